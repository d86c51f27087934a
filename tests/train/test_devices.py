"""One device, eight in several meshes, and two processes do the same training; each sample is read once."""

import json
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.commandline import run_cli
from dynaip_jax.data.loader import BatchIterator
from tests.train import runs
from tests.train.runs import Child, data_state, losses, metrics, steps, words
from train import config as config_
from train import processes
from train.loop import train
from train.main import main
from train.photographs import resolve
from train.run import Run

MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}  # data, fsdp, tensor
FOUR_STEPS = ("--batch", 8, "--steps", 4)


def mesh_words(*mesh):
    return [w for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True) for w in (f"--mesh.{name}", size)]


def train_on_meshes(folder):
    """In a child with eight devices: a run on every mesh, and in `NAME.json` the shapes of some leaves' shards."""
    for name, mesh in MESHES.items():
        argv = words(folder / name, *FOUR_STEPS, *mesh_words(*mesh))
        config = resolve(config_.override(config_.load(Path(argv[1])), argv[4:]))
        state = train(config, folder / name)
        frozen = Run(config).load("transformer")
        leaves = dict(
            params=state.params["adapter"]["double"]["key"],
            ema=state.ema["adapter"]["double"]["key"],
            mu=state.opt_state[1][0].mu["adapter"]["double"]["key"],
            frozen=frozen["transformer"]["double_blocks"]["img_mlp"]["in_layer"]["kernel"],
        )
        shards = {
            k: [list(x.shape), *map(list, {s.data.shape for s in x.addressable_shards})] for k, x in leaves.items()
        }
        (folder / f"{name}.json").write_text(json.dumps(shards))


def train_as_process(folder, *argv):
    """In one of several children: the training command; the rows that it read go to `rows.INDEX`."""
    read, following = [], BatchIterator.__next__

    def noting(self):
        batch = following(self)
        read.append(batch.row.tolist())
        return batch

    BatchIterator.__next__ = noting
    status = run_cli(main, argv)
    (Path(folder) / f"rows.{jax.process_index()}").write_text(json.dumps(read))
    sys.exit(status)


CALL = "import sys; from tests.train import test_devices as t; "


@pytest.fixture(scope="module")
def eight(home, tmp_path_factory):
    """The folder with a run a mesh."""
    folder = tmp_path_factory.mktemp("eight")
    call = f"{CALL}t.train_on_meshes(t.Path(sys.argv[1]))"
    child = Child(home | dict(JAX_NUM_CPU_DEVICES="8"), folder / "log", "-c", call, folder)
    assert child.end() == 0, child.log.read_text()
    return folder


@pytest.fixture(scope="module")
def one(home, tmp_path_factory):
    """The folder of the same run on one device, in this process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", home["XDG_CACHE_HOME"])
        assert run_cli(main, [str(word) for word in words(folder, *FOUR_STEPS)]) == 0
    return folder


def assert_close(run, other, step):
    """Up to the rounding of float32: seen are 2e-7 in the losses, 5e-7 in the gradient norms, 4e-8 in the weights."""
    np.testing.assert_allclose(losses(run)[:step], losses(other)[:step], rtol=1e-5)
    np.testing.assert_allclose(losses(run, "grad_norm")[:step], losses(other, "grad_norm")[:step], rtol=1e-5)
    a, b = runs.state(run, step), runs.state(other, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-6, err_msg=name)
    assert data_state(run, step) == data_state(other, step)


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one(one, eight, mesh):
    assert_close(eight / mesh, one, 4)


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_and_optimizer_state_are_split(eight, mesh):
    """A device holds its part alone, of what is trained and of the frozen base."""
    _, fsdp, tensor = MESHES[mesh]
    shards = json.loads((eight / f"{mesh}.json").read_text())
    for name in ("params", "ema", "mu"):
        (layers, width, heads, size), *parts = shards[name]
        assert parts == [[layers, width // fsdp, heads // tensor, size]]
    (layers, width, wide), *parts = shards["frozen"]
    assert parts == [[layers, width // fsdp, wide // tensor]]


def test_a_checkpoint_of_eight_devices_goes_on_with_one(trainer, one, eight, tmp_path):
    six = ("--batch", 8, "--steps", 6, "--resume")
    runs = tmp_path / "moved", tmp_path / "stayed"
    for run, of in zip(runs, (eight / "2x2x2", one), strict=True):
        shutil.copytree(of, run)
        assert trainer(words(run, *six))[0] == 0
    assert_close(*runs, 6)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


def two_processes(home, folder, port, *argv, others=((), ()), call="train_as_process"):
    """Two processes of two devices each, on a mesh that makes the parts of neither of them neighbours in the batch."""
    together = "--distributed.enabled --distributed.processes 2".split()
    return [
        Child(
            home | dict(JAX_NUM_CPU_DEVICES="2"), folder / f"log{index}", "-c", f"{CALL}t.{call}(*sys.argv[1:])", folder,
            *words(folder / "run", "--batch", 4, *mesh_words(2, 2, 1), *together, *argv, *others[index]),
            "--distributed.coordinator", f"localhost:{port}", "--distributed.index", index,
        )
        for index in (0, 1)
    ]  # fmt: skip


def test_two_processes_train_as_one_and_stop_together(home, photographs, trainer, port, tmp_path):
    """With micro-batches, a sample grid and validation. SIGTERM to one of them stops both at the same step; one process alone can go
    on from there."""
    shared = "--batch 8 --accumulate 2 --sample.every 2 --sample.rows 1 --sample.size 64 --sample.steps 1".split()
    shared += f"--validation.path {photographs} --validation.every 2 --validation.batches 1".split()
    children = two_processes(home, tmp_path, port, *shared, "--steps", 100_000, "--save-every", 100_000)
    children[0].wait_for(lambda: children[0].says("step 3 "))
    children[1].process.send_signal(signal.SIGTERM)
    assert [child.end() for child in children] == [143, 143], children[0].log.read_text()
    (last,) = steps(tmp_path / "run")
    assert children[0].says(f"stopped by SIGTERM after step {last}; saved; go on with --resume\n")
    assert not children[1].says("step 1 ") and not children[1].says("stopped by")
    assert children[1].says("SIGTERM: waits for the step that runs") and not children[0].says("SIGTERM: waits")

    rows = [json.loads((tmp_path / f"rows.{index}").read_text())[1:] for index in (0, 1)]  # the first is validation's
    assert [len(part) for part in rows] == [last, last]
    for step in range(last):  # an epoch is eight rows
        assert sorted(row for part in rows for row in part[step]) == list(range(8))

    alone = tmp_path / "alone"
    assert trainer(words(alone, *shared, "--steps", last))[0] == 0
    assert_close(tmp_path / "run", alone, last)
    validated = [losses(run, "validation_loss") for run in (tmp_path / "run", alone)]
    np.testing.assert_allclose(*validated, rtol=1e-5)
    assert len(validated[0]) == last // 2
    grids = [images.load_image(run / "samples" / "step_000002.png").astype(int) for run in (tmp_path / "run", alone)]
    assert abs(grids[0] - grids[1]).max() <= 1 and grids[0].std() > 20
    assert trainer(words(tmp_path / "run", *shared, "--steps", last + 2, "--resume"))[0] == 0
    trained = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert trained == list(range(1, last + 3))


def test_a_process_that_fails_does_not_leave_the_other_waiting(home, port, tmp_path):
    children = two_processes(home, tmp_path, port, others=((), ("--data.path", tmp_path / "missing")))
    began = time.monotonic()
    assert children[1].end() == 2 and children[0].end() == 1
    assert time.monotonic() - began < 60
    errors = [[line for line in child.lines() if line.startswith("error: ")] for child in children]
    assert [len(lines) for lines in errors] == [1, 1] and f"dataset {tmp_path / 'missing'}" in errors[1][0]
    assert errors[0][0].startswith(
        f"error: process 1 on {socket.gethostname()}, process id {children[1].process.pid}, ended: dataset"
    )
    assert not (tmp_path / "run").exists()


def test_a_second_start_of_two_processes_beside_compiled_programs(home, tmp_path):
    """As users start them, copies on two processes: what one of them finds compiled and the other not would exchange data otherwise."""
    env = home | dict(JAX_NUM_CPU_DEVICES="1", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))
    for last in (1, 2):
        address = f"localhost:{free_port()}"
        together = f"--distributed.enabled --distributed.processes 2 --distributed.coordinator {address}".split()
        options = words(tmp_path / "run", "--steps", last, "--mesh.data", 2, "--resume", *together)
        children = [
            Child.train(env, tmp_path / f"log{index}.{last}", *options, "--distributed.index", index)
            for index in (0, 1)
        ]
        assert [child.end() for child in children] == [0, 0], children[0].log.read_text()
    assert steps(tmp_path / "run") == [1, 2]


def slow_to_fail(folder, *argv):
    """Process 1 fails later than process 0, which the processes meet at; its word of that arrives, but no answer, since that one is gone
    and JAX aborts the others; then it says what failed."""
    if argv[-1] == "1":
        leave, show = processes.Others.__exit__, processes.Others._show

        def late(others, *error):
            time.sleep(5)
            leave(others, *error)
            time.sleep(3)

        def unanswered(others, folder, text):
            show(others, folder, text)
            if folder == processes.ENDED:
                time.sleep(2)
                show(others, folder, text)

        processes.Others.__exit__, processes.Others._show = late, unanswered
    train_as_process(folder, *argv)


def test_processes_with_different_options_end_before_the_first_step(home, port, tmp_path):
    children = two_processes(home, tmp_path, port, others=((), ("--optim.rate", 0.5)), call="slow_to_fail")
    assert [child.end() for child in children] == [2, 2], children[0].log.read_text()
    for child in children:
        (line,) = [line for line in child.log.read_text().splitlines() if line.startswith("error: ")]
        assert "error: process 1 (" in line and "--optim.rate 0.5; process 0 (" in line and "has 0.001" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, found",
    [
        (mesh_words(2, 1, 1), "mesh data x fsdp x tensor = 2 x 1 x 1: does not fit 1 devices; choose sizes whose product is 1"),
        (mesh_words(-1, -1, 1), "expected positive numbers and at most one -1"),
        (mesh_words(0, 1, 1), "expected positive numbers and at most one -1"),
        (("--distributed.processes", 2), "--distributed: has values but is not enabled; pass --distributed.enabled too"),
        (
            "--distributed.enabled --distributed.coordinator localhost:1 --distributed.processes 2 --distributed.index 2".split(),
            "--distributed.index 2 of --distributed.processes 2: expected at least 1 process, and indices from 0",
        ),
    ],
)  # fmt: skip
def test_a_mesh_or_processes_that_do_not_fit(trainer, tmp_path, options, found):
    status, lines = trainer(words(tmp_path / "run", *options))
    assert status == 2 and len(lines) == 1 and found in lines[0]
    assert not (tmp_path / "run").exists()
