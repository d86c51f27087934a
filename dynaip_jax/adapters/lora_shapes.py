"""Whether the tensors that a LoRA file has for a module are whole and of its sizes, told from their names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from dynaip_jax.errors import UserError, shortened
from dynaip_jax.public_names import Module

Shape = tuple[int, ...]
HADA, BIASES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("up_bias", "diff_bias", "set_bias")
CHANGES = {"down", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff"}  # roles of what a magnitude may act on
PARTNERS = {  # role -> what has to be beside it: all of one of these
    "down": (("up",),),
    "up": (("down",),),
    "up_bias": (("down",),),
    **dict.fromkeys(HADA, (HADA,)),
    "lokr_w1": (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
    "lokr_w2": (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
    "lokr_w1_a": (("lokr_w1_b", "lokr_w2"), ("lokr_w1_b", "lokr_w2_a")),
    "lokr_w1_b": (("lokr_w1_a",),),
    "lokr_w2_a": (("lokr_w2_b", "lokr_w1"), ("lokr_w2_b", "lokr_w1_a")),
    "lokr_w2_b": (("lokr_w2_a",),),
}


def check_shapes(
    where: str, module: Module, tensors: Mapping[str, tuple[str, Shape]], family: str, wider: str | None = None
) -> None:
    """Raises `UserError`, naming the tensor, unless those of a module (role -> name, shape) are whole and fit it; `wider`: what the
    file is if its matrix has more inputs than the module."""
    shapes = {role: shape[:2] if shape[2:] == (1, 1) else shape for role, (_, shape) in tensors.items()}
    _check_whole(where, module, {role: shortened(name, 90) for role, (name, _) in tensors.items()})
    out = module.shape[0]
    for role, made in _made(shapes).items():
        name = shortened(tensors[role][0], 90)
        if made is None:
            raise UserError(f"{where}: {name} {list(shapes[role])} does not fit its other half; use another file")
        if wider and len(made) == 2 and made[0] == out and made[1] > module.columns:
            raise UserError(f"{where}: {wider} ({name}); expected a LoRA for pictures from text; use another file")
        expected = (out,) if role in BIASES else module.shape
        if made != expected:
            raise UserError(
                f"{where}: {name} is for {list(made)}, the layer of this model has {list(expected)}; expected a LoRA for {family} of "
                "its sizes"
            )
    if "magnitude" in shapes and shapes["magnitude"] not in ((out,), (out, 1), (1, module.columns)):
        name, shape = tensors["magnitude"]
        raise UserError(
            f"{where}: {shortened(name, 90)} is {list(shape)}; expected [{out}] or [1, {module.columns}]; use another file"
        )


def _check_whole(where: str, module: Module, names: Mapping[str, str]) -> None:
    """Raises `UserError` for halves, and for what contradicts itself."""
    for role, choices in PARTNERS.items():
        if role in names and not any(all(partner in names for partner in choice) for choice in choices):
            raise UserError(
                f"{where}: {names[role]} stands without its other half; expected a whole file; download it again"
            )
    for role in ("alpha", "magnitude", "reshape"):
        acted_on = CHANGES | ({"set"} if role == "reshape" else set())
        if role in names and not acted_on & names.keys():
            raise UserError(f"{where}: {names[role]} stands without factors; expected a whole file; download it again")
    if "set" in names and (CHANGES & names.keys()):
        raise UserError(f"{where}: {names['set']} replaces what other tensors change; use another file")
    if "set_bias" in names and ({"up_bias", "diff_bias"} & names.keys()):
        raise UserError(f"{where}: {names['set_bias']} replaces what other tensors change; use another file")
    if not module.columns and (odd := names.keys() - {"diff", "set", *BIASES}):
        raise UserError(f"{where}: {names[min(odd)]} is for a matrix, the layer is a norm; use another file")
    if module.bias is None and (odd := set(BIASES) & names.keys()):
        raise UserError(f"{where}: {names[min(odd)]} is for a bias, which the layer has not; use another file")


def _made(shapes: Mapping[str, Shape]) -> dict[str, Shape | None]:
    """Role -> the shape of what its tensors make together; None if they do not fit each other."""
    made: dict[str, Shape | None] = {
        role: shapes[role] for role in ("diff", "set", "reshape", *BIASES) if role in shapes
    }
    if "down" in shapes:
        made["down"] = _product(shapes["up"], shapes["down"])
    if "hada_w1_a" in shapes:
        first, second = (_product(shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"]) for n in (1, 2))
        made["hada_w1_a"] = first if first == second else None
    factors = [_factor(shapes, f"lokr_w{n}") for n in (1, 2)]
    role = next((role for role in ("lokr_w1", "lokr_w1_a") if role in shapes), None)
    if role is not None:
        a, b = factors
        made[role] = (a[0] * b[0], a[1] * b[1]) if a is not None and b is not None else None
    return made


def _factor(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    if name in shapes:
        return shapes[name] if len(shapes[name]) == 2 else None
    return _product(shapes[f"{name}_a"], shapes[f"{name}_b"]) if f"{name}_a" in shapes else None


def _product(a: Shape, b: Shape) -> Shape | None:
    """Of matrices `[out, r]` and `[r, in]`."""
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] and min(*a, *b) > 0 else None
