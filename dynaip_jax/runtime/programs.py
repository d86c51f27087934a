"""How programs are compiled: with how much effort, and without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import jax

from dynaip_jax.runtime.sharding import platform

# `compiler_options` of jax.jit: at FLUX.1's size XLA's TPU compiler takes 122 s of a core for the VAE's decoder, with these 11 s, and 180
# and 16 s for the features of a training step (docs/performance.md)
QUICK = dict(exec_time_optimization_effort=-1.0)
# For a CPU, XLA takes a block's bfloat16 weights out of their stack as float32, and would do so for all blocks at once before it
# begins: twice the memory of the weights again
IN_TURN = dict(xla_disable_hlo_passes="while-loop-invariant-code-motion")


def options_for(where: str) -> dict[str, Any]:
    """`compiler_options` of jax.jit for a program that goes through stacked blocks `where` it runs, "cpu", "gpu" or "tpu"."""
    return IN_TURN if where == "cpu" else {}


class Quick:
    """`jax.jit(function, **options)`, compiled with little effort for where it runs: for what is a small part of the work."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        update_wrapper(self, function)
        self._cpu = jax.jit(function, **options, compiler_options=QUICK | options_for("cpu"))
        self._other = jax.jit(function, **options, compiler_options=QUICK)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._here()(*args, **options)

    def lower(self, *args: Any, **options: Any) -> jax.stages.Lowered:
        """As that of what `jax.jit` returns."""
        return self._here().lower(*args, **options)

    def eval_shape(self, *args: Any, **options: Any) -> Any:
        """As that of what `jax.jit` returns."""
        return self._here().eval_shape(*args, **options)

    def _here(self) -> Any:
        return self._cpu if platform() == "cpu" else self._other
