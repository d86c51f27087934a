"""Training data: decoded pictures per second and core, and what worker processes deliver.

python -m benchmarks.data [--side PIXELS ...] [--resolution PIXELS] [--workers N ...] [--seconds S]

Photographs of scikit-image, enlarged to `--side` pixels, are prepared as JPEG and as PNG and read as training reads
them: every sample decodes one picture that is target and reference. Prints a JSON object a line. Figures "per core" are
per second of CPU time, so that they hold on a busy machine; those of worker processes are wall time, from the second
batch on. Needs the `test` extra (scikit-image).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from dynaip_jax import images
from dynaip_jax.data.check import Limits, Picture, Row, check
from dynaip_jax.data.config import Bucket, DataConfig, buckets
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.records import Dataset, Record, open_dataset, write_dataset
from dynaip_jax.data.samples import Pictures

BATCH = 8


class NoText:
    """Stands for the tokenizers, which are not measured."""

    def ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        lengths = dict(t5=512, clip_text=77)
        return {name: np.zeros((len(texts), length), np.int32) for name, length in lengths.items()}


def main() -> int:
    """Prints the machine, then a line for each format and size, then one for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, nargs="+", default=[512, 1024, 2048], help="longer side of the files")
    parser.add_argument("--resolution", type=int, default=512, help="of the targets")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    args = parser.parse_args()

    _print(
        machine=dict(
            processor=platform.processor() or platform.machine(), cores=os.cpu_count(), load=os.getloadavg()[0],
            python=platform.python_version(), pillow=features.version("pil"), jpeg=features.version("libjpeg_turbo"),
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for side, kind in itertools.product(args.side, ("JPEG", "PNG")):
            folder = Path(work) / f"{kind}{side}"
            folder.mkdir()
            write_dataset(folder, _records(side, kind))
            dataset = open_dataset(folder)
            config = DataConfig(path=str(folder), resolution=args.resolution, aspects=("1:1", "3:2"), prefetch=4)
            reader, bucket = Pictures(dataset, config, NoText()), buckets(args.resolution, ("3:2",))[0]
            rows = itertools.cycle(range(len(dataset)))
            steps: dict[str, Callable[[int], Any]] = dict(
                records=dataset.__getitem__,
                decoded=partial(_decoded, dataset),
                samples=partial(_sample, reader, bucket),
            )
            rates = {f"{k}_per_core_s": _rate(call, rows, args.seconds) for k, call in steps.items()}
            _print(
                format=kind, side=side, resolution=args.resolution, bytes_a_file=len(dataset[0].target),
                **rates,
            )  # fmt: skip
        for workers in args.workers:
            config = DataConfig(
                path=str(Path(work) / f"JPEG{args.side[0]}"), resolution=args.resolution, aspects=("1:1", "3:2"),
                workers=workers, prefetch=4,
            )  # fmt: skip
            loader = make_loader(config, NoText(), global_batch=BATCH)
            start = time.perf_counter()
            next(loader)
            first = time.perf_counter()
            count = 0
            while time.perf_counter() - first < 2 * args.seconds:
                count += len(next(loader).row)
            rate = count / (time.perf_counter() - first)
            loader.close()
            _print(format="JPEG", side=args.side[0], workers=workers, first_batch_s=first - start, samples_per_s=rate)
    return 0


def _records(side: int, kind: str) -> list[Record]:
    """Three photographs, 16 times each."""
    from skimage import data

    records = []
    for number in range(48):
        photo = Image.fromarray((data.chelsea, data.coffee, data.astronaut)[number % 3]())
        scale = side / max(photo.size)
        file = BytesIO()
        options: dict[str, Any] = dict(quality=90) if kind == "JPEG" else {}
        size = (round(photo.width * scale), round(photo.height * scale))
        photo.resize(size, Image.Resampling.LANCZOS).save(file, kind, **options)
        picture = Picture(Path(f"{number}.{kind.lower()}"), file.getvalue())
        record = check(Row(number + 1, picture, picture, "a photograph"), Limits())
        if not isinstance(record, Record):
            raise ValueError(f"--side {side}: {record.reason}")
        records.append(record)
    return records


def _decoded(dataset: Dataset, row: int) -> Any:
    return images.load_image("record", data=dataset[row].target)


def _sample(reader: Pictures, bucket: Bucket, row: int) -> Any:
    return reader.read(np.array([row]), bucket, 0)


def _rate(call: Callable[[int], Any], rows: Iterator[int], seconds: float) -> float:
    """Calls per second of this process's CPU time."""
    call(next(rows))
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        call(next(rows))
        count += 1
    return count / spent


def _print(**facts: Any) -> None:
    def shorter(x: Any) -> Any:
        return round(x, 2) if isinstance(x, float) else x

    print(json.dumps({k: shorter(v) for k, v in facts.items()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
