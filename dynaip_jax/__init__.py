"""DynaIP (arXiv 2512.09814) in JAX/Flax: subject personalisation for multimodal diffusion transformers.

The names below are imported when they are first used, so that `import dynaip_jax` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynaip_jax.version import __version__

if TYPE_CHECKING:
    from dynaip_jax.errors import UserError
    from dynaip_jax.images import read_settings
    from dynaip_jax.runtime.compiling import keep_compiled
    from dynaip_jax.sampling.options import SampleOptions
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

__all__ = ["DynaIPPipeline", "SampleOptions", "UserError", "__version__", "keep_compiled", "read_settings"]


def __getattr__(name: str) -> Any:
    match name:
        case "DynaIPPipeline":
            from dynaip_jax.sampling.pipeline import DynaIPPipeline

            return DynaIPPipeline
        case "SampleOptions":
            from dynaip_jax.sampling.options import SampleOptions

            return SampleOptions
        case "UserError":
            from dynaip_jax.errors import UserError

            return UserError
        case "keep_compiled":
            from dynaip_jax.runtime.compiling import keep_compiled

            return keep_compiled
        case "read_settings":
            from dynaip_jax.images import read_settings

            return read_settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
