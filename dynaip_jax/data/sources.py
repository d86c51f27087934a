"""What a user has on disk -> rows, not yet checked. Three layouts, one stream.

*manifest*: a file `metadata.jsonl`, one JSON object a line: `reference` and `target` (picture files; they may be the
same), `caption`, `subject` (the words of the caption that name it), optionally `mask` (the subject in the reference, white
on black, of the reference's size). Paths are relative to the manifest's folder.

*subjects200k*: the layout of the Subjects200K dataset: two square pictures of one subject side by side in one file, with
padding around, as parquet files (as downloaded) or as a `metadata.jsonl` with the same fields: `image` (a file),
`description` (`item`, `description_0` of the left picture, `description_1` of the right one, `description_valid`),
`quality_assessment` (three scores from 0 to 5). Each file gives two rows: left as the reference of right, and the reverse.

*folder*: pictures, each its own reference and target, captioned by `NAME.txt` beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import images, reading
from dynaip_jax.data.check import BadRow, Picture, Row
from dynaip_jax.errors import UserError, reason

MANIFEST = "metadata.jsonl"
AVIF = (".avif",) if "AVIF" in images.FORMATS else ()
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", *AVIF)
NOT_READ = (
    ".heic",
    ".heif",
    ".avif",
    ".jfif",
    ".jxl",
    ".jp2",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".psd",
    ".svg",
)  # pictures too
SCORES = ("compositeStructure", "objectConsistency", "imageQuality")


class Source(NamedTuple):
    """`rows` in order, from `entries` lines, files or parquet rows; `ignored`: lines that say what beside them is not read."""

    entries: int
    rows: Iterator[Row | BadRow]
    ignored: tuple[str, ...] = ()


def read_manifest(path: Path) -> Source:
    """The rows of a manifest, given as the file or as its folder. Raises `UserError` if it cannot be read or is empty."""
    lines = _Lines(path / MANIFEST if reading.is_dir(path) else path)
    folder = path if reading.is_dir(path) else path.parent

    def row(number: int, entry: dict[str, Any]) -> Row:
        fields = ("reference", "target", "caption", "subject")
        _check_fields(entry, fields, optional=("mask",))
        reference, target, caption, subject = (_text(entry, k) for k in fields)
        if not _names(subject, caption):
            raise UserError(
                f"subject {subject!r} is not in the caption {caption!r}; expected words of the caption; copy them"
            )
        mask = folder / _text(entry, "mask") if entry.get("mask") is not None else None
        return Row(number, Picture(folder / target), Picture(folder / reference), caption, subject, mask)

    return Source(len(lines), _each(lines, lambda number, entry: iter((row(number, entry),))))


def read_subjects200k(path: Path, min_quality: int = 0) -> Source:
    """Two rows a picture: each half as the reference of the other, captioned by its own description.

    `path`: a folder of parquet files (or with a folder `data` of them), or with a `metadata.jsonl`, or such a file.
    Entries with a `quality_assessment` score below `min_quality`, and those whose description is marked as not valid,
    are passed over in silence: the dataset itself says they are not fit. Raises `UserError` as `read_manifest`.
    """
    shards = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    folder = path if reading.is_dir(path) else path.parent

    def rows(number: int, entry: dict[str, Any]) -> Iterator[Row]:
        description, quality = entry.get("description"), entry.get("quality_assessment") or {}
        if not isinstance(description, dict) or not isinstance(quality, dict):
            raise UserError(
                "'description' and 'quality_assessment' are not objects; expected the fields of Subjects200K"
            )
        scores = [quality.get(s) for s in SCORES]
        if description.get("description_valid") is False:
            return
        if min_quality and not all(isinstance(s, int | float) and s >= min_quality for s in scores):
            return
        picture = _composite(entry.get("image"), folder, number)
        captions = [_text(description, f"description_{n}") for n in (0, 1)]
        item = description.get("item")
        halves = picture._replace(half="left"), picture._replace(half="right")
        for reference, target, caption in ((halves[1], halves[0], captions[0]), (halves[0], halves[1], captions[1])):
            subject = item if isinstance(item, str) and item.strip() and _names(item, caption) else ""
            yield Row(number, target, reference, caption, subject)

    if shards:
        count, entries = _parquet(shards)
        return Source(count, _each(entries, rows))
    lines = _Lines(path / MANIFEST if reading.is_dir(path) else path)
    return Source(len(lines), _each(lines, rows))


def read_folder(path: Path) -> Source:
    """A row for each picture under `path`, in sorted order. Raises `UserError` if there is none."""
    if not reading.is_dir(path):
        raise UserError(
            f"`source` {path}: no such folder; expected one of pictures with a .txt beside each; check the path"
        )
    everything = sorted(path.rglob("*"))
    files = [f for f in everything if f.suffix.lower() in SUFFIXES]
    ignored = _ignored(path, everything)
    if not files:
        also = "".join(f"; {line.removeprefix(f'{path}: ')}" for line in ignored)
        raise UserError(
            f"`source` {path}: empty, no picture in it{also}; expected {images.KINDS} files; check the path"
        )

    def rows() -> Iterator[Row | BadRow]:
        for number, file in enumerate(files, 1):
            text = file.with_suffix(".txt")
            try:
                caption = text.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as e:
                yield BadRow(
                    number, f"{text}: caption cannot be read ({e}); expected UTF-8 text beside {file.name}; write it"
                )
                continue
            if caption:
                yield Row(number, Picture(file), Picture(file), caption)
            else:
                yield BadRow(
                    number, f"{text}: empty caption; expected a sentence that describes {file.name}; write one"
                )

    return Source(len(files), rows(), ignored)


def _ignored(folder: Path, entries: list[Path]) -> tuple[str, ...]:
    """What of a folder is passed over though it may be meant."""
    kinds = Counter(f.suffix.lower() for f in entries if f.suffix.lower() in set(NOT_READ) - set(SUFFIXES))
    links = [f for f in entries if f.is_symlink() and f.is_dir()]
    lines = []
    if kinds:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
        lines.append(f"{folder}: {listed} files are not read; convert them to PNG or JPEG to have them")
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        lines.append(f"{folder}: links to folders are not followed: {links[0].name}{more}")
    return tuple(lines)


class _Lines:
    """The lines of a manifest, read as they are asked for: of ten million they would take gigabytes."""

    def __init__(self, path: Path):
        self._path, self._count, empty = path, 0, True
        try:
            for line in self:
                self._count += 1
                empty = empty and not line.strip()
        except OSError as e:
            raise UserError(
                f"`source` {path}: cannot be read ({e.strerror}); expected a {MANIFEST} with a JSON object a line; check the path"
            ) from e
        if empty:
            raise UserError(f"`source` {path}: empty; expected a JSON object a line; write at least one")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            for line in file:
                yield from line.splitlines()


def _each(entries: Any, rows: Callable[[int, dict[str, Any]], Iterator[Row]]) -> Iterator[Row | BadRow]:
    """`rows(number, entry)` of every entry (an object, or a line of JSON); what it raises becomes a bad row."""
    for number, entry in enumerate(entries, 1):
        try:
            if isinstance(entry, bytes):
                if not entry.strip():
                    continue
                entry = _object(entry)
            yield from rows(number, entry)
        except UserError as e:
            yield BadRow(number, str(e))


def _object(line: bytes) -> dict[str, Any]:
    try:
        entry = reading.parse_json(line, halves=True)
    except ValueError as e:
        raise UserError(f"broken JSON ({reason(e)}); expected one object a line; correct it") from e
    if not isinstance(entry, dict):
        raise UserError(f"JSON {type(entry).__name__}; expected an object, {{...}}; correct it")
    return entry


def _check_fields(entry: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing, unknown = [k for k in required if k not in entry], sorted(entry.keys() - {*required, *optional})
    if missing or unknown:
        raise UserError(
            f"missing fields {missing}, unknown fields {unknown}; expected {', '.join(required)} and optionally "
            f"{', '.join(optional)}; correct the names"
        )


def _text(entry: dict[str, Any], field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{'empty ' if value in ('', None) else ''}{field} {value!r}; expected text; write it")
    _check_text(value, field)
    return value


def _check_text(value: str, field: str) -> None:
    """Raises `UserError` for text that is no Unicode: JSON can hold half of a character's pair (an emoji cut in two), UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{field} {value[max(0, e.start - 20) : e.end]!r}: half a character, \\u{ord(value[e.start]):x}, at place {e.start + 1}; "
            "expected whole ones; write it again"
        ) from e


def _names(subject: str, caption: str) -> bool:
    """Whether the caption has the subject's words, as whole words, in whatever case and spacing."""
    words = r"\s+".join(re.escape(w) for w in subject.split())
    return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def _composite(image: Any, folder: Path, number: int) -> Picture:
    if isinstance(image, str):
        _check_text(image, "image")
        return Picture(folder / image)
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return Picture(folder / (image.get("path") or f"image of row {number}"), image["bytes"])
    raise UserError(f"image {repr(image)[:60]}; expected a file name, or an embedded picture in parquet; correct it")


def _parquet(shards: list[Path]) -> tuple[int, Iterator[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for shard in shards:
        try:
            files.append(pq.ParquetFile(shard))
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"`source` {shard}: not a whole parquet file ({reason(e)}); download it again") from e
        if not {"image", "description"} <= set(files[-1].schema_arrow.names):
            raise UserError(
                f"`source` {shard}: columns {files[-1].schema_arrow.names}; expected image, description, "
                "quality_assessment, as in Subjects200K; check the path"
            )

    def entries() -> Iterator[dict[str, Any]]:
        for shard, file in zip(shards, files, strict=True):
            wanted = [c for c in ("image", "description", "quality_assessment") if c in file.schema_arrow.names]
            try:
                for batch in file.iter_batches(batch_size=16, columns=wanted):
                    yield from batch.to_pylist()
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"`source` {shard}: not a whole parquet file ({reason(e)}); download it again") from e

    return sum(f.metadata.num_rows for f in files), entries()
