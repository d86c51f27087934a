"""FLUX.2's autoencoder: from BFL's layout (`ae.safetensors`) and diffusers' (`AutoencoderKLFlux2`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dynaip_jax.errors import UserError, shortened
from dynaip_jax.models.flux2_vae import SQUARE, Flux2VAE, Flux2VAEConfig
from dynaip_jax.models.vae import NORM_GROUPS, VAEConfig
from tools.convert_torch_weights import vae
from tools.convert_torch_weights.engine import Table, abstract_params, conv, convert, copy
from tools.convert_torch_weights.selection import Selection

MEAN, VARIANCE, UNUSED = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


def is_flux2(names: Iterable[str]) -> bool:
    """Whether tensors are of FLUX.2's autoencoder, in either layout, by their names."""
    return MEAN in names


def layout_of(names: Iterable[str]) -> str:
    """ "bfl" or "diffusers", by the names present. Raises `UserError` if it is neither, or another autoencoder."""
    names = list(names)
    if not is_flux2(names):
        raise UserError(f"vae: no {MEAN}; expected FLUX.2's autoencoder, whose latents have stored statistics")
    return vae.layout_of(names)


def params_from_torch(tensors: Mapping[str, Any], config: Flux2VAEConfig, **options) -> dict[str, Any]:
    """Parameters of `Flux2VAE(config)` from `tensors` (name -> array) in either layout, without the count of batches that its statistics
    were taken over.

    `options` are those of `engine.convert`. Raises `UserError` listing names that are missing, unexpected or of the wrong shape, and
    for a tensor that is not finite.
    """
    kept = Selection(tensors, lambda name: name != UNUSED)
    return convert("vae", kept, table(config, layout_of(tensors)), target(config), **options)


def target(config: Flux2VAEConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `Flux2VAE(config)`."""
    return abstract_params(lambda key, x: Flux2VAE(config).init(key, **x), Flux2VAE.inputs_spec(config))


def table(c: Flux2VAEConfig, layout: str) -> Table:
    """Every leaf of `Flux2VAE(c)` and the source tensor it is made of. `layout`: "bfl" or "diffusers"."""
    inside = ("encoder.", "decoder.") if layout == "bfl" else ("", "")
    z = c.z_channels
    t = conv("quant", f"{inside[0]}quant_conv", 2 * z, 2 * z, 1) | conv(
        "post_quant", f"{inside[1]}post_quant_conv", z, z, 1
    )
    for half, config in (("encoder/", c.encoding), ("decoder/", c.decoding)):
        t |= {path: leaf for path, leaf in vae.table(config, layout).items() if path.startswith(half)}
    statistics = {"mean": MEAN, "variance": VARIANCE}
    return t | {f"statistics/{path}": copy(name, c.latent_channels) for path, name in statistics.items()}


def config_from_diffusers(hf: Mapping[str, Any]) -> Flux2VAEConfig:
    """`Flux2VAEConfig` from the `config.json` of a diffusers `AutoencoderKLFlux2`; a switch it leaves out has diffusers' default.

    Raises `UserError` naming every setting that FLUX.2's autoencoder does not have, and for sizes that are missing or impossible.
    """
    widths = _whole(hf.get("block_out_channels"))
    decoder = _whole(hf.get("decoder_block_out_channels") or widths)
    levels = len(widths)
    expected = dict(
        _class_name="AutoencoderKLFlux2",
        act_fn="silu",
        norm_num_groups=NORM_GROUPS,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
        patch_size=[SQUARE, SQUARE],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    wrong = []
    for field, wanted in expected.items():
        value = hf.get(field, wanted)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            wrong.append(f"{field} {shortened(repr(value), 80)}, expected {wanted!r}")
    for channels in (widths, decoder):
        if not channels or any(w < 1 or w % channels[0] for w in channels):
            wrong.append(f"block_out_channels {channels}, expected multiples of the first")
    if not wrong and [w * widths[0] for w in decoder] != [w * decoder[0] for w in widths]:
        wrong.append(f"decoder_block_out_channels {decoder}, expected the multiples of block_out_channels {widths}")
    if wrong:
        raise UserError(f"vae/config.json: {'; '.join(wrong)}; use the vae folder of a supported model")
    try:
        return Flux2VAEConfig(
            resolution=hf["sample_size"],
            in_channels=hf["in_channels"],
            ch=widths[0],
            decoder_ch=decoder[0],
            out_ch=hf["out_channels"],
            ch_mult=tuple(w // widths[0] for w in widths),
            num_res_blocks=hf["layers_per_block"],
            z_channels=hf["latent_channels"],
            norm_eps=hf.get("batch_norm_eps", 1e-4),
        )
    except KeyError as e:
        raise UserError(
            f"vae/config.json: no {e.args[0]!r}; expected an AutoencoderKLFlux2's sizes; download it again"
        ) from e
    except (TypeError, ValueError) as e:
        raise UserError(f"vae/config.json: {e}; use the vae folder of a supported model") from e


def _whole(channels: Any) -> list[int]:
    """Channels of each level; empty for anything but a list of whole numbers."""
    return [w for w in channels if type(w) is int] if isinstance(channels, list | tuple) else []


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]]) -> Flux2VAEConfig:
    """`Flux2VAEConfig` of a BFL single file, read off its tensor shapes (it holds no config).

    Raises `UserError` if a tensor needed for this is missing or the sizes do not fit each other.
    """
    encoder: VAEConfig = vae.config_from_bfl(shapes)
    names = ("resolution", "in_channels", "ch", "out_ch", "ch_mult", "num_res_blocks", "z_channels")
    try:
        finest = shapes["decoder.norm_out.weight"][0]
        return Flux2VAEConfig(
            decoder_ch=finest // encoder.ch_mult[0], **{name: getattr(encoder, name) for name in names}
        )
    except KeyError as e:
        raise UserError(f"vae: tensor {e.args[0]} is missing; expected a whole autoencoder in BFL's layout") from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(f"vae: not an autoencoder of a supported kind: {e}; expected BFL's ae.safetensors") from e
