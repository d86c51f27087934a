"""All that needs no accelerator, in a quarter of an hour, compared with a stored baseline.

python -m benchmarks.all [--only NAME ...] [--baseline FILE] [--update] [--json]

Each benchmark runs in a process of its own with few repeats, one after the other. Only figures that mean the same on every machine
are compared: ratios of times taken in one run, shares, counts and bytes. `change` is the figure over that of the baseline; it is worse if it
grew by more than the figure's tolerance (of speeds, which grow as they get better: fell). Exit status 1 if any is worse or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.output import show

BASELINE = Path(__file__).with_name("baseline.json")
PATIENCE = 1200  # seconds that a benchmark may take
PACKAGES = ("jax", "flax", "optax", "torch", "diffusers")


class Figure(NamedTuple):
    """A figure of a benchmark's JSON. `tolerance`: the share by which it may get worse; `higher`: whether a larger one is better."""

    read: Callable[[Any], float]
    tolerance: float = 0.2
    higher: bool = False


class Benchmark(NamedTuple):
    """`words`: what `python -m` runs; it prints a JSON object, or one a line, which are read as a list."""

    words: tuple[str, ...]
    figures: dict[str, Figure]


def _key(*path: str | int) -> Callable[[Any], float]:
    def read(result: Any) -> float:
        for key in path:
            result = result[key]
        return float(result)

    return read


def _denoise(key: str) -> Callable[[Any], float]:
    return lambda plan: float(next(p for p in plan["programs"] if p["name"] == "denoise")[key])


def _received(plan: Any) -> float:
    return float(sum(c["bytes"] for p in plan["programs"] for c in p["collectives"].values()))


def _forward(*words: str) -> Benchmark:
    figures = {
        "/ diffusers eager": _key("ratio_ours_to_diffusers"),
        "adapter on / diffusers eager": _key("ratio_adapter_on_to_diffusers"),
    }
    command = ("benchmarks.flux_forward", "--repeats", "9", "--json", *words)
    return Benchmark(command, {name: Figure(read, tolerance=0.3) for name, read in figures.items()})


BENCHMARKS: dict[str, Benchmark] = {
    "forward": _forward(),
    "forward bfloat16": _forward("--dtype", "bfloat16"),
    "forward flux2": _forward("--family", "flux2"),
    "training": Benchmark(
        ("benchmarks.training", "--repeats", "5", "--json"),
        {"step / bare gradient": Figure(lambda r: 1 + r["step_overhead"], tolerance=0.1)},
    ),
    "data": Benchmark(
        ("benchmarks.data", "--side", "512", "--workers", "0", "--seconds", "2"),
        {
            "finished / decoded pictures": Figure(lambda r: r[1]["samples_per_core_s"] / r[1]["decoded_per_core_s"], higher=True),
            "PNG / JPEG decoded": Figure(lambda r: r[2]["decoded_per_core_s"] / r[1]["decoded_per_core_s"], higher=True),
        },
    ),
    "scale": Benchmark(
        ("benchmarks.scale", "--rows", "1000000", "--json"),
        {
            "bytes a row of the host": Figure(lambda r: r["more host_mib"] * 2**20 / r["large rows"]),
            "open files of a worker": Figure(_key("large files_open_in_a_worker")),
        },
    ),
    "converting": Benchmark(
        ("benchmarks.converting", "--gigabytes", "1", "--repeats", "3", "--json"),
        {
            "speed / cp": Figure(_key("ratio"), tolerance=0.5, higher=True),
            "peak memory, GB": Figure(_key("peak_rss_gigabytes")),
        },
    ),
    "shortcuts": Benchmark(
        ("benchmarks.shortcuts", "--num", "8"),
        {f"{row} / in full, time": Figure(_key("rows", row, "time")) for row in ("cache 0.2", "8 steps", "int8")},
    ),
    "page": Benchmark(
        ("benchmarks.page", "--visits", "20", "--rounds", "2", "--json"),
        {
            "memory after 40 pictures / after 10": Figure(
                lambda r: r["resident_MiB"]["after 40"] / r["resident_MiB"]["after 10"], tolerance=0.05
            ),
        },
    ),
    "plan": Benchmark(
        (
            "dynaip_jax.app.main", "plan", "--config", "configs/flux_dev_1024.py", "--topology", "v6e:2x2", "--job", "sample", "--json",
        ),
        {
            "denoise, FLOPs compiled / by formula": Figure(
                lambda plan: _denoise("compiled_flops")(plan) / _denoise("flops_per_chip")(plan), tolerance=0.02
            ),
            "denoise, bytes written": Figure(_denoise("written_bytes"), tolerance=0.05),
            "denoise, bytes copied": Figure(_denoise("copied_bytes"), tolerance=0.05),
            "denoise, scratch": Figure(_denoise("scratch_bytes"), tolerance=0.05),
            "bytes in collectives": Figure(_received, tolerance=0.05),
        },
    ),
}  # fmt: skip


def main() -> int:
    """Prints a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=BENCHMARKS, default=list(BENCHMARKS), help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="(default: benchmarks/baseline.json)")
    parser.add_argument("--update", action="store_true", help="store what was measured as the baseline")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    stored = json.loads(args.baseline.read_text()) if args.baseline.is_file() else dict(figures={})
    start = time.monotonic()
    measured: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name in args.only:
        print(name, file=sys.stderr)
        try:
            result = run(BENCHMARKS[name].words)
            measured |= {f"{name}: {key}": figure.read(result) for key, figure in BENCHMARKS[name].figures.items()}
        except Failed as e:
            failures[name] = str(e)
    rows = compare(measured, stored["figures"])
    facts = dict(
        machine=platform.processor() or platform.machine(), cores=os.cpu_count(), load=round(os.getloadavg()[0], 1),
        date=time.strftime("%Y-%m-%d"), versions={name: version(name) for name in PACKAGES}, python=platform.python_version(),
    )  # fmt: skip
    if args.update and failures:
        print(f"note: {args.baseline} is kept as it was: {', '.join(failures)} failed", file=sys.stderr)
    elif args.update:
        kept = stored["figures"] | {name: float(f"{value:.4g}") for name, value in measured.items()}
        args.baseline.write_text(json.dumps(facts | dict(figures=kept), indent=1) + "\n")
    told = dict(
        figures=rows, failed=failures, seconds=round(time.monotonic() - start), baseline=stored.get("date"), **facts
    )
    show(told if args.json else table(rows) | failures, args.json)
    return int(bool(failures) or any(row["verdict"] == "worse" for row in rows.values()))


class Failed(Exception):
    """A benchmark that gave no figures: its last words."""


def run(words: tuple[str, ...]) -> Any:
    """What a benchmark prints, as JSON. Raises `Failed`."""
    with tempfile.TemporaryFile("w+") as told:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=told, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {PATIENCE} s") from None
        told.seek(0)
        last = (told.read().strip().splitlines() or ["nothing"])[-1]
    if done.returncode:
        raise Failed(f"exit status {done.returncode}: {last}")
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return [json.loads(line) for line in done.stdout.splitlines()]


def compare(measured: Mapping[str, float], stored: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """A row a figure: the baseline's, what is measured `now`, the `change`, and the verdict: "same", "better", "worse", or "new"."""
    rows = {}
    for name, value in measured.items():
        bench, key = name.split(": ", 1)
        figure, before = BENCHMARKS[bench].figures[key], stored.get(name)
        row: dict[str, Any] = dict(baseline=before, now=float(f"{value:.4g}"), tolerance=figure.tolerance)
        if not before:
            rows[name] = row | dict(change=None, verdict="new" if before is None else "same" if not value else "worse")
            continue
        change = value / before
        loss = (before / value if value else float("inf")) if figure.higher else change
        verdict = "worse" if loss > 1 + figure.tolerance else "better" if loss < 1 / (1 + figure.tolerance) else "same"
        rows[name] = row | dict(change=round(change, 3), verdict=verdict)
    return rows


def table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Rows as text, by name."""
    return {name: f"{row['now']:<12g} {row['change'] or '':<8} {row['verdict']}" for name, row in rows.items()}


if __name__ == "__main__":
    sys.exit(main())
