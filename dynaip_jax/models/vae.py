"""FLUX.1's KL autoencoder: pictures to latents of an eighth of their size, and back.

Source: black-forest-labs/flux `modules/autoencoder.py`; parameter names follow that layout, as in
`encoder/down_0/block_0/conv1/kernel`. Inside, and in pictures and moments, channels come last; latents have them first,
since FLUX packs them channel-major.
Axis letters here: b batch, H, W picture pixels, h, w latent pixels, z latent channels, c channels. Logical axis names:
"conv_in", "conv_out" channels of a convolution; norms are never sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import LECUN, Conv, DenseGeneral, GroupNorm, linear
from dynaip_jax.layers.compute import REMAT_POLICIES, Compute
from dynaip_jax.runtime.sharding import PICTURES, constrain

NORM_GROUPS = 32
LEVELS = 8
MOST = dict(
    resolution=1 << 14,
    in_channels=1 << 10,
    ch=1 << 12,
    out_ch=1 << 10,
    ch_mult=64,
    num_res_blocks=16,
    z_channels=1 << 12,
)
REMAT = ("none", "full")  # saving matrix products would save nothing here: the work is in convolutions


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder, in BFL's field names.

    `resolution`: side in pixels of the picture that `VAE.inputs_spec` describes; any multiple of `downsample` can be
    encoded. `ch` channels at the finest level, times `ch_mult` at each level; `num_res_blocks` a level, one more in the
    decoder. Raises `ValueError` for sizes that do not fit each other.
    """

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        least = {name: (-schema.LARGEST, most) for name, most in MOST.items()}  # what is too small is told below
        schema.check(self, **least, scale_factor=(-1e6, 1e6), shift_factor=(-1e6, 1e6))
        if len(self.ch_mult) > LEVELS:
            raise ValueError(f"ch_mult {self.ch_mult[:LEVELS]}...: expected at most {LEVELS} levels")
        if self.ch <= 0 or self.ch % NORM_GROUPS:
            raise ValueError(f"ch {self.ch}: expected a multiple of {NORM_GROUPS}, the number of GroupNorm groups")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult {self.ch_mult}: expected one positive multiple of ch a level")
        if self.resolution <= 0 or self.resolution % self.downsample:
            raise ValueError(
                f"resolution {self.resolution}: expected a multiple of {self.downsample}, the downsampling"
            )
        for field in ("in_channels", "out_ch", "num_res_blocks", "z_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)}: expected at least 1")
        if not self.scale_factor:
            raise ValueError(f"scale_factor {self.scale_factor}: expected a number other than 0")

    @property
    def downsample(self) -> int:
        """Picture pixels a side per latent pixel."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.ch * m for m in self.ch_mult)

    @classmethod
    def flux(cls, **changes) -> VAEConfig:
        """The autoencoder of FLUX.1-dev and -schnell: 83.8 M parameters."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes) -> VAEConfig:
        """For tests and the embedded default: FLUX's 8x and 16 latent channels, few channels inside."""
        return cls(**{**dict(resolution=32, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1), **changes})


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), `[b, h, w, c]` -> `[b, h, w, width]`; a 1x1 convolution on x where
    c changes."""

    config: VAEConfig
    compute: Compute
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.compute
        h = constrain(_conv(p, self.width, 3, "conv1")(nn.silu(_norm(p, "norm1")(x))), *PICTURES)
        h = _conv(p, self.width, 3, "conv2")(nn.silu(_norm(p, "norm2")(h)))
        x = x if x.shape[-1] == self.width else _conv(p, self.width, 1, "nin_shortcut")(x)
        return constrain(x + h, *PICTURES)


class AttentionBlock(nn.Module):
    """x + attention over all pixels of `[b, h, w, c]`, with one head as wide as the picture has channels."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.compute
        b, h, w, width = x.shape

        def project(name: str) -> DenseGeneral:
            return linear(width, ("conv_in", "conv_out"), name=name, **p.dtypes)

        rows = _norm(p, "norm")(x).reshape(b, h * w, width)
        q, k, v = (project(name)(rows)[:, :, None] for name in ("q", "k", "v"))
        out = attention(q, k, v)[:, :, 0]
        return x + project("proj_out")(out).reshape(x.shape)


class Level(nn.Module):
    """`blocks` residual blocks at one size, then half the size ("downsample"), twice it ("upsample") or itself."""

    config: VAEConfig
    compute: Compute
    width: int
    blocks: int
    resample: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        for n in range(self.blocks):
            x = _resnet(c, p, self.width, f"block_{n}")(x)
        if self.resample == "downsample":
            x = _conv(p, self.width, 3, "downsample", strides=2, padding=((0, 1), (0, 1)))(x)
        elif self.resample == "upsample":
            x = _conv(p, self.width, 3, "upsample")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return constrain(x, *PICTURES)


class Mid(nn.Module):
    """Residual block, attention, residual block at the coarsest size."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        x = _resnet(c, p, x.shape[-1], "block_1")(x)
        x = AttentionBlock(c, p, name="attn_1")(x)
        return _resnet(c, p, x.shape[-1], "block_2")(x)


class Encoder(nn.Module):
    """Pictures `[b, H, W, in_channels]` -> moments `[b, h, w, 2z]`."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        x = constrain(_conv(p, c.ch, 3, "conv_in")(x), *PICTURES)
        for i, width in enumerate(c.widths):
            resample = "downsample" if i < len(c.widths) - 1 else None
            x = Level(c, p, width, c.num_res_blocks, resample, name=f"down_{i}")(x)
        x = Mid(c, p, name="mid")(x)
        return _conv(p, 2 * c.z_channels, 3, "conv_out")(nn.silu(_norm(p, "norm_out")(x)))


class Decoder(nn.Module):
    """Unscaled latents `[b, h, w, z]` -> pictures `[b, H, W, out_ch]`. `up_0` is the finest level, as in BFL's file."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        x = constrain(_conv(p, c.widths[-1], 3, "conv_in")(x), *PICTURES)
        x = Mid(c, p, name="mid")(x)
        for i, width in reversed(list(enumerate(c.widths))):
            x = Level(c, p, width, c.num_res_blocks + 1, "upsample" if i else None, name=f"up_{i}")(x)
        return _conv(p, c.out_ch, 3, "conv_out")(nn.silu(_norm(p, "norm_out")(x)))


class VAE(nn.Module):
    """The autoencoder: `apply(..., method="encode" | "latents" | "decode")`; `__call__` is the three in turn.

    `compute.remat` "full" recomputes each residual block in the backward pass; `ValueError` for "dots".
    """

    config: VAEConfig
    compute: Compute = Compute()

    def setup(self):
        if self.compute.remat not in REMAT:
            raise ValueError(f"remat {self.compute.remat!r}: expected one of {REMAT}")
        self.encoder = Encoder(self.config, self.compute)
        self.decoder = Decoder(self.config, self.compute)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction `[b, H, W, out_ch]` of `images` from the mean of their latents."""
        return self.decode(self.latents(self.encode(images)))

    def encode(self, images: jax.Array) -> jax.Array:
        """Pictures `[b, H, W, in_channels]` in [-1, 1] -> moments `[b, h, w, 2z]` (mean, then log-variance), float32.

        Raises `ValueError` if H or W is not a multiple of `config.downsample`.
        """
        check_size(images, self.config.downsample)
        return self.encoder(images).astype(jnp.float32)

    def latents(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Scaled latents `[b, z, h, w]`, float32, from moments `[b, h, w, 2z]`: (x - shift_factor) · scale_factor.

        x is the mean or, given standard normal `noise` `[b, z, h, w]`, mean + std · noise, with the log-variance
        clipped to [-30, 20].
        """
        mean, logvar = jnp.split(jnp.moveaxis(moments.astype(jnp.float32), -1, 1), 2, axis=1)
        x = mean if noise is None else mean + jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)) * noise
        return (x - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents `[b, z, h, w]` -> pictures `[b, H, W, out_ch]`, float32, about [-1, 1], not clipped."""
        x = latents.astype(jnp.float32) / self.config.scale_factor + self.config.shift_factor
        return self.decoder(jnp.moveaxis(x, 1, -1)).astype(jnp.float32)

    @staticmethod
    def inputs_spec(config: VAEConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of the argument of `__call__`, by name: for `init`, fake batches and compilation."""
        side = config.resolution
        return dict(images=jax.ShapeDtypeStruct((batch, side, side, config.in_channels), jnp.float32))


def check_size(images: jax.Array, step: int) -> None:
    """Raises `ValueError` unless height and width of `images` `[b, H, W, c]` are multiples of `step`."""
    height, width = images.shape[1:3]
    if height % step or width % step:
        raise ValueError(f"picture of {height} x {width} pixels: expected multiples of {step}")


def _resnet(c: VAEConfig, p: Compute, width: int, name: str) -> nn.Module:
    block = ResnetBlock if p.remat == "none" else nn.remat(ResnetBlock, policy=REMAT_POLICIES[p.remat])
    return block(c, p, width, name=name)


def _conv(
    p: Compute,
    width: int,
    size: int,
    name: str,
    *,
    strides: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> Conv:
    return Conv(
        width,
        (size, size),
        strides=strides,
        padding=padding,
        **p.dtypes,
        kernel_init=nn.with_logical_partitioning(LECUN, (None, None, "conv_in", "conv_out")),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        conv_general_dilated=_with_whole_kernel,
        name=name,
    )


def _with_whole_kernel(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """A convolution whose split kernel is put together first; XLA would send its parts round in a ring of small convolutions."""
    return jax.lax.conv_general_dilated(x, constrain(kernel, *[None] * kernel.ndim), *args, **options)


def _norm(p: Compute, name: str) -> GroupNorm:
    """GroupNorm, eps 1e-6; mean and variance in float32, the variance in two passes."""
    return GroupNorm(
        NORM_GROUPS,
        epsilon=1e-6,
        use_fast_variance=False,
        **p.dtypes,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )
