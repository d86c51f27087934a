"""FLUX.2, the multimodal diffusion transformer (MM-DiT) of FLUX.2 [klein] and [dev], with an optional image prompt.

Source: black-forest-labs/flux2 `model.py`; diffusers `Flux2Transformer2DModel`. Against FLUX.1 (`models/flux.py`): no biases; one
modulation shared by all blocks of a kind; gated MLPs (SiLU of the first half times the second); positions on four axes, of text
too; no pooled text. Parameter names follow BFL's, with FLUX.1's changes: blocks of a kind are stacked, and the fused `linear1` and
`linear2` of single blocks are kept as `qkv` + `mlp_in`, `attn_out` + `mlp_out`, so that heads and MLP width shard apart.
Text rows come before image rows wherever the two are joined, and reference rows (the model's own reference pictures) after them.
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
from dynaip_jax.layers.basic import SEEN, DenseGeneral, linear, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import BlockPrompt, Injection, Places, Shares, joint_attention
from dynaip_jax.layers.positions import rope_table, timestep_embedding
from dynaip_jax.layers.step_cache import StepCache, cached, first_of, with_first_block
from dynaip_jax.models.mmdit import QKV, MLPEmbedder, Modulate, Modulation, heads_out, split
from dynaip_jax.runtime.sharding import ROWS, constrain
from dynaip_jax.types import ImagePrompt, References

BLOCKS = (0, schema.BLOCKS[1])  # of a kind
GATED = ("batch", None, None, "mlp")  # [b, n, 2, width of an MLP]


class Shared(NamedTuple):
    """What every block reads: modulations of its kind (image and text rows in double blocks), rotary table, where subjects belong."""

    image: list[Modulation]
    text: list[Modulation]
    single: list[Modulation]
    rope: tuple[jax.Array, jax.Array]
    places: Places


class Counts(NamedTuple):
    """Rows of each kind, in their order; reference rows come last."""

    text: int
    image: int


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of the transformer, in BFL's field names. Raises `ValueError` for sizes that do not fit each other."""

    in_channels: int = 128
    out_channels: int = 128
    context_in_dim: int = 7680
    hidden_size: int = 3072
    mlp_ratio: float = 3.0
    num_heads: int = 24
    depth: int = 5
    depth_single_blocks: int = 20
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    theta: int = 2000
    guidance_embed: bool = False

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        schema.check(self, depth=BLOCKS, depth_single_blocks=BLOCKS, mlp_ratio=(1e-3, 1e3), theta=(1, 1e8))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if len(self.axes_dim) != 4 or sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim}: expected four even numbers that add up to the head size {self.head_dim}"
            )
        double, single = 8 * self.hidden_size + 6 * self.mlp_dim, 4 * self.hidden_size + 3 * self.mlp_dim
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
    def klein_4b(cls, **changes) -> Flux2Config:
        """FLUX.2 [klein] 4B, base and distilled: 3.9 B parameters."""
        return cls(**changes)

    @classmethod
    def klein_9b(cls, **changes) -> Flux2Config:
        """FLUX.2 [klein] 9B, base and distilled: 9.1 B parameters."""
        sizes = dict(context_in_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single_blocks=24)
        return cls(**{**sizes, **changes})

    @classmethod
    def dev(cls, **changes) -> Flux2Config:
        """FLUX.2 [dev]: 32.2 B parameters, guidance-distilled."""
        sizes = dict(context_in_dim=15360, hidden_size=6144, num_heads=48, depth=8, depth_single_blocks=48)
        return cls(**{**sizes, "guidance_embed": True, **changes})

    @classmethod
    def tiny(cls, **changes) -> Flux2Config:
        """For tests: 128 latent channels as the real one, 4 blocks."""
        sizes = dict(context_in_dim=48, hidden_size=64, num_heads=4, depth=2, depth_single_blocks=2)
        return cls(**{**sizes, "axes_dim": (4, 4, 4, 4), **changes})


class MLP(nn.Module):
    """Linear -> SiLU of the first half times the second -> Linear."""

    config: Flux2Config
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _mlp_out(self.config, self.compute, "out_layer")(_gated(self.config, self.compute, "in_layer", x))


class DoubleBlock(nn.Module):
    """Text rows and image rows with weights of their own, joined in attention only."""

    config: Flux2Config
    compute: Compute
    injection: Injection
    counts: Counts

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c, p, how, keep = self.config, self.compute, self.injection, partial(self.sow, SEEN, "injection")
        img, txt, evidence = state
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = shared.image, shared.text
        img_qkv = QKV(c.head, p, use_bias=False, name="img_attn")(img_mod1(img))
        txt_qkv = QKV(c.head, p, use_bias=False, name="txt_attn")(txt_mod1(txt))
        qkv = [jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True)]
        rope, places, rows = shared.rope, shared.places, (self.counts.text, sum(self.counts))
        heads, term, evidence = joint_attention(how, p.attention, qkv, rope, places, prompt, evidence, *rows, keep=keep)
        (txt_heads, img_heads), (txt_term, img_term) = (split(x, self.counts.text) for x in (heads, term))

        img = img + img_mod1.gate * heads_out(c.hidden_size, p, "img_attn_proj", use_bias=False)(img_heads)
        txt = txt + txt_mod1.gate * heads_out(c.hidden_size, p, "txt_attn_proj", use_bias=False)(txt_heads)
        img = img + img_mod2.gate * MLP(c, p, name="img_mlp")(img_mod2(img))
        txt = txt + txt_mod2.gate * MLP(c, p, name="txt_mlp")(txt_mod2(txt))
        img, txt = injection.after_block(how, img, img_term), injection.after_block(how, txt, txt_term)
        return (constrain(img, *ROWS), constrain(txt, *ROWS), evidence), None


class SingleBlock(nn.Module):
    """All rows in one stream; attention and MLP side by side."""

    config: Flux2Config
    compute: Compute
    injection: Injection
    counts: Counts

    @nn.compact
    def __call__(self, state, shared: Shared, prompt: BlockPrompt | None):
        c, p, how, keep = self.config, self.compute, self.injection, partial(self.sow, SEEN, "injection")
        rows, evidence = state
        (mod,) = shared.single
        x = mod(rows)
        qkv, rope, places = QKV(c.head, p, use_bias=False, name="attn")(x), shared.rope, shared.places
        own = (self.counts.text, sum(self.counts))
        heads, term, evidence = joint_attention(how, p.attention, qkv, rope, places, prompt, evidence, *own, keep=keep)
        attended = heads_out(c.hidden_size, p, "attn_out", use_bias=False)(heads)
        out = attended + _mlp_out(c, p, "mlp_out")(_gated(c, p, "mlp_in", x))
        rows = injection.after_block(how, rows + mod.gate * out, term)
        return (constrain(rows, *ROWS), evidence), None


class Flux2(nn.Module):
    """The transformer: predicts the velocity (noise - clean latents) of packed latents.

    `__call__` arguments, float unless said otherwise:

    - `img` `[b, i, in_channels]` noisy packed latents, `img_ids` `[b or 1, i, 4]` their positions;
    - `txt` `[b, t, context_in_dim]` text states, `txt_ids` `[b or 1, t, 4]` their positions;
    - `timesteps` `[b]` in [0, 1], 1 = pure noise; `guidance` `[b]`, or None exactly when `config.guidance_embed` is false;
    - `references`: the model's own reference pictures; they are read at every step and not injected into;
    - `image_prompt`: see `ImagePrompt`; the parameter tree is the same with and without it;
    - `cache`: see `StepCache`; a step that runs all blocks runs the first twice.

    Returns the velocity `[b, i, out_channels]` in float32; with a cache, that and the cache for the next step. Raises
    `ValueError` for guidance that does not fit the config and for an image prompt of another depth, head count or head size, of
    another number of text rows, or with both regions and words.
    """

    config: Flux2Config
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
        guidance=None,
        references: References | None = None,
        image_prompt: ImagePrompt | None = None,
        cache: StepCache | None = None,
    ) -> jax.Array | tuple[jax.Array, StepCache]:
        c, p = self.config, self.compute
        if (guidance is not None) != c.guidance_embed:
            raise ValueError(
                f"guidance must be {'given' if c.guidance_embed else 'None'}: guidance_embed is {c.guidance_embed}"
            )
        counts = Counts(txt.shape[1], img.shape[1])
        share = injection.shares(
            image_prompt, c.depth, c.depth_single_blocks, c.head, jnp.asarray(img_ids), len(img), counts.text
        )
        vec = self._conditioning(timesteps, guidance)
        tokens, ids = [img], [txt_ids, img_ids]
        if references is not None:
            tokens, ids = [img, references.tokens], [*ids, references.ids]
        img = self._embedded("img_in", jnp.concatenate([x.astype(p.dtype) for x in tokens], axis=1))
        txt = self._embedded("txt_in", txt.astype(p.dtype))
        ids = [jnp.broadcast_to(x, (max(len(y) for y in ids), *x.shape[1:])) for x in ids]
        shared = Shared(
            self._modulate("double_modulation_img", 2)(vec),
            self._modulate("double_modulation_txt", 2)(vec),
            self._modulate("single_modulation", 1)(vec),
            rope_table(jnp.concatenate(ids, axis=1), c.axes_dim, c.theta),
            share.places,
        )
        state = (img, txt, share.evidence)

        def all_blocks(flux: Flux2) -> jax.Array:
            return _all_blocks(flux, state, shared, share, counts)

        if cache is None:
            rows = all_blocks(self)
        else:
            first = partial(_first_block, state, shared, share, counts)
            rows, cache = cached(self, img[:, : counts.image], first, all_blocks, cache)

        (mod,) = self._modulate("final_modulation", 1, vectors=2)(vec)
        how = dict(name="final_linear", use_bias=False, **p.dtypes)
        out = linear(c.out_channels, ("embed", "channels"), **how)(mod(rows)).astype(jnp.float32)
        return out if cache is None else (out, cache)

    def _conditioning(self, timesteps, guidance) -> jax.Array:
        """The vector `[b, c]` by which all blocks are modulated."""
        how = (self.config.hidden_size, self.compute, False)
        vec = MLPEmbedder(*how, name="time_in")(self._sinusoids(timesteps))
        if guidance is None:
            return vec
        return vec + MLPEmbedder(*how, name="guidance_in")(self._sinusoids(guidance))

    def _sinusoids(self, values: jax.Array) -> jax.Array:
        return timestep_embedding(values, 256).astype(self.compute.dtype)

    def _modulate(self, name: str, parts: int, vectors: int = 3) -> Modulate:
        return Modulate(self.config.hidden_size, self.compute, parts, vectors, use_bias=False, name=name)

    def _embedded(self, name: str, rows: jax.Array) -> jax.Array:
        how = dict(name=name, use_bias=False, **self.compute.dtypes)
        return constrain(linear(self.config.hidden_size, ("channels", "embed"), **how)(rows), *ROWS)

    @staticmethod
    def inputs_spec(
        config: Flux2Config, batch: int = 1, image_rows: int = 16, text_rows: int = 8
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__` without references and image prompt, by name: for `init`, fake batches and compilation."""
        c, f32 = config, jnp.float32
        spec = dict(
            img=jax.ShapeDtypeStruct((batch, image_rows, c.in_channels), f32),
            img_ids=jax.ShapeDtypeStruct((1, image_rows, len(c.axes_dim)), f32),
            txt=jax.ShapeDtypeStruct((batch, text_rows, c.context_in_dim), f32),
            txt_ids=jax.ShapeDtypeStruct((1, text_rows, len(c.axes_dim)), f32),
            timesteps=jax.ShapeDtypeStruct((batch,), f32),
        )
        return spec | (dict(guidance=jax.ShapeDtypeStruct((batch,), f32)) if c.guidance_embed else {})


def _double_blocks(flux: Flux2, depth: int, state, shared: Shared, prompt: BlockPrompt | None, counts: Counts):
    blocks = scanned(DoubleBlock, depth, remat=flux.compute.remat, in_axes=(nn.broadcast, 0))
    made = blocks(flux.config, flux.compute, flux.injection, counts, name="double_blocks")
    return made(state, shared, prompt)[0]


def _all_blocks(flux: Flux2, state, shared: Shared, share: Shares, counts: Counts) -> jax.Array:
    """Image rows `[b, i, c]` after all blocks."""
    c, p = flux.config, flux.compute
    img, txt, evidence = _double_blocks(flux, c.depth, state, shared, share.double, counts)
    blocks = scanned(SingleBlock, c.depth_single_blocks, remat=p.remat, in_axes=(nn.broadcast, 0))
    rows = jnp.concatenate([txt, img], axis=1)
    (rows, _), _ = blocks(c, p, flux.injection, counts, name="single_blocks")((rows, evidence), shared, share.single)
    return rows[:, counts.text : sum(counts)]


def _first_block(state, shared: Shared, share: Shares, counts: Counts, flux: Flux2) -> jax.Array:
    """Image rows `[b, i, c]` after the first block alone."""

    def run(flux: Flux2) -> jax.Array:
        return _double_blocks(flux, 1, state, shared, first_of(share.double), counts)[0][:, : counts.image]

    return with_first_block(run, flux)


def _gated(c: Flux2Config, p: Compute, name: str, x: jax.Array) -> jax.Array:
    """SiLU of the first half of a projection of `x` `[b, n, c]` times its second half, `[b, n, width of an MLP]`."""
    both = linear((2, c.mlp_dim), ("embed", None, "mlp"), name=name, use_bias=False, **p.dtypes)(x)
    both = constrain(both, *GATED)
    return nn.silu(both[:, :, 0]) * both[:, :, 1]


def _mlp_out(c: Flux2Config, p: Compute, name: str) -> DenseGeneral:
    return linear(c.hidden_size, ("mlp", "embed"), name=name, use_bias=False, **p.dtypes)
