"""FLUX.2's autoencoder: FLUX.1's (`models/vae.py`) with 32 channels, 1x1 convolutions on both sides of them, and latents that are
squares of 2 x 2 of its pixels, normalised channel by channel with stored statistics.

Source: black-forest-labs/flux2 `autoencoder.py`; diffusers `AutoencoderKLFlux2` and `Flux2KleinPipeline`. A latent pixel is 16 x 16
picture pixels. Axis letters here: b batch, H, W picture pixels, h, w latent pixels, z channels of the convolutions; 4z of latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.layers.basic import linear, parameter
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.vae import MOST, REMAT, Decoder, Encoder, VAEConfig, check_size

SQUARE = 2  # pixels a side of what a latent pixel joins


@dataclass(frozen=True)
class Flux2VAEConfig:
    """Sizes of the autoencoder, in the field names of `VAEConfig`.

    `decoder_ch`: `ch` of the decoder, which BFL also publishes in a smaller one; `norm_eps`: added to the stored variance of latents.
    Raises `ValueError` for sizes that do not fit each other.
    """

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    decoder_ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    norm_eps: float = 1e-4

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        least = {name: (-schema.LARGEST, most) for name, most in MOST.items()}  # what is too small is told below
        schema.check(self, **least, decoder_ch=least["ch"], norm_eps=schema.EPSILON)
        for half in ("encoding", "decoding"):
            try:
                getattr(self, half)  # checks them
            except ValueError as e:
                raise ValueError(f"{half}: {e}") from e
        if self.resolution % self.downsample:
            raise ValueError(
                f"resolution {self.resolution}: expected a multiple of {self.downsample}, the downsampling"
            )

    @property
    def encoding(self) -> VAEConfig:
        """Of the encoder's convolutions."""
        return self._convolutions(self.ch)

    @property
    def decoding(self) -> VAEConfig:
        """Of the decoder's convolutions."""
        return self._convolutions(self.decoder_ch)

    def _convolutions(self, ch: int) -> VAEConfig:
        names = ("resolution", "in_channels", "out_ch", "ch_mult", "num_res_blocks", "z_channels")
        return VAEConfig(ch=ch, scale_factor=1.0, shift_factor=0.0, **{name: getattr(self, name) for name in names})

    @property
    def downsample(self) -> int:
        """Picture pixels a side per latent pixel."""
        return SQUARE * 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        return SQUARE**2 * self.z_channels

    @classmethod
    def flux2(cls, **changes) -> Flux2VAEConfig:
        """The autoencoder of FLUX.2: 84.0 M parameters."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes) -> Flux2VAEConfig:
        """For tests: FLUX.2's 16x and 128 latent channels, few channels inside."""
        sizes = dict(resolution=32, ch=32, decoder_ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)
        return cls(**{**sizes, **changes})


class Statistics(nn.Module):
    """The mean and the variance, `norm_eps` added, of each channel of latents, `[4z]` both, float32."""

    config: Flux2VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        c, zeros, ones = self.config, nn.initializers.zeros, nn.initializers.ones
        mean, variance = (
            parameter(self, name, init, (None,), (c.latent_channels,), self.compute.param_dtype).astype(jnp.float32)
            for name, init in (("mean", zeros), ("variance", ones))
        )
        return mean, variance + c.norm_eps


class Flux2VAE(nn.Module):
    """The autoencoder: `apply(..., method="encode" | "latents" | "decode")`; `__call__` is the three in turn.

    `compute.remat`: see `VAE`; `ValueError` for "dots".
    """

    config: Flux2VAEConfig
    compute: Compute = Compute()

    def setup(self):
        c, p = self.config, self.compute
        if p.remat not in REMAT:
            raise ValueError(f"remat {p.remat!r}: expected one of {REMAT}")
        self.encoder, self.decoder = Encoder(c.encoding, p), Decoder(c.decoding, p)
        self.quant = linear(2 * c.z_channels, ("conv_in", "conv_out"), **p.dtypes)
        self.post_quant = linear(c.z_channels, ("conv_in", "conv_out"), **p.dtypes)
        self.statistics = Statistics(c, p)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction `[b, H, W, out_ch]` of `images`."""
        return self.decode(self.latents(self.encode(images)))

    def encode(self, images: jax.Array) -> jax.Array:
        """Pictures `[b, H, W, in_channels]` in [-1, 1] -> moments `[b, h, w, 8z]` of latents (mean, then log-variance), float32.

        Raises `ValueError` if H or W is not a multiple of `config.downsample`.
        """
        check_size(images, self.config.downsample)
        moments = self.quant(self.encoder(images)).astype(jnp.float32)
        mean, logvar = (squares(x) for x in jnp.split(moments, 2, axis=-1))
        usual, variance = self.statistics()
        mean, logvar = (mean - usual) * jax.lax.rsqrt(variance), jnp.clip(logvar, -30.0, 20.0) - jnp.log(variance)
        return jnp.concatenate([mean, logvar], axis=-1)

    def latents(self, moments: jax.Array) -> jax.Array:
        """Latents `[b, 4z, h, w]`, float32, the mean of moments `[b, h, w, 8z]`."""
        mean, _ = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return jnp.moveaxis(mean, -1, 1)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[b, 4z, h, w]` -> pictures `[b, H, W, out_ch]`, float32, about [-1, 1], not clipped."""
        usual, variance = self.statistics()
        x = jnp.moveaxis(latents.astype(jnp.float32), 1, -1) * jnp.sqrt(variance) + usual
        return self.decoder(self.post_quant(pixels(x))).astype(jnp.float32)

    @staticmethod
    def inputs_spec(config: Flux2VAEConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of the argument of `__call__`, by name: for `init`, fake batches and compilation."""
        side = config.resolution
        return dict(images=jax.ShapeDtypeStruct((batch, side, side, config.in_channels), jnp.float32))


def squares(x: jax.Array) -> jax.Array:
    """Squares of 2 x 2 pixels as one, channel-major: `[b, 2h, 2w, z]` -> `[b, h, w, 4z]`, z (row column)."""
    b, h, w, z = x.shape
    x = x.reshape(b, h // SQUARE, SQUARE, w // SQUARE, SQUARE, z).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // SQUARE, w // SQUARE, z * SQUARE**2)


def pixels(x: jax.Array) -> jax.Array:
    """The inverse of `squares`: `[b, h, w, 4z]` -> `[b, 2h, 2w, z]`."""
    b, h, w, z = x.shape
    x = x.reshape(b, h, w, z // SQUARE**2, SQUARE, SQUARE).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * SQUARE, w * SQUARE, z // SQUARE**2)
