"""Every writer of the project against kills, a second writer, a full disk and a read-only folder.

python -m tests.writers --kills 20                  about half an hour on two cores
python -m tests.writers --kills 5 --only adapter    one of them

A writer must leave at its target what was there or what it makes, whole; a later run of it must leave nothing else. Kills come at random
moments, two in three of them once it has begun to write. Disks are small ones in memory where this user may mount some; else the
size of files is limited, and folders are closed. Exits with 1 if anything was lost, taken for whole or left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["train.cache", "train.export", "train.loop", "train.main", "train.prepare"]
PATIENCE = 300  # seconds after which a writer is taken to hang
SIDE = 64  # files of the plain folder
PAGE = 4096  # bytes: a file takes whole ones


@dataclass(frozen=True)
class Writer:
    """A command, given the target, and what reads the target: it raises whatever it likes if it is not whole."""

    run: Callable[[Path, Path], int]  # (folder of the sources, target)
    check: Callable[[Path, Path], None]
    beside: bool = True  # whether it works beside the target, not in it


def folder(sources: Path, out: Path) -> int:
    """A plain folder."""
    from dynaip_jax.commandline import run_cli
    from dynaip_jax.storage.folders import replacing

    def write(argv):
        with replacing(out, overwrite=True, marks=("mark",)) as work:
            for n in range(SIDE):
                (work / str(n)).write_bytes(bytes([n]) * 100_000)
            (work / "mark").touch()

    return run_cli(write, [])


def check_folder(sources: Path, out: Path) -> None:
    for n in range(SIDE):
        assert (out / str(n)).read_bytes() == bytes([n]) * 100_000


def command(name: str, *words: object) -> int:
    import importlib

    from dynaip_jax.commandline import run_cli

    return run_cli(importlib.import_module(name).main, [str(word) for word in words])


def bundle(sources: Path, out: Path) -> int:
    """The converter."""
    return command(
        "tools.convert_torch_weights.__main__", "--source", sources / "ae.safetensors", "--out", out, "--overwrite"
    )


def check_bundle(sources: Path, out: Path) -> None:
    import jax

    from dynaip_jax.families.registry import FAMILIES
    from dynaip_jax.storage.bundle import Bundle

    opened, vae = Bundle.open(out, FAMILIES), FAMILIES["flux"].components["vae"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = vae.abstract(opened.config("vae", vae.config))
    opened.load("vae", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes))


def dataset(sources: Path, out: Path) -> int:
    """`train.prepare`."""
    return command("train.prepare", "--source", sources / "photos" / "metadata.jsonl", "--out", out, "--overwrite")


def parts(sources: Path, out: Path) -> int:
    """`train.prepare` in two more processes, whose parts, of a row each, are kept until all is whole."""
    import train.parts

    train.parts.ROWS_A_SHARD = 1
    words = ("--source", sources / "photos" / "metadata.jsonl", "--out", out, "--overwrite", "--processes", 2)
    return command("train.prepare", *words)


def check_dataset(sources: Path, out: Path) -> None:
    from dynaip_jax.data.records import open_dataset

    rows = open_dataset(out)
    assert len(rows) == 4 and all(row.target for row in map(rows.__getitem__, range(4)))


RECIPE = (
    "--config", "configs/debug.py", "--data.workers", 0, "--batch", 2, "--adapter.levels", 2, 3, 4, "--adapter.expert-width", 64,
    "--data.clip-size", 32,
)  # fmt: skip


def recipe(sources: Path) -> tuple[object, ...]:
    return (*RECIPE, "--bundle", sources / "bundle", "--data.path", sources / "dataset")


def features(sources: Path, out: Path) -> int:
    """`train.cache`."""
    return command("train.cache", *recipe(sources), "--out", out, "--overwrite", "--variants", 4)


def check_features(sources: Path, out: Path) -> None:
    import numpy as np

    assert json.loads((out / "features.json").read_text())["variants"] == 4
    assert all(np.isfinite(np.load(file)).all() and np.load(file).any() for file in out.rglob("*.npy"))


def adapter(sources: Path, out: Path) -> int:
    """`train.export`."""
    return command("train.export", "--workdir", sources / "run", "--out", out, "--overwrite")


def check_adapter(sources: Path, out: Path) -> None:
    from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS
    from dynaip_jax.storage.tensors import read_tree

    assert read_tree(out / ADAPTER_WEIGHTS) and json.loads((out / "adapter.json").read_text())["training_step"] == 2


def run(sources: Path, out: Path) -> int:
    """`train.main`."""
    steps = (
        "--steps",
        8,
        "--save-every",
        1,
        "--log-every",
        1,
        "--sample.every",
        1,
        "--sample.size",
        32,
        "--sample.steps",
        1,
    )
    return command("train.main", *recipe(sources), *steps, "--workdir", out, "--resume")


def check_run(sources: Path, out: Path) -> None:
    from train.checksums import CHECKSUMS, damage
    from train.workdir import CHECKPOINTS, read_config, steps_in

    if not (out / "run.json").is_file():
        assert not out.exists() or {path.name for path in out.iterdir()} <= {"trainer.lock"} | set(litter(out))
        return
    read_config(out)
    for step in steps_in(out):
        kept = out / CHECKPOINTS / str(step)
        assert (kept / CHECKSUMS).is_file() and damage(kept) is None
    for picture in (out / "samples").glob("*.png"):
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")


WRITERS = dict(
    folder=Writer(folder, check_folder),
    bundle=Writer(bundle, check_bundle),
    dataset=Writer(dataset, check_dataset),
    parts=Writer(parts, check_dataset),
    features=Writer(features, check_features),
    adapter=Writer(adapter, check_adapter),
    run=Writer(run, check_run, beside=False),
)


def make_sources(to: Path) -> None:
    """What the writers read."""
    import numpy as np
    from safetensors.numpy import save_file

    from dynaip_jax.models.vae import VAEConfig
    from dynaip_jax.testing import make_bundle
    from tests.data.photos import entries, write_lines
    from tools.convert_torch_weights import engine, vae

    rng = np.random.default_rng(0)
    shapes = engine.source_shapes(vae.table(VAEConfig.tiny(), "bfl"))
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, to / "ae.safetensors")
    (to / "photos").mkdir()
    write_lines(to / "photos", entries(to / "photos"))
    make_bundle(to / "bundle")
    assert dataset(to, to / "dataset") == 0
    words = ("--steps", 2, "--save-every", 2, "--workdir", to / "run")
    assert command("train.main", *recipe(to), *words) == 0


def litter(folder: Path) -> list[str]:
    """Names, below `folder`, of what a writer leaves when it is killed."""
    found = [path for pattern in (".*", "*tmp*", "*.lock", "*partial*") for path in folder.rglob(pattern)]
    return sorted({path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".zarray")})


def taken(folder: Path) -> int:
    """Bytes of a disk that the files below `folder` take."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in folder.rglob("*") if file.is_file())


class Child:
    """A writer in a process of its own. `log`: what it says."""

    def __init__(self, writer: Writer, sources: Path, out: Path, limit: int = 0):
        self.log = Path(tempfile.mkstemp(prefix="log.", dir=sources)[1])
        self._process = CONTEXT.Process(target=_child, args=(writer.run, sources, out, self.log, limit))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit status, or minus the signal; None if it goes on after so many seconds. One that hangs is killed."""
        self._process.join(seconds)
        status = self._process.exitcode
        if seconds >= PATIENCE:
            self.kill()
        return status

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def errors(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(("error: ", "Traceback"))]


def _child(write: Callable[[Path, Path], int], sources: Path, out: Path, log: Path, limit: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(write(sources, out))


class Faults:
    """The faults of one writer, in a folder `place` of its own."""

    def __init__(self, name: str, sources: Path, place: Path, mount: bool = True):
        self._mount = mount and os.geteuid() == 0 and shutil.which("mount") is not None
        self.name, self.writer, self.sources, self.place = name, WRITERS[name], sources, place
        self.out, self.wrong = place / "out", []
        self.lock = place / ".out.lock" if self.writer.beside else self.out / "trainer.lock"

    def child(self, out: Path | None = None, **options: int) -> Child:
        return Child(self.writer, self.sources, out or self.out, **options)

    def expect(self, holds: object, what: str) -> None:
        if not holds:
            self.wrong.append(f"{self.name}: {what}")
            print(self.wrong[-1], file=sys.stderr, flush=True)

    def whole(self, out: Path, when: str) -> None:
        try:
            self.writer.check(self.sources, out)
        except Exception as e:  # a check says by any exception that it is not whole
            self.expect(False, f"{when}: not whole ({type(e).__name__}: {str(e)[:200]})")

    def again(self, out: Path, when: str) -> None:
        """The next run of the writer ends well and leaves its target alone."""
        child = self.child(out)
        self.expect(child.wait() == 0, f"{when}: the next run fails: {child.errors() or child.log.read_text()[-300:]}")
        self.whole(out, f"{when}, then another run")
        left = litter(out.parent)
        self.expect(not left and [p.name for p in out.parent.iterdir()] == [out.name], f"{when}: left behind {left}")

    def begin(self, child: Child) -> None:
        """Returns once this writer, not one that was killed, holds the lock under which it writes; or has ended."""
        while child.wait(0.001) is None:
            with contextlib.suppress(OSError, ValueError):
                if json.loads(self.lock.read_text())["pid"] == child.pid:
                    return

    def undo(self) -> None:
        """Has a writer begin at its beginning that else goes on where it ended."""
        if not self.writer.beside:
            shutil.rmtree(self.out, ignore_errors=True)

    def kills(self, count: int, chance: random.Random) -> None:
        began = time.monotonic()
        child = self.child()
        self.begin(child)
        before = time.monotonic() - began
        self.expect(child.wait() == 0, f"cannot be run: {child.log.read_text()[-500:]}")
        during = time.monotonic() - began - before
        cut, number, late = 0, 0, True
        while cut < count and number < 3 * count:
            if late or number % 2:
                self.undo()
            child = self.child()
            if number % 3:
                self.begin(child)
            delay = chance.uniform(0, during if number % 3 else before)
            start = time.monotonic()
            late = child.wait(delay) is not None
            took = time.monotonic() - start
            child.kill()
            cut += not late
            if late:  # the first one may have had to compile
                before, during = (before, took) if number % 3 else (took, during)
            self.whole(self.out, f"kill {number}, {delay:.3f} s {'into writing' if number % 3 else 'after the start'}")
            if self.writer.beside:
                left = [x for x in os.listdir(self.place) if x != "out"]
                self.expect(all(x.startswith(".out.") for x in left), f"kill {number}: visible litter {left}")
            number += 1
        self.again(self.out, "after the kills")
        self.expect(cut == count, f"only {cut} of {number} kills came before it had ended")

    def two(self) -> None:
        """Two begin together: one does it, or both do it one after the other; never both at once."""
        self.undo()
        children = [self.child(), self.child()]
        results = sorted(child.wait() or 0 for child in children)
        said = " ".join(line for child in children for line in child.errors())
        self.expect(results in ([0, 0], [0, 2]), f"two at once: ended with {results}: {said}")
        self.expect(results == [0, 0] or " process " in said, f"two at once: the holder is not named: {said}")
        self.again(self.out, "two at once")

    def second_while_one_writes(self) -> None:
        self.undo()
        first = self.child()
        self.begin(first)
        os.kill(first.pid, signal.SIGSTOP)
        began = time.monotonic()
        second = self.child()
        status = second.wait(60)
        os.kill(first.pid, signal.SIGCONT)
        if first.wait(0) is None or status == 2:
            self.expect(
                status == 2 and "process" in " ".join(second.errors()), f"a second one: {status} {second.errors()}"
            )
        self.expect(time.monotonic() - began < 60, "a second one waits")
        self.expect(first.wait() == 0, f"the first of two: {first.errors()}")
        second.kill()
        self.again(self.out, "a second one while one writes")

    @contextlib.contextmanager
    def disk(self, name: str, size: int) -> Iterator[Path | None]:
        """A file system in memory, gone afterwards; None, and a plain folder, where none can be mounted."""
        place = self.place / name
        place.mkdir()
        tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        mounted = self._mount and subprocess.run(tmpfs, capture_output=True).returncode == 0
        try:
            yield place if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", place], check=True)
            shutil.rmtree(place, ignore_errors=True)

    def full(self) -> None:
        """An old result, then room for a part of the new one; for a run, of its next checkpoint."""
        size, largest = taken(self.out), max(file.stat().st_size for file in self.out.rglob("*"))
        room = size // 2
        with self.disk("small", max(int(2.3 * size), 1 << 20)) as mounted:
            small = mounted or self.place / "small"
            shutil.copytree(self.out, small / "out")
            if self.name == "run":
                first, *later = sorted((small / "out" / "checkpoints").iterdir())
                room = taken(first) // 2
                for kept in later:
                    shutil.rmtree(kept)
            if mounted:
                filler = small / "filler"
                free = shutil.disk_usage(small).free - room
                filler.write_bytes(bytes(max(free, 0)))
            child = self.child(small / "out", limit=0 if mounted else largest // 2)
            status, errors = child.wait(), child.errors()
            self.expect(
                status == 2 and len(errors) == 1 and errors[0].startswith("error: "),
                f"full disk: ended with {status}: {errors or child.log.read_text()[-300:]}",
            )
            self.whole(small / "out", "full disk")
            if mounted:
                filler.unlink()
                if size * 2 < shutil.disk_usage(small).free + size:
                    self.again(small / "out", "full disk")

    def read_only(self) -> None:
        with self.disk("closed", 1 << 28) as mounted:
            closed = mounted or self.place / "closed"
            shutil.copytree(self.out, closed / "out")
            if mounted:
                subprocess.run(["mount", "-o", "remount,ro", closed], check=True)
            else:
                for path in (closed, closed / "out"):
                    path.chmod(0o555)
            child = self.child(closed / "out")
            status, errors = child.wait(), child.errors()
            if os.geteuid() or mounted:
                self.expect(status == 2 and len(errors) == 1, f"read-only: ended with {status}: {errors}")
            self.whole(closed / "out", "read-only")
            self.expect(not litter(closed), f"read-only: left {litter(closed)}")
            if not mounted:
                for path in (closed, closed / "out"):
                    path.chmod(0o755)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    CONTEXT.set_forkserver_preload(PRELOADED)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="dynaip-writers-") as top:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{top}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        sources = Path(top) / "sources"
        sources.mkdir()
        make_sources(sources)
        for name in args.only:
            place = Path(top) / name
            place.mkdir()
            faults = Faults(name, sources, place)
            faults.kills(args.kills, random.Random(args.seed))
            for fault in (faults.two, faults.second_while_one_writes, faults.full, faults.read_only):
                fault()
            print(f"{name}: {args.kills} kills and 4 more faults, {len(faults.wrong)} wrong", flush=True)
            wrong += faults.wrong
    return bool(wrong)


if __name__ == "__main__":
    from tests import writers

    sys.exit(writers.main())
