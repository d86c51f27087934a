"""FLUX.1, the multimodal diffusion transformer (MM-DiT), with an optional image prompt.

Source: black-forest-labs/flux `model.py` and `modules/layers.py`; parameter names follow that layout, with two changes: the
blocks of a kind are stacked (leading "layers" axis), and the fused `linear1`/`linear2` of the single blocks are kept as
their halves (`qkv` + `mlp_in`, `attn_out` + `mlp_out`), so that heads and MLP width shard separately.
Text rows come before image rows wherever the two are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dynaip_jax.layers import attention as ops
from dynaip_jax.layers.basic import LayerNorm, RMSNorm, linear, scanned
from dynaip_jax.layers.kernels import KERNELS
from dynaip_jax.runtime.sharding import HEADS, ROWS, WIDE, constrain
from dynaip_jax.types import KV, MERGES, QUERIES, WEIGHTS, ImagePrompt


class BlockPrompt(NamedTuple):
    """One block's share of an `ImagePrompt`: keys and values `[b, s, m, h, d]`, gains `[b, s]`."""

    kv: KV
    image_gain: jax.Array
    text_gain: jax.Array


class Shared(NamedTuple):
    """What every block reads: conditioning vector `[b, c]`, rotary table; regions `[b, s, i]` or None; to find the regions in
    the block itself: words `[b, s, t]` and what smooths their scores, `[b, i, i]`."""

    vec: jax.Array
    rope: tuple[jax.Array, jax.Array]
    region: jax.Array | None
    words: jax.Array | None = None
    smoothing: jax.Array | None = None


class Found(NamedTuple):
    """Where subjects belong by the blocks so far: the sum of their `ops.word_scores`, `[b, s, i]`, and their number."""

    scores: jax.Array
    blocks: jax.Array


class StepCache(NamedTuple):
    """First Block Cache, handed from one sampling step to the next: the first block shows how much has changed, and where that is
    little, what all the others add is taken from before.

    `threshold`: of the mean absolute change of what the first block adds, relative to its mean absolute value; `first`, `rest`
    `[b, i, c]`: what the first and what the other blocks added to image rows in the last step that ran them all; `reused`:
    int32, steps that did not. One decision for the whole batch. Source: ParaAttention, "First Block Cache", as in diffusers.
    """

    threshold: jax.Array
    first: jax.Array
    rest: jax.Array
    reused: jax.Array

    @classmethod
    def empty(cls, config: FluxConfig, batch: int, image_rows: int, threshold: jax.Array) -> StepCache:
        """Before the first step, which runs all blocks."""
        nothing = jnp.zeros((batch, image_rows, config.hidden_size), config.dtype)
        return cls(threshold, nothing, nothing, jnp.zeros((), jnp.int32))


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the transformer, in BFL's field names, and how it is computed.

    `remat`: a key of `layers.REMAT_POLICIES`; `attention`: one of `kernels.KERNELS`; `weights`: of `types.WEIGHTS`, see
    `quantize`; `dtype`: activations and matrix products;
    `param_dtype`: the parameters that `init` makes. Of the reference term, as the adapter was trained: `reference_query`, one
    of `types.QUERIES`; `reference_merge`, one of `types.MERGES` (see `ops.reference_attention`). `region_sharpness`: exponent
    of `ops.auto_region`; 0 gives every subject the same share everywhere.
    """

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    weights: str = "full"
    reference_query: str = "before_rope"
    reference_merge: str = "sum"
    region_sharpness: float = 6.0

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim}: expected even numbers that add up to the head size {self.head_dim}"
            )
        for name, allowed in dict(
            attention=KERNELS, weights=WEIGHTS, reference_query=QUERIES, reference_merge=MERGES
        ).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {allowed}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def dev(cls, **changes) -> FluxConfig:
        """FLUX.1-dev: 11.9 B parameters, guidance-distilled."""
        return cls(**changes)

    @classmethod
    def schnell(cls, **changes) -> FluxConfig:
        """FLUX.1-schnell: the same without guidance embedding, distilled to few steps."""
        return cls(guidance_embed=False, **changes)

    @classmethod
    def tiny(cls, **changes) -> FluxConfig:
        """For tests and the embedded default: 64 latent channels as the real one, 3 blocks."""
        sizes = dict(
            vec_in_dim=32,
            context_in_dim=32,
            hidden_size=64,
            num_heads=4,
            depth=2,
            depth_single_blocks=2,
            axes_dim=(4, 6, 6),
        )
        return cls(**{**sizes, **changes})


class MLPEmbedder(nn.Module):
    """Linear -> SiLU -> Linear, from a vector to the model width."""

    config: FluxConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = _linear(c, c.hidden_size, (None, "embed"), "in_layer")(x)
        return _linear(c, c.hidden_size, (None, "embed"), "out_layer")(nn.silu(x))


class Modulation(nn.Module):
    """`parts` vectors `[b, 1, c]` (shift, scale, gate; in the double blocks twice) from the conditioning vector `[b, c]`."""

    config: FluxConfig
    parts: int

    @nn.compact
    def __call__(self, vec: jax.Array) -> list[jax.Array]:
        c = self.config
        out = _linear(c, (self.parts, c.hidden_size), ("embed", None, "mlp"), "lin")(nn.silu(vec))
        return [out[:, None, p] for p in range(self.parts)]


class QKV(nn.Module):
    """Queries and keys, RMS-normed per head, and values, each `[b, n, h, d]`."""

    config: FluxConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        axes = ("embed", None, "heads", "head_dim")
        qkv = _linear(c, (3, c.num_heads, c.head_dim), axes, "qkv", use_bias=c.qkv_bias)(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return (
            RMSNorm(param_dtype=c.param_dtype, name="query_norm")(q),
            RMSNorm(param_dtype=c.param_dtype, name="key_norm")(k),
            v,
        )


class MLP(nn.Module):
    """Linear -> tanh GELU -> Linear."""

    config: FluxConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = constrain(_linear(c, c.mlp_dim, ("embed", "mlp"), "in_layer")(x), *WIDE)
        return _linear(c, c.hidden_size, ("mlp", "embed"), "out_layer")(nn.gelu(x, approximate=True))


class DoubleBlock(nn.Module):
    """Text rows and image rows with weights of their own, joined in attention only."""

    config: FluxConfig

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c = self.config
        img, txt, found = state
        img_mod = Modulation(c, 6, name="img_mod")(shared.vec)
        txt_mod = Modulation(c, 6, name="txt_mod")(shared.vec)
        img_qkv = QKV(c, name="img_attn")(_modulate(img, *img_mod[:2]))
        txt_qkv = QKV(c, name="txt_attn")(_modulate(txt, *txt_mod[:2]))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True))

        attn, found = _attend(c, q, k, v, shared, prompt, found, text_rows=txt.shape[1])
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]

        img = img + img_mod[2] * _attn_out(c, "img_attn_proj")(img_attn)
        txt = txt + txt_mod[2] * _attn_out(c, "txt_attn_proj")(txt_attn)
        img = img + img_mod[5] * MLP(c, name="img_mlp")(_modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[5] * MLP(c, name="txt_mlp")(_modulate(txt, *txt_mod[3:5]))
        return (constrain(img, *ROWS), constrain(txt, *ROWS), found), None


class SingleBlock(nn.Module):
    """All rows in one stream; attention and MLP side by side. `text_rows` of them, at the front, are text."""

    config: FluxConfig
    text_rows: int

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c = self.config
        rows, found = state
        shift, scale, gate = Modulation(c, 3, name="modulation")(shared.vec)
        x = _modulate(rows, shift, scale)
        q, k, v = QKV(c, name="attn")(x)
        attn, found = _attend(c, q, k, v, shared, prompt, found, text_rows=self.text_rows)
        mlp = constrain(_linear(c, c.mlp_dim, ("embed", "mlp"), "mlp_in")(x), *WIDE)
        mlp = _linear(c, c.hidden_size, ("mlp", "embed"), "mlp_out")(nn.gelu(mlp, approximate=True))
        out = _attn_out(c, "attn_out", use_bias=False)(attn) + mlp
        return (constrain(rows + gate * out, *ROWS), found), None


class Flux(nn.Module):
    """The transformer: predicts the velocity (noise - clean latents) of packed latents.

    `__call__` arguments, float unless said otherwise:

    - `img` `[b, i, in_channels]` noisy packed latents, `img_ids` `[b or 1, i, 3]` their positions;
    - `txt` `[b, t, context_in_dim]` T5 states, `txt_ids` `[b or 1, t, 3]` (zeros);
    - `timesteps` `[b]` in [0, 1], 1 = pure noise; `pooled` `[b, vec_in_dim]` CLIP pooled text;
    - `guidance` `[b]`, or None exactly when `config.guidance_embed` is false;
    - `image_prompt`: see `ImagePrompt`; the parameter tree is the same with and without it;
    - `cache`: see `StepCache`; a step that runs all blocks runs the first twice.

    Returns the velocity `[b, i, out_channels]` in float32; with a cache, that and the cache for the next step. Raises
    `ValueError` for guidance that does not fit the config and for an image prompt of another depth, head count or head size, of
    another number of text rows, or with both regions and words.
    """

    config: FluxConfig

    @nn.compact
    def __call__(
        self,
        img,
        img_ids,
        txt,
        txt_ids,
        timesteps,
        pooled,
        guidance=None,
        image_prompt: ImagePrompt | None = None,
        cache: StepCache | None = None,
    ) -> jax.Array | tuple[jax.Array, StepCache]:
        c = self.config
        if (guidance is not None) != c.guidance_embed:
            raise ValueError(
                f"guidance must be {'given' if c.guidance_embed else 'None'}: guidance_embed is {c.guidance_embed}"
            )
        double, single, region, words = _split_prompt(c, image_prompt, txt.shape[1])

        vec = MLPEmbedder(c, name="time_in")(ops.timestep_embedding(timesteps, 256).astype(c.dtype))
        if guidance is not None:
            vec = vec + MLPEmbedder(c, name="guidance_in")(ops.timestep_embedding(guidance, 256).astype(c.dtype))
        vec = vec + MLPEmbedder(c, name="vector_in")(pooled.astype(c.dtype))
        img = constrain(_linear(c, c.hidden_size, (None, "embed"), "img_in")(img.astype(c.dtype)), *ROWS)
        txt = constrain(_linear(c, c.hidden_size, (None, "embed"), "txt_in")(txt.astype(c.dtype)), *ROWS)
        ids_batch = max(txt_ids.shape[0], img_ids.shape[0])
        ids = [jnp.broadcast_to(x, (ids_batch, *x.shape[1:])) for x in (txt_ids, img_ids)]
        rope = ops.rope_table(jnp.concatenate(ids, axis=1), c.axes_dim, c.theta)
        shared = Shared(vec, rope, region, words, None if words is None else ops.smoothing_matrix(jnp.asarray(img_ids)))

        found = None
        if words is not None:
            found = Found(jnp.zeros((img.shape[0], words.shape[1], img.shape[1])), jnp.zeros(()))

        state = (img, txt, found)
        if cache is None:
            rows = _all_blocks(self, state, shared, double, single)
        else:
            rows, cache = _cached_blocks(self, state, shared, double, single, cache)

        shift, scale = Modulation(c, 2, name="final_modulation")(vec)
        out = _linear(c, c.out_channels, ("embed", None), "final_linear")(_modulate(rows, shift, scale))
        out = out.astype(jnp.float32)
        return out if cache is None else (out, cache)

    @staticmethod
    def inputs_spec(
        config: FluxConfig, batch: int = 1, image_rows: int = 16, text_rows: int = 8
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` without an image prompt, by name: for `init`, fake batches and compilation."""
        c, f32 = config, jnp.float32
        spec = dict(
            img=jax.ShapeDtypeStruct((batch, image_rows, c.in_channels), f32),
            img_ids=jax.ShapeDtypeStruct((1, image_rows, len(c.axes_dim)), f32),
            txt=jax.ShapeDtypeStruct((batch, text_rows, c.context_in_dim), f32),
            txt_ids=jax.ShapeDtypeStruct((1, text_rows, len(c.axes_dim)), f32),
            timesteps=jax.ShapeDtypeStruct((batch,), f32),
            pooled=jax.ShapeDtypeStruct((batch, c.vec_in_dim), f32),
        )
        return spec | (dict(guidance=jax.ShapeDtypeStruct((batch,), f32)) if c.guidance_embed else {})


def _double_blocks(flux: Flux, depth: int, state, shared: Shared, prompt: BlockPrompt | None):
    blocks = scanned(DoubleBlock, depth, remat=flux.config.remat, in_axes=(nn.broadcast, 0))
    return blocks(flux.config, name="double_blocks")(state, shared, prompt)[0]


def _all_blocks(flux: Flux, state, shared: Shared, double: BlockPrompt | None, single: BlockPrompt | None) -> jax.Array:
    """Image rows `[b, i, c]` after all blocks."""
    c = flux.config
    img, txt, found = _double_blocks(flux, c.depth, state, shared, double)
    text_rows = txt.shape[1]
    blocks = scanned(SingleBlock, c.depth_single_blocks, remat=c.remat, in_axes=(nn.broadcast, 0))
    rows = jnp.concatenate([txt, img], axis=1)
    (rows, _), _ = blocks(c, text_rows, name="single_blocks")((rows, found), shared, single)
    return rows[:, text_rows:]


def _cached_blocks(
    flux: Flux, state, shared: Shared, double: BlockPrompt | None, single: BlockPrompt | None, cache: StepCache
) -> tuple[jax.Array, StepCache]:
    """Image rows after all blocks, or after the first with what the others added before; and the cache that follows."""

    def first_of(tree):
        return jax.tree.map(lambda x: x[:1], tree)

    def first_block(flux: Flux) -> jax.Array:
        return _double_blocks(flux, 1, state, shared, first_of(double))[0]

    def slim(variables):
        params = variables["params"]
        return {"params": {**params, "double_blocks": first_of(params["double_blocks"])}}

    after = nn.map_variables(first_block, "params", trans_in_fn=slim)(flux)
    first = after - state[0]

    def size(x):
        return jnp.mean(jnp.abs(x.astype(jnp.float32)))

    def reuse(flux: Flux) -> tuple[jax.Array, StepCache]:
        return after + cache.rest, cache._replace(reused=cache.reused + 1)

    def run(flux: Flux) -> tuple[jax.Array, StepCache]:
        rows = _all_blocks(flux, state, shared, double, single)
        return rows, cache._replace(first=first, rest=rows - after)

    return nn.cond(size(first - cache.first) <= cache.threshold * size(cache.first), reuse, run, flux)


def _linear(c: FluxConfig, features, axes, name: str, use_bias: bool = True) -> nn.DenseGeneral:
    return linear(features, axes, name=name, use_bias=use_bias, dtype=c.dtype, param_dtype=c.param_dtype)


def _attn_out(c: FluxConfig, name: str, use_bias: bool = True) -> nn.DenseGeneral:
    """The projection of attention heads `[b, n, h, d]` back to the model width."""
    axes = ("heads", "head_dim", "embed")
    return linear(
        c.hidden_size, axes, name=name, axis=(-2, -1), use_bias=use_bias, dtype=c.dtype, param_dtype=c.param_dtype
    )


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return (1 + scale) * LayerNorm(affine=False)(x) + shift


def _attend(
    c: FluxConfig, q, k, v, shared: Shared, prompt: BlockPrompt | None, found: Found | None, text_rows: int
) -> tuple[jax.Array, Found | None]:
    """Joint attention with RoPE, plus the reference term (docs/method.md, "Injection"), whose keys stand at position 0; and
    `found` with what this block adds to it."""
    q, k, v = (constrain(x, *HEADS) for x in (q, k, v))
    rotated, keys = ops.apply_rope(q, shared.rope), ops.apply_rope(k, shared.rope)
    attn = ops.attention(rotated, keys, v, kernel=c.attention)
    if prompt is None:
        return attn, found
    b, n = q.shape[:2]
    region = shared.region
    if found is not None and shared.words is not None and shared.smoothing is not None:
        scores = ops.word_scores(
            rotated[:, text_rows:], keys[:, :text_rows], shared.words, shared.smoothing, c.attention
        )
        found = Found(found.scores + scores, found.blocks + 1)
        region = ops.auto_region(found.scores / found.blocks, c.region_sharpness)
    gain = jnp.concatenate(
        [
            ops.row_gain(prompt.text_gain, None, b, text_rows),
            ops.row_gain(prompt.image_gain, region, b, n - text_rows),
        ],
        axis=1,
    )
    query = rotated if c.reference_query == "after_rope" else q
    return attn + ops.reference_attention(query, prompt.kv, gain, c.reference_merge, c.attention), found


def _split_prompt(c: FluxConfig, prompt: ImagePrompt | None, text_rows: int):
    """The prompt's shares of the double and of the single blocks (stacked `BlockPrompt`s or None), its regions, its words."""
    if prompt is None:
        return None, None, None, None
    for kind, kv, depth in (("double", prompt.double, c.depth), ("single", prompt.single, c.depth_single_blocks)):
        if kv is not None and (kv.k.shape[0], *kv.k.shape[-2:]) != (depth, c.num_heads, c.head_dim):
            raise ValueError(
                f"image prompt for {kind} blocks: blocks, heads, head size {(kv.k.shape[0], *kv.k.shape[-2:])}; "
                f"this transformer has {(depth, c.num_heads, c.head_dim)}: the adapter was made for another base"
            )
    injected = c.depth + (0 if prompt.single is None else c.depth_single_blocks)
    if prompt.image_gain.shape[0] != injected or prompt.text_gain.shape[0] != injected:
        raise ValueError(f"image prompt: gains for {prompt.image_gain.shape[0]} blocks, expected {injected}")
    double = BlockPrompt(prompt.double, prompt.image_gain[: c.depth], prompt.text_gain[: c.depth])
    single = None
    if prompt.single is not None:
        single = BlockPrompt(prompt.single, prompt.image_gain[c.depth :], prompt.text_gain[c.depth :])
    words = prompt.words
    if words is not None:
        if prompt.region is not None:
            raise ValueError("image prompt: has both regions and words; expected one of them at most")
        if words.shape[-2:] != (prompt.image_gain.shape[-1], text_rows):
            expected = (prompt.image_gain.shape[-1], text_rows)
            raise ValueError(f"image prompt: words for subjects, text rows {words.shape[-2:]}; expected {expected}")
        if words.shape[-2] == 1:
            words = None  # one subject has every row to itself
    return double, single, prompt.region, words
