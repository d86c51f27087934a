"""FLUX.1, the multimodal diffusion transformer (MM-DiT), with an optional image prompt.

Source: black-forest-labs/flux `model.py` and `modules/layers.py`; parameter names follow that layout, with two changes: the
blocks of a kind are stacked (leading "layers" axis), and the fused `linear1`/`linear2` of the single blocks are kept as
their halves (`qkv` + `mlp_in`, `attn_out` + `mlp_out`), so that heads and MLP width shard separately.
Text rows come before image rows wherever the two are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.layers import injection
from dynaip_jax.layers.basic import SEEN, linear, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import BlockPrompt, Injection, Places, Shares, joint_attention
from dynaip_jax.layers.positions import rope_table, timestep_embedding
from dynaip_jax.layers.step_cache import StepCache, cached, first_of, with_first_block
from dynaip_jax.models.mmdit import QKV, MLPEmbedder, Modulate, heads_out, split
from dynaip_jax.runtime.sharding import ROWS, WIDE, constrain
from dynaip_jax.types import ImagePrompt

BLOCKS = (0, schema.BLOCKS[1])  # of a kind


class Shared(NamedTuple):
    """What every block reads: conditioning vector `[b, c]`, rotary table, where subjects belong."""

    vec: jax.Array
    rope: tuple[jax.Array, jax.Array]
    places: Places


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the transformer, in BFL's field names. Raises `ValueError` for sizes that do not fit each other."""

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

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        schema.check(self, depth=BLOCKS, depth_single_blocks=BLOCKS, mlp_ratio=(1e-3, 1e3), theta=(1, 1e8))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim}: expected even numbers that add up to the head size {self.head_dim}"
            )
        double, single = 20 * self.hidden_size + 4 * self.mlp_dim, 7 * self.hidden_size + 2 * self.mlp_dim
        schema.check_total(self.hidden_size * (self.depth * double + self.depth_single_blocks * single))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def head(self) -> tuple[int, int]:
        """Heads and head size."""
        return self.num_heads, self.head_dim

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


class MLP(nn.Module):
    """Linear -> tanh GELU -> Linear."""

    config: FluxConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtypes = self.config, self.compute.dtypes
        x = constrain(linear(c.mlp_dim, ("embed", "mlp"), name="in_layer", **dtypes)(x), *WIDE)
        return linear(c.hidden_size, ("mlp", "embed"), name="out_layer", **dtypes)(nn.gelu(x, approximate=True))


class DoubleBlock(nn.Module):
    """Text rows and image rows with weights of their own, joined in attention only."""

    config: FluxConfig
    compute: Compute
    injection: Injection

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c, p, how, keep = self.config, self.compute, self.injection, partial(self.sow, SEEN, "injection")
        img, txt, evidence = state
        img_mod1, img_mod2 = Modulate(c.hidden_size, p, 2, name="img_mod")(shared.vec)
        txt_mod1, txt_mod2 = Modulate(c.hidden_size, p, 2, name="txt_mod")(shared.vec)
        img_qkv = QKV(c.head, p, c.qkv_bias, name="img_attn")(img_mod1(img))
        txt_qkv = QKV(c.head, p, c.qkv_bias, name="txt_attn")(txt_mod1(txt))
        qkv = [jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True)]
        rope, places, text = shared.rope, shared.places, txt.shape[1]
        heads, term, evidence = joint_attention(how, p.attention, qkv, rope, places, prompt, evidence, text, keep=keep)
        (txt_heads, img_heads), (txt_term, img_term) = (split(x, txt.shape[1]) for x in (heads, term))

        img = img + img_mod1.gate * heads_out(c.hidden_size, p, "img_attn_proj")(img_heads)
        txt = txt + txt_mod1.gate * heads_out(c.hidden_size, p, "txt_attn_proj")(txt_heads)
        img = img + img_mod2.gate * MLP(c, p, name="img_mlp")(img_mod2(img))
        txt = txt + txt_mod2.gate * MLP(c, p, name="txt_mlp")(txt_mod2(txt))
        img, txt = injection.after_block(how, img, img_term), injection.after_block(how, txt, txt_term)
        return (constrain(img, *ROWS), constrain(txt, *ROWS), evidence), None


class SingleBlock(nn.Module):
    """All rows in one stream; attention and MLP side by side. `text_rows` of them, at the front, are text."""

    config: FluxConfig
    compute: Compute
    injection: Injection
    text_rows: int

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c, p, how, keep = self.config, self.compute, self.injection, partial(self.sow, SEEN, "injection")
        rows, evidence = state
        (mod,) = Modulate(c.hidden_size, p, 1, name="modulation")(shared.vec)
        x = mod(rows)
        qkv, rope, places = QKV(c.head, p, c.qkv_bias, name="attn")(x), shared.rope, shared.places
        heads, term, evidence = joint_attention(
            how, p.attention, qkv, rope, places, prompt, evidence, self.text_rows, keep=keep
        )
        mlp = constrain(linear(c.mlp_dim, ("embed", "mlp"), name="mlp_in", **p.dtypes)(x), *WIDE)
        mlp = linear(c.hidden_size, ("mlp", "embed"), name="mlp_out", **p.dtypes)(nn.gelu(mlp, approximate=True))
        out = heads_out(c.hidden_size, p, "attn_out", use_bias=False)(heads) + mlp
        rows = injection.after_block(how, rows + mod.gate * out, term)
        return (constrain(rows, *ROWS), evidence), None


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
    compute: Compute = Compute()
    injection: Injection = Injection()

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
        c, p = self.config, self.compute
        if (guidance is not None) != c.guidance_embed:
            raise ValueError(
                f"guidance must be {'given' if c.guidance_embed else 'None'}: guidance_embed is {c.guidance_embed}"
            )
        share = injection.shares(
            image_prompt, c.depth, c.depth_single_blocks, c.head, jnp.asarray(img_ids), len(img), txt.shape[1]
        )
        vec = self._conditioning(timesteps, pooled, guidance)
        img = constrain(
            linear(c.hidden_size, ("channels", "embed"), name="img_in", **p.dtypes)(img.astype(p.dtype)), *ROWS
        )
        txt = constrain(
            linear(c.hidden_size, ("channels", "embed"), name="txt_in", **p.dtypes)(txt.astype(p.dtype)), *ROWS
        )
        ids_batch = max(txt_ids.shape[0], img_ids.shape[0])
        ids = [jnp.broadcast_to(x, (ids_batch, *x.shape[1:])) for x in (txt_ids, img_ids)]
        rope = rope_table(jnp.concatenate(ids, axis=1), c.axes_dim, c.theta)
        shared, state = Shared(vec, rope, share.places), (img, txt, share.evidence)

        def all_blocks(flux: Flux) -> jax.Array:
            return _all_blocks(flux, state, shared, share)

        if cache is None:
            rows = all_blocks(self)
        else:
            rows, cache = cached(self, img, partial(_first_block, state, shared, share), all_blocks, cache)

        (mod,) = Modulate(c.hidden_size, p, 1, vectors=2, name="final_modulation")(vec)
        out = linear(c.out_channels, ("embed", "channels"), name="final_linear", **p.dtypes)(mod(rows)).astype(
            jnp.float32
        )
        return out if cache is None else (out, cache)

    def _conditioning(self, timesteps, pooled, guidance) -> jax.Array:
        """The vector `[b, c]` by which all blocks are modulated."""
        c, p = self.config, self.compute
        vec = MLPEmbedder(c.hidden_size, p, name="time_in")(timestep_embedding(timesteps, 256).astype(p.dtype))
        if guidance is not None:
            vec = vec + MLPEmbedder(c.hidden_size, p, name="guidance_in")(
                timestep_embedding(guidance, 256).astype(p.dtype)
            )
        return vec + MLPEmbedder(c.hidden_size, p, name="vector_in")(pooled.astype(p.dtype))

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
    blocks = scanned(DoubleBlock, depth, remat=flux.compute.remat, in_axes=(nn.broadcast, 0))
    return blocks(flux.config, flux.compute, flux.injection, name="double_blocks")(state, shared, prompt)[0]


def _all_blocks(flux: Flux, state, shared: Shared, share: Shares) -> jax.Array:
    """Image rows `[b, i, c]` after all blocks."""
    c, p = flux.config, flux.compute
    img, txt, evidence = _double_blocks(flux, c.depth, state, shared, share.double)
    text_rows = txt.shape[1]
    blocks = scanned(SingleBlock, c.depth_single_blocks, remat=p.remat, in_axes=(nn.broadcast, 0))
    rows = jnp.concatenate([txt, img], axis=1)
    (rows, _), _ = blocks(c, p, flux.injection, text_rows, name="single_blocks")((rows, evidence), shared, share.single)
    return rows[:, text_rows:]


def _first_block(state, shared: Shared, share: Shares, flux: Flux) -> jax.Array:
    """Image rows `[b, i, c]` after the first block alone."""

    def run(flux: Flux) -> jax.Array:
        return _double_blocks(flux, 1, state, shared, first_of(share.double))[0]

    return with_first_block(run, flux)
