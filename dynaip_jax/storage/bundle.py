"""Models on disk: a folder with `bundle.json`, one Orbax checkpoint a component, and `tokenizers/`.

Knows no model class; trees and configs come in from the caller.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import OutOfMemory, UserError, out_of_memory, reason
from dynaip_jax.storage import checksums
from dynaip_jax.storage.codec import from_dict
from dynaip_jax.storage.folders import AnyPath, absolute, as_path, copy_file, copy_tree, replacing
from dynaip_jax.storage.manifest import BUNDLE_FILE, MANIFESTS, fingerprint, flatten, read_manifest, write_manifest
from dynaip_jax.storage.pieces import Hashes, Journal, NewLeaf, write_leaves

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
LARGEST_TOKENIZER_FILE = 1 << 27  # bytes
KIND, REMEDY = "dynaip-bundle", "convert the model again"
FIELDS = dict(  # of bundle.json, and their types
    family=str, fingerprint=str | None, schedule=dict[str, bool | int | float],
    text=dict[str, int], defaults=dict[str, int | float | None],
)  # fmt: skip
SIDES = (1, 1 << 15)
RANGES = dict(steps=(1, 10_000), height=SIDES, width=SIDES, t5_length=(1, 1 << 14), clip_length=(1, 1 << 14))


def save_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays as an Orbax checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(**_plainly()) as checkpointer:
        checkpointer.save(folder.absolute(), params)
    (folder / "commit_success.txt").unlink(missing_ok=True)  # it names a folder of this machine


def _plainly() -> dict[str, Any]:
    """Options of Orbax: weights are whole if there is a `bundle.json`, and need no file of their own that says so, as Orbax would
    ask for in a bucket."""
    import orbax.checkpoint as ocp

    return dict(temporary_path_class=ocp.path.atomicity.AtomicRenameTemporaryPath)


@lru_cache(maxsize=1)
def _quiet() -> None:
    """What Orbax raises of files that it cannot read, it also logs, with tracebacks; and reads of it that end after the first that
    failed would print one each."""
    for logger in map(logging.getLogger, ("absl", "asyncio")):
        logger.addFilter(lambda record: record.levelno < logging.ERROR)
    told = sys.unraisablehook
    sys.unraisablehook = lambda what: None if is_late(what.exc_value) else told(what)


def is_late(error: BaseException | None) -> bool:
    """Whether an error is of a read or write of Orbax that ended after one that failed, which has been told of."""
    return str(error).startswith(("Event loop is closed", "Encountered error while reading array index"))


@dataclass(frozen=True)
class Bundle:
    """An opened model folder, local or in a bucket. `manifest` is the content of `bundle.json`."""

    path: AnyPath
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], families: Collection[str], field: str = "bundle") -> Bundle:
        """Reads and checks `bundle.json`; no weights yet. `families`: names of those that can be used; `field`: the option that errors
        name.

        Raises `UserError` for anything that is not a bundle we can read.
        """
        path = as_path(path)
        if reading.is_file(path / "model_index.json"):
            raise UserError(
                f"`{field}` {path}: a diffusers folder; expected a bundle; convert it: "
                f"python -m tools.convert_torch_weights --source {path} --out BUNDLE"
            )
        manifest = read_manifest(path, BUNDLE_FILE, KIND, field, REMEDY, FIELDS)
        if manifest.get("family") not in families:
            raise UserError(
                f"{path / BUNDLE_FILE}: unknown family {manifest.get('family')!r}; expected one of {', '.join(families)}; "
                "use a newer dynaip_jax or another model"
            )
        components = manifest.get("components")
        if not isinstance(components, dict) or not all(map(_is_component, components.values())):
            raise UserError(
                f"{path / BUNDLE_FILE}: no components, each with its config; expected what the converter writes; {REMEDY}"
            )
        for name, (least, most) in RANGES.items():
            for values in (manifest["text"], manifest["defaults"]):
                if (value := values.get(name)) is not None and not least <= value <= most:
                    raise UserError(
                        f"{path / BUNDLE_FILE}: {name} {value}: expected a number from {least} to {most}; {REMEDY}"
                    )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """Of the transformer: what an adapter is trained against."""
        return self.manifest["fingerprint"]

    def config(self, name: str, config_class: type) -> Any:
        """The config of a component as `config_class`. Raises `UserError` if the bundle lacks it or the fields do not fit."""
        if name not in self.manifest["components"]:
            encoders = dict(clip_vision="--clip-vision CLIP_FOLDER", siglip="--clip-vision SIGLIP_FOLDER")
            source = encoders.get(name, f"a --source that has its {name}")
            raise UserError(
                f"{self.path}: has no {name} (only {', '.join(self.manifest['components'])}); convert the model again with {source}"
            )
        try:
            return from_dict(config_class, self.manifest["components"][name]["config"])
        except (TypeError, ValueError, KeyError) as e:
            raise UserError(f"{self.path / BUNDLE_FILE}: config of {name}: {reason(e)}; {REMEDY}") from e

    def part(self, name: str, *, verify: bool = True) -> AnyPath:
        """The folder of a component or of "tokenizers". Raises `UserError` if it is missing or, unless `verify` is False, if a file in
        it is not the one that was written; bundles of before checksums are taken as they are."""
        folder = self.path / name
        if not reading.is_dir(folder):
            raise UserError(
                f"{folder}: missing; expected the {'' if name == 'tokenizers' else 'weights of '}{name}; {REMEDY}"
            )
        if verify:
            checksums.verify(
                self.path, self.manifest.get("checksums", {}), name, BUNDLE_FILE, "copy or convert the model again"
            )
        return folder

    def load(self, name: str, target: Any, *, verify: bool = True) -> Any:
        """The parameters of a component, restored to the shapes, dtypes and shardings of `target`.

        `target`: a tree of `jax.ShapeDtypeStruct`; `verify`: see `part`. Raises `UserError` if the checkpoint is missing, damaged or of
        other shapes.
        """
        import orbax.checkpoint as ocp

        folder = self.part(name, verify=verify)
        _quiet()
        try:
            with ocp.StandardCheckpointer(**_plainly()) as checkpointer:
                stored = checkpointer.metadata(absolute(folder)).item_metadata.tree
                shapes = {k: tuple(v.shape) for k, v in flatten(stored).items()}
                expected = {k: tuple(v.shape) for k, v in flatten(target).items()}
                if shapes != expected:
                    first = next(iter(dict(set(shapes.items()) ^ set(expected.items()))))
                    raise UserError(
                        f"{folder}: weights do not fit the config in {BUNDLE_FILE}: {first}: found {shapes.get(first)}, "
                        f"expected {expected.get(first)}; {REMEDY}"
                    )
                return checkpointer.restore(absolute(folder), target)
        except UserError:
            raise
        except Exception as e:  # Orbax and TensorStore each raise their own
            if out_of_memory(e):
                raise OutOfMemory(reason(e, 160)) from e
            raise UserError(
                f"{folder}: cannot be read ({reason(e)}); expected whole weights of {name}; {REMEDY}"
            ) from e


def _is_component(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("config"), dict)


class NewComponent(NamedTuple):
    """A component to be written: its name, the architecture's fields, its parameters, and where they came from, or from which files.

    Parameters are a tree of arrays, or, if they do not all fit into memory, `NewLeaf`s by name ("a.b.c").
    """

    name: str
    config: dict[str, Any]
    params: Mapping[str, Any]
    provenance: Sequence[dict[str, Any] | Path]


def write_bundle(
    path: str | os.PathLike[str],
    components: Iterable[NewComponent],
    *,
    family: str,
    schedule: dict[str, Any],
    text: dict[str, int],
    defaults: dict[str, Any],
    tokenizers: Mapping[str, AnyPath],
    overwrite: bool = False,
    resume: str | None = None,
    step: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes a bundle; `components` is consumed one at a time, so that only one needs to be in memory.

    `tokenizers`: name -> the folder whose `TOKENIZER_FILES` are copied; `resume`: a key, in hexadecimal, of all that is to be written:
    what a killed writer with the same one has written is kept; `step` is told of bytes that are written; the other arguments go into
    `bundle.json` as they are.
    """
    with replacing(path, overwrite=overwrite, marks=MANIFESTS, resume=resume) as work:
        entries, base = {}, None
        journal = Journal(work)
        hashes, sums = Hashes(journal), dict[str, str]()
        with contextlib.closing(hashes):
            for c in components:
                digest, entries[c.name], own = _write_component(work, c, journal, hashes, step)
                sums |= {f"{c.name}/{file}": value for file, value in own.items()}
                base = digest if c.name == "transformer" else base
            for entry in entries.values():
                entry["provenance"] = [_origin(p) for p in entry["provenance"]]
        journal.close()
        for name, folder in tokenizers.items():
            _copy_tokenizer(folder, work / "tokenizers" / name)
        content = dict(
            family=family, fingerprint=base, components=entries, schedule=schedule, text=text, defaults=defaults
        )
        content |= dict(checksums=checksums.of_files(work, sums))
        write_manifest(work / BUNDLE_FILE, KIND, content)


def _write_component(
    work: Path, c: NewComponent, journal: Journal, hashes: Hashes, step: Callable[[int], object]
) -> tuple[str | None, dict[str, Any], dict[str, str]]:
    """Its fingerprint, what `bundle.json` says of it, and the checksums of its files that are known."""
    provenance = [(file, hashes.ask(file)) if isinstance(file, Path) else file for file in c.provenance]
    leaves = flatten(c.params)
    digest: str | None = None
    sums: dict[str, str] = {}
    if all(isinstance(x, NewLeaf) for x in leaves.values()):
        digest, sums = write_leaves(work / c.name, leaves, journal, step)
    else:
        save_params(work / c.name, c.params)
        digest = fingerprint(c.params) if c.name == "transformer" else None
    entry = dict(
        config=c.config,
        parameters=sum(math.prod(x.shape) for x in leaves.values()),
        dtype=str(next(iter(leaves.values())).dtype),
        provenance=provenance,
    )
    return digest, entry, sums


def _origin(entry: Any) -> dict[str, Any]:
    """What `bundle.json` says of a source: what it is told, or a file's name and sha256."""
    return entry if isinstance(entry, dict) else dict(file=entry[0].name, sha256=entry[1].result())


def _copy_tokenizer(source: AnyPath, target: Path) -> None:
    """Copies the files that tokenizers are read from, and no others. Raises `UserError` for one that is larger than any, or a link; but
    those of a downloaded snapshot, which lead to its own files, are followed."""
    for name in TOKENIZER_FILES:
        file = _of_snapshot(source / name)
        if not (os.path.lexists(file) if isinstance(file, Path) else file.is_file()):
            continue
        size = file.lstat().st_size if isinstance(file, Path) else file.stat().length
        if size > LARGEST_TOKENIZER_FILE:
            raise UserError(
                f"{source / name}: {size} bytes; expected at most {LARGEST_TOKENIZER_FILE} of a tokenizer's file; download it again"
            )
        copy_file(file, target / name)


def _of_snapshot(path: AnyPath) -> AnyPath:
    """The file that `path` leads to if it is a link in MODEL/snapshots/REVISION/ into MODEL/blobs/, as huggingface_hub lays out what it
    downloads; otherwise `path`."""
    if not isinstance(path, Path) or not path.is_symlink():
        return path
    folder, file = path.parent.resolve(), path.resolve()
    models = [p.parent.parent for p in (folder, *folder.parents) if p.parent.name == "snapshots"]
    return file if any(file.parent == model / "blobs" for model in models) else path


def replace_component(
    bundle: Bundle,
    path: str | os.PathLike[str],
    name: str,
    params: Mapping[str, Any],
    origin: dict[str, Any],
    *,
    config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a copy of `bundle` to `path` with other parameters for one component, of the same shapes unless another `config`
    is given; `origin` says where they came from."""
    with replacing(path, overwrite=overwrite, marks=MANIFESTS, field="bundle") as work:
        for part in bundle.path.iterdir():
            if part.name in {"tokenizers", *bundle.manifest["components"]} - {name}:
                copy_tree(part, work / part.name)
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
        kept = {file: value for file, value in manifest.get("checksums", {}).items() if not file.startswith(f"{name}/")}
        manifest["checksums"] = checksums.of_files(work, kept)
        write_manifest(work / BUNDLE_FILE, KIND, manifest)
