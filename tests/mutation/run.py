"""Seeded mutation of every file that is read.

    python -m tests.mutation.run                                  1,000 mutants of every reader, about 20 minutes
    python -m tests.mutation.run --reader safetensors --count 10000

Each mutant is read in a process of its own kind, with a time limit. A reader must refuse it (`UserError`, one short clean line), read
what it read before ("same"), or read what the file now truly says ("other"). Faults: "foreign" exceptions, "hang", "died", "different"
(read otherwise than the file says, in silence), "message" (too long, or with control characters), "noise" (a traceback on the terminal).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GOOD = ("refused", "same", "other")
START = 300.0  # seconds that a worker may take to be ready


class Fault(NamedTuple):
    """A mutant that was read badly: made again by its number."""

    number: int
    verdict: str
    text: str


class Worker:
    """A process that reads mutants of one reader."""

    def __init__(self, reader: str, seed: int, folder: Path):
        command = [sys.executable, "-m", "tests.mutation.worker", reader, str(seed), str(folder)]
        env = os.environ | dict(PYTHONPATH=str(ROOT))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env, text=True, bufsize=1
        )
        started = self._answer(START)
        if started is None or started[0] != "ready":
            self.close()
            raise RuntimeError(f"{reader}: the worker does not start")

    def read(self, number: int, limit: float) -> tuple[str, str]:
        """The verdict on a mutant: "hang" after `limit` seconds of computing, "died" if the process did."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{number}\n")
        except OSError:
            return "died", f"exit status {self.process.wait()}"
        answer = self._answer(limit)
        if answer is not None:
            return answer
        return (
            ("hang", f"more than {limit} s")
            if self.process.poll() is None
            else ("died", f"exit status {self.process.poll()}")
        )

    def _answer(self, limit: float) -> tuple[str, str] | None:
        """Its next line, unless it computes for more than `limit` seconds first, or sleeps for ten times as long."""
        stdout, start, spent = self.process.stdout, time.monotonic(), self._seconds()
        assert stdout is not None
        while not select.select([stdout], [], [], 0.5)[0]:
            if self._seconds() - spent > limit or time.monotonic() - start > 10 * limit:
                return None
        line = stdout.readline()
        if not line:
            self.process.wait()
            return None
        verdict, text = json.loads(line)
        return verdict, text

    def _seconds(self) -> float:
        """The processor time that it has taken; other programs may keep it waiting."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # not Linux
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def run(
    reader: str, count: int, *, seed: int = 0, limit: float = 20.0, first: int = 0
) -> tuple[collections.Counter, list[Fault]]:
    """Verdicts on the mutants `first` to `first + count` of a reader, and those that are faults."""
    verdicts: collections.Counter = collections.Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(reader, seed, Path(folder))
        try:
            for number in range(first, first + count):
                verdict, text = worker.read(number, limit)
                verdicts[verdict] += 1
                if verdict not in GOOD:
                    faults.append(Fault(number, verdict, text))
                if verdict in ("hang", "died"):
                    worker.close()
                    worker = Worker(reader, seed, Path(folder))
        finally:
            worker.close()
    return verdicts, faults


def main() -> int:
    """Prints a line a reader and its faults; exit status 1 if there are any."""
    from tests.mutation.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of a processor that a mutant may take")
    parser.add_argument("--show", type=int, default=10, help="faults to print of each reader")
    args = parser.parse_args()
    bad = 0
    for name in args.reader or READERS:
        start = time.monotonic()
        verdicts, faults = run(name, args.count, seed=args.seed, limit=args.limit, first=args.first)
        bad += len(faults)
        print(f"{name}: {dict(verdicts)} in {time.monotonic() - start:.0f} s", flush=True)
        for fault in faults[: args.show]:
            print(f"    {fault.number} {fault.verdict}: {fault.text!r}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
