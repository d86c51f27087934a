"""What a LoRA file asks for: every tensor in it belongs to one module, in one role, or is refused by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax import reading
from dynaip_jax.adapters.lora import Change, Read
from dynaip_jax.adapters.lora_shapes import check_shapes
from dynaip_jax.errors import UserError, reason, shortened
from dynaip_jax.public_names import PublicNames

METADATA = "lora_adapter_metadata"
PAIRS = {  # of low-rank factors, behind the module's name
    ".lora_down.weight": ".lora_up.weight", ".lora_A.weight": ".lora_B.weight", ".lora_A.default.weight": ".lora_B.default.weight",
    "_lora.down.weight": "_lora.up.weight", ".lora.down.weight": ".lora.up.weight", ".down.weight": ".up.weight", ".lora_A": ".lora_B",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
}  # fmt: skip
PLAIN = (
    "alpha", "diff", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
)  # fmt: skip
SUFFIXES = {  # behind the module's name -> the tensor's role
    **dict.fromkeys(PAIRS, "down"),
    **dict.fromkeys(PAIRS.values(), "up"),
    **dict.fromkeys((".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias"), "up_bias"),
    **{f".{role}": role for role in PLAIN},
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "magnitude"),
    **dict.fromkeys((".lora_magnitude_vector.default", ".lora_magnitude_vector.default.weight"), "magnitude"),
    **{".diff_b": "diff_bias", ".b_norm": "diff_bias", ".w_norm": "diff", ".reshape_weight": "reshape"},
    **{".set_weight": "set", ".weight": "set", ".scale": "set", ".bias": "set_bias"},
}
WHOLE = {"set", "set_bias"}
UNKNOWN_KINDS = (  # in names of tensors -> what is not read
    (r"\.oft_(blocks|diag)$|\.oft_R\b", "OFT"),
    (r"\.boft", "BOFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_mid\.weight$|\.(hada|lokr)_t[12]$", "a convolution"),
    (r"\.vera_lambda", "VeRA"),
    (r"\.ia3_l|\.on_input$", "IA3"),
    (r"^emb_params|string_to_param", "a textual inversion"),
)
EMBEDDING = "bundle_emb."
LARGEST = 1e6  # of alpha


class Asked(NamedTuple):
    """A file's changes, and lines worth showing."""

    changes: list[Change]
    notes: list[str]


def read_changes(where: str, tensors: Any, metadata: Mapping[str, str], names: PublicNames, read: Read) -> Asked:
    """What the tensors of a file ask of the modules of `names`.

    `where`: what errors call the file; `tensors`: its names, with `tensors.shape(name)`; `metadata`: of its header; `read(name)`
    gives a tensor as float32, of which only the single numbers are asked for here. Raises `UserError`, naming the tensor, for one
    that belongs to no module or stands twice, whose shape does not fit, whose partner is missing, or of a kind that is not known;
    and for a file that holds whole weights alone.
    """
    embeddings = sorted({t.removeprefix(EMBEDDING).split(".")[0] for t in tensors if t.startswith(EMBEDDING)})
    found = _modules(where, [t for t in tensors if not t.startswith(EMBEDDING)], names)
    if all(role in WHOLE for roles in found.values() for role in roles):
        what = "whole weights, no LoRA" if found else "no tensors of a LoRA"
        raise UserError(f"{where}: holds {what}; expected a LoRA for {names.family}; use another file")
    header, changes = _header(where, metadata), []
    for (component, name), roles in found.items():
        module = names.components[component].modules[name]
        shapes = {role: (tensor, tuple(tensors.shape(tensor))) for role, tensor in roles.items()}
        if "reshape" in roles:
            shapes["reshape"] = roles["reshape"], tuple(int(n) for n in read(roles["reshape"]).reshape(-1))
        check_shapes(where, module, shapes, names.family, names.wider.get(name))
        prefix = f"{names.headers[component]}."
        said = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
        alpha, rslora = _alpha(where, roles, read, said, name)
        used = {role: tensor for role, tensor in roles.items() if role not in ("alpha", "reshape")}
        first = f"{where}: {shortened(next(iter(roles.values())), 90)}"
        changes.append(Change(component, module, used, read, alpha, rslora, first))
    words = ", ".join(shortened(word, 40) for word in embeddings[:3])
    notes = [f"{where}: the words of its textual inversion ({words}) are not used, the rest is"] if embeddings else []
    return Asked(changes, notes)


def _modules(where: str, tensors: list[str], names: PublicNames) -> dict[tuple[str, str], dict[str, str]]:
    """(Component, module) -> role -> tensor."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    strangers = []
    for tensor in tensors:
        place = _place(tensor, names)
        if place is None:
            strangers.append(tensor)
            continue
        component, module, role = place
        roles = found.setdefault((component, module), {})
        if role in roles:
            both = f"{shortened(roles[role], 80)} and {shortened(tensor, 80)}"
            raise UserError(f"{where}: {both} are one tensor under two names; expected it once; use another file")
        roles[role] = tensor
    if strangers:
        raise _refusal(where, strangers, names)
    return found


def _place(tensor: str, names: PublicNames) -> tuple[str, str, str] | None:
    """Component, module (by its name with dots) and role of a tensor; None if it belongs to none."""
    for suffix, role in SUFFIXES.items():
        if not tensor.endswith(suffix):
            continue
        stem = tensor.removesuffix(suffix)
        for prefix in names.prefixes:
            if stem.startswith(prefix.text):
                known, rest = names.components[prefix.component], stem.removeprefix(prefix.text)
                name = known.flat.get(rest, "") if prefix.flat else rest
                if name in known.modules:
                    return prefix.component, name, role
    return None


def _refusal(where: str, strangers: list[str], names: PublicNames) -> UserError:
    """The error that says what the tensors seem to be of."""

    def first(pattern: str) -> str | None:
        return next((shortened(name, 80) for name in strangers if re.search(pattern, name)), None)

    for pattern, model in names.others:
        if hit := first(pattern):
            return UserError(f"{where}: made for {model} ({hit}); expected a LoRA for {names.family}; use another file")
    for pattern, kind in UNKNOWN_KINDS:
        if hit := first(pattern):
            return UserError(
                f"{where}: {hit} is of {kind}, which is not read; expected LoRA, DoRA, LoHa, LoKr or full differences"
            )
    return UserError(
        f"{where}: {len(strangers)} tensors that belong to no layer of this model, the first {shortened(strangers[0], 90)}; expected a "
        f"LoRA for {names.family} with as many blocks; use another file"
    )


def _header(where: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings of training that diffusers writes into the header."""
    if METADATA not in metadata:
        return {}
    try:
        values = reading.parse_json(metadata[METADATA].encode())
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}, not an object")
        return values
    except ValueError as e:
        raise UserError(
            f"{where}: {METADATA} in its header cannot be read ({reason(e)}); expected JSON; download it again"
        ) from e


def _alpha(
    where: str, roles: Mapping[str, str], read: Read, header: Mapping[str, Any], name: str
) -> tuple[float | None, bool]:
    """alpha (None: the rank), and whether the square root of the rank divides it. A tensor wins over the header."""
    if "alpha" in roles:
        alpha = read(roles["alpha"])
        if alpha.size != 1:
            raise UserError(f"{where}: {roles['alpha']} has {alpha.size} numbers; expected one; use another file")
        return _number(where, roles["alpha"], float(alpha.reshape(()))), False
    value = header.get("lora_alpha")
    patterns = header.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: alpha_pattern in its header is no object; expected one; download it again")
    for pattern, own in patterns.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UserError(
                f"{where}: alpha_pattern {shortened(pattern, 60)!r} in its header is no layer's name, which is not read; "
                "expected names; save it with alpha tensors"
            )
        if name == plain or name.endswith(f".{plain}"):
            value = own
            break
    rslora = bool(header.get("use_rslora"))
    return (None if value is None else _number(where, "lora_alpha in its header", value)), rslora


def _number(where: str, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise UserError(f"{where}: {what} is {shortened(str(value), 40)}; expected a finite number; use another file")
    return float(value)


def header_of_config(config: Mapping[str, Any], names: PublicNames) -> dict[str, str]:
    """PEFT's `adapter_config.json` as the metadata of a file."""
    return {
        METADATA: json.dumps(
            {f"{part}.{key}": value for part in names.headers.values() for key, value in config.items()}
        )
    }


def as_float32(x: np.ndarray, where: str, name: str) -> np.ndarray:
    """A tensor of a file as float32. Raises `UserError` unless it is of finite floats, or of whole numbers for single values."""
    value = x.astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(
            f"{where}: {shortened(name, 90)} holds NaN or infinity; expected finite numbers; download it again"
        )
    return value
