"""FLUX autoencoder: from BFL's layout (`ae.safetensors`) and diffusers' (`AutoencoderKL`, no quant convolutions)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax.errors import UserError, shortened
from dynaip_jax.models.vae import NORM_GROUPS, VAE, VAEConfig
from tools.convert_torch_weights.engine import Table, abstract_params, conv, convert, linear, norm, numbered

LAYOUTS = {"bfl": ("encoder.down.", "decoder.up."), "diffusers": ("encoder.down_blocks.", "decoder.up_blocks.")}


def layout_of(names: Iterable[str]) -> str:
    """ "bfl" or "diffusers", by the names present. Raises `UserError` if it is neither."""
    names = sorted(names)
    for layout, marks in LAYOUTS.items():
        if any(n.startswith(marks) for n in names):
            return layout
    raise UserError(
        f"vae: neither BFL's tensor names (encoder.down.*) nor diffusers' (encoder.down_blocks.*) among {names[:8]}; "
        "expected an autoencoder without quantisation, of 16 latent channels"
    )


def params_from_torch(tensors: Mapping[str, Any], config: VAEConfig, **options) -> dict[str, Any]:
    """Parameters of `VAE(config)` from `tensors` (name -> array) in either layout.

    `options` are those of `engine.convert`. Raises `UserError` listing names that are missing,
    unexpected or of the wrong shape, and for a tensor that is not finite.
    """
    return convert("vae", tensors, table(config, layout_of(tensors)), target(config), **options)


@lru_cache(maxsize=8)
def target(config: VAEConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `VAE(config)`."""
    return abstract_params(lambda key, x: VAE(config).init(key, **x), VAE.inputs_spec(config))


def table(config: VAEConfig, layout: str) -> Table:
    """Every leaf of `VAE(config)` and the source tensor it is made of. `layout`: "bfl" or "diffusers"."""
    bfl = layout == "bfl"
    widths, last = config.widths, len(config.widths) - 1

    def resnet(path: str, name: str, in_: int, out: int) -> Table:
        t = norm(f"{path}/norm1", f"{name}.norm1", in_) | conv(f"{path}/conv1", f"{name}.conv1", out, in_, 3)
        t |= norm(f"{path}/norm2", f"{name}.norm2", out) | conv(f"{path}/conv2", f"{name}.conv2", out, out, 3)
        if in_ != out:
            t |= conv(f"{path}/nin_shortcut", f"{name}.{'nin' if bfl else 'conv'}_shortcut", out, in_, 1)
        return t

    def level(path: str, name: str, in_: int, out: int, blocks: int, resample: str | None) -> Table:
        t: Table = {}
        for n in range(blocks):
            t |= resnet(f"{path}/block_{n}", f"{name}.{'block' if bfl else 'resnets'}.{n}", in_ if n == 0 else out, out)
        if resample:
            t |= conv(f"{path}/{resample}", f"{name}.{resample if bfl else f'{resample}rs.0'}.conv", out, out, 3)
        return t

    def attention(path: str, name: str, width: int) -> Table:
        t = norm(f"{path}/norm", f"{name}.{'norm' if bfl else 'group_norm'}", width)
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            if bfl:
                t |= conv(f"{path}/{ours}", f"{name}.{ours}", width, width, 1)
            else:
                t |= linear(f"{path}/{ours}", f"{name}.{theirs}", out=width, in_=width)
        return t

    def half(side: str, in_: int, inner: int, final: int, out: int) -> Table:
        """What both have: the first and last convolutions and the middle."""
        mid = f"{side}.mid" if bfl else f"{side}.mid_block"
        width = widths[-1]
        t = conv(f"{side}/conv_in", f"{side}.conv_in", inner, in_, 3)
        for n in (1, 2):
            t |= resnet(f"{side}/mid/block_{n}", f"{mid}.{f'block_{n}' if bfl else f'resnets.{n - 1}'}", width, width)
        t |= attention(f"{side}/mid/attn_1", f"{mid}.{'attn_1' if bfl else 'attentions.0'}", width)
        t |= norm(f"{side}/norm_out", f"{side}.{'norm_out' if bfl else 'conv_norm_out'}", final)
        return t | conv(f"{side}/conv_out", f"{side}.conv_out", out, final, 3)

    t = half("encoder", config.in_channels, config.ch, widths[-1], 2 * config.z_channels)
    t |= half("decoder", config.z_channels, widths[-1], widths[0], config.out_ch)
    for i, width in enumerate(widths):
        down = f"encoder.{'down' if bfl else 'down_blocks'}.{i}"
        in_ = widths[i - 1] if i else config.ch
        t |= level(f"encoder/down_{i}", down, in_, width, config.num_res_blocks, "downsample" if i < last else None)
        up = f"decoder.up.{i}" if bfl else f"decoder.up_blocks.{last - i}"  # diffusers counts from the coarsest
        in_ = widths[min(i + 1, last)]
        t |= level(f"decoder/up_{i}", up, in_, width, config.num_res_blocks + 1, "upsample" if i else None)
    return t


def config_from_diffusers(hf: Mapping[str, Any]) -> VAEConfig:
    """`VAEConfig` from the `config.json` of a diffusers `AutoencoderKL`; a switch it leaves out has diffusers' default.

    Raises `UserError` naming every setting that FLUX.1's autoencoder does not have, and for sizes that
    are missing or impossible.
    """
    widths = _widths(hf.get("block_out_channels"))
    expected = {
        "_class_name": ("AutoencoderKL", "AutoencoderKL"),
        "act_fn": ("silu", "silu"),
        "norm_num_groups": (NORM_GROUPS, NORM_GROUPS),
        "use_quant_conv": (True, False),
        "use_post_quant_conv": (True, False),
        "mid_block_add_attention": (True, True),
        "latents_mean": (None, None),
        "latents_std": (None, None),
        "down_block_types": (None, ["DownEncoderBlock2D"] * len(widths)),
        "up_block_types": (None, ["UpDecoderBlock2D"] * len(widths)),
    }
    wrong = []
    for field, (default, wanted) in expected.items():
        value = hf.get(field, default)
        if (list(value) if isinstance(value, tuple) else value) != wanted:
            wrong.append(f"{field} {shortened(repr(value), 80)}, expected {wanted!r}")
    if not widths or any(w < 1 or w % widths[0] for w in widths):
        wrong.append(f"block_out_channels {widths}, expected multiples of the first")
    if wrong:
        raise UserError(f"vae/config.json: {'; '.join(wrong)}; use the vae folder of a supported model")
    try:
        return VAEConfig(
            resolution=hf["sample_size"],
            in_channels=hf["in_channels"],
            ch=widths[0],
            out_ch=hf["out_channels"],
            ch_mult=tuple(w // widths[0] for w in widths),
            num_res_blocks=hf["layers_per_block"],
            z_channels=hf["latent_channels"],
            scale_factor=hf["scaling_factor"],
            shift_factor=0.0 if hf.get("shift_factor") is None else hf["shift_factor"],
        )
    except KeyError as e:
        raise UserError(
            f"vae/config.json: no {e.args[0]!r}; expected an AutoencoderKL's sizes; download it again"
        ) from e
    except (TypeError, ValueError) as e:
        raise UserError(f"vae/config.json: {e}; use the vae folder of a supported model") from e


def _widths(channels: Any) -> list[int]:
    """Channels of each level; empty for anything but a list of whole numbers."""
    fits = isinstance(channels, list | tuple) and all(type(w) is int for w in channels)
    return list(channels) if fits else []


SIZES = dict(  # where the shapes say the sizes: in BFL's layout and in diffusers'
    bfl=("encoder.down.", "encoder.down.{}.block.0.conv1.weight", "encoder.down.0.block."),
    diffusers=(
        "encoder.down_blocks.",
        "encoder.down_blocks.{}.resnets.0.conv1.weight",
        "encoder.down_blocks.0.resnets.",
    ),
)


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """`VAEConfig` of a single file in BFL's layout; see `config_from_shapes`."""
    return config_from_shapes(shapes, "bfl")


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str) -> VAEConfig:
    """`VAEConfig` of a file without a config, read off its tensor shapes; FLUX's scale and shift.

    Raises `UserError` if a tensor needed for this is missing or the sizes do not fit each other.
    """
    down, conv, blocks = SIZES[layout]

    try:
        ch, in_channels = shapes["encoder.conv_in.weight"][:2]
        levels = numbered(shapes, down)
        if not levels:
            raise ValueError(f"no {down}N")
        return VAEConfig(
            in_channels=in_channels,
            ch=ch,
            out_ch=shapes["decoder.conv_out.weight"][0],
            ch_mult=tuple(shapes[conv.format(n)][0] // ch for n in range(levels)),
            num_res_blocks=numbered(shapes, blocks),
            z_channels=shapes["decoder.conv_in.weight"][1],
        )
    except KeyError as e:
        raise UserError(f"vae: tensor {e.args[0]} is missing; expected a whole autoencoder; download it again") from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(f"vae: not an autoencoder of a supported kind: {e}; expected BFL's ae.safetensors") from e
