"""What a dataset of many rows costs: CPU time to open and to order it, memory of a host's process and of each worker, open files.

python -m benchmarks.scale [--rows 10000000] [--workers 2] [--batch 1024] [--features] [--json]

The rows are a few small pictures over and over: one shard of 2048, linked as often as it takes, with an index of its own, so that every
row can be read. Workers read batches of 16 rows of the global ones, as one of 64 hosts would; with `--features` they read small arrays of a
cache, the same ones in every part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import show
from dynaip_jax.data import features
from dynaip_jax.data.config import DataConfig
from dynaip_jax.data.joining import join, link
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.order import make_order
from dynaip_jax.data.records import DIGESTS, INDEX, ROWS_A_SHARD, Record, open_dataset, write_dataset

EACH = 16  # rows that a host reads of a batch


class Nothing:
    """Tokenizers that do nothing."""

    def ids(self, texts: Any) -> dict[str, np.ndarray]:
        return dict(t5=np.zeros((len(texts), 8), np.int32))


def synthetic(folder: Path, rows: int) -> Path:
    """A dataset of `rows` rows, rounded up to whole shards."""
    from dynaip_jax.data.check import png

    rng, shapes = np.random.default_rng(0), ((64, 64), (64, 96), (96, 64), (64, 112))
    pictures = [png(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    part, out = folder / "part", folder / "data"
    part.mkdir()
    out.mkdir()

    def record(n: int) -> Record:
        box = np.array([0, 0, *shapes[n % 4]], np.int32)
        return Record(n + 1, pictures[n % 4], box, b"", box, b"", f"picture {n}", "picture")

    write_dataset(part, map(record, range(ROWS_A_SHARD)), digests=True)
    count = -(-rows // ROWS_A_SHARD)
    groups = [part] * min(count, 64)  # joined in two rounds: the index of all parts is read for each
    if count > 64:
        wide = folder / "wide"
        wide.mkdir()
        join(wide, groups)
        digests = np.load(part / DIGESTS)
        np.save(wide / DIGESTS, np.concatenate([digests] * 64))
        groups = [wide] * (count // 64) + [part] * (count % 64)
    join(out, groups)
    return out


def cached(data: Path, path: Path, batch: int) -> Path:
    """A cache of the dataset in `data`, for batches of `batch`: the arrays of its first part, linked as often as it takes."""
    config = config_of(data)
    dataset = open_dataset(config.path)
    order = make_order(config, dataset, batch)
    made_of = features.facts(config, order, "", "bfloat16", dataset.content)
    key, rng = features.cache_key(made_of, 1, ROWS_A_SHARD), np.random.default_rng(0)
    for number in range(features.parts(len(dataset))):
        part = path / features.part_name(number)
        part.mkdir(parents=True)
        bucket_of = order.bucket_of[number * ROWS_A_SHARD :][:ROWS_A_SHARD]
        if number:
            for file in (path / features.part_name(0)).glob("*.npy"):
                link(file, part / file.name)
        else:
            store, places = features.Store(part, "bfloat16"), np.arange(len(bucket_of))
            for name, shape in (("states", (8, 64)), ("pooled", (64,))):
                store.put(f"empty_{name}", shape, (), np.zeros(shape))
                store.put(name, (len(places), *shape), (places,), rng.normal(size=(len(places), *shape)))
            store.put("levels", (1, len(places), 3, 5, 64), (0, places), rng.normal(size=(len(places), 3, 5, 64)))
            for index, bucket in enumerate(order.buckets):
                moments = rng.normal(size=(np.count_nonzero(bucket_of == index), 8, 8, 32))
                store.put(features.moments_name(bucket), (1, *moments.shape), (0, np.arange(len(moments))), moments)
            store.finish()
        features.write_part(part, key, number, bucket_of)
    features.write_facts(path, made_of, 1)
    return path


def config_of(data: Path, workers: int = 0, cache: str = "") -> DataConfig:
    """How the dataset in `data` is read; from the features in `cache`, if any are."""
    return DataConfig(
        path=str(data), resolution=64, aspects=("1:1", "3:2", "2:3"), clip_size=32, workers=workers, features=cache
    )


def private(pid: int | str) -> float:
    """MiB of memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (fields["Private_Clean"] + fields["Private_Dirty"]) / 1024


def workers_of(pid: int) -> list[int]:
    """Worker processes, but not what keeps count of their shared memory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
            if b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def measure(path: Path, workers: int, batch: int, cache: str = "") -> dict[str, Any]:
    """Figures of a dataset: seconds of CPU time, MiB."""
    config = config_of(path, workers, cache)
    before, start = private("self"), time.process_time()
    loader = make_loader(config, Nothing(), global_batch=batch, positions=np.arange(EACH))
    opened = time.process_time()
    loader.order.step(0)
    shuffled = time.process_time()
    host = private("self") - before
    batches = list(itertools.islice(loader, 400))
    pids = workers_of(os.getpid())
    figures = dict(
        rows=len(open_dataset(path)),
        index_mib=(path / INDEX).stat().st_size / 2**20,
        open_and_order_cpu_s=opened - start,
        shuffle_an_epoch_cpu_s=shuffled - opened,
        host_mib=host,
        worker_mib=max(map(private, pids)),
        files_open_in_a_worker=max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        rows_read=sum(len(b.row) for b in batches),
    )
    loader.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--features", action="store_true", help="workers read a cache of features")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {}
    for name, rows in (("small", 4 * ROWS_A_SHARD), ("large", args.rows)):
        with tempfile.TemporaryDirectory() as folder:
            data = synthetic(Path(folder), rows)
            cache = str(cached(data, Path(folder) / "cache", args.batch)) if args.features else ""
            given = f"scale.Path({str(data)!r}), {args.workers}, {args.batch}, {cache!r}"
            call = f"import json; from benchmarks import scale; print(json.dumps(scale.measure({given})))"
            done = subprocess.run(
                [sys.executable, "-c", call], check=True, capture_output=True, text=True
            )  # a heap of its own
            results[name] = json.loads(done.stdout)
    figures = {f"{name} {key}": value for name, part in results.items() for key, value in part.items()}
    more = {f"more {key}": results["large"][key] - results["small"][key] for key in ("host_mib", "worker_mib")}
    show(figures | more, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
