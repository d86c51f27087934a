"""A checkpoint of a run -> an adapter folder that `dynaip sample` takes.

python -m train.export --workdir runs/debug --out adapters/debug
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epath

from dynaip_jax.commandline import argument, parse, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.storage.adapter import write_adapter
from dynaip_jax.storage.bundle import replace_component
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.manifest import fingerprint
from train.checkpoint import Checkpoints
from train.run import Run
from train.workdir import read_config, read_identity

EXAMPLES = """
examples:
  python -m train.export --workdir runs/debug --out adapters/debug
  python -m train.export --workdir runs/all --step best --out adapters/mine --bundle bundles/mine
"""


@dataclass(frozen=True)
class Arguments:
    """Writes the adapter of a run as a folder for sampling (adapter.json, adapter.safetensors)."""

    workdir: str = argument("of the run", unit="DIR")
    out: str | None = argument("the adapter folder to write", default=None, unit="ADAPTER")
    bundle: str | None = argument("if the base was trained too: the bundle to write", default=None, unit="BUNDLE")
    step: str = argument("which checkpoint", default="last", unit="N|best|last")
    weights: Literal["ema", "params"] = argument("the average or the last ones", default="ema")
    dtype: Literal["float32", "bfloat16"] = argument("of the weights on disk", default="float32")
    overwrite: bool = argument("replace existing folders", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes what was trained; prints the name of each folder."""
    args = parse(Arguments, argv, "python -m train.export", EXAMPLES)
    out, bundle = (None if path is None else as_path(path) for path in (args.out, args.bundle))
    export(as_path(args.workdir), out, bundle, args.step, args.weights, dtype=args.dtype, overwrite=args.overwrite)
    return 0


def export(
    workdir: epath.PathLike,
    out: Path | None,
    bundle_out: Path | None,
    step: str = "last",
    weights: str = "ema",
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes the trained adapter to `out` and, if it was trained, the base to `bundle_out`; the run may go on meanwhile.

    `step`: "last", "best" or a number; `weights`: "ema" or "params"; `dtype`: of the files. Raises `UserError` for a folder without a run or
    checkpoint, and for outputs that do not fit what was trained.
    """
    run = Run(read_config(workdir), workdir)
    _check_outputs(run.config.trainable, out, bundle_out)
    with contextlib.closing(Checkpoints(workdir, reading=True)) as checkpoints:
        number = _step(checkpoints, step)
        params = _weights(run, checkpoints, number, weights, dtype)
    identity = run.bundle.fingerprint
    if bundle_out is not None:
        identity = fingerprint(params["transformer"])
        origin = dict(trained_from=run.bundle.fingerprint, step=number, weights=weights)
        replace_component(run.bundle, bundle_out, "transformer", params["transformer"], origin, overwrite=overwrite)
        print(bundle_out)
    if out is not None:
        _write_adapter(run, out, params["adapter"], identity, number, weights, overwrite=overwrite)
        print(out)


def _check_outputs(trainable: str, out: Path | None, bundle_out: Path | None) -> None:
    """Raises `UserError` if an output is missing or there is nothing to write to it."""
    if (out is None) != (trainable == "base"):
        raise UserError(
            f"`out`: {'not given' if out is None else 'given'}; this run trained trainable={trainable!r}; "
            f"{'pass `out` ADAPTER' if out is None else 'there is no adapter in it; leave it out'}"
        )
    if (bundle_out is None) != (trainable == "adapter"):
        remedy = "pass `bundle` BUNDLE for the base it trained"
        raise UserError(
            f"`bundle`: {'not given' if bundle_out is None else 'given'}; this run trained trainable={trainable!r}; "
            f"{remedy if bundle_out is None else 'its base is the one it began with; leave it out'}"
        )


def _step(checkpoints: Checkpoints, step: str) -> int:
    """The checkpoint that `step` means. Raises `UserError` if there is none."""
    steps, named = checkpoints.steps(), dict(last=checkpoints.latest(), best=checkpoints.best())
    number = int(step) if step.isdigit() else named.get(step)
    if number is None or number not in steps:
        raise UserError(
            f"`step` {step}: no such checkpoint in {checkpoints.workdir}; it has {', '.join(map(str, steps)) or 'none'}"
        )
    return number


def _weights(run: Run, checkpoints: Checkpoints, step: int, weights: str, dtype: str) -> dict[str, Any]:
    """The trained parameters of a checkpoint as NumPy arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from train.state import abstract_state

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = checkpoints.restore(step, abstract_state(run.config, run.constants, here))
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), getattr(state, weights))


def _write_adapter(run: Run, out: Path, params: Any, base: str, step: int, weights: str, *, overwrite: bool) -> None:
    """The adapter's folder. `base`: the fingerprint of the base that it belongs to."""
    config, adapter = run.config, run.constants.adapter
    assert adapter is not None
    conventions = dict(
        weights=weights,
        drop_image=config.data.drop_image,
        drop_text=config.data.drop_text,
        drop_both=config.data.drop_both,
        reference=config.data.square,
        remove_background=config.data.remove_background,
        guidance=config.guidance,
        dataset=read_identity(run.workdir).get("data"),
    )
    write_adapter(
        out,
        to_dict(adapter),
        params,
        base=dict(family=run.bundle.manifest["family"], fingerprint=base),
        step=step,
        conventions=conventions,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
