"""`import dynaip_jax`: a few names, imported when they are used."""

import subprocess
import sys

import pytest

import dynaip_jax


def test_names_are_those_of_their_modules():
    from dynaip_jax.errors import UserError
    from dynaip_jax.images import read_settings
    from dynaip_jax.runtime.compiling import keep_compiled
    from dynaip_jax.sampling.options import SampleOptions
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    assert dynaip_jax.DynaIPPipeline is DynaIPPipeline and dynaip_jax.SampleOptions is SampleOptions
    assert dynaip_jax.UserError is UserError and dynaip_jax.read_settings is read_settings
    assert dynaip_jax.keep_compiled is keep_compiled
    assert set(dynaip_jax.__all__) <= set(dir(dynaip_jax))
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        dynaip_jax.Pipeline  # noqa: B018


def test_nothing_heavy_is_imported_before():
    program = """if True:
        import sys, dynaip_jax
        dynaip_jax.SampleOptions, dynaip_jax.UserError
        print(*sorted({"jax", "numpy", "PIL", "flax", "tyro", "transformers"} & sys.modules.keys()))
        from dynaip_jax import *
        print("jax" in sys.modules, DynaIPPipeline.__name__)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["", "True DynaIPPipeline"]
