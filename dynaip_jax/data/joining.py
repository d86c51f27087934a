"""Several datasets on disk -> one, without reading a picture: their shards are given new numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.data.records import DIGESTS, INDEX, INFO, NAME, SPLIT, new_info, write_index
from dynaip_jax.errors import UserError


def join(folder: Path, parts: Sequence[Path]) -> int:
    """Writes the dataset of the rows of all `parts`, in their order, to an existing, empty `folder`; returns the number of rows. It is
    known by the same digest as if it had been written whole.

    `parts`: folders of `write_dataset` with digests, which stay as they are. Raises `UserError` if there are none.
    """
    if not parts:
        raise UserError("dataset: no rows are left to write; expected at least one; correct the rows named above")
    from tensorflow_datasets.core import naming, splits

    template = naming.ShardedFileTemplate(
        dataset_name=NAME, data_dir=folder, split=SPLIT, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )  # fmt: skip
    lengths: list[int] = []
    size = 0
    for part in parts:
        stated = json.loads((part / INFO).read_text())["splits"][0]
        size += int(stated["numBytes"])
        shards = sorted(part.glob(f"{NAME}-{SPLIT}.array_record-*"))
        for shard, length in zip(shards, stated["shardLengths"], strict=True):
            link(shard, Path(os.fspath(template.sharded_filepath(shard_index=len(lengths), num_shards=None))))
            lengths.append(int(length))
    info = new_info(folder)
    info.set_file_format("array_record")
    split = splits.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(splits.SplitDict([split]))
    info.write_to_directory(folder)
    indices = [_index(part) for part in parts]
    arrays = {name: np.concatenate([index[name] for index in indices]) for name in ("sizes", "numbers", "masked")}
    write_index(folder, np.concatenate([np.load(part / DIGESTS, allow_pickle=False) for part in parts]), **arrays)
    return sum(lengths)


def _index(part: Path) -> dict[str, Any]:
    with np.load(part / INDEX, allow_pickle=False) as index:
        return {name: index[name] for name in ("sizes", "numbers", "masked")}


def link(source: Path, target: Path) -> None:
    """The same file under another name, or, on another disk, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
