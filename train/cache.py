"""Runs the frozen encoders over a dataset once, so that training holds the MM-DiT and the adapter alone.

python -m train.cache --config configs/flux_dev_512.py --out caches/512 --bundle bundles/flux-dev --data.path data/photos
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynaip_jax.commandline import argument, parse_known, run_cli
from dynaip_jax.data import features
from dynaip_jax.data.joining import link
from dynaip_jax.data.mixture import open_data
from dynaip_jax.data.order import BatchOrder, Step, make_order
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import Pictures
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage.folders import replacing
from dynaip_jax.tasks import task
from train import config as config_
from train.parts import Share, folder_of, new_part
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
    """Caches what the frozen encoders make of a recipe's dataset; train with --data.features OUT and the same options.

    What is finished is kept until the cache is whole: the same command goes on after it was stopped.
    """

    config: Path = argument("a recipe; its fields can be set as in train.main", unit="FILE")
    out: Path = argument("the folder to write", unit="DIR")
    variants: int = argument("augmentations of each picture, used in turn by epochs", default=1, unit="N")
    share: str | None = argument(
        "this process does part I of N, on a host or GPU of its own; run it without once all have ended",
        default=None,
        usual="all",
        unit="I/N",
    )
    overwrite: bool = argument("replace an existing cache", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the cache; prints where it is."""
    args, words = parse_known(Arguments, argv, "python -m train.cache", EXAMPLES)
    share = None if args.share is None else Share.parse(args.share)
    config = resolve(config_.override(config_.load(args.config), words))
    if args.variants < 1:
        raise UserError(f"`variants` {args.variants}: expected at least 1")
    cache(config, args.out, args.variants, share=share, overwrite=args.overwrite)
    if share is None:
        print(args.out)
    else:
        print(f"{args.out}: part {share.number} of {share.hosts} is done; run without --share to join all")
    return 0


def cache(
    config: config_.TrainConfig, out: Path, variants: int = 1, *, share: Share | None = None, overwrite: bool = False
) -> None:
    """Writes the features of all rows of `config.data`, in `variants` augmentations, to the folder `out`.

    Finished parts stay until `out` is whole: the same call goes on after it was stopped. `share`: of one of several processes that see
    the same folders, each with devices of its own; nothing is joined then. Raises `UserError` as `train` does for what it reads, if
    `out` exists and not `overwrite`, if another process makes the same part, and if the disk is full.
    """
    from train.run import Run

    if config.distributed.enabled:
        raise UserError(
            "`distributed.enabled`: features are cached by processes that need not meet; pass --share I/N to each"
        )
    run = Run(config)
    dataset = open_data(config.data)
    order = make_order(config.data, dataset, config.batch)
    facts = features.facts(config.data, order, run.encoder_identity, config.dtype, dataset.content)
    making = Making(run, dataset, order, variants, folder_of(out), _key(facts, variants))
    at_risk = at_stake(f"finished parts are kept in {making.folder}; run the same command to go on")
    if share is not None:
        with at_risk:
            make_parts(making, [n for n in making.numbers if share.has(n)])
        return
    with at_risk, replacing(out, overwrite=overwrite, marks=(features.FILE,)) as work:
        make_parts(making, list(making.numbers))
        for number in making.numbers:
            name = features.part_name(number)
            (work / name).mkdir()
            for file in (making.folder / name).iterdir():
                link(file, work / name / file.name)
        features.write_facts(work, facts, variants)
    shutil.rmtree(making.folder, ignore_errors=True)


def _key(facts: dict[str, Any], variants: int) -> str:
    return features.cache_key(facts, variants, features.ROWS_A_PART)


class Making(NamedTuple):
    """A cache that is made: of what, and where its parts lie until it is whole."""

    run: Run
    dataset: Dataset
    order: BatchOrder
    variants: int
    folder: Path
    key: str

    @property
    def numbers(self) -> range:
        """Of all parts."""
        return range(features.parts(len(self.dataset)))

    def bucket_of(self, number: int) -> np.ndarray:
        """The index of the bucket of each row of a part."""
        return self.order.bucket_of[number * features.ROWS_A_PART :][: features.ROWS_A_PART]

    def finished(self, number: int) -> bool:
        """Whether the part is there, and of this cache."""
        try:
            features.read_part(self.folder / features.part_name(number), self.key, number)
        except (OSError, ValueError):
            return False
        return True


class Few(NamedTuple):
    """At most a batch of rows of one bucket, in one variant, by their places in a part."""

    part: int
    bucket: int
    variant: int
    places: np.ndarray


class Batches:
    """What the encoders are given, in order: see `BatchOrder`, of which this has what a loader asks for. Each batch has as many rows
    as one of training, so that programs are compiled once a bucket; those that are too many are the first ones again."""

    fingerprint = ""

    def __init__(self, making: Making, numbers: Sequence[int]):
        self.buckets, self._size = making.order.buckets, making.order.global_batch
        self.all = [few for number in numbers for few in _few(making, number, self._size)]

    def step(self, step: int) -> Step:
        """The batch of this number; workers that read ahead of the last one get the first ones again."""
        few = self.all[step % len(self.all)]
        rows = np.resize(few.places, self._size) + few.part * features.ROWS_A_PART
        return Step(few.variant, self.buckets[few.bucket], rows)


def _few(making: Making, number: int, size: int) -> Iterator[Few]:
    bucket_of = making.bucket_of(number)
    for bucket in range(len(making.order.buckets)):
        members = np.flatnonzero(bucket_of == bucket)
        for variant in range(making.variants):
            for start in range(0, len(members), size):
                yield Few(number, bucket, variant, members[start : start + size])


class Encoding:
    """The frozen encoders over `batches` of a dataset, which are read ahead as training does."""

    def __init__(self, run: Run, dataset: Dataset, batches: Batches):
        import jax

        from dynaip_jax.data.loader import BatchIterator
        from dynaip_jax.runtime.sharding import batch_sharding
        from train.step import encode

        run.check_batch()
        config = run.config
        self._run, self._batch, self._few = run, config.batch, iter(batches.all)
        self._encode = jax.jit(encode, static_argnums=0, out_shardings=batch_sharding(run.mesh))
        self._encoders = run.load(*run.encoders)
        kept = dataclasses.replace(config.data, drop_image=0.0, drop_text=0.0, drop_both=0.0)
        pictures, without = (
            Pictures(dataset, data, run.tokenizers) for data in (kept, dataclasses.replace(kept, drop_text=1.0))
        )
        self._loader = BatchIterator(
            batches, pictures, positions=np.arange(self._batch), workers=config.data.workers, prefetch=config.data.prefetch
        )  # fmt: skip
        empty = self._encoded(without.read(np.zeros(self._batch, np.int64), batches.buckets[0], 0))
        self.empty = {name: values[0] for name, values in _text(empty).items()}  # what the empty prompt gives

    def __iter__(self) -> Generator[tuple[Few, Encoded]]:
        """Each batch, and the features of its rows."""
        import jax

        with contextlib.closing(self._loader):
            for few in self._few:
                encoded = self._encoded(next(self._loader))
                count = len(few.places)
                yield few, jax.tree.map(lambda x, count=count: x[:count], encoded)

    def _encoded(self, batch: Any) -> Encoded:
        import jax

        run = self._run
        with jax.set_mesh(run.mesh):
            encoded = self._encode(run.constants, self._encoders, run.on_mesh(batch, self._batch))
        return jax.tree.map(np.asarray, encoded)


def make_parts(making: Making, numbers: Sequence[int]) -> None:
    """Makes those parts of `numbers` that are not finished."""
    making.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in numbers if not making.finished(number)]
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} parts are finished already", file=sys.stderr)
    if not missing:
        return
    encoding = Encoding(making.run, making.dataset, Batches(making, missing))
    encoded = iter(encoding)
    total = making.variants * sum(len(making.bucket_of(number)) for number in missing)
    with contextlib.closing(encoded), task("encoding", total, "row") as done:
        for number in missing:
            with new_part(making.folder / features.part_name(number)) as folder:
                bucket_of, store = making.bucket_of(number), features.Store(folder, making.run.config.dtype)
                for name, values in encoding.empty.items():
                    store.put(f"empty_{name}", values.shape, (), values)
                left = making.variants * len(bucket_of)
                while left:
                    few, result = next(encoded)
                    _put(store, making, few, result)
                    left -= len(few.places)
                    done(len(few.places))
                store.finish()
                features.write_part(folder, making.key, number, bucket_of)


def _put(store: features.Store, making: Making, few: Few, encoded: Encoded) -> None:
    """Stores the features of some rows: what text gives once, what pictures give in every variant."""
    bucket_of, (_, bucket, variant, places) = making.bucket_of(few.part), few
    count, members = len(bucket_of), int(np.count_nonzero(bucket_of == bucket))
    moments = (making.variants, members, *encoded.moments.shape[1:])
    name = features.moments_name(making.order.buckets[bucket])
    store.put(name, moments, (variant, features.slots(bucket_of)[places]), encoded.moments)
    if encoded.levels is not None:
        levels = np.stack([level[:, 0] for level in encoded.levels], axis=1)
        store.put("levels", (making.variants, count, *levels.shape[1:]), (variant, places), levels)
    if variant == 0:
        for name, values in _text(encoded).items():
            store.put(name, (count, *values.shape[1:]), (places,), values)


def _text(encoded: Encoded) -> dict[str, Any]:
    """The arrays of a prompt; not every family has a pooled one."""
    return {name: x for name in ("states", "pooled") if (x := getattr(encoded, name)) is not None}


if __name__ == "__main__":
    sys.exit(run_cli(main))
