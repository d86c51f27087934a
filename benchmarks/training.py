"""The training step against a bare value_and_grad of the same model, waiting for data, and saving, on CPU.

python -m benchmarks.training [--repeats N] [--json]

Step and bare gradient take turns in one process on the same features; the debug run that follows gives the share of time
spent waiting for data (one worker) and how long saving a checkpoint blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.output import show
from dynaip_jax.adapters.dynaip import DynaIPConfig, init_adapter_params
from dynaip_jax.families.flux import Flux1
from dynaip_jax.flow import ScheduleConfig, sample_times
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.flux import FluxConfig
from train import config as config_
from train.checkpoint import Checkpoints
from train.constants import Constants
from train.loop import train
from train.metrics import METRICS_FILE
from train.photographs import prepare_photographs
from train.state import init_state
from train.step import Features, loss, train_step


def main() -> int:
    """Prints one line a figure, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = step_overhead(args.repeats) | debug_run()
    result |= dict(
        machine=f"{platform.machine()}, {jax.device_count()} device",
        versions=dict(jax=jax.__version__, python=platform.python_version()),
    )
    show(result, args.json)
    return 0


def step_overhead(repeats: int) -> dict[str, Any]:
    """Time of `train_step` over that of value_and_grad of its loss: 512 wide, 2 + 4 blocks, 256 + 64 tokens, batch 2."""
    flux = FluxConfig(
        hidden_size=512,
        num_heads=8,
        axes_dim=(8, 28, 28),
        depth=2,
        depth_single_blocks=4,
        context_in_dim=256,
        vec_in_dim=64,
    )
    family = Flux1((("transformer", flux),), (("transformer", Compute()),), ScheduleConfig(), (("t5_length", 64),))
    adapter = DynaIPConfig.for_base(family.sites, 128, hmoe=dict(expert_width=256))
    constants = Constants(
        family=family, adapter=adapter, adapter_compute=Compute(), optim=config_.OptimConfig(), accumulate=1, guidance=1.0,
        random_granularity=0.0, time_mean=0.0, time_std=1.0, fixed_noise=False, seed=0,
    )  # fmt: skip
    frozen = dict(transformer=jax.jit(lambda k: family.init_params("transformer", k))(jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    levels = tuple(normal(2, 1, 257, 128) for _ in range(3))
    latents, noise, t = normal(2, 16, 32, 32), normal(2, 16, 32, 32), sample_times(next(keys), 2, 1.0)
    features = Features(latents, noise, t, normal(2, 64, 256), normal(2, 64), levels, jnp.ones(2))
    params = dict(adapter=init_adapter_params(adapter, next(keys)))
    bare = jax.jit(lambda p, f: jax.value_and_grad(lambda q: loss(constants, frozen | q, f)[0])(p))
    step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
    state = init_state(constants.optim, jax.tree.map(jnp.copy, params))
    times: dict[str, list[float]] = dict(bare=[], step=[])
    for n in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(bare(params, features))
        middle = time.perf_counter()
        state, _ = step(constants, state, frozen, features)
        jax.block_until_ready(state)
        if n:
            times["bare"].append(middle - start)
            times["step"].append(time.perf_counter() - middle)
    bare_s, step_s = (statistics.median(times[k]) for k in ("bare", "step"))
    return dict(bare_gradient_s=bare_s, train_step_s=step_s, step_overhead=step_s / bare_s - 1)


def debug_run(steps: int = 60) -> dict[str, Any]:
    """The debug recipe with one worker: waiting for data after warm-up, and the longest time a save took of the loop."""
    debug = config_.load(Path("configs/debug.py"))
    data = dataclasses.replace(debug.data, path=str(prepare_photographs()), workers=1)
    blocked: list[float] = []
    save = Checkpoints.save

    def timed(self: Checkpoints, *args: Any) -> None:
        start = time.perf_counter()
        save(self, *args)
        blocked.append(time.perf_counter() - start)

    with mock.patch.object(Checkpoints, "save", timed), tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        train(dataclasses.replace(debug, data=data, steps=steps, log_every=20, save_every=10), workdir)
        lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    after = lines[1:]  # the first line holds compilation
    return dict(
        data_wait=statistics.mean(line["data_wait"] for line in after),
        debug_step_s=statistics.mean(line["step_seconds"] for line in after),
        save_blocks_ms=[round(1000 * b, 1) for b in blocked],
    )


if __name__ == "__main__":
    sys.exit(main())
