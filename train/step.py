"""One training step as a pure function: features in, new state and metrics out.

Gradients are taken of the trained tree alone; frozen weights are a plain argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIP
from dynaip_jax.data.samples import Batch
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.runtime.sharding import batch_sharding
from dynaip_jax.types import TextCondition
from train.constants import Constants
from train.state import TrainState, updated

TIME_BUCKETS = 4


class Encoded(NamedTuple):
    """What the frozen encoders make of a batch: nothing of it depends on chance."""

    moments: jax.Array  # [b, h, w, 2z] of the VAE
    states: jax.Array  # [b, t, c] of the prompt
    pooled: jax.Array | None  # [b, c] of the prompt; None where the family has none
    levels: tuple[jax.Array, ...] | None  # three of [b, s, m, c] of CLIP vision; None without an adapter


class Features(NamedTuple):
    """What the trained parts see of a batch; made by `features_of`."""

    latents: jax.Array  # [b, c, h, w]
    noise: jax.Array  # [b, c, h, w]
    t: jax.Array  # [b]
    states: jax.Array  # [b, t, c] of the prompt
    pooled: jax.Array | None  # [b, c] of the prompt; None where the family has none
    levels: tuple[jax.Array, ...] | None  # three of [b, s, m, c] of CLIP vision; None without an adapter
    keep_image: jax.Array  # [b]: 0 where the image prompt is dropped
    granularity: jax.Array | None = (
        None  # [b, 3]: weights of the levels, zeros where the router decides; None: everywhere
    )


def encode(constants: Constants, params: dict[str, Any], batch: Batch) -> Encoded:
    """The frozen encoders over a batch of pictures and token ids."""
    family = constants.family
    levels = None
    if constants.adapter is not None:
        b, s = batch.reference.shape[:2]
        pixels = batch.reference.reshape(b * s, *batch.reference.shape[2:])
        states = family.vision(params["clip_vision"], pixels, constants.adapter.hmoe.levels)
        levels = tuple(x.reshape(b, s, *x.shape[1:]) for x in states)
    text = family.encode_text(params, batch.ids)
    return Encoded(family.encode(params["vae"], batch.target), text.states, text.pooled, levels)


def features_of(constants: Constants, params: dict[str, Any], batch: Any, step: jax.Array) -> Features:
    """The features of a `Batch` or `CachedBatch` at `step`: encoded here or read from a cache. All that chance decides in a
    step is drawn here, apart from the step itself: latents from the VAE's posterior, noise, times.
    """
    if isinstance(batch, Batch):
        encoded = encode(constants, params, batch)
    else:
        encoded = Encoded(batch.moments, batch.states, batch.pooled, batch.levels)
    b, h, w, z = encoded.moments.shape
    posterior_key, noise_key, time_key = (constants.key(step, purpose) for purpose in (1, 2, 3))
    shape = (b, z // 2, h, w)
    moments = encoded.moments.astype(jnp.float32)
    factor = constants.family.shift(constants.family.tokens((h, w)))
    return Features(
        latents=constants.family.latents(moments, jax.random.normal(posterior_key, shape)),
        noise=jax.random.normal(noise_key, shape),
        t=flow.sample_times(time_key, b, factor, mean=constants.time_mean, std=constants.time_std),
        states=encoded.states,
        pooled=encoded.pooled,
        levels=encoded.levels,
        keep_image=batch.keep_image,
        granularity=_granularity(constants, step, b)
        if constants.adapter is not None and constants.random_granularity > 0
        else None,
    )


def _granularity(constants: Constants, step: jax.Array, b: int) -> jax.Array:
    """Random weights `[b, 3]`, often mostly of one level, for a share of the samples; zeros for the others."""
    weights_key, share_key = jax.random.split(constants.key(step, 4))
    weights = jax.random.dirichlet(weights_key, jnp.full(3, 0.5), (b,))
    return weights * (jax.random.uniform(share_key, (b, 1)) < constants.random_granularity)


def loss(constants: Constants, params: dict[str, Any], features: Features) -> tuple[jax.Array, dict[str, Any]]:
    """Mean squared error of the velocity, and sums for the metrics. `params`: trained and frozen together."""
    f, family = features, constants.family
    b, _, h, w = f.latents.shape
    x, target = flow.interpolate(family.pack(f.latents), family.pack(f.noise), f.t)
    prompt, sums = None, {}
    if constants.adapter is not None:
        adapter: Any = DynaIP(constants.adapter, constants.adapter_compute)
        prompt, weights = adapter.apply(
            {"params": params["adapter"]},
            f.levels,
            granularity=None if f.granularity is None else f.granularity[:, None],
        )
        prompt = prompt.scaled(f.keep_image[None, :, None])
        sums["routing"] = weights.reshape(b, -1, 3).mean(axis=1).sum(axis=0)
        sums["key_rms"] = b * _rms(prompt.double.k)
        sums["value_rms"] = b * _rms(prompt.double.v)
    velocity = family.velocity(
        params["transformer"],
        x,
        f.t,
        TextCondition(f.states, f.pooled),
        (h, w),
        guidance=jnp.full(b, constants.guidance) if family.takes_guidance else None,
        image_prompt=prompt,
    )
    per_sample = jnp.mean((velocity - target) ** 2, axis=(1, 2))
    bucket = jax.nn.one_hot(jnp.minimum((f.t * TIME_BUCKETS).astype(int), TIME_BUCKETS - 1), TIME_BUCKETS)
    sums |= dict(loss=per_sample.sum(), bucket_loss=per_sample @ bucket, bucket_count=bucket.sum(axis=0))
    return per_sample.mean(), sums


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def train_step(
    constants: Constants, state: TrainState, frozen: dict[str, Any], features: Features
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step over a batch, in `constants.accumulate` micro-batches.

    `frozen`: the parameters that are not trained. Noise and times come with the features, so that accumulation changes no
    number but by rounding. Metrics: loss, loss by quarter of t (NaN where a quarter is empty), norms of gradient, parameters and
    their change, routing weights, RMS of keys and values.
    """
    b = features.latents.shape[0]

    def grads_of(part: Features) -> tuple[Any, dict[str, Any]]:
        grads, sums = jax.grad(lambda p: loss(constants, frozen | p, part), has_aux=True)(state.params)
        return grads, sums

    n = constants.accumulate
    if n == 1:
        grads, sums = grads_of(features)
    else:
        parts = jax.tree.map(lambda x: x.reshape(b // n, n, *x.shape[1:]).swapaxes(0, 1), features)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grads_of, jax.tree.map(lambda x: x[0], parts))
        )
        (grads, sums), _ = jax.lax.scan(
            lambda acc, part: (jax.tree.map(jnp.add, acc, grads_of(part)), None), zero, parts
        )
        grads = jax.tree.map(lambda g: g / n, grads)

    new = updated(constants.optim, state, grads, constants.decayed, constants.matrices)
    metrics = dict(
        loss=sums["loss"] / b,
        grad_norm=optax.tree.norm(grads),
        param_norm=optax.tree.norm(new.params),
        update_norm=optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params)),
        loss_by_time=sums["bucket_loss"] / sums["bucket_count"],
    )
    metrics |= {k: sums[k] / b for k in ("routing", "key_rms", "value_rms") if k in sums}
    return new, metrics


def jitted(mesh: Mesh, places: TrainState) -> tuple[Any, Any]:
    """`features_of` and `train_step` for a mesh, and a state with the shardings `places`; to be called, or lowered, with the mesh
    set (`jax.set_mesh`)."""
    features_fn = Quick(features_of, static_argnums=0, out_shardings=batch_sharding(mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step_fn = jax.jit(train_step, static_argnums=0, donate_argnums=1, out_shardings=(places, everywhere))
    return features_fn, step_fn
