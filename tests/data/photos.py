"""Photographs of scikit-image as the three layouts of `dynaip_jax.data.sources`, and tokenizers small enough to read."""

import io
import itertools
import json
import zlib
from functools import cache
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from skimage import data

from dynaip_jax.data.check import BadRow, Limits, check, png
from dynaip_jax.data.config import DataConfig
from dynaip_jax.data.records import Record, write_dataset
from dynaip_jax.data.sources import Source, read_manifest

CAPTIONS = {  # name: caption, subject
    "astronaut": ("an astronaut smiling in front of a flag", "astronaut"),  # 512 x 512
    "chelsea": ("a photograph of a ginger cat on a sofa", "ginger cat"),  # 300 x 451
    "coffee": ("a cup of coffee on a wooden table", "cup of coffee"),  # 400 x 600
    "rocket": ("A Rocket on the launch pad", "rocket"),  # 427 x 640
}


class WordIds:
    """Ids of words, [n, 8] and [n, 77], padded with 0."""

    def ids(self, texts):
        return dict(t5=self._ids(texts, 8), clip_text=self._ids(texts, 77))

    def _ids(self, texts, length):
        ids = np.zeros((len(texts), length), np.int32)
        for n, text in enumerate(texts):
            words = [zlib.crc32(w.encode()) % 1000 + 1 for w in text.split()][:length]
            ids[n, : len(words)] = words
        return ids


@cache
def photo(name: str) -> bytes:
    return png(getattr(data, name)())


def entries(folder: Path) -> list[dict]:
    """Manifest entries of the photographs, whose files this writes into `folder`; the cat's has a mask."""
    for name in CAPTIONS:
        (folder / f"{name}.png").write_bytes(photo(name))
    mask = np.zeros(data.chelsea().shape[:2], np.uint8)
    mask[50:250, 100:350] = 255
    (folder / "mask.png").write_bytes(png(mask))
    lines = [
        dict(reference=f"{name}.png", target=f"{name}.png", caption=caption, subject=subject)
        for name, (caption, subject) in CAPTIONS.items()
    ]
    lines[1]["mask"] = "mask.png"
    lines[2]["reference"] = "rocket.png"
    return lines


def write_lines(folder: Path, lines: list) -> Path:
    """A manifest of `lines`: objects, or text that is written as it is."""
    path = folder / "metadata.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def make_dataset(folder: Path, lines: list | None = None, times: int = 1) -> Path:
    """A dataset of the photographs, or of `lines`, all of them `times` times."""
    pictures, out = folder / "pictures", folder / "dataset"
    pictures.mkdir()
    out.mkdir()
    photographs = entries(pictures)
    manifest = write_lines(pictures, (photographs if lines is None else lines) * times)
    write_dataset(out, (check(row, Limits()) for row in read_manifest(manifest).rows))
    return out


def checked(source: Source, limits: Limits | None = None) -> list[Record | BadRow]:
    """Its rows as records, or what is wrong with them."""
    return [r if isinstance(r, BadRow) else check(r, limits or Limits()) for r in source.rows]


def pixels(record: Record) -> list[np.ndarray]:
    """Target and reference of a record, decoded by PIL alone."""
    parts = []
    for file, box in ((record.target, record.target_box), (record.reference or record.target, record.reference_box)):
        top, left, bottom, right = box
        parts.append(np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[top:bottom, left:right])
    return parts


def config(folder: Path, **changes) -> DataConfig:
    """Small samples of the dataset in `folder`."""
    small = dict(path=str(folder), resolution=64, aspects=("1:1", "3:2"), clip_size=32, workers=0, seed=7)
    return DataConfig(**small | changes)


def take(loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def same(a: list, b: list) -> bool:
    """Whether the batches are the same to the last bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
