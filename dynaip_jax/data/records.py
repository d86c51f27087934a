"""Datasets on disk: a tensorflow-datasets folder of array_record shards, written and read without TensorFlow.

A folder holds tfds' own files (`dataset_info.json`, `features.json`, the shards) and `index.npz`: for every row the target's
size, the number of its row in the source, whether it has a mask, and a checksum, so that ordering an epoch reads no picture; and one
digest of all that can be trained on, by which a dataset is known wherever it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dynaip_jax import reading
from dynaip_jax.data.columns import Column
from dynaip_jax.data.shards import Shards
from dynaip_jax.errors import UserError, reason
from dynaip_jax.schema import typed
from dynaip_jax.storage.arrays import read_arrays
from dynaip_jax.storage.folders import AnyPath, as_path

NAME, SPLIT, VERSION = "subjects", "train", "1.0.0"
INFO, FEATURES, INDEX, DIGESTS = "dataset_info.json", "features.json", "index.npz", "digests.npy"
INDEX_BYTES = 1 << 32
OF_ALL, NUMBERED = ("{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}")
FILE: tuple[str, list[str]] = ("string", [])
BOX: tuple[str, list[str]] = ("int32", ["4"])
TEXT: tuple[str, list[str]] = ("text", [])
SCHEMA = dict(  # dtype and shape of every field, as tfds states them in `features.json`
    number=("int64", []), target=FILE, target_box=BOX, reference=FILE, reference_box=BOX, mask=FILE, caption=TEXT, subject=TEXT,
)  # fmt: skip
ROWS_A_SHARD = 2048
WRITTEN_AT_ONCE = 32


class Record(NamedTuple):
    """One row. Pictures are the bytes of PNG or JPEG files; a box is int32 `[4]`: top, left, bottom, right in pixels."""

    number: int  # of the row in its source, from 1
    target: bytes
    target_box: Int[np.ndarray, " 4"]
    reference: bytes  # empty: the same file as the target
    reference_box: Int[np.ndarray, " 4"]
    mask: bytes  # the subject in the whole reference picture, white on black, as 8-bit grey PNG; empty: none
    caption: str
    subject: str  # the words of the caption that name the subject; may be empty


def digest(record: Record) -> bytes:
    """sha256 of what is trained on in a row: all but its number in the source."""
    whole = hashlib.sha256()
    for value in record[1:]:
        part = value.astype("<i4").tobytes() if isinstance(value, np.ndarray) else value
        part = part.encode() if isinstance(part, str) else part
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.digest()


class Index:
    """What `index.npz` says of the rows, gathered as they are written."""

    def __init__(self) -> None:
        self.numbers, self._sizes, self._masked, self._digests = array("q"), array("i"), bytearray(), bytearray()

    def add(self, record: Record) -> None:
        """Takes in the next row."""
        top, left, bottom, right = record.target_box
        self._sizes.extend((int(bottom - top), int(right - left)))
        self.numbers.append(record.number)
        self._masked.append(bool(record.mask))
        self._digests += digest(record)

    def write(self, folder: Path, *, digests: bool = False) -> None:
        """Writes the arrays, and the digest of all rows in their order; `digests`: also each row's own, for joining datasets."""
        rows = np.frombuffer(self._digests, np.uint8).reshape(-1, 32)
        if digests:
            np.save(folder / DIGESTS, rows)
        write_index(
            folder, rows,
            sizes=np.array(self._sizes, np.int32).reshape(-1, 2), numbers=np.array(self.numbers, np.int64),
            masked=np.frombuffer(self._masked, np.bool_),
        )  # fmt: skip


def write_index(folder: Path, digests: np.ndarray, **arrays: Any) -> None:
    """Writes `index.npz` of the `arrays` of all rows, whose digests are uint8 `[n, 32]`."""
    checks = np.ascontiguousarray(digests[:, :4]).view("<u4")[:, 0]
    content = np.array(hashlib.sha256(np.ascontiguousarray(digests).data).hexdigest())
    np.savez(folder / INDEX, **arrays, checks=checks, content=content)


def _check(row: bytes) -> int:
    """The checksum of a row that is compared when it is read: the start of its digest."""
    return int.from_bytes(row[:4], "little")


def new_info(folder: Path) -> Any:
    """tfds' description of the dataset that is to be written to `folder`."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Pictures of one subject each, with captions and reference pictures (dynaip_jax).",
        features=tfds.features.FeaturesDict(_features()),
    )


def write_dataset(folder: Path, records: Iterable[Record], *, digests: bool = False) -> int:
    """Writes the dataset into an existing, empty `folder`, in the order given; returns the number of rows. `digests`: see `Index.write`.

    Raises `UserError` if there are none, and `OSError` if the disk is full.
    """
    import tensorflow_datasets as tfds

    info = new_info(folder)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=ROWS_A_SHARD, file_format="array_record")
    writer.initialize_splits([SPLIT])
    index = Index()
    stream = iter(records)
    while chunk := list(itertools.islice(stream, WRITTEN_AT_ONCE)):
        with _as_os_error():
            writer.add_examples({SPLIT: [r._asdict() for r in chunk]})
        for r in chunk:
            index.add(r)
    if not index.numbers:
        raise UserError("dataset: no rows are left to write; expected at least one; correct the rows named above")
    with _as_os_error():
        writer.close_all()
    index.write(folder, digests=digests)
    return len(index.numbers)


class Dataset:
    """A dataset on disk or in a bucket, with random access: `dataset[i]` -> `Record`. May be sent to other processes.

    `sizes` int32 `[n, 2]`: height and width of the targets; `numbers` int64 `[n]`: of the rows in their source; `masked`
    bool `[n]`; `content`: the digest of all rows, by which the dataset is known, empty for one that was prepared before there were
    digests. Raises `UserError` for a folder that is missing or was not written by `write_dataset`, and for files that
    are missing, damaged or do not belong together.

    `known`: the `content` of a dataset that another process has opened: of a local one, values of the index are then read one by one as
    they are asked for, since ten million rows would take each worker hundreds of megabytes.
    """

    sizes: Any
    numbers: Any
    masked: Any
    _checks: Any

    def __init__(self, path: str | os.PathLike[str], *, known: str = ""):
        self.path = as_path(path)
        if not reading.is_file(self.path / INFO) or not reading.is_file(self.path / INDEX):
            raise UserError(
                f"dataset {self.path}: no {INFO} and {INDEX} there; expected a folder written by python -m train.prepare; "
                "check the path, or run it"
            )
        try:
            if known and isinstance(self.path, Path):
                self._read_columns(known)
            else:
                self._read_rows()
        except (OSError, ValueError) as e:
            raise self._damaged(INDEX, e) from e
        if len(self._source) != len(self.sizes):
            raise self._damaged(INDEX, f"{len(self.sizes)} rows, the shards hold {len(self._source)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _known, (self.path, self.content)

    def _read_rows(self) -> None:
        """Reads the index whole."""
        index = _read_index(reading.read_bytes(self.path / INDEX, INDEX_BYTES))
        self.sizes, self.numbers, self.masked = (index[k] for k in ("sizes", "numbers", "masked"))
        self._checks, self.content = index.get("checks"), str(index.get("content", ""))

    def _read_columns(self, known: str) -> None:
        """Opens the index of the dataset of this content. Raises `ValueError` if it is of another."""
        file = Path(self.path / INDEX)
        try:
            with np.load(file, allow_pickle=False) as index:
                self.content = str(index["content"])
            columns = [Column(file, name) for name in ("sizes", "numbers", "masked", "checks")]
        except Exception as e:  # zip and NumPy each have their own
            raise ValueError(reason(e)) from e
        if self.content != known:
            raise ValueError("the dataset was replaced while it was read")
        self.sizes, self.numbers, self.masked, self._checks = columns

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Record:
        try:
            fields = dict(_parser().deserialize_example_np(self._source[row]))
            record = Record(**fields | {k: fields[k].decode() for k in ("caption", "subject")})
            _check_kinds(record)
        except Exception as e:  # array_record and protobuf each have their own; an empty record decodes to None
            raise self._damaged(f"row {row}", e) from e
        if record.number != self.numbers[row]:
            raise self._damaged(f"row {row}", f"it says {record.number}, {INDEX} says {self.numbers[row]}")
        top, left, bottom, right = record.target_box
        if (bottom - top, right - left, bool(record.mask)) != (*self.sizes[row], self.masked[row]):
            raise self._damaged(f"row {row}", f"its size or mask is not what {INDEX} says")
        if self._checks is not None and _check(digest(record)) != self._checks[row]:
            raise self._damaged(f"row {row}", f"its checksum is not the one in {INDEX}")
        return record

    @cached_property
    def _source(self) -> Shards:
        """The serialised records. tfds would open the folder by importing the classes that its `features.json` names; here that file is
        compared with the schema of this project, and no more."""
        self._stated(FEATURES, _check_schema)
        template, lengths = self._stated(INFO, _shard_lengths)
        return _records(self.path, template, lengths)

    def _stated(self, file: str, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of a JSON file of the folder."""
        try:
            return read(reading.parse_json(reading.read_bytes(self.path / file, reading.JSON_BYTES)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise self._damaged(file, f"no {e}" if isinstance(e, KeyError) else e) from e

    def _damaged(self, what: str, why: Any) -> UserError:
        return UserError(
            f"dataset {self.path}: {what} is damaged ({reason(why)}); expected what python -m train.prepare wrote; run it again"
        )


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """The dataset in a folder, local or in a bucket, written by `write_dataset`. Errors as in `Dataset`."""
    return Dataset(path)


def _known(path: AnyPath, content: str) -> Dataset:
    """What another process gets of a dataset."""
    return Dataset(path, known=content)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """array_record reports a full disk, and whatever else the file system refuses, as a RuntimeError."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(str(e).splitlines()[0]) from e


def _check_kinds(record: Record) -> None:
    """Raises `ValueError` for a record whose fields hold what they cannot."""
    for box in (record.target_box, record.reference_box):
        top, left, bottom, right = box
        if not (0 <= top < bottom and 0 <= left < right):
            raise ValueError(f"a box {[*map(int, box)]}: expected top, left, bottom, right")
    if not all(isinstance(file, bytes) for file in (record.target, record.reference, record.mask)):
        raise ValueError("a picture that is no file")


def _read_index(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of `index.npz`. Raises `ValueError` unless they belong together."""
    index = read_arrays(data, ("sizes", "numbers", "masked", "checks", "content"), INDEX_BYTES)
    if missing := {"sizes", "numbers", "masked"} - index.keys():
        raise ValueError(f"no {min(missing)}")
    count = len(index["numbers"]) if index["numbers"].ndim else 0
    shapes = dict(sizes=(count, 2), numbers=(count,), masked=(count,), checks=(count,), content=())
    for name, values in index.items():
        if values.shape != shapes[name] or (values.dtype.kind == "U") != (name == "content"):
            raise ValueError(f"{name} is {values.dtype} {values.shape}, expected {shapes[name]}")
    return index


def _check_schema(stated: Any) -> None:
    """Raises `ValueError` unless a `features.json` says what `SCHEMA` does."""
    fields = {}
    for name, entry in stated["featuresDict"]["features"].items():
        tensor = entry.get("tensor", {})
        dimensions = tensor.get("shape", {}).get("dimensions", []) if isinstance(tensor, dict) else None
        fields[name] = ("text", []) if "text" in entry else (tensor.get("dtype"), dimensions)
    if fields != SCHEMA:
        name = min({n for n in {*fields, *SCHEMA} if fields.get(n) != SCHEMA.get(n)})
        raise ValueError(f"{name}: found {fields.get(name)}, expected {SCHEMA.get(name)}")


def _shard_lengths(stated: Any) -> tuple[str, list[int]]:
    """How the shards of a `dataset_info.json` are named, and how many rows each has. Raises `ValueError` for other datasets."""
    split = next((s for s in stated["splits"] if s["name"] == SPLIT), None)
    if split is None or stated["name"] != NAME or stated.get("fileFormat") != "array_record":
        raise ValueError(f"no {SPLIT} split of {NAME} in array_record")
    template = split.get("filepathTemplate", OF_ALL)
    if template not in (OF_ALL, NUMBERED):
        raise ValueError(f"shards named {template!r}")
    lengths = [typed(int, int(typed(str, n, "shardLengths")), "shardLengths") for n in split["shardLengths"]]
    if not lengths or min(lengths) < 0:
        raise ValueError(f"shardLengths {lengths[:8]}")
    return template, lengths


def _records(folder: AnyPath, template: str, lengths: list[int]) -> Shards:
    """Random access to the bytes of the records in the shards of a folder."""
    digits = max(5, len(str(len(lengths))))
    of = f"-of-{len(lengths):0{digits}}" if template == OF_ALL else ""
    files = [os.fspath(folder / f"{NAME}-{SPLIT}.array_record-{n:0{digits}}{of}") for n in range(len(lengths))]
    return Shards(files, lengths)


@lru_cache(maxsize=1)
def _parser() -> Any:
    """Of serialised records, by this project's own schema."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(_features())


def _features() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    f = tfds.features
    file, box = f.Tensor(shape=(), dtype=np.object_), f.Tensor(shape=(4,), dtype=np.int32)
    return dict(
        number=f.Scalar(np.int64), target=file, target_box=box, reference=file, reference_box=box, mask=file,
        caption=f.Text(), subject=f.Text(),
    )  # fmt: skip
