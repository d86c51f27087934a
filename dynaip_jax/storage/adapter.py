"""Adapters on disk: a folder with `adapter.json` and `adapter.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError
from dynaip_jax.storage import checksums
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import AnyPath, as_path, replacing
from dynaip_jax.storage.manifest import ADAPTER_FILE, MANIFESTS, flatten, read_manifest, write_manifest
from dynaip_jax.storage.tensors import TensorFile, check_weights, write_tree

ADAPTER_WEIGHTS, KIND = "adapter.safetensors", "dynaip-adapter"
REMEDY = "export the adapter again"


def write_adapter(
    path: str | Path,
    config: dict[str, Any],
    params: Mapping[str, Any],
    *,
    base: dict[str, str],
    step: int,
    conventions: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes an adapter folder. `base`: {"family", "fingerprint"} of the transformer it belongs to; `step`: training step."""
    with replacing(path, overwrite=overwrite, marks=MANIFESTS) as work:
        write_tree(work / ADAPTER_WEIGHTS, params)
        content = dict(config=config, base=base, training_step=step, conventions=conventions)
        content |= dict(checksums=checksums.of_files(work))
        write_manifest(work / ADAPTER_FILE, KIND, content)


def read_adapter_manifest(
    path: str | Path, *, base: Bundle, any_base: bool = False, field: str = "adapter"
) -> dict[str, Any]:
    """Reads and checks `adapter.json` against the bundle it is to be used with.

    Raises `UserError` for another format or family, and for another base model unless `any_base`; the message names the option `field`.
    """
    manifest = _manifest(as_path(path), field)
    made_for, family = manifest["base"], base.manifest["family"]
    if made_for.get("family") != family:
        raise UserError(
            f"`{field}` {path}: made for family {made_for.get('family')!r}; the model is {family!r}; use an adapter for it"
        )
    if made_for.get("fingerprint") != base.fingerprint and not any_base:
        anyway = ", or `any_base` to try a fine-tune of it" if field == "adapter" else ""
        raise UserError(
            f"`{field}` {path}: made for another base (fingerprint {str(made_for.get('fingerprint'))[:12]}, this model has "
            f"{base.fingerprint[:12]}); use the model it was trained on{anyway}"
        )
    return manifest


def read_adapter_weights(path: str | Path, target: Mapping[str, Any], *, verify: bool = True) -> dict[str, Any]:
    """The adapter's tree in the shapes, dtypes and shardings of `target`; each device reads its part alone. Raises `UserError` if
    names, shapes or values are not right, and, unless `verify` is False, if the file is not the one that was written."""
    import jax
    from flax.traverse_util import unflatten_dict

    weights = as_path(path) / ADAPTER_WEIGHTS
    file, expected = TensorFile(weights), {k: tuple(v.shape) for k, v in flatten(target).items()}
    stored = {k: file.shape(k) for k in file}
    if stored != expected:
        wrong = sorted(dict(set(stored.items()) ^ set(expected.items())))
        name = wrong[0]
        raise UserError(
            f"{weights}: {len(wrong)} tensors do not fit {ADAPTER_FILE}; the first, {name}: found {stored.get(name)}, "
            f"expected {expected.get(name)}; {REMEDY}"
        )
    if verify:
        stated = _manifest(as_path(path)).get("checksums", {})
        checksums.verify(as_path(path), stated, ADAPTER_WEIGHTS, ADAPTER_FILE, REMEDY)
    for name in file:
        check_weights(str(weights), name, file.dtype(name))
    params = {}
    for k, t in flatten(target).items():
        params[k] = jax.make_array_from_callback(t.shape, t.sharding, partial(_read_part, file, k, t.dtype))
    return unflatten_dict(params, sep=".")


def _manifest(path: AnyPath, field: str = "adapter") -> dict[str, Any]:
    fields = dict(config=dict[str, Any], base=dict[str, str])
    return read_manifest(path, ADAPTER_FILE, KIND, field, REMEDY, fields)


def _read_part(file: TensorFile, name: str, dtype: Any, part: tuple[slice, ...]) -> np.ndarray:
    values = np.asarray(file.part(name, part), dtype)
    if not np.isfinite(values).all():
        raise UserError(
            f"{file.files[0]}: {name} holds NaN or infinity; expected finite weights; export an earlier checkpoint"
        )
    return values
