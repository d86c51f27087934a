"""The one road from conditions to pictures: under the pipeline, evaluation and the trainer's sample grids."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynaip_jax import flow
from dynaip_jax.errors import OutOfMemory
from dynaip_jax.families.base import Family
from dynaip_jax.runtime import layouts, memory
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.sampling.conditions import Conditions
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.progress import SILENT, Progress, step_done, watching
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
    shown: Progress = SILENT,
) -> Made:
    """The pictures of initial latents `noise` `[b, c, h, w]`. `options`: as from `SampleOptions.filled`; `shown`: what is told of it.

    Raises `OutOfMemory` if the program needs more than is free, as far as the system says; JAX raises its own error if it does not.
    """
    family, steps = parts.family, options.steps
    assert steps is not None, "options are filled first"
    if options.merge is not None:
        family = family.with_injection(dataclasses.replace(family.injection, merge=options.merge))
    times = family.times(steps, family.tokens(noise.shape))
    with on_mesh(parts.mesh), contextlib.ExitStack() as stack:
        args = (jnp.asarray(noise), conditions.text, conditions.image_prompt, jnp.asarray(times))
        scalars = dict(guidance=options.guidance, true_cfg=options.true_cfg, cache_threshold=options.cache_threshold)
        dynamic = {name: None if x is None else jnp.float32(x) for name, x in scalars.items()}
        dynamic["window"] = jnp.array([options.image_start, options.image_end], jnp.float32)
        dynamic["ticket"] = jnp.int32(0) if shown.counts else None
        loop = denoising_loop if shown.view is None else viewed_loop
        facts = dict(progress=shown.counts, viewed=shown.view is not None)
        news = parts.transformer.news(_facts(conditions, noise, options) | facts)
        with contextlib.nullcontext() if news is None else shown.doing(f"compiling{news and f' again: {news}'}"):
            program = parts.transformer.program(loop, family, args, dynamic)
        memory.check_fits(program)
        ticket = stack.enter_context(watching(stack.enter_context(shown.denoising(steps)), shown.view))
        dynamic["ticket"] = None if ticket is None else jnp.int32(ticket)
        latents, reused = wait(parts.transformer.run(loop, family, args, dynamic, program))
    with on_mesh(parts.mesh), shown.doing("decoding"):
        return Made(decoded(family, parts.vae, latents), None if reused is None else int(reused))


def decoded(family: Family, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """Latents `[b, c, h, w]` -> pictures `[b, H, W, 3]`, all at once or, where the memory does not hold that, in halves."""
    try:
        with memory.watched():
            return wait(decode(family, params, latents))
    except OutOfMemory:
        if len(latents) == 1:
            raise
    half = len(latents) // 2
    return jnp.concatenate([decoded(family, params, part) for part in (latents[:half], latents[half:])])


def wait(arrays: Any) -> Any:
    """`arrays`, once they are there. Ctrl-C ends the waiting, as it would not if JAX did it."""
    pause = 1e-4
    while not all(x.is_ready() for x in jax.tree.leaves(arrays)):
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return jax.block_until_ready(arrays)  # raises what went wrong


def _facts(conditions: Conditions, noise: Any, options: SampleOptions) -> dict[str, Any]:
    """What the shapes of the denoising loop depend on, by names that a user knows."""
    prompt = conditions.image_prompt
    given = {} if prompt is None else dict(words=prompt.words, masks=prompt.region)
    return dict(
        pictures=len(noise),
        height=options.height,
        width=options.width,
        steps=options.steps,
        prompts=len(conditions.text.states),
        native_references=jax.tree.map(jnp.shape, conditions.text.references),
        references=0 if prompt is None else prompt.image_gain.shape[-1],
        regions=next((name for name, value in given.items() if value is not None), "none"),
        merge=options.merge,
        negative=options.true_cfg is not None,
        cache=options.cache_threshold is not None,
        guidance=options.guidance is not None,
    )


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
    viewed: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The whole denoising loop: noise `[b, c, h, w]` -> latents `[b, c, h, w]`, float32, and with a cache the number of steps that
    took the blocks' work from it.

    `text`: a row (the prompt), or two (prompt, negative prompt) with `true_cfg`: v = v_neg + true_cfg (v - v_neg), where the
    negative pass has no image prompt; either for all pictures, or b rows of each for a prompt a picture. `image_prompt` is
    shared by all of the batch, or one a picture; it acts where window[0] <= step / steps < window[1].
    `times` `[steps + 1]` as from `Family.times`. `cache_threshold`: see `layers.step_cache`; None: every step runs all blocks.
    `ticket`: of `progress.watching`; None: no step is reported; `viewed`: with latents.
    """
    b, _, h, w = noise.shape
    branches = 1 if true_cfg is None else 2
    text = jax.tree.map(lambda x: jnp.repeat(x, branches * b // len(x), axis=0), text)
    if image_prompt is not None and branches == 2:
        on = jnp.repeat(jnp.array([1.0, 0.0]), b)[:, None]
        image_prompt = image_prompt.tiled(branches).scaled(on)
    guidance = None if guidance is None else jnp.broadcast_to(guidance, (branches * b,))
    cache, steps = None, len(times) - 1
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
        v = v if true_cfg is None else v[b:] + true_cfg * (v[:b] - v[b:])
        if ticket is not None:
            latents = (family.unpack(y, h, w) for y in (x, x - t * v)) if viewed else ()
            jax.debug.callback(step_done, ticket, *([jnp.round(done * steps)] if viewed else []), *latents)
        return v, cache

    tokens, cache = flow.euler(velocity, family.pack(noise), times, cache)
    return family.unpack(tokens, h, w), None if cache is None else cache.reused


def viewed_loop(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array | None]:
    """`denoising_loop` whose steps are reported with their latents, and with the clean ones as they are expected there."""
    return denoising_loop(*args, **options, viewed=True)


@partial(Quick, static_argnums=0)
def decode(family: Family, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """Latents `[b, c, h, w]` -> pictures `[b, H, W, 3]`, about [-1, 1]."""
    return family.decode(params, latents)
