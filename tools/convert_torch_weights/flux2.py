"""FLUX.2 transformer: from BFL's layout (`flux-2-klein-4b.safetensors`) and diffusers' (`Flux2Transformer2DModel`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dynaip_jax import schema
from dynaip_jax.errors import UserError, reason
from dynaip_jax.models.flux2 import Flux2, Flux2Config
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
FIXED = dict(  # of diffusers' config.json: what no FLUX.2 has otherwise, and is the default
    patch_size=1, timestep_guidance_channels=256, eps=1e-6
)


MARKS = dict(bfl="single_stream_modulation.lin.weight", diffusers="single_stream_modulation.linear.weight")


def is_flux2(names: Iterable[str]) -> bool:
    """Whether tensors are of a FLUX.2 transformer, in either layout, by their names."""
    return any(mark in {n.removeprefix(COMMUNITY_PREFIX) for n in names} for mark in MARKS.values())


def layout_of(names: Iterable[str]) -> str:
    """ "bfl" or "diffusers", by the names present. Raises `UserError` if it is neither."""
    plain = {n.removeprefix(COMMUNITY_PREFIX) for n in names}
    for layout, mark in MARKS.items():
        if mark in plain:
            return layout
    kinds = sorted({n.split(".")[0] for n in plain})[:8]
    raise UserError(
        f"transformer: no single_stream_modulation among {kinds}; expected a FLUX.2 transformer in BFL's or diffusers' layout"
    )


def table(c: Flux2Config, layout: str) -> Table:
    """Every leaf of `Flux2(c)` and the source rows it is made of."""
    return (_bfl if layout == "bfl" else _diffusers)(c)


def params_from_torch(tensors: Mapping[str, Any], config: Flux2Config, **options) -> dict[str, Any]:
    """Parameters of `Flux2(config)` from `tensors` (name -> array) in either layout, with or without the community prefix.

    `options` are those of `engine.convert`. Raises `UserError` listing names that are missing, unexpected or of the wrong shape, and
    for a tensor that is not finite.
    """
    layout = layout_of(tensors)
    whole = Selection(tensors, prefix=COMMUNITY_PREFIX)
    return convert("transformer", whole, table(config, layout), target(config), **options)


def target(config: Flux2Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `Flux2(config)`."""
    return abstract_params(lambda key, spec: Flux2(config).init(key, **spec), Flux2.inputs_spec(config))


def _linear(path: str, *names: str, out: int, in_: int) -> Table:
    return linear(path, *names, out=out, in_=in_, bias=False)


def _norms(path: str, d: int, query: str, key: str) -> Table:
    return {f"{path}/query_norm/scale": copy(query, d), f"{path}/key_norm/scale": copy(key, d)}


def _fused(c: Flux2Config, inner: str, outer: str) -> Table:
    """The two products of a single block: rows q, k, v, gate, up of `inner`, and columns attention, MLP of `outer`."""
    w, m = c.hidden_size, c.mlp_dim
    rows, columns = (3 * w + 2 * m, w), (w, w + m)
    return {
        "attn/qkv/kernel": Leaf((Part(inner, rows, 0, 0, 3 * w),), (1, 0)),
        "mlp_in/kernel": Leaf((Part(inner, rows, 0, 3 * w, rows[0]),), (1, 0)),
        "attn_out/kernel": Leaf((Part(outer, columns, 1, 0, w),), (1, 0)),
        "mlp_out/kernel": Leaf((Part(outer, columns, 1, w, w + m),), (1, 0)),
    }


def _bfl(c: Flux2Config) -> Table:
    w, d, m = c.hidden_size, c.head_dim, c.mlp_dim

    def double(n: int) -> Table:
        t: Table = {}
        for s in ("img", "txt"):
            b = f"double_blocks.{n}.{s}"
            t |= _linear(f"{s}_attn/qkv", f"{b}_attn.qkv", out=3 * w, in_=w)
            t |= _norms(f"{s}_attn", d, *(f"{b}_attn.norm.{x}_norm.scale" for x in ("query", "key")))
            t |= _linear(f"{s}_attn_proj", f"{b}_attn.proj", out=w, in_=w)
            t |= _linear(f"{s}_mlp/in_layer", f"{b}_mlp.0", out=2 * m, in_=w)
            t |= _linear(f"{s}_mlp/out_layer", f"{b}_mlp.2", out=w, in_=m)
        return t

    def single(n: int) -> Table:
        b = f"single_blocks.{n}"
        norms = _norms("attn", d, *(f"{b}.norm.{x}_norm.scale" for x in ("query", "key")))
        return norms | _fused(c, f"{b}.linear1.weight", f"{b}.linear2.weight")

    t = _linear("img_in", "img_in", out=w, in_=c.in_channels) | _linear("txt_in", "txt_in", out=w, in_=c.context_in_dim)
    for name in ("time_in", *(["guidance_in"] if c.guidance_embed else [])):
        t |= _linear(f"{name}/in_layer", f"{name}.in_layer", out=w, in_=256)
        t |= _linear(f"{name}/out_layer", f"{name}.out_layer", out=w, in_=w)
    for s in ("img", "txt"):
        t |= _linear(f"double_modulation_{s}/lin", f"double_stream_modulation_{s}.lin", out=6 * w, in_=w)
    t |= _linear("single_modulation/lin", "single_stream_modulation.lin", out=3 * w, in_=w)
    t |= stack("double_blocks", [double(n) for n in range(c.depth)])
    t |= stack("single_blocks", [single(n) for n in range(c.depth_single_blocks)])
    t |= _linear("final_modulation/lin", "final_layer.adaLN_modulation.1", out=2 * w, in_=w)
    return t | _linear("final_linear", "final_layer.linear", out=c.out_channels, in_=w)


STREAMS = dict(  # of double blocks: names in `attn` of q, k, v; their norms; the projection; and the MLP
    img=(("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    txt=(("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
)


def _diffusers(c: Flux2Config) -> Table:
    w, d, m = c.hidden_size, c.head_dim, c.mlp_dim

    def double(n: int) -> Table:
        b = f"transformer_blocks.{n}"
        t: Table = {}
        for s, (qkv, norms, out, ff) in STREAMS.items():
            t |= _linear(f"{s}_attn/qkv", *(f"{b}.attn.{x}" for x in qkv), out=3 * w, in_=w)
            t |= _norms(f"{s}_attn", d, *(f"{b}.attn.{x}.weight" for x in norms))
            t |= _linear(f"{s}_attn_proj", f"{b}.attn.{out}", out=w, in_=w)
            t |= _linear(f"{s}_mlp/in_layer", f"{b}.{ff}.linear_in", out=2 * m, in_=w)
            t |= _linear(f"{s}_mlp/out_layer", f"{b}.{ff}.linear_out", out=w, in_=m)
        return t

    def single(n: int) -> Table:
        b = f"single_transformer_blocks.{n}.attn"
        norms = _norms("attn", d, f"{b}.norm_q.weight", f"{b}.norm_k.weight")
        return norms | _fused(c, f"{b}.to_qkv_mlp_proj.weight", f"{b}.to_out.weight")

    t = _linear("img_in", "x_embedder", out=w, in_=c.in_channels)
    t |= _linear("txt_in", "context_embedder", out=w, in_=c.context_in_dim)
    for name in ("time", *(["guidance"] if c.guidance_embed else [])):
        embedder = f"time_guidance_embed.{'timestep' if name == 'time' else name}_embedder"
        t |= _linear(f"{name}_in/in_layer", f"{embedder}.linear_1", out=w, in_=256)
        t |= _linear(f"{name}_in/out_layer", f"{embedder}.linear_2", out=w, in_=w)
    for s in ("img", "txt"):
        t |= _linear(f"double_modulation_{s}/lin", f"double_stream_modulation_{s}.linear", out=6 * w, in_=w)
    t |= _linear("single_modulation/lin", "single_stream_modulation.linear", out=3 * w, in_=w)
    t |= stack("double_blocks", [double(n) for n in range(c.depth)])
    t |= stack("single_blocks", [single(n) for n in range(c.depth_single_blocks)])
    # diffusers keeps (scale, shift); ours is BFL's (shift, scale)
    halves = (Part("norm_out.linear.weight", (2 * w, w), 0, *h) for h in ((w, 2 * w), (0, w)))
    t["final_modulation/lin/kernel"] = Leaf(tuple(halves), (1, 0))
    return t | _linear("final_linear", "proj_out", out=c.out_channels, in_=w)


def config_from_diffusers(hf: Mapping[str, Any]) -> Flux2Config:
    """`Flux2Config` from the `config.json` of a diffusers `Flux2Transformer2DModel`. Raises `UserError` for other classes."""
    if hf.get("_class_name", "Flux2Transformer2DModel") != "Flux2Transformer2DModel":
        raise UserError(
            f"transformer/config.json: _class_name {hf['_class_name']!r}; expected Flux2Transformer2DModel (FLUX.2)"
        )
    for name, value in FIXED.items():
        if hf.get(name, value) != value:
            raise UserError(f"transformer/config.json: {name} {hf[name]}; expected {value}, as FLUX.2 has it")
    heads, head_dim = (schema.typed(int, hf[name], name) for name in ("num_attention_heads", "attention_head_dim"))
    return Flux2Config(
        in_channels=hf["in_channels"],
        out_channels=hf.get("out_channels") or hf["in_channels"],
        context_in_dim=hf["joint_attention_dim"],
        hidden_size=heads * head_dim,
        mlp_ratio=hf.get("mlp_ratio", 3.0),
        num_heads=heads,
        depth=hf["num_layers"],
        depth_single_blocks=hf["num_single_layers"],
        axes_dim=schema.typed(tuple[int, ...], hf["axes_dims_rope"], "axes_dims_rope"),
        theta=hf.get("rope_theta", 2000),
        guidance_embed=hf.get("guidance_embeds", True),
    )


def config_from_bfl(shapes: Mapping[str, tuple[int, ...]]) -> Flux2Config:
    """`Flux2Config` of a BFL single file, read off its tensor shapes (it holds no config).

    The rotary axes leave no trace in the shapes: FLUX.2's own four of 32 are taken, for its head size 128. Raises `UserError` for
    another head size and if a tensor needed for this is missing.
    """
    shapes = {n.removeprefix(COMMUNITY_PREFIX): s for n, s in shapes.items()}
    try:
        width, in_channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        if head != 128:
            raise UserError(
                f"transformer: head size {head} in a BFL file; expected 128 (a single file does not say how other sizes "
                "split into rotary axes); convert it from a diffusers folder"
            )
        return Flux2Config(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            context_in_dim=shapes["txt_in.weight"][1],
            hidden_size=width,
            mlp_ratio=shapes["double_blocks.0.img_mlp.2.weight"][1] / width,
            num_heads=width // head,
            depth=numbered(shapes, "double_blocks."),
            depth_single_blocks=numbered(shapes, "single_blocks."),
            guidance_embed="guidance_in.in_layer.weight" in shapes,
        )
    except KeyError as e:
        raise UserError(
            f"transformer: tensor {e.args[0]} is missing; expected a whole FLUX.2 transformer in BFL's layout"
        ) from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"transformer: shapes do not fit FLUX.2 ({reason(e)}); expected BFL's flux-2-klein-4b.safetensors or the like"
        ) from e
