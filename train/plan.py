"""Does a recipe fit a TPU topology or the devices that are here, and how fast could it be? `dynaip plan` runs this command.

python -m train.plan --config configs/flux_dev_1024.py --topology v5e:4x4
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynaip_jax.app import plan
from dynaip_jax.commandline import run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import as_path
from train import config as config_
from train.config import TrainConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dynaip_jax.planner.jobs import Job
    from train.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if the recipe does not fit."""
    args, words = plan.read(argv)
    if args.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options: dict[str, Any] = {}
    if args.job == "sample":
        options = dict(weights=args.weights, offload_text=args.offload_text)
    elif args.weights != "full" or args.offload_text:
        raise UserError(
            "`job` train: `weights` and `offload_text` are about sampling; leave them out or add `job` sample"
        )
    from dynaip_jax.planner import report
    from dynaip_jax.planner.topologies import devices
    from dynaip_jax.runtime.sharding import MeshConfig, make_mesh, parse_mesh

    config = config_.override(config_.load(args.config), words)
    usual = config.mesh if args.job == "train" else MeshConfig(data=1, fsdp=1, tensor=-1)
    mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else usual, devices(args.topology))
    made = report.make(job(config, mesh, args.job, **options), mesh)
    print(json.dumps(made, indent=1) if args.json else report.text(made))
    return 0 if made["fits"] else 1


def job(config: TrainConfig, mesh: Mesh, kind: Literal["train", "sample"], **sampling: Any) -> Job:
    """What a recipe asks of `mesh`; `sampling`: more options of `jobs.sampling`. A bundle that is not there is planned with its
    published sizes if it is named like one that has some. Raises `UserError` for a recipe that cannot run on the mesh."""
    from dynaip_jax.families.registry import published
    from dynaip_jax.planner import jobs
    from train.run import Run

    bundle = None if as_path(config.bundle).is_dir() else published(Path(config.bundle).name)
    run = Run(config, bundle=bundle, mesh=mesh)
    if kind == "train":
        return training(run)
    adapter = run.constants.adapter
    if adapter is None:
        raise UserError(f"`job` sample: the recipe trains {config.trainable!r}, no adapter; expected one that does")
    return jobs.sampling(run.bundle, adapter, mesh, size=config.sample.size, steps=config.sample.steps, **sampling)


def training(run: Run) -> Job:
    """The programs of a training step."""
    import jax
    import jax.numpy as jnp

    from dynaip_jax.families.base import REFERENCE_ENCODER
    from dynaip_jax.planner.jobs import Job, Program
    from dynaip_jax.runtime.sharding import batch_sharding
    from train.state import abstract_state
    from train.step import features_of

    run.check_batch()
    config, constants, split = run.config, run.constants, batch_sharding(run.mesh)
    encoders = {name: run.abstract(name) for name in run.encoders}
    base = dict(transformer=run.abstract("transformer")) if config.trainable == "adapter" else {}
    frozen = base | encoders
    state = abstract_state(config, constants, run.places)
    batch, step = _batch(run), jax.ShapeDtypeStruct((), jnp.int32)
    features = jax.eval_shape(lambda f, x, n: features_of(constants, f, x, n), frozen, batch, step)
    features = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), features)
    features_fn, step_fn = run.programs

    family, side = constants.family, config.data.resolution
    encoding = 2 * family.text_rows * _size(encoders[family.text_encoders[0]])
    if constants.adapter is not None:
        encoding += 2 * family.config(REFERENCE_ENCODER).tokens * _size(encoders[REFERENCE_ENCODER])
    rows = family.tokens(family.latent(side, side))
    return Job(
        programs=[
            Program(
                "features", lambda: features_fn.lower(constants, frozen, batch, step), 1, config.batch * encoding,
                tuple(encoders),
            ),
            Program(
                "step", lambda: step_fn.lower(constants, state, base, features), 1, config.batch * run.flops(rows),
                (*base, "trained state"),
            ),
        ],
        components=frozen | {"trained state": state},
        images=config.batch,
    )  # fmt: skip


def _batch(run: Run) -> Any:
    """A batch of square pictures, in shapes alone."""
    import jax
    import jax.numpy as jnp

    from dynaip_jax.data.samples import Batch
    from dynaip_jax.runtime.sharding import batch_sharding

    side, clip = run.config.data.resolution, run.config.data.clip_size
    split = batch_sharding(run.mesh)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((run.config.batch, *shape), dtype, sharding=split)

    return Batch(
        target=array(jnp.float32, side, side, 3),
        reference=array(jnp.float32, 1, clip, clip, 3),
        ids={name: array(x.dtype, *x.shape[1:]) for name, x in run.constants.family.text_ids_spec().items()},
        keep_image=array(jnp.float32),
        row=array(jnp.int32),
    )


def _size(tree: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(run_cli(main))
