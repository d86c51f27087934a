"""Speed of the converter against that of copying the same file, and the memory that it takes.

python -m benchmarks.converting [--gigabytes N] [--repeats R] [--folder DIR] [--json]

A file of FLUX.1-dev's shapes in bfloat16 is made in a folder, of fewer blocks where N is below 23.8; then `cp` and the converter take
turns, each until all of it is on the disk (sync). `ratio`: the converter's speed over that of `cp`, by medians. Needs three times N free.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.output import show
from dynaip_jax.models.flux import FluxConfig
from tools.convert_torch_weights import flux
from tools.convert_torch_weights.engine import source_shapes

BLOCK = 1 << 24  # values that are drawn; a file repeats them
GIGABYTE = 1e9


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the file, at most 23.8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        show(measure(Path(folder), args.gigabytes, args.repeats), args.json)
    return 0


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, object]:
    """The figures, by name."""
    config = sized(gigabytes)
    source = folder / "flux1-dev.safetensors"
    write(source, source_shapes(flux.table(config, "bfl")))
    convert: list[str | Path] = [sys.executable, "-m", "tools.convert_torch_weights", "--source", source]
    times: dict[str, list[float]] = dict(cp=[], convert=[])
    cpu, peak = [], 0
    start, _, _ = run([*convert, "--out", folder / "none", "--dry-run"])
    for _ in range(repeats):
        turns: tuple[tuple[str, list[str | Path], Path], ...] = (
            ("cp", ["cp", source, folder / "copy"], folder / "copy"),
            ("convert", [*convert, "--out", folder / "bundle"], folder / "bundle"),
        )
        for name, words, made in turns:
            seconds, used, rss = run(words)
            times[name].append(round(seconds, 2))
            if name == "convert":
                cpu.append(round(used, 2))
                peak = max(peak, rss)
            (shutil.rmtree if made.is_dir() else os.remove)(made)
    size = source.stat().st_size / GIGABYTE
    return dict(
        gigabytes=round(size, 2),
        blocks=[config.depth, config.depth_single_blocks],
        cores=os.cpu_count(),
        load=round(os.getloadavg()[0], 1),
        dry_run_seconds=round(start, 2),
        cp_seconds=times["cp"],
        convert_seconds=times["convert"],
        convert_cpu_seconds=cpu,
        ratio=round(statistics.median(times["cp"]) / statistics.median(times["convert"]), 3),
        peak_rss_gigabytes=round(peak * 1024 / GIGABYTE, 2),
    )


def run(words: Sequence[str | Path]) -> tuple[float, float, int]:
    """Wall time of a command until what it wrote is on the disk, its CPU time, and its largest resident memory in KiB."""
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    told = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words[0]}: exit status {child.returncode}: {told[-500:]}")
    os.sync()
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss


def sized(gigabytes: float) -> FluxConfig:
    """FLUX.1-dev with as many blocks of both kinds as fit into a file of bfloat16."""
    return next(
        config
        for n in range(19, 0, -1)
        if values(config := FluxConfig.dev(depth=n, depth_single_blocks=2 * n)) * 2 <= gigabytes * GIGABYTE or n == 1
    )


def values(config: FluxConfig) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for shape in source_shapes(flux.table(config, "bfl")).values())


def write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of random bfloat16 numbers."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = dict(dtype="BF16", shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    drawn = np.random.default_rng(0).normal(size=BLOCK).astype(ml_dtypes.bfloat16).view(np.uint8).data
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(drawn)):
            file.write(drawn[: end - start])


if __name__ == "__main__":
    sys.exit(main())
