"""Runs of the trainer for tests: their command, children that run it, and what they leave on disk."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from train import config as config_
from train.step import train_step

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "debug.py"
STEP = jax.jit(train_step, static_argnums=0)
PATIENCE = 1500  # seconds after which a child is taken to hang


def tiny_recipe(tiny):
    """The debug recipe on the tiny bundle, whose CLIP is smaller than the embedded one."""
    debug = config_.load(RECIPE)
    return dataclasses.replace(
        debug,
        bundle=str(tiny[0]),
        adapter=dataclasses.replace(debug.adapter, levels=(2, 3, 4), expert_width=64),
        data=dataclasses.replace(debug.data, clip_size=32),
    )


def fixed(config, **changes):
    """`config` with one batch, noise and times for all steps."""
    return dataclasses.replace(config, fixed_batch=True, fixed_noise=True, **changes)


def without_overview(lines):
    """Lines of stderr without the table of parameters and what is said of data and run."""
    return [line for line in lines if not line.startswith(("parameters: ", "data: ", "run: ", "  "))]


def words(workdir, *more):
    """The command line of a small, quick run in `workdir`."""
    small = "--batch 2 --data.workers 0 --log-every 1 --save-every 2 --steps 12".split()
    return [str(w) for w in ("--config", RECIPE, "--workdir", workdir, *small, *more)]


class Child:
    """A Python process in the checkout; its stderr goes to the file `log`."""

    def __init__(self, env, log, *arguments, **options):
        self.log = Path(log)
        with open(self.log, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-B", *map(str, arguments)], cwd=ROOT, env=os.environ | env, stderr=stderr, **options
            )

    @classmethod
    def train(cls, env, log, *arguments, **options):
        """`python -m train.main`."""
        return cls(env, log, "-m", "train.main", *arguments, **options)

    def wait_for(self, condition):
        """Until `condition()` holds; fails if the process ends first."""
        until = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.002)

    def says(self, text):
        """Whether `text` was written to stderr."""
        return text in self.log.read_text()

    def lines(self):
        """What was written to stderr, without the table of parameters."""
        return without_overview(self.log.read_text().splitlines())

    def end(self):
        """The exit status, once it is there."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


def steps(workdir):
    """Steps of the whole checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def state(workdir, step):
    """Name of leaf -> array of a checkpoint's training state."""
    folder = workdir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(arrays)}


def data_state(workdir, step):
    """The data position of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def metrics(workdir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir, key="loss"):
    """One value a line of metrics.jsonl that has it: a step's and those of a validation are lines of their own."""
    return [line[key] for line in metrics(workdir) if key in line]


def assert_same(one, other, step):
    """Two runs have bit-identical adapter, average, optimizer state and data position at `step`."""
    a, b = state(one, step), state(other, step)
    assert a.keys() == b.keys() and any("ema" in name for name in a) and any("mu" in name for name in a)
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []
    assert data_state(one, step) == data_state(other, step)


def contents(folder):
    """Every file below `folder` -> its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(trainer, argv, *found, **options):
    """Runs a command that is refused with one line that holds every text of `found`."""
    status, lines = trainer(argv, **options)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    for text in found:
        assert text in lines[0], lines[0]
