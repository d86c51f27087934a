"""Weights in the memory layout that their program wants.

A jitted function takes its arguments in the usual layout and copies them into its own when it begins. On TPUs that is half of
FLUX.1's weights (kernels of q, k, v and of modulation, whose parts the compiler wants side by side; docs/performance.md). Here the
compiler chooses, and the weights stay as it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import jax
from jax.experimental.layout import Format, Layout


def lower(
    function: Callable[..., Any],
    config: Hashable,
    params: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    **static: Hashable,
) -> jax.stages.Lowered:
    """`function(config, params, *args, **options, **static)` lowered for `params` in any layout; only their shapes and shardings are
    looked at. What `compile()` makes of it is called with (params as from `arranged`, (args, options))."""
    leaves, structure = jax.tree.flatten(params)
    jitted = _jitted(function, config, tuple(static.items()), structure, tuple(x.sharding for x in leaves))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
    return jitted.lower(jax.tree.unflatten(structure, shapes), (args, options))


def arranged(program: jax.stages.Compiled, params: Any) -> Any:
    """`params` in the layouts in which `program`, as from `lower`, takes them. Arrays that are copied for it are given up."""
    (formats, _), _ = program.input_formats
    return jax.tree.map(lambda x, f: x if x.format == f else jax.device_put(x, f, donate=True), params, formats)


@lru_cache
def _jitted(function: Callable[..., Any], config: Hashable, static: tuple, structure: Any, shardings: tuple) -> Any:
    """One object for the same arguments, so that JAX finds again what it has compiled."""

    def run(params: Any, rest: Any) -> Any:
        args, options = rest
        return function(config, params, *args, **options, **dict(static))

    run.__name__ = function.__name__  # of the program
    formats = jax.tree.unflatten(structure, [Format(Layout.AUTO, x) for x in shardings])
    return jax.jit(run, in_shardings=(formats, None))
