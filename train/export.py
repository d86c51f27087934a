"""A checkpoint of a run -> an adapter folder that `dynaip sample` takes.

python -m train.export --workdir runs/debug --out adapters/debug
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dynaip_jax.commandline import Parser, run_cli
from dynaip_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.export",
        description="Writes the adapter of a run as a folder for sampling (adapter.json, adapter.safetensors).",
        epilog="""examples:
  python -m train.export --workdir runs/debug --out adapters/debug
  python -m train.export --workdir runs/all --step best --out adapters/mine --bundle bundles/mine""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="of the run")
    parser.add_argument("--out", type=Path, metavar="ADAPTER", help="the adapter folder to write")
    parser.add_argument(
        "--bundle", type=Path, metavar="BUNDLE", help="if the base was trained too: the bundle to write"
    )
    parser.add_argument("--step", default="last", metavar="N|best|last", help="which checkpoint (default: last)")
    parser.add_argument(
        "--weights", choices=("ema", "params"), default="ema", help="the average or the last ones (default: ema)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights on disk (default: float32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing folders")
    args = parser.parse_args(argv)
    export(args.workdir, args.out, args.bundle, args.step, args.weights, dtype=args.dtype, overwrite=args.overwrite)
    return 0


def export(
    workdir: Path,
    out: Path | None,
    bundle_out: Path | None,
    step: str = "last",
    weights: str = "ema",
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes the trained adapter to `out` and, if it was trained, the base to `bundle_out`.

    `step`: "last", "best" or a number; `weights`: "ema" or "params"; `dtype`: of the files. Raises `UserError` for a folder without a run or
    checkpoint, and for outputs that do not fit what was trained.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dynaip_jax.storage.adapter import write_adapter
    from dynaip_jax.storage.bundle import replace_component
    from dynaip_jax.storage.codec import to_dict
    from dynaip_jax.storage.manifest import fingerprint
    from train import assemble as models
    from train import config as config_
    from train.checkpoint import RUN_FILE, Checkpoints
    from train.step import TrainState, init_state

    try:
        config = config_.from_dict(json.loads((workdir / RUN_FILE).read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"--workdir {workdir}: no readable {RUN_FILE} ({e}); expected a run's folder; check the path"
        ) from e
    if (out is None) != (config.trainable == "base"):
        raise UserError(
            f"--out: {'not given' if out is None else 'given'}; this run trained trainable={config.trainable!r}; "
            f"{'pass --out ADAPTER' if out is None else 'there is no adapter in it; leave it out'}"
        )
    if (bundle_out is None) != (config.trainable == "adapter"):
        raise UserError(
            f"--bundle: {'not given' if bundle_out is None else 'given'}; this run trained trainable="
            f"{config.trainable!r}; {'pass --bundle BUNDLE for the base it trained' if bundle_out is None else 'its base is the one it began with; leave it out'}"
        )
    bundle = models.open_bundle(config)
    recipe = models.make_recipe(config, bundle)
    checkpoints = Checkpoints(workdir, config.keep)
    try:
        steps = checkpoints.steps()
        number = (
            {"last": checkpoints.latest(), "best": checkpoints.best()}.get(step) if not step.isdigit() else int(step)
        )
        if number not in steps:
            raise UserError(
                f"--step {step}: no such checkpoint in {workdir}; it has {', '.join(map(str, steps)) or 'none'}"
            )
        assert number is not None
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target: TrainState = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            jax.eval_shape(lambda: init_state(config.optim, models.fresh_params(config, recipe))),
        )
        state = checkpoints.restore(number, target)
    finally:
        checkpoints.close()
    params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), getattr(state, weights))

    identity = bundle.fingerprint
    if bundle_out is not None:
        identity = fingerprint(params["transformer"])
        origin = dict(trained_from=bundle.fingerprint, step=number, weights=weights)
        replace_component(bundle, bundle_out, "transformer", params["transformer"], origin, overwrite=overwrite)
        print(bundle_out)
    if out is not None:
        assert recipe.adapter is not None
        conventions = dict(
            weights=weights,
            drop_image=config.data.drop_image,
            drop_text=config.data.drop_text,
            drop_both=config.data.drop_both,
            reference=config.data.square,
            remove_background=config.data.remove_background,
            guidance=config.guidance,
        )
        write_adapter(
            out,
            to_dict(recipe.adapter),
            params["adapter"],
            base=dict(family=bundle.manifest["family"], fingerprint=identity),
            step=number,
            conventions=conventions,
            overwrite=overwrite,
        )
        print(out)


if __name__ == "__main__":
    sys.exit(run_cli(main))
