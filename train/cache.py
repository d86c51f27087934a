"""Runs the frozen encoders over a dataset once, so that training holds the MM-DiT and the adapter alone.

python -m train.cache --config configs/flux_dev_512.py --out caches/512 --bundle bundles/flux-dev --data.path data/photos
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynaip_jax.commandline import Parser, run_cli
from dynaip_jax.data import features
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.order import make_order
from dynaip_jax.data.records import open_dataset
from dynaip_jax.data.samples import Pictures
from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import replacing
from train import config as config_
from train.photographs import resolve


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.cache",
        description="Caches T5, CLIP and VAE features of a recipe's dataset; train with --data.features OUT and the same options.",
        epilog="""examples:
  python -m train.cache --config configs/debug.py --out caches/debug --variants 4
  python -m train.main --config configs/debug.py --workdir runs/cached --data.features caches/debug""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a recipe; its fields can be set as in train.main"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--variants",
        type=int,
        default=1,
        metavar="N",
        help="augmentations of each picture, used in turn by epochs (default 1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing cache")
    args, rest = parser.parse_known_args(argv)
    config = resolve(config_.override(config_.load(args.config), rest))
    if args.variants < 1:
        raise UserError(f"--variants {args.variants}: expected at least 1")
    cache(config, args.out, args.variants, overwrite=args.overwrite)
    print(args.out)
    return 0


def cache(config: config_.TrainConfig, out: Path, variants: int = 1, *, overwrite: bool = False) -> None:
    """Writes the features of all rows of `config.data`, in `variants` augmentations, to the folder `out`.

    Raises `UserError` as `train` does for what it reads, if `out` exists and not `overwrite`, and if the disk is full.
    """
    import jax
    from tqdm import tqdm

    from dynaip_jax.runtime.sharding import batch_sharding, make_mesh
    from train import assemble as models_
    from train.step import encode

    mesh = make_mesh(config.mesh)
    bundle = models_.open_bundle(config)
    models_.make_recipe(config, bundle)
    dataset = open_dataset(config.data.path)
    order = make_order(config.data, dataset, config.batch)
    with replacing(out, overwrite=overwrite, marks=(features.FILE,)) as work:
        models = models_.load(config, bundle, mesh, encoders=True, transformer=False)
        run = jax.jit(encode, static_argnums=0, out_shardings=batch_sharding(mesh))
        store, arrays = features.Store(work, config.dtype), {}
        slot = features.slots(order.bucket_of)

        def encoded(data: DataConfig, rows: np.ndarray, bucket: Bucket, epoch: int):
            padded = np.resize(rows, config.batch)  # one shape for the compiler
            batch = Pictures(dataset, data, models.tokenizers).read(padded, bucket, epoch)
            return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], run(models.recipe, models.frozen, batch))

        def put(name: str, shape: tuple[int, ...], where: tuple, values: np.ndarray) -> None:
            if name not in arrays:
                arrays[name] = store.create(name, shape)
            arrays[name][where] = values

        keep_text = dataclasses.replace(config.data, drop_image=0.0, drop_text=0.0, drop_both=0.0)
        empty = encoded(dataclasses.replace(keep_text, drop_text=1.0), np.zeros(1, np.int64), order.buckets[0], 0)
        put("empty_states", empty.states.shape[1:], (), empty.states[0])
        if empty.pooled is not None:
            put("empty_pooled", empty.pooled.shape[1:], (), empty.pooled[0])
        with tqdm(total=len(dataset) * variants, desc="encoding", unit="row", disable=None) as bar:
            for number, bucket in enumerate(order.buckets):
                members = np.flatnonzero(order.bucket_of == number)
                for variant in range(variants):
                    for start in range(0, len(members), config.batch):
                        rows = members[start : start + config.batch]
                        e = encoded(keep_text, rows, bucket, variant)
                        put(
                            features.moments_name(bucket), (variants, len(members), *e.moments.shape[1:]),
                            (variant, slot[rows]), e.moments,
                        )  # fmt: skip
                        if e.levels is not None:
                            levels = np.stack([level[:, 0] for level in e.levels], axis=1)
                            put("levels", (variants, len(dataset), *levels.shape[1:]), (variant, rows), levels)
                        if variant == 0:
                            put("states", (len(dataset), *e.states.shape[1:]), (rows,), e.states)
                            if e.pooled is not None:
                                put("pooled", (len(dataset), *e.pooled.shape[1:]), (rows,), e.pooled)
                        bar.update(len(rows))
        made_of = features.facts(config.data, order, models_.encoder_identity(bundle, config), config.dtype)
        manifest = dict(format=features.FORMAT, format_version=features.VERSION, variants=variants, facts=made_of)
        (work / features.FILE).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
