"""The one road from conditions to pictures: under the pipeline, evaluation and the trainer's sample grids."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynaip_jax import flow
from dynaip_jax.families.base import Family
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.compiling import QUICK
from dynaip_jax.sampling import progress
from dynaip_jax.sampling.conditions import Conditions
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.types import ImagePrompt, TextCondition


class Parts(NamedTuple):
    """What makes pictures: the `transformer`'s weights, the autoencoder's (`vae`), and the mesh that shares the work, if any."""

    family: Family
    transformer: layouts.Arranged
    vae: Any
    mesh: Mesh | None = None


class Made(NamedTuple):
    """`pictures` float32 `[b, H, W, 3]`, about [-1, 1]; `reused`: steps taken from the cache, None without one."""

    pictures: jax.Array
    reused: int | None


def generate(
    parts: Parts,
    conditions: Conditions,
    noise: np.ndarray | jax.Array,
    options: SampleOptions,
    watcher: progress.Watcher | None = None,
) -> Made:
    """The pictures of initial latents `noise` `[b, c, h, w]`. `options`: as from `SampleOptions.filled`; `watcher`: called at each
    step."""
    family, steps = parts.family, options.steps
    assert steps is not None, "options are filled first"
    if options.merge is not None:
        family = family.with_injection(dataclasses.replace(family.injection, merge=options.merge))
    times = family.times(steps, family.tokens(noise.shape))
    with on_mesh(parts.mesh), progress.watching(watcher) as ticket:
        args = (jnp.asarray(noise), conditions.text, conditions.image_prompt, jnp.asarray(times))
        scalars = dict(guidance=options.guidance, true_cfg=options.true_cfg, cache_threshold=options.cache_threshold)
        dynamic = {name: None if x is None else jnp.float32(x) for name, x in scalars.items()}
        dynamic["window"] = jnp.array([options.image_start, options.image_end], jnp.float32)
        dynamic["ticket"] = None if ticket is None else jnp.int32(ticket)
        latents, reused = parts.transformer.run(denoising_loop, family, args, dynamic)
        latents.block_until_ready()
    with on_mesh(parts.mesh):
        return Made(decode(family, parts.vae, latents), None if reused is None else int(reused))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The block's programs run on `mesh`."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def denoising_loop(
    family: Family,
    params: Any,
    noise: jax.Array,
    text: TextCondition,
    image_prompt: ImagePrompt | None,
    times: jax.Array,
    *,
    guidance: jax.Array | None,
    true_cfg: jax.Array | None,
    window: jax.Array,
    cache_threshold: jax.Array | None = None,
    ticket: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The whole denoising loop: noise `[b, c, h, w]` -> latents `[b, c, h, w]`, float32, and with a cache the number of steps that
    took the blocks' work from it.

    `text`: a row (the prompt), or two (prompt, negative prompt) with `true_cfg`: v = v_neg + true_cfg (v - v_neg), where the
    negative pass has no image prompt; either for all pictures, or b rows of each for a prompt a picture. `image_prompt` is
    shared by all of the batch, or one a picture; it acts where window[0] <= step / steps < window[1].
    `times` `[steps + 1]` as from `Family.times`. `cache_threshold`: see `layers.step_cache`; None: every step runs all blocks.
    `ticket`: of `progress.watching`; None: no step is reported.
    """
    b, _, h, w = noise.shape
    branches = 1 if true_cfg is None else 2
    text = jax.tree.map(lambda x: jnp.repeat(x, branches * b // len(x), axis=0), text)
    if image_prompt is not None and branches == 2:
        on = jnp.repeat(jnp.array([1.0, 0.0]), b)[:, None]
        image_prompt = image_prompt.tiled(branches).scaled(on)
    guidance = None if guidance is None else jnp.broadcast_to(guidance, (branches * b,))
    cache = None
    if cache_threshold is not None:
        cache = family.step_cache(branches * b, family.tokens(noise.shape), cache_threshold)

    def velocity(x, t, done, cache):
        prompt = image_prompt
        if prompt is not None:
            prompt = prompt.scaled(((window[0] <= done) & (done < window[1])).astype(jnp.float32))
        tokens, now = jnp.concatenate([x] * branches), jnp.full(branches * b, t)
        v = family.velocity(params, tokens, now, text, (h, w), guidance=guidance, image_prompt=prompt, cache=cache)
        if cache is not None:
            v, cache = v
        if ticket is not None:
            jax.debug.callback(progress.step_done, ticket)
        return v if true_cfg is None else v[b:] + true_cfg * (v[:b] - v[b:]), cache

    tokens, cache = flow.euler(velocity, family.pack(noise), times, cache)
    return family.unpack(tokens, h, w), None if cache is None else cache.reused


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def decode(family: Family, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """Latents `[b, c, h, w]` -> pictures `[b, H, W, 3]`, about [-1, 1]."""
    return family.decode(params, latents)
