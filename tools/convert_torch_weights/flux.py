"""FLUX transformer: from BFL's layout (`flux1-dev.safetensors`) and diffusers' (`FluxTransformer2DModel`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax import schema
from dynaip_jax.errors import UserError, reason
from dynaip_jax.models.flux import Flux, FluxConfig
from tools.convert_torch_weights.engine import (
    Leaf,
    Part,
    Table,
    abstract_params,
    convert,
    copy,
    linear,
    numbered,
    stack,
)
from tools.convert_torch_weights.selection import Selection

COMMUNITY_PREFIX = "model.diffusion_model."


def layout_of(names) -> str:
    """ "bfl" or "diffusers", by the names present. Raises `UserError` if it is neither."""
    names = {n.removeprefix(COMMUNITY_PREFIX).split(".")[0] for n in names}
    for layout, mark in (("bfl", "img_in"), ("diffusers", "x_embedder")):
        if mark in names:
            return layout
    raise UserError(
        f"transformer: neither BFL's tensor names (img_in.*) nor diffusers' (x_embedder.*) among {sorted(names)[:8]}; "
        "expected a FLUX.1 transformer"
    )


def table(c: FluxConfig, layout: str) -> Table:
    """Every leaf of `Flux(c)` and the source rows it is made of."""
    return (_bfl if layout == "bfl" else _diffusers)(c)


def params_from_torch(tensors: Mapping[str, Any], config: FluxConfig, **options) -> dict[str, Any]:
    """Parameters of `Flux(config)` from `tensors` (name -> array) in either layout; community prefixes are taken off.

    `options` are those of `engine.convert` (dtype, empty). Raises `UserError` listing names that are missing, unexpected
    or of the wrong shape, and tensors that are not finite.
    """
    layout = layout_of(tensors)
    tensors = Selection(tensors, prefix=COMMUNITY_PREFIX)
    return convert("transformer", tensors, table(config, layout), target(config), **options)


@lru_cache(maxsize=8)
def target(config: FluxConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `Flux(config)`."""
    spec = Flux.inputs_spec(config)
    return abstract_params(lambda key, x: Flux(config).init(key, **x), spec)


def _columns(path: str, name: str, out: int, widths: tuple[int, int], which: int) -> Table:
    """The kernel of one input half of a Linear whose input joins two, of `widths`."""
    start = which * widths[0]
    return {
        f"{path}/kernel": Leaf((Part(f"{name}.weight", (out, sum(widths)), 1, start, start + widths[which]),), (1, 0))
    }


def _bfl(c: FluxConfig) -> Table:
    w, d, m = c.hidden_size, c.head_dim, c.mlp_dim

    def embedder(name: str, in_: int) -> Table:
        return linear(f"{name}/in_layer", f"{name}.in_layer", out=w, in_=in_) | linear(
            f"{name}/out_layer", f"{name}.out_layer", out=w, in_=w
        )

    def attn(path: str, name: str) -> Table:
        return {
            f"{path}/query_norm/scale": copy(f"{name}.query_norm.scale", d),
            f"{path}/key_norm/scale": copy(f"{name}.key_norm.scale", d),
        }

    def double(n: int) -> Table:
        t: Table = {}
        for s in ("img", "txt"):
            b = f"double_blocks.{n}.{s}"
            t |= linear(f"{s}_mod/lin", f"{b}_mod.lin", out=6 * w, in_=w)
            t |= linear(f"{s}_attn/qkv", f"{b}_attn.qkv", out=3 * w, in_=w, bias=c.qkv_bias)
            t |= attn(f"{s}_attn", f"{b}_attn.norm")
            t |= linear(f"{s}_attn_proj", f"{b}_attn.proj", out=w, in_=w)
            t |= linear(f"{s}_mlp/in_layer", f"{b}_mlp.0", out=m, in_=w)
            t |= linear(f"{s}_mlp/out_layer", f"{b}_mlp.2", out=w, in_=m)
        return t

    def single(n: int) -> Table:
        b = f"single_blocks.{n}"
        t = linear("modulation/lin", f"{b}.modulation.lin", out=3 * w, in_=w) | attn("attn", f"{b}.norm")
        for path, start, stop in (("attn/qkv", 0, 3 * w), ("mlp_in", 3 * w, 3 * w + m)):
            rows = Part(f"{b}.linear1.weight", (3 * w + m, w), 0, start, stop)
            t[f"{path}/kernel"] = Leaf((rows,), (1, 0))
            t[f"{path}/bias"] = Leaf((Part(f"{b}.linear1.bias", (3 * w + m,), 0, start, stop),))
        t |= _columns("attn_out", f"{b}.linear2", w, (w, m), 0) | _columns("mlp_out", f"{b}.linear2", w, (w, m), 1)
        t["mlp_out/bias"] = copy(f"{b}.linear2.bias", w)
        return t

    t = linear("img_in", "img_in", out=w, in_=c.in_channels) | linear("txt_in", "txt_in", out=w, in_=c.context_in_dim)
    t |= embedder("time_in", 256) | embedder("vector_in", c.vec_in_dim)
    t |= embedder("guidance_in", 256) if c.guidance_embed else {}
    t |= stack("double_blocks", [double(n) for n in range(c.depth)])
    t |= stack("single_blocks", [single(n) for n in range(c.depth_single_blocks)])
    t |= linear("final_modulation/lin", "final_layer.adaLN_modulation.1", out=2 * w, in_=w)
    return t | linear("final_linear", "final_layer.linear", out=c.out_channels, in_=w)


def _diffusers(c: FluxConfig) -> Table:
    w, d, m = c.hidden_size, c.head_dim, c.mlp_dim

    def embedder(path: str, name: str, in_: int) -> Table:
        name = f"time_text_embed.{name}"
        return linear(f"{path}/in_layer", f"{name}.linear_1", out=w, in_=in_) | linear(
            f"{path}/out_layer", f"{name}.linear_2", out=w, in_=w
        )

    def attn(path: str, name: str, qkv: tuple[str, ...], norms: tuple[str, str], bias: bool = True) -> Table:
        t = linear(f"{path}/qkv", *(f"{name}.{x}" for x in qkv), out=3 * w, in_=w, bias=bias)
        t[f"{path}/query_norm/scale"] = copy(f"{name}.{norms[0]}.weight", d)
        t[f"{path}/key_norm/scale"] = copy(f"{name}.{norms[1]}.weight", d)
        return t

    plain, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

    def double(n: int) -> Table:
        b = f"transformer_blocks.{n}"
        t = attn("img_attn", f"{b}.attn", plain, ("norm_q", "norm_k"), c.qkv_bias)
        t |= attn("txt_attn", f"{b}.attn", added, ("norm_added_q", "norm_added_k"), c.qkv_bias)
        for s, norm1, out, ff in (
            ("img", "norm1", "to_out.0", "ff"),
            ("txt", "norm1_context", "to_add_out", "ff_context"),
        ):
            t |= linear(f"{s}_mod/lin", f"{b}.{norm1}.linear", out=6 * w, in_=w)
            t |= linear(f"{s}_attn_proj", f"{b}.attn.{out}", out=w, in_=w)
            t |= linear(f"{s}_mlp/in_layer", f"{b}.{ff}.net.0.proj", out=m, in_=w)
            t |= linear(f"{s}_mlp/out_layer", f"{b}.{ff}.net.2", out=w, in_=m)
        return t

    def single(n: int) -> Table:
        b = f"single_transformer_blocks.{n}"
        t = linear("modulation/lin", f"{b}.norm.linear", out=3 * w, in_=w)
        t |= attn("attn", f"{b}.attn", plain, ("norm_q", "norm_k"))
        t |= linear("mlp_in", f"{b}.proj_mlp", out=m, in_=w)
        t |= _columns("attn_out", f"{b}.proj_out", w, (w, m), 0) | _columns("mlp_out", f"{b}.proj_out", w, (w, m), 1)
        t["mlp_out/bias"] = copy(f"{b}.proj_out.bias", w)
        return t

    t = linear("img_in", "x_embedder", out=w, in_=c.in_channels)
    t |= linear("txt_in", "context_embedder", out=w, in_=c.context_in_dim)
    t |= embedder("time_in", "timestep_embedder", 256) | embedder("vector_in", "text_embedder", c.vec_in_dim)
    t |= embedder("guidance_in", "guidance_embedder", 256) if c.guidance_embed else {}
    t |= stack("double_blocks", [double(n) for n in range(c.depth)])
    t |= stack("single_blocks", [single(n) for n in range(c.depth_single_blocks)])
    # diffusers keeps (scale, shift); ours is BFL's (shift, scale)
    halves = [(w, 2 * w), (0, w)]
    norm_out = "norm_out.linear"
    t["final_modulation/lin/kernel"] = Leaf(
        tuple(Part(f"{norm_out}.weight", (2 * w, w), 0, *h) for h in halves), (1, 0)
    )
    t["final_modulation/lin/bias"] = Leaf(tuple(Part(f"{norm_out}.bias", (2 * w,), 0, *h) for h in halves))
    return t | linear("final_linear", "proj_out", out=c.out_channels, in_=w)


def config_from_diffusers(hf: Mapping[str, Any]) -> FluxConfig:
    """`FluxConfig` from the `config.json` of a diffusers `FluxTransformer2DModel`. Raises `UserError` for other classes."""
    if hf.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
        raise UserError(
            f"transformer/config.json: _class_name {hf['_class_name']!r}; expected FluxTransformer2DModel (FLUX.1)"
        )
    if hf.get("patch_size", 1) != 1:
        raise UserError(f"transformer/config.json: patch_size {hf['patch_size']}; expected 1, as FLUX.1 has it")
    heads, head_dim = (schema.typed(int, hf[name], name) for name in ("num_attention_heads", "attention_head_dim"))
    return FluxConfig(
        in_channels=hf["in_channels"],
        out_channels=hf.get("out_channels") or hf["in_channels"],
        vec_in_dim=hf["pooled_projection_dim"],
        context_in_dim=hf["joint_attention_dim"],
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=hf["num_layers"],
        depth_single_blocks=hf["num_single_layers"],
        axes_dim=schema.typed(tuple[int, ...], hf["axes_dims_rope"], "axes_dims_rope"),
        guidance_embed=hf["guidance_embeds"],
    )


# where the shapes of a file without a config say the sizes: names in BFL's layout and in diffusers'
SIZES = dict(
    bfl=dict(
        image="img_in.weight", head="double_blocks.0.img_attn.norm.query_norm.scale", out="final_layer.linear.weight", context="txt_in.weight",
        vector="vector_in.in_layer.weight", mlp="double_blocks.0.img_mlp.0.weight", double="double_blocks.", single="single_blocks.",
        guidance="guidance_in.in_layer.weight",
    ),
    diffusers=dict(
        image="x_embedder.weight", head="transformer_blocks.0.attn.norm_q.weight", out="proj_out.weight", context="context_embedder.weight",
        vector="time_text_embed.text_embedder.linear_1.weight", mlp="transformer_blocks.0.ff.net.0.proj.weight", double="transformer_blocks.",
        single="single_transformer_blocks.", guidance="time_text_embed.guidance_embedder.linear_1.weight",
    ),
)  # fmt: skip


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
    """`FluxConfig` of a single file in BFL's layout; see `config_from_shapes`."""
    return config_from_shapes({n.removeprefix(COMMUNITY_PREFIX): s for n, s in shapes.items()}, "bfl")


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str) -> FluxConfig:
    """`FluxConfig` of a file without a config, read off its tensor shapes.

    The rotary axes leave no trace in the shapes: FLUX.1's own (16, 56, 56) are taken, for its head size 128. Raises
    `UserError` for another head size and if a tensor needed for this is missing.
    """
    names = SIZES[layout]

    try:
        width, in_channels = shapes[names["image"]]
        head = shapes[names["head"]][0]
        if head != 128:
            raise UserError(
                f"transformer: head size {head} in a single file; expected 128 (it does not say how other sizes "
                "split into rotary axes); convert it from a diffusers folder"
            )
        return FluxConfig(
            in_channels=in_channels,
            out_channels=shapes[names["out"]][0],
            vec_in_dim=shapes[names["vector"]][1],
            context_in_dim=shapes[names["context"]][1],
            hidden_size=width,
            mlp_ratio=shapes[names["mlp"]][0] / width,
            num_heads=width // head,
            depth=numbered(shapes, names["double"]),
            depth_single_blocks=numbered(shapes, names["single"]),
            guidance_embed=names["guidance"] in shapes,
        )
    except KeyError as e:
        raise UserError(
            f"transformer: tensor {e.args[0]} is missing; expected a whole FLUX.1 transformer; use another file, or download it again"
        ) from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"transformer: shapes do not fit FLUX.1 ({reason(e)}); expected BFL's flux1-dev.safetensors or the like"
        ) from e
