"""Files of weights, known by what they hold and not by what they are called: safetensors, GGUF, pickles; one file or a set of shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import reading
from dynaip_jax.errors import UserError, printable, reason, shortened
from dynaip_jax.storage.pickled import Pickled
from dynaip_jax.storage.tensors import TensorFile
from tools.convert_torch_weights import clip
from tools.convert_torch_weights.gguf_file import GGUFFile
from tools.convert_torch_weights.quantised import Dequantised

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.(safetensors|sft|bin))")
SUFFIXES = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".ckpt", ".bin", ".msgpack")
TAIL = 1 << 16  # bytes of zeros at the end of a file that are too many to be weights


class Opened(NamedTuple):
    """Tensors by name, not read yet, and the files they lie in."""

    tensors: Mapping[str, Any]
    files: list[Path]


def open_weights(path: Path) -> Opened:
    """What a file holds, or the set that a shard, or an index, belongs to; quantised weights are undone where they are read.

    Raises `UserError`, by its name, for what is no file of weights.
    """
    if path.name.endswith(".json") and ".index." in path.name:
        return _opened(TensorFile(path))
    if not reading.exists(path):
        raise UserError(f"{path}: no such file; expected a safetensors file; check the path or download it again")
    if shard := SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard['stem']}{shard['suffix']}.index.json")
        if reading.is_file(index):
            return open_weights(index)
        return _shards(path, shard)
    return _one(path)


def _one(path: Path) -> Opened:
    kind = _kind(path)
    if kind == "gguf":
        return Opened(GGUFFile(path), [path])
    if kind == "pickle":
        return Opened(Dequantised(Pickled([path])), [path])
    if path.suffix == ".msgpack":
        return Opened(clip.from_flax(path), [path])
    return _opened(TensorFile(path))


def _shards(path: Path, shard: re.Match[str]) -> Opened:
    """A set that has no index, by the numbers in the names."""
    count = int(shard["count"])
    files = [
        path.with_name(f"{shard['stem']}-{n:05}-of-{shard['count']}{shard['suffix']}") for n in range(1, count + 1)
    ]
    if missing := [f for f in files if not reading.is_file(f)]:
        raise UserError(f"{missing[0]}: missing; expected all {count} shards of {shard['stem']}; download it again")
    if _kind(path) == "pickle":
        return Opened(Dequantised(Pickled(files)), files)
    return _opened(TensorFile(path, files))


def _opened(file: TensorFile) -> Opened:
    for path in file.files:
        _check_tail(path)
    return Opened(Dequantised(file, file.metadata), file.files)


def in_folder(folder: Path, stem: str) -> Opened:
    """The weights of a component's folder, called `stem` with a suffix: whole or in shards, of one variant.

    Raises `UserError` if there are none, or more than one set.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if reading.is_dir(folder) else []
    pattern = rf"{re.escape(stem)}(?P<set>(\.[A-Za-z]\w*)?(\.safetensors|\.safetensors\.index(\.\w+)?\.json|-\d{{5}}-of-\d{{5}}.*\.safetensors))"
    sets: dict[str, Path] = {}
    for name in names:
        if match := re.fullmatch(pattern, name):
            rest = re.sub(r"-\d{5}-of-\d{5}", "-shards", match["set"])
            sets.setdefault(rest, folder / name)
    indexed = {rest for rest in sets if ".index" in rest}
    listed = {_plain(rest) for rest in indexed}
    found = [path for rest, path in sets.items() if not ("-shards" in rest and _plain(rest) in listed)]
    if len(found) > 1:
        raise UserError(
            f"{folder}: holds {found[0].name} and {found[1].name}; expected one set of weights; remove the one that is not meant"
        )
    if found:
        return open_weights(found[0])
    for name in (
        "flax_model.msgpack",
        f"{stem}.bin",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ):
        if name in names:
            return open_weights(folder / name)
    for name in names:
        if re.fullmatch(r"(pytorch_model|diffusion_pytorch_model)-00001-of-\d{5}\.bin", name):
            return open_weights(folder / name)
    raise UserError(f"{folder}: no weights; expected {stem}.safetensors, its shards, or {stem}.bin; download it again")


def _plain(rest: str) -> str:
    """A set's variant: "" or such as "bf16"."""
    words = [w for w in re.split(r"[.\-]", rest) if w not in ("", "safetensors", "index", "json", "shards")]
    return words[0] if words else ""


def _kind(path: Path) -> str:
    """ "gguf", "pickle" or "tensors", by the first bytes. Raises `UserError` for what is known to be none, by its name."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({reason(e)}); expected a file of weights; check the path") from e
    size = path.stat().st_size
    text = start.lstrip().lower()
    wrong = None
    if not start:
        wrong = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        wrong = f"is a git-LFS pointer of {size} bytes, not the file it points to (git lfs pull fetches that)"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        wrong = "is a web page, as a site sends it to who is not logged in"
    elif start[:1] in (b"{", b"[") and start[8:9] != b"{":
        shown = shortened(printable(start.decode(errors="replace")), 60)
        wrong = f"is a message of a site ({shown})"
    if wrong:
        raise UserError(f"{path}: {wrong}; expected a whole safetensors file; download it again")
    if start.startswith(b"GGUF"):
        return "gguf"
    return "pickle" if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{" else "tensors"


def _check_tail(path: Path) -> None:
    """Raises `UserError` for a file that ends in zeros but does not begin with them: room that was taken for a download."""
    if not isinstance(path, Path) or (size := path.stat().st_size) < 4 * TAIL:
        return
    with open(path, "rb") as file:
        file.seek(size - TAIL)
        if any(file.read(TAIL)):
            return
        zeros = TAIL
        start = 8 + int.from_bytes(_at(file, 0, 8), "little")
        while zeros < size - start:
            more = min(1 << 20, size - start - zeros)
            block = _at(file, size - zeros - more, more)
            if any(block):
                raise UserError(
                    f"{path}: its last {zeros} bytes and more are zeros; expected weights there; the download did not end: download it again"
                )
            zeros += more


def _at(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
