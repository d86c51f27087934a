"""LoRA files of every naming and kind for a tiny FLUX.1, each beside what it is to make of the weights, in float64 and BFL's layout."""

import json

import numpy as np

from dynaip_jax.models.flux import FluxConfig

CONFIG = FluxConfig.tiny(depth=2, depth_single_blocks=2)
W, M, R = CONFIG.hidden_size, CONFIG.mlp_dim, 3
QKV, IN, LAST = "double_blocks.1.txt_attn.qkv", "img_in", "final_layer.adaLN_modulation.1"
ONE, TWO, MLP, NORM = (
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
    "double_blocks.0.img_mlp.0",
    "double_blocks.0.img_attn.norm.query_norm",
)
THEIRS = {  # BFL -> diffusers; rows of BFL's matrix, in diffusers' order
    QKV: [
        (f"transformer_blocks.1.attn.add_{x}_proj", [slice(j * W, j * W + W)]) for j, x in enumerate(("q", "k", "v"))
    ],
    ONE: [
        (f"single_transformer_blocks.0.{x}", [slice(j * W, j * W + (M if j == 3 else W))])
        for j, x in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    ],
    TWO: [("single_transformer_blocks.1.proj_out", [slice(0, W)])],
    MLP: [("transformer_blocks.0.ff.net.0.proj", [slice(0, M)])],
    LAST: [("norm_out.linear", [slice(W, 2 * W), slice(0, W)])],
    IN: [("x_embedder", [slice(0, W)])],
}
LINEARS = tuple(THEIRS)
XLABS = {
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", slice(0, 3 * W)),
    "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", slice(0, W)),
    "single_blocks.0.processor.qkv_lora": (ONE, slice(0, 3 * W)),
    "single_blocks.1.processor.proj_lora": (TWO, slice(0, W)),
}


def bfl_weights(names):
    """Random weights under BFL's names, float32: of all tensors of `names` (`flux_names`)."""
    rng = np.random.default_rng(5)
    draw = {name: rng.normal(size=t.shape, scale=0.2) for name, t in names.tensors.items()}
    for name, module in names.modules.items():  # BFL calls the scale of a norm NAME.scale
        if not module.columns and f"{name}.weight" in draw:
            draw[f"{name}.scale"] = draw.pop(f"{name}.weight")
    return {name: x.astype(np.float32) for name, x in draw.items()}


class File:
    """A file's tensors and header, and the weights that it is to make."""

    def __init__(self, base, seed=0):
        self.weights = {name: x.astype(np.float64) for name, x in base.items()}
        self.base, self.tensors, self.metadata, self.rng = base, {}, {}, np.random.default_rng(seed)

    def draw(self, *shape):
        return self.rng.normal(size=shape, scale=0.3).astype(np.float32)

    def factors(self, out, in_, rank=R):
        return self.draw(rank, in_), self.draw(out, rank)

    def add(self, name, delta, rows=slice(None)):
        self.weights[f"{name}.weight"][rows] += delta

    def shape(self, name):
        return self.tensors[name].shape


def exact(up, down):
    return up.astype(np.float64) @ down.astype(np.float64)


def low_rank(base, prefix, halves, alpha=None, flat=False, linears=LINEARS):
    """BFL's names with a prefix and two endings."""
    file = File(base)
    for name in linears:
        down, up = file.factors(*base[f"{name}.weight"].shape)
        key = prefix + (name.replace(".", "_") if flat else name)
        file.tensors |= {key + halves[0]: down, key + halves[1]: up}
        if alpha is not None:
            file.tensors[f"{key}.alpha"] = np.float32(alpha)
        file.add(name, exact(up, down) * (1 if alpha is None else alpha / R))
    return file


def diffusers(
    base,
    prefix="transformer.",
    flat=False,
    header=None,
    alpha=None,
    halves=(".lora_A.weight", ".lora_B.weight"),
    rank=R,
):
    """diffusers' names: rows of BFL's matrices."""
    file = File(base)
    for name, parts in THEIRS.items():
        for theirs, rows in parts:
            out = sum(r.stop - r.start for r in rows)
            down, up = file.factors(out, base[f"{name}.weight"].shape[1], rank)
            key = prefix + (theirs.replace(".", "_") if flat else theirs)
            file.tensors |= {key + halves[0]: down, key + halves[1]: up}
            if alpha is not None:
                file.tensors[f"{key}.alpha"] = np.float32(alpha)
            scale, at = 1.0 if alpha is None else alpha / rank, 0
            if header:
                special = header.get("transformer.alpha_pattern", {}).get(theirs, header["transformer.lora_alpha"])
                scale = special / (rank**0.5 if header.get("transformer.use_rslora") else rank)
            for r in rows:
                file.add(name, scale * exact(up, down)[at : at + r.stop - r.start], r)
                at += r.stop - r.start
    if header:
        file.metadata = {"lora_adapter_metadata": json.dumps(header)}
    return file


def omi(base):
    file = File(base)
    for name, count in ((QKV, 3), (ONE, 4)):
        for j in range(count):
            rows = slice(j * W, j * W + (M if j == 3 else W))
            down, up = file.factors(rows.stop - rows.start, W)
            key = f"transformer.{name}.{j}"
            file.tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": np.float32(2),
            }
            file.add(name, exact(up, down) * 2 / R, rows)
    return file


def xlabs(base):
    file = File(base)
    for key, (name, rows) in XLABS.items():
        down, up = file.factors(rows.stop - rows.start, base[f"{name}.weight"].shape[1])
        file.tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        file.add(name, exact(up, down), rows)
    return file


def dora(base, of_inputs):
    """Magnitudes of rows (PEFT's) or of inputs (OneTrainer's)."""
    file = low_rank(base, "diffusion_model.", (".lora_A.weight", ".lora_B.weight"))
    for name in LINEARS:
        new = file.weights[f"{name}.weight"]
        norm = np.linalg.norm(new, axis=0 if of_inputs else 1, keepdims=True)
        magnitude = (norm * file.rng.uniform(0.5, 1.5, norm.shape)).astype(np.float32)
        key, kept = (".dora_scale", magnitude) if of_inputs else (".lora_magnitude_vector", magnitude[:, 0])
        file.tensors[f"diffusion_model.{name}{key}"] = kept
        file.weights[f"{name}.weight"] = new * (magnitude / norm)
    return file


def lokr(base, first=False, second=True):
    """Kronecker products, either factor of which is a product itself; alpha acts only if one is."""
    file = File(base)
    for name in LINEARS:
        out, in_ = base[f"{name}.weight"].shape
        key, whole = f"lycoris_{name.replace('.', '_')}", []
        for n, split, shape in ((1, first, (4, 2)), (2, second, (out // 4, in_ // 2))):
            if split:
                b, a = file.factors(*shape)
                file.tensors |= {f"{key}.lokr_w{n}_a": a, f"{key}.lokr_w{n}_b": b}
                whole.append(exact(a, b))
            else:
                whole.append(file.draw(*shape))
                file.tensors[f"{key}.lokr_w{n}"] = whole[-1]
        file.tensors[f"{key}.alpha"] = np.float32(2)
        file.add(name, np.kron(*(x.astype(np.float64) for x in whole)) * (2 / R if first or second else 1))
    return file


def loha(base):
    file = File(base)
    for name in LINEARS:
        (b1, a1), (b2, a2) = (file.factors(*base[f"{name}.weight"].shape) for _ in range(2))
        key = f"lora_unet_{name.replace('.', '_')}"
        file.tensors |= {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2}
        file.tensors[f"{key}.alpha"] = np.float32(2)
        file.add(name, exact(a1, b1) * exact(a2, b2) * 2 / R)
    return file


def differences(base):
    """Of weights, biases and norms; and some replaced."""
    file = low_rank(base, "diffusion_model.", (".lora_down.weight", ".lora_up.weight"), linears=(QKV, ONE))
    for name in (QKV, ONE, TWO):
        bias = file.draw(*base[f"{name}.bias"].shape)
        file.tensors[f"diffusion_model.{name}.diff_b"] = bias
        file.weights[f"{name}.bias"] += bias
    whole, scale = file.draw(*base[f"{IN}.weight"].shape), file.draw(CONFIG.head_dim)
    file.tensors |= {f"diffusion_model.{IN}.diff": whole, f"diffusion_model.{NORM}.scale.diff": scale}
    file.add(IN, whole)
    file.weights[f"{NORM}.scale"] += scale
    new = file.draw(*base[f"{MLP}.weight"].shape)
    file.tensors[f"diffusion_model.{MLP}.set_weight"] = new
    file.tensors[f"diffusion_model.{MLP}.reshape_weight"] = np.array(new.shape, np.int64)
    file.weights[f"{MLP}.weight"] = new.astype(np.float64)
    file.tensors[f"diffusion_model.{MLP}.bias"] = file.draw(*base[f"{MLP}.bias"].shape)
    file.weights[f"{MLP}.bias"] = file.tensors[f"diffusion_model.{MLP}.bias"].astype(np.float64)
    return file


def control(base):
    """BFL's own: biases of the up matrix, and norms that replace the base's; without the wider input."""
    file = low_rank(base, "", (".lora_A.weight", ".lora_B.weight"), linears=(QKV, ONE, TWO, LAST))
    for name in (QKV, ONE, TWO, LAST):
        file.tensors[f"{name}.lora_B.bias"] = file.draw(*base[f"{name}.bias"].shape)
        file.weights[f"{name}.bias"] += file.tensors[f"{name}.lora_B.bias"]
    file.tensors[f"{NORM}.scale"] = file.draw(CONFIG.head_dim)
    file.weights[f"{NORM}.scale"] = file.tensors[f"{NORM}.scale"].astype(np.float64)
    return file


HEADER = {
    "transformer.r": R,
    "transformer.lora_alpha": 2,
    "transformer.use_rslora": False,
    "transformer.alpha_pattern": {"transformer_blocks.0.ff.net.0.proj": 5},
}
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
FILES = {
    "diffusers": diffusers,
    "diffusers, alphas": lambda base: diffusers(base, alpha=2),
    "diffusers, header": lambda base: diffusers(base, header=HEADER),
    "diffusers, rslora": lambda base: diffusers(base, header=HEADER | {"transformer.use_rslora": True}),
    "diffusers, old": lambda base: diffusers(base, halves=(".lora.down.weight", ".lora.up.weight")),
    "PEFT": lambda base: diffusers(base, "base_model.model.", halves=(".lora_A.default.weight", ".lora_B.default.weight")),
    "OneTrainer": lambda base: diffusers(base, "lora_transformer_", flat=True, alpha=1, halves=DOWN_UP),
    "OMI": omi,
    "kohya": lambda base: low_rank(base, "lora_unet_", DOWN_UP, alpha=1, flat=True),
    "XLabs": xlabs,
    "XLabs in ComfyUI": lambda base: low_rank(base, "diffusion_model.", DOWN_UP),
    "BFL's names": lambda base: low_rank(base, "diffusion_model.", AB),
    "fal": lambda base: low_rank(base, "base_model.model.", AB),
    "control": control,
    "DoRA of rows": lambda base: dora(base, of_inputs=False),
    "DoRA of inputs": lambda base: dora(base, of_inputs=True),
    "LoKr": lokr,
    "LoKr, first": lambda base: lokr(base, True, False),
    "LoKr, both": lambda base: lokr(base, True, True),
    "LoKr, none": lambda base: lokr(base, False, False),
    "LoHa": loha,
    "differences": differences,
}  # fmt: skip
