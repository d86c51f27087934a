"""Models and adapters on disk: read, write, check. Knows no model class; trees and configs come in from the caller.

A *bundle* is a folder: `bundle.json`, one Orbax checkpoint a component, `tokenizers/`. An *adapter* is a folder:
`adapter.json`, `adapter.safetensors`. Both are written under a temporary name and renamed when whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax.errors import UserError
from dynaip_jax.storage.codec import from_dict

FORMAT_VERSION = 1
BUNDLE_FILE, ADAPTER_FILE, ADAPTER_WEIGHTS = "bundle.json", "adapter.json", "adapter.safetensors"


@contextlib.contextmanager
def replacing(
    path: Path, *, overwrite: bool, option: str = "--out", marks: Sequence[str] = (BUNDLE_FILE, ADAPTER_FILE)
) -> Iterator[Path]:
    """A new empty folder that becomes `path` when the block ends well, and disappears when it does not.

    Raises `UserError` if `path` exists and `overwrite` is false, if it holds something else (none of the files `marks`),
    or if its parent is not a folder one can write to.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path}: already exists; choose another name or pass --overwrite")
    if path.is_dir() and any(path.iterdir()) and not any((path / f).is_file() for f in marks):
        raise UserError(
            f"{option} {path}: holds something else (there is no {' or '.join(marks)} in it); choose another name"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise UserError(f"{option} {path}: cannot write there ({e.strerror}); choose a folder you may write to") from e
    try:
        yield work
        work.chmod(0o755)
        old = path.with_name(f"{work.name}.old")
        if path.exists():
            path.rename(old)
        work.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
    except OSError as e:
        raise UserError(
            f"{option} {path}: writing failed ({e.strerror or e}); nothing was changed; free space or choose another disk"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def reserve(path: Path) -> None:
    """Allocates all blocks of a sparse file, where the system can: a full disk is an `OSError` now, not a crash when a
    memory map of it is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)


def fingerprint(params: Mapping[str, Any]) -> str:
    """sha256 over names, shapes and values of a tree of arrays; values are rounded to bfloat16 first, so that a model has
    the same fingerprint in whichever precision it is stored."""
    import jax.numpy as jnp

    digest = hashlib.sha256()
    for name, x in sorted(flatten(params).items()):
        digest.update(f"{name} {tuple(x.shape)}\n".encode())
        digest.update(np.ascontiguousarray(np.asarray(x).astype(jnp.bfloat16)).view(np.uint16).tobytes())
    return digest.hexdigest()


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tree -> {"a.b.c": leaf}."""
    from flax.traverse_util import flatten_dict

    return flatten_dict(params, sep=".")


def read_tree(path: Path) -> Any:
    """The parameter tree in a safetensors file whose names are paths in it, as `flatten` makes them."""
    from flax.traverse_util import unflatten_dict

    from dynaip_jax.storage.tensors import TensorFile

    file = TensorFile(path)
    return unflatten_dict({name: np.asarray(file[name]) for name in file}, sep=".")


def save_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays as an Orbax checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params)
    (folder / "commit_success.txt").unlink(missing_ok=True)  # names a folder of this machine, and only buckets need it


@dataclass(frozen=True)
class Bundle:
    """An opened model folder. `manifest` is the content of `bundle.json`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, families: tuple[str, ...]) -> Bundle:
        """Reads and checks `bundle.json`; no weights yet. Raises `UserError` for anything that is not a bundle we can read."""
        path = Path(path)
        if (path / "model_index.json").is_file():
            raise UserError(
                f"--model {path}: a diffusers folder; expected a bundle; convert it: "
                f"python -m tools.convert_torch_weights --source {path} --out BUNDLE"
            )
        manifest = _read_manifest(path, BUNDLE_FILE, "dynaip-bundle", "--model", "convert the model again")
        if manifest.get("family") not in families:
            raise UserError(
                f"{path / BUNDLE_FILE}: unknown family {manifest.get('family')!r}; expected one of {', '.join(families)}; "
                "use a newer dynaip_jax or another model"
            )
        if not isinstance(manifest.get("components"), dict):
            raise UserError(
                f"{path / BUNDLE_FILE}: no components; expected what the converter writes; convert the model again"
            )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """Of the transformer: what an adapter is trained against."""
        return self.manifest["fingerprint"]

    def config(self, name: str, config_class: type) -> Any:
        """The config of a component as `config_class`. Raises `UserError` if the bundle lacks it or the fields do not fit."""
        if name not in self.manifest["components"]:
            option = "--clip-vision CLIP_FOLDER" if name == "clip_vision" else f"a --source that has its {name}"
            raise UserError(
                f"{self.path}: has no {name} (only {', '.join(self.manifest['components'])}); convert the model again with {option}"
            )
        try:
            return from_dict(config_class, self.manifest["components"][name]["config"])
        except (TypeError, ValueError, KeyError) as e:
            raise UserError(f"{self.path / BUNDLE_FILE}: config of {name}: {e}; convert the model again") from e

    def load(self, name: str, target: Any) -> Any:
        """The parameters of a component, restored to the shapes, dtypes and shardings of `target`.

        `target`: a tree of `jax.ShapeDtypeStruct`. Raises `UserError` if the checkpoint is missing, damaged or of other shapes.
        """
        import orbax.checkpoint as ocp

        folder = self.path / name
        advice = "convert the model again"
        if not folder.is_dir():
            raise UserError(f"{folder}: missing; expected the weights of {name}; {advice}")
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.metadata(folder.absolute()).item_metadata.tree
                shapes = {k: tuple(v.shape) for k, v in flatten(found).items()}
                expected = {k: tuple(v.shape) for k, v in flatten(target).items()}
                if shapes != expected:
                    name_, got = next(iter(dict(set(shapes.items()) ^ set(expected.items())).items()))
                    raise UserError(
                        f"{folder}: weights do not fit the config in {BUNDLE_FILE}: {name_}: found {shapes.get(name_)}, "
                        f"expected {expected.get(name_)}; {advice}"
                    )
                return checkpointer.restore(folder.absolute(), target)
        except UserError:
            raise
        except (ValueError, KeyError, OSError, TypeError, RuntimeError, AttributeError) as e:
            raise UserError(
                f"{folder}: cannot be read ({str(e)[:160]}); expected whole weights of {name}; {advice}"
            ) from e


class NewComponent(NamedTuple):
    """A component to be written: its name, the architecture's fields, its parameters, and where they came from."""

    name: str
    config: dict[str, Any]
    params: Mapping[str, Any]
    provenance: list[dict[str, str]]


def write_bundle(
    path: Path,
    components: Iterable[NewComponent],
    *,
    family: str,
    schedule: dict[str, Any],
    text: dict[str, int],
    defaults: dict[str, Any],
    tokenizers: Mapping[str, Path],
    overwrite: bool = False,
) -> None:
    """Writes a bundle; `components` is consumed one at a time, so that only one needs to be in memory.

    `tokenizers`: "t5" and "clip" -> folders whose files are copied; the other arguments go into `bundle.json` as they are.
    """
    with replacing(path, overwrite=overwrite) as work:
        entries, base = {}, None
        for c in components:
            save_params(work / c.name, c.params)
            leaves = flatten(c.params).values()
            entries[c.name] = dict(
                config=c.config,
                parameters=sum(int(np.prod(x.shape)) for x in leaves),
                dtype=str(next(iter(leaves)).dtype),
                provenance=c.provenance,
            )
            if c.name == "transformer":
                base = fingerprint(c.params)
        for name, folder in tokenizers.items():
            shutil.copytree(folder, work / "tokenizers" / name)
        manifest = dict(
            format="dynaip-bundle",
            format_version=FORMAT_VERSION,
            family=family,
            fingerprint=base,
            components=entries,
            schedule=schedule,
            text=text,
            defaults=defaults,
        )
        (work / BUNDLE_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def replace_component(
    bundle: Bundle,
    path: Path,
    name: str,
    params: Mapping[str, Any],
    origin: dict[str, Any],
    *,
    config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a copy of `bundle` to `path` with other parameters for one component, of the same shapes unless another `config`
    is given; `origin` says where they came from."""
    with replacing(path, overwrite=overwrite, option="--bundle") as work:
        for part in bundle.path.iterdir():
            if part.is_dir() and part.name != name:
                shutil.copytree(part, work / part.name)
        save_params(work / name, params)
        manifest = json.loads(json.dumps(bundle.manifest))
        manifest["components"][name] |= dict(
            dtype=str(next(iter(flatten(params).values())).dtype),
            provenance=[*manifest["components"][name]["provenance"], origin],
            parameters=sum(int(np.prod(x.shape)) for x in flatten(params).values()),
            config=manifest["components"][name]["config"] if config is None else config,
        )
        if name == "transformer":
            manifest["fingerprint"] = fingerprint(params)
        (work / BUNDLE_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def write_adapter(
    path: Path,
    config: dict[str, Any],
    params: Mapping[str, Any],
    *,
    base: dict[str, str],
    step: int,
    conventions: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes an adapter folder. `base`: {"family", "fingerprint"} of the transformer it belongs to; `step`: training step."""
    from safetensors.numpy import save_file

    with replacing(path, overwrite=overwrite) as work:
        save_file({k: np.ascontiguousarray(v) for k, v in flatten(params).items()}, work / ADAPTER_WEIGHTS)
        manifest = dict(
            format="dynaip-adapter",
            format_version=FORMAT_VERSION,
            config=config,
            base=base,
            training_step=step,
            conventions=conventions,
        )
        (work / ADAPTER_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def read_adapter_manifest(path: str | Path, *, base: Bundle, any_base: bool = False) -> dict[str, Any]:
    """Reads and checks `adapter.json` against the bundle it is to be used with.

    Raises `UserError` for another format or family, and for another base model unless `any_base`.
    """
    path = Path(path)
    manifest = _read_manifest(path, ADAPTER_FILE, "dynaip-adapter", "--adapter", "export the adapter again")
    made_for, family = manifest.get("base", {}), base.manifest["family"]
    if made_for.get("family") != family:
        raise UserError(
            f"--adapter {path}: made for family {made_for.get('family')!r}; the model is {family!r}; use an adapter for it"
        )
    if made_for.get("fingerprint") != base.fingerprint and not any_base:
        raise UserError(
            f"--adapter {path}: made for another base (fingerprint {str(made_for.get('fingerprint'))[:12]}, this model has "
            f"{base.fingerprint[:12]}); use the model it was trained on, or --any-base to try a fine-tune of it"
        )
    return manifest


def read_adapter_weights(path: str | Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's tree in the shapes, dtypes and shardings of `target`; each device reads its part alone. Raises `UserError` if
    names, shapes or values are not right."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from dynaip_jax.storage.tensors import TensorFile

    path = Path(path) / ADAPTER_WEIGHTS
    file, expected = TensorFile(path), {k: tuple(v.shape) for k, v in flatten(target).items()}
    found = {k: file.shape(k) for k in file}
    if found != expected:
        wrong = sorted(dict(set(found.items()) ^ set(expected.items())))
        name = wrong[0]
        raise UserError(
            f"{path}: {len(wrong)} tensors do not fit {ADAPTER_FILE}; the first, {name}: found {found.get(name)}, "
            f"expected {expected.get(name)}; export the adapter again"
        )
    params = {}
    for k, t in flatten(target).items():
        x = jax.make_array_from_callback(t.shape, t.sharding, partial(_read_part, file, k, t.dtype))
        if not bool(jnp.isfinite(x).all()):
            raise UserError(f"{path}: {k} holds NaN or infinity; expected finite weights; export an earlier checkpoint")
        params[k] = x
    return unflatten_dict(params, sep=".")


def _read_part(file: Any, name: str, dtype: Any, part: tuple[slice, ...]) -> np.ndarray:
    return np.asarray(file.part(name, part), dtype)


def _read_manifest(path: Path, file: str, kind: str, option: str, remedy: str) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such folder; expected one with {file}; check the path")
    try:
        manifest = json.loads((path / file).read_text())
    except FileNotFoundError as e:
        raise UserError(
            f"{option} {path}: no {file} in it; expected a folder made by dynaip_jax; check the path"
        ) from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path / file}: not readable as JSON ({e}); {remedy}") from e
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise UserError(f'{path / file}: not a {kind} file; expected "format": "{kind}"; {remedy}')
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path / file}: format version {manifest.get('format_version')}; this program reads version {FORMAT_VERSION}; "
            f"{remedy} with this version, or install the one that wrote it"
        )
    return manifest


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
