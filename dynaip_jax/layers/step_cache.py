"""First Block Cache: steps in which little changes run one block of all.

Source: ParaAttention, "First Block Cache", as in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class StepCache(NamedTuple):
    """Handed from one sampling step to the next: the first block shows how much has changed, and where that is little, what all the
    others add is taken from before.

    `threshold`: of the mean absolute change of what the first block adds, relative to its mean absolute value; `first`, `rest`
    `[b, i, c]`: what the first and what the other blocks added to image rows in the last step that ran them all; `reused`:
    int32, steps that did not. One decision for the whole batch.
    """

    threshold: jax.Array
    first: jax.Array
    rest: jax.Array
    reused: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int], dtype: DTypeLike, threshold: jax.Array) -> StepCache:
        """Before the first step, which runs all blocks. `shape`: of the image rows, `[b, i, c]`."""
        nothing = jnp.zeros(shape, dtype)
        return cls(threshold, nothing, nothing, jnp.zeros((), jnp.int32))


def cached(
    module: nn.Module,
    rows: jax.Array,
    first_block: Callable[[Any], jax.Array],
    all_blocks: Callable[[Any], jax.Array],
    cache: StepCache,
) -> tuple[jax.Array, StepCache]:
    """Image rows `[b, i, c]` after all blocks of `module`, or after the first with what the others added before; and the cache that
    follows. `rows`: before the blocks; the two functions give the image rows after the first block and after all."""
    after = first_block(module)
    first = after - rows

    def size(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(x.astype(jnp.float32)))

    def reuse(module: nn.Module) -> tuple[jax.Array, StepCache]:
        return after + cache.rest, cache._replace(reused=cache.reused + 1)

    def run(module: nn.Module) -> tuple[jax.Array, StepCache]:
        whole = all_blocks(module)
        return whole, cache._replace(first=first, rest=whole - after)

    return nn.cond(size(first - cache.first) <= cache.threshold * size(cache.first), reuse, run, module)


def first_of(tree: Any) -> Any:
    """The first entry of stacked arrays, still stacked."""
    return jax.tree.map(lambda x: x[:1], tree)


def with_first_block(run: Callable[[Any], jax.Array], module: nn.Module) -> jax.Array:
    """`run(module)`, where `module`'s stacked "double_blocks" are the first alone."""

    def slim(variables: Any) -> Any:
        params = variables["params"]
        return {"params": {**params, "double_blocks": first_of(params["double_blocks"])}}

    return nn.map_variables(run, "params", trans_in_fn=slim)(module)
