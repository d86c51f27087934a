"""Weights in the memory layout that their program wants.

A jitted function takes its arguments in the usual layout and copies them into its own when it begins. On TPUs that is half of
FLUX.1's weights (kernels of q, k, v and of modulation, whose parts the compiler wants side by side; docs/performance.md). Here the
compiler chooses, and the weights stay as it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from threading import Lock
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from dynaip_jax.runtime.programs import options_for


def lower(
    function: Callable[..., Any],
    config: Hashable,
    params: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> jax.stages.Lowered:
    """`function(config, params, *args, **options)` lowered for `params` in any layout; only their shapes and shardings are looked at.
    What `compile()` makes of it is called with (params in its layouts, (args, options))."""
    leaves, structure = jax.tree.flatten(params)
    jitted = _jitted(function, config, structure, tuple(x.sharding for x in leaves))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
    return jitted.lower(jax.tree.unflatten(structure, shapes), (args, options))


class Arranged:
    """Parameters in the layouts that their program wants. Threads may share one; arrays that others hold stay as they are."""

    def __init__(self, params: Any):
        self._leaves, self._structure = jax.tree.flatten(params)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in self._leaves]
        self._shapes, self._lock = jax.tree.unflatten(self._structure, shapes), Lock()
        self._compiled: list[dict[str, Any]] = []  # facts of programs, the last at the end

    @property
    def params(self) -> Any:
        """The tree, in the layouts of the last program."""
        with self._lock:
            return jax.tree.unflatten(self._structure, self._leaves)

    def news(self, facts: dict[str, Any]) -> str | None:
        """What makes the next program, of which `facts` tell all that its shapes depend on, another than the last: "" for the first
        one, such as "pictures 4 -> 2" later, None if it has been compiled before."""
        with self._lock:
            if facts in self._compiled:
                return None
            last = self._compiled[-1] if self._compiled else facts
            self._compiled.append(facts)
        return ", ".join(f"{name} {last[name]} -> {value}" for name, value in facts.items() if last[name] != value)

    def program(
        self, function: Callable[..., Any], config: Hashable, args: tuple[Any, ...], options: dict[str, Any]
    ) -> jax.stages.Compiled:
        """What `run` calls, compiled for these shapes."""
        return lower(function, config, self._shapes, args, options).compile()

    def run(
        self,
        function: Callable[..., Any],
        config: Hashable,
        args: tuple[Any, ...],
        options: dict[str, Any],
        program: jax.stages.Compiled | None = None,
    ) -> Any:
        """`function(config, params, *args, **options)`; `program`: what compiles it, if that has been done."""
        program = program or self.program(function, config, args, options)
        (formats, _), _ = program.input_formats
        with self._lock:
            for n, wanted in enumerate(jax.tree.leaves(formats)):  # one by one: no more than one array is there twice
                if self._leaves[n].format != wanted:
                    self._leaves[n] = jax.device_put(self._leaves[n], wanted)
            params = jax.tree.unflatten(self._structure, self._leaves)
        return program(params, (args, options))


@lru_cache
def _jitted(function: Callable[..., Any], config: Hashable, structure: Any, shardings: tuple) -> Any:
    """One object for the same arguments, so that JAX finds again what it has compiled."""

    def run(params: Any, rest: Any) -> Any:
        args, options = rest
        return function(config, params, *args, **options)

    run.__name__ = function.__name__  # of the program
    formats = jax.tree.unflatten(structure, [Format(Layout.AUTO, x) for x in shardings])
    where = next(iter(shardings[0].device_set)).platform
    return jax.jit(run, in_shardings=(formats, None), compiler_options=options_for(where))
