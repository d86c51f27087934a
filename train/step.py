"""One training step as a pure function: features in, new state and metrics out.

Gradients are taken of the trained tree alone; frozen weights are a plain argument.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig
from dynaip_jax.data.samples import Batch
from dynaip_jax.families.base import Family
from dynaip_jax.layers.compute import Compute
from dynaip_jax.types import TextCondition
from train.config import OptimConfig

TIME_BUCKETS = 4


class Encoded(NamedTuple):
    """What the frozen encoders make of a batch: nothing of it depends on chance."""

    moments: jax.Array  # [b, h, w, 2z] of the VAE
    states: jax.Array  # [b, t, c] of T5
    pooled: jax.Array | None  # [b, c] of CLIP text
    levels: tuple[jax.Array, ...] | None  # three of [b, s, m, c] of CLIP vision; None without an adapter


class Features(NamedTuple):
    """What the trained parts see of a batch; made by `features_of`."""

    latents: jax.Array  # [b, c, h, w]
    noise: jax.Array  # [b, c, h, w]
    t: jax.Array  # [b]
    states: jax.Array  # [b, t, c] of T5
    pooled: jax.Array | None  # [b, c] of CLIP text
    levels: tuple[jax.Array, ...] | None  # three of [b, s, m, c] of CLIP vision; None without an adapter
    keep_image: jax.Array  # [b]: 0 where the image prompt is dropped
    granularity: jax.Array | None = (
        None  # [b, 3]: weights of the levels, zeros where the router decides; None: everywhere
    )


class TrainState(NamedTuple):
    """All that changes in training. `params` has "adapter", "transformer" or both, float32; `ema` its average."""

    step: jax.Array  # int32, steps done
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: Any


@dataclass(frozen=True)
class Recipe:
    """The constants of a step (hashable: it is a static argument)."""

    family: Family
    adapter: DynaIPConfig | None
    adapter_compute: Compute
    optim: OptimConfig
    accumulate: int
    guidance: float
    random_granularity: float
    time_mean: float
    time_std: float
    fixed_noise: bool
    seed: int

    def key(self, step: jax.Array, purpose: int) -> jax.Array:
        """The random key of a step; the same for all steps with `fixed_noise`."""
        key = jax.random.fold_in(jax.random.key(self.seed), purpose)
        return key if self.fixed_noise else jax.random.fold_in(key, step)


def optimizer(c: OptimConfig) -> optax.GradientTransformation:
    """Clipping, AdamW or Muon, warmup and cosine."""

    def schedule(rate: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, rate, c.warmup, max(c.decay_steps, c.warmup + 1), rate * c.final)

    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    if c.kind == "adamw":
        inner = optax.adamw(schedule(c.rate), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=decayed)
    else:
        inner = optax.contrib.muon(
            schedule(c.muon_rate), adam_learning_rate=schedule(c.rate), adam_b1=c.b1, adam_b2=c.b2,
            weight_decay=c.weight_decay, adam_weight_decay=c.weight_decay, weight_decay_mask=decayed,
            muon_weight_dimension_numbers=_matrices,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(c.clip), inner)


MATRICES = (  # parameter name -> axes that go in and axes that come out; the others count matrices. The first match wins.
    (r"blocks.*(attn_proj|attn_out).*kernel", (1, 2), (3,)),
    (r"blocks.*(qkv|mod).*kernel", (1,), (3, 4)),
    (r"blocks.*kernel", (1,), (2,)),
    (r"'(double|single)'.*'(key|value)'", (1,), (2, 3)),
    (r"expert_.*kernel", (0,), (1,)),
)


def _matrices(params: Any) -> Any:
    """For each parameter what `MATRICES` says of it, None if nothing."""

    def axes(path: Any, x: jax.Array) -> Any:
        name = jax.tree_util.keystr(path)
        for pattern, into, out in MATRICES:
            if re.search(pattern, name):
                return optax.contrib.MuonDimensionNumbers(into, tuple(axis for axis in out if axis < x.ndim))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def init_state(optim: OptimConfig, params: dict[str, Any]) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer(optim).init(params))


def encode(recipe: Recipe, params: dict[str, Any], batch: Batch) -> Encoded:
    """The frozen encoders over a batch of pictures and token ids."""
    family = recipe.family
    levels = None
    if recipe.adapter is not None:
        b, s = batch.reference.shape[:2]
        pixels = batch.reference.reshape(b * s, *batch.reference.shape[2:])
        states = family.vision(params["clip_vision"], pixels, recipe.adapter.hmoe.levels)
        levels = tuple(x.reshape(b, s, *x.shape[1:]) for x in states)
    text = family.encode_text(params, batch.ids)
    return Encoded(family.encode(params["vae"], batch.target), text.states, text.pooled, levels)


def features_of(recipe: Recipe, params: dict[str, Any], batch: Any, step: jax.Array) -> Features:
    """The features of a `Batch` or `CachedBatch` at `step`: encoded here or read from a cache. All that chance decides in a
    step is drawn here, apart from the step itself: latents from the VAE's posterior, noise, times.
    """
    if isinstance(batch, Batch):
        encoded = encode(recipe, params, batch)
    else:
        encoded = Encoded(batch.moments, batch.states, batch.pooled, batch.levels)
    b, h, w, z = encoded.moments.shape
    posterior_key, noise_key, time_key = (recipe.key(step, purpose) for purpose in (1, 2, 3))
    shape = (b, z // 2, h, w)
    moments = encoded.moments.astype(jnp.float32)
    factor = recipe.family.shift(recipe.family.tokens((h, w)))
    return Features(
        latents=recipe.family.latents(moments, jax.random.normal(posterior_key, shape)),
        noise=jax.random.normal(noise_key, shape),
        t=flow.sample_times(time_key, b, factor, mean=recipe.time_mean, std=recipe.time_std),
        states=encoded.states,
        pooled=encoded.pooled,
        levels=encoded.levels,
        keep_image=batch.keep_image,
        granularity=_granularity(recipe, step, b)
        if recipe.adapter is not None and recipe.random_granularity > 0
        else None,
    )


def _granularity(recipe: Recipe, step: jax.Array, b: int) -> jax.Array:
    """Random weights `[b, 3]`, often mostly of one level, for a share of the samples; zeros for the others."""
    weights_key, share_key = jax.random.split(recipe.key(step, 4))
    weights = jax.random.dirichlet(weights_key, jnp.full(3, 0.5), (b,))
    return weights * (jax.random.uniform(share_key, (b, 1)) < recipe.random_granularity)


def loss(recipe: Recipe, params: dict[str, Any], features: Features) -> tuple[jax.Array, dict[str, Any]]:
    """Mean squared error of the velocity, and sums for the metrics. `params`: trained and frozen together."""
    f, family = features, recipe.family
    b, _, h, w = f.latents.shape
    x, target = flow.interpolate(family.pack(f.latents), family.pack(f.noise), f.t)
    prompt, sums = None, {}
    if recipe.adapter is not None:
        adapter: Any = DynaIP(recipe.adapter, recipe.adapter_compute)
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
        guidance=jnp.full(b, recipe.guidance) if family.takes_guidance else None,
        image_prompt=prompt,
    )
    per_sample = jnp.mean((velocity - target) ** 2, axis=(1, 2))
    bucket = jax.nn.one_hot(jnp.minimum((f.t * TIME_BUCKETS).astype(int), TIME_BUCKETS - 1), TIME_BUCKETS)
    sums |= dict(loss=per_sample.sum(), bucket_loss=per_sample @ bucket, bucket_count=bucket.sum(axis=0))
    return per_sample.mean(), sums


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def updated(optim: OptimConfig, state: TrainState, grads: Any) -> TrainState:
    """The state after one optimizer step along `grads`."""
    updates, opt_state = optimizer(optim).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    done = state.step.astype(jnp.float32)
    decay = jnp.minimum(optim.ema, (1 + done) / (10 + done))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return TrainState(state.step + 1, params, ema, opt_state)


def train_step(
    recipe: Recipe, state: TrainState, frozen: dict[str, Any], features: Features
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step over a batch, in `recipe.accumulate` micro-batches.

    `frozen`: the parameters that are not trained. Noise and times come with the features, so that accumulation changes no
    number but by rounding. Metrics: loss, loss by quarter of t (NaN where a quarter is empty),
    gradient norm, routing weights, RMS of keys and values.
    """
    b = features.latents.shape[0]

    def grads_of(part: Features) -> tuple[Any, dict[str, Any]]:
        grads, sums = jax.grad(lambda p: loss(recipe, frozen | p, part), has_aux=True)(state.params)
        return grads, sums

    n = recipe.accumulate
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

    new = updated(recipe.optim, state, grads)
    metrics = dict(
        loss=sums["loss"] / b,
        grad_norm=optax.global_norm(grads),
        loss_by_time=sums["bucket_loss"] / sums["bucket_count"],
    )
    metrics |= {k: sums[k] / b for k in ("routing", "key_rms", "value_rms") if k in sums}
    return new, metrics
