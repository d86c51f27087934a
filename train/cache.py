"""Runs the frozen encoders over a dataset once, so that training holds the MM-DiT and the adapter alone.

python -m train.cache --config configs/flux_dev_512.py --out caches/512 --bundle bundles/flux-dev --data.path data/photos
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaip_jax.commandline import argument, parse_known, run_cli
from dynaip_jax.data import features
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.mixture import open_data
from dynaip_jax.data.order import BatchOrder, make_order
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import Pictures
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage.folders import replacing
from dynaip_jax.tasks import task
from train import config as config_
from train.photographs import resolve

if TYPE_CHECKING:
    from train.run import Run
    from train.step import Encoded

EXAMPLES = """
examples:
  python -m train.cache --config configs/debug.py --out caches/debug --variants 4
  python -m train.main --config configs/debug.py --workdir runs/cached --data.features caches/debug
"""


@dataclass(frozen=True)
class Arguments:
    """Caches what the frozen encoders make of a recipe's dataset; train with --data.features OUT and the same options."""

    config: Path = argument("a recipe; its fields can be set as in train.main", unit="FILE")
    out: Path = argument("the folder to write", unit="DIR")
    variants: int = argument("augmentations of each picture, used in turn by epochs", default=1, unit="N")
    overwrite: bool = argument("replace an existing cache", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the cache; prints where it is."""
    args, words = parse_known(Arguments, argv, "python -m train.cache", EXAMPLES)
    config = resolve(config_.override(config_.load(args.config), words))
    if args.variants < 1:
        raise UserError(f"`variants` {args.variants}: expected at least 1")
    cache(config, args.out, args.variants, overwrite=args.overwrite)
    print(args.out)
    return 0


def cache(config: config_.TrainConfig, out: Path, variants: int = 1, *, overwrite: bool = False) -> None:
    """Writes the features of all rows of `config.data`, in `variants` augmentations, to the folder `out`.

    Raises `UserError` as `train` does for what it reads, if `out` exists and not `overwrite`, and if the disk is full.
    """
    from train.run import Run

    run = Run(config)
    dataset = open_data(config.data)
    order = make_order(config.data, dataset, config.batch)
    facts = features.facts(config.data, order, run.encoder_identity, config.dtype, dataset.content)
    with (
        at_stake(f"nothing is written to {out}"),
        replacing(out, overwrite=overwrite, marks=(features.FILE,)) as folder,
    ):
        store = features.Store(folder, config.dtype)
        _write_features(store, Encoding(run, dataset), order, variants)
        features.write_facts(folder, facts, variants)


class Encoding:
    """The frozen encoders over rows of a dataset, in batches of one size, so that they are compiled once a bucket."""

    def __init__(self, run: Run, dataset: Dataset):
        import jax

        from dynaip_jax.runtime.sharding import batch_sharding
        from train.step import encode

        self.config, self._run, self._dataset = run.config, run, dataset
        self._encode = jax.jit(encode, static_argnums=0, out_shardings=batch_sharding(run.mesh))
        self._encoders = run.load(*run.encoders)

    def __call__(self, data: DataConfig, rows: np.ndarray, bucket: Bucket, epoch: int) -> Encoded:
        """The features of dataset indices `rows`, at most as many as a training batch, as `data` augments and drops them."""
        import jax

        run = self._run
        padded = np.resize(rows, run.config.batch)
        batch = Pictures(self._dataset, data, run.tokenizers).read(padded, bucket, epoch)
        return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], self._encode(run.constants, self._encoders, batch))


def _write_features(store: features.Store, encoded: Encoding, order: BatchOrder, variants: int) -> None:
    """Fills `store` with the features of every row: what text gives once, what pictures give in every variant."""
    config, count = encoded.config, len(order.bucket_of)
    keep_text = dataclasses.replace(config.data, drop_image=0.0, drop_text=0.0, drop_both=0.0)
    empty = encoded(dataclasses.replace(keep_text, drop_text=1.0), np.zeros(1, np.int64), order.buckets[0], 0)
    for name, values in _text(empty).items():
        store.put(f"empty_{name}", values.shape[1:], (), values[0])
    slot = features.slots(order.bucket_of)
    with task("encoding", count * variants, "row") as done:
        for bucket, members, variant, rows in _parts(order, variants, config.batch):
            e = encoded(keep_text, rows, bucket, variant)
            moments = (variants, members, *e.moments.shape[1:])
            store.put(features.moments_name(bucket), moments, (variant, slot[rows]), e.moments)
            if e.levels is not None:
                levels = np.stack([level[:, 0] for level in e.levels], axis=1)
                store.put("levels", (variants, count, *levels.shape[1:]), (variant, rows), levels)
            if variant == 0:
                for name, values in _text(e).items():
                    store.put(name, (count, *values.shape[1:]), (rows,), values)
            done(len(rows))
    store.finish()


def _text(encoded: Encoded) -> dict[str, Any]:
    """The arrays of a prompt; not every family has a pooled one."""
    return {name: x for name in ("states", "pooled") if (x := getattr(encoded, name)) is not None}


def _parts(order: BatchOrder, variants: int, size: int) -> Iterator[tuple[Bucket, int, int, np.ndarray]]:
    """(bucket, how many rows it has, variant, at most `size` of its rows) until all rows have been given in all variants."""
    for number, bucket in enumerate(order.buckets):
        members = np.flatnonzero(order.bucket_of == number)
        for variant in range(variants):
            for start in range(0, len(members), size):
                yield bucket, len(members), variant, members[start : start + size]


if __name__ == "__main__":
    sys.exit(run_cli(main))
