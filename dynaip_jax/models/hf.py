"""Configs from the `config.json` of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dynaip_jax.errors import UserError, shortened
from dynaip_jax.schema import D


def config_from_hf(
    cls: type[D], hf: Mapping[str, Any], supported: Mapping[str, tuple], changes: Mapping[str, Any]
) -> D:
    """`cls` with the fields that the dictionary `hf` has, then `changes`; the other entries of `hf` are ignored.

    `supported` lists the values that an entry of `hf` may have where it is present. Raises `UserError` for another
    value and for sizes that `cls` refuses; the caller knows the file and names it.
    """
    for name, values in supported.items():
        if name in hf and hf[name] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(
                f"{name} {shortened(repr(hf[name]), 60)}: expected {expected}; use a checkpoint of that kind"
            )
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{**{k: v for k, v in hf.items() if k in names}, **changes})
    except ValueError as e:
        raise UserError(f"{e}; download it again or use a checkpoint of a supported kind") from e
