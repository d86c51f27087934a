"""What faster or smaller sampling costs in quality: First Block Cache, fewer steps and 8-bit weights, against all steps in full.

python -m benchmarks.shortcuts [--num N] [--seed N] [--out FILE.json]

Shapeland, one subject, the embedded model, one picture at a time as a user draws them, the same cases and noise for all. CP, PF and CP·PF: see
`dynaip_jax.shapeland.scoring`; `difference`: mean absolute difference from the picture in full, of 255; `cached`: share of the steps that
ran the first block alone; `time`: seconds a picture over those of the first row, in turns, compilation left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.cases import make_cases
from dynaip_jax.shapeland.scoring import calibrate, scores
from dynaip_jax.shapeland.world import caption
from dynaip_jax.storage.tensors import read_tree

ROWS: dict[str, dict[str, Any]] = {
    "in full": {},
    **{f"cache {threshold}": dict(cache_threshold=threshold) for threshold in (0.05, 0.1, 0.2, 0.3)},
    **{f"{steps} steps": dict(steps=steps) for steps in (12, 8, 5)},
    "int8": dict(weights="int8"),
    "fp8": dict(weights="fp8"),
}


def main() -> int:
    """Draws and judges all rows and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=96, help="cases")
    parser.add_argument("--seed", type=int, default=5, help="of the cases")
    parser.add_argument("--out", type=Path, help="where to write the JSON too")
    args = parser.parse_args()
    model, adapter = default.paths()
    judge = read_tree(default.JUDGE)
    calibration = calibrate(judge, 1)
    cases = make_cases(1, args.seed, args.num)
    pipes = {kind: DynaIPPipeline.load(model, adapter, weights=kind) for kind in ("full", "int8", "fp8")}
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in ROWS}
    seconds, cached = dict.fromkeys(ROWS, 0.0), dict.fromkeys(ROWS, 0.0)
    for n in range(-1, args.num):  # the first round compiles
        case = max(n, 0)
        prompt, reference = caption(cases.scenes[case]), cases.references[case][0]
        for name, row in ROWS.items():
            options = {k: v for k, v in row.items() if k != "weights"}
            start = time.perf_counter()
            result = pipes[row.get("weights", "full")](prompt, [reference], seed=case, **options)
            if n >= 0:
                seconds[name] += time.perf_counter() - start
                cached[name] += result.settings.get("cached_steps", 0) / result.settings["steps"] / args.num
                pictures[name].append(np.asarray(result.images[0]))
    rows, full = {}, np.stack(pictures["in full"]).astype(float)
    for name in ROWS:
        drawn = np.stack(pictures[name])
        cp, pf, _ = scores(judge, drawn, cases, calibration)
        rows[name] = dict(
            cp=cp.mean(), pf=pf.mean(), cp_pf=(cp * pf).mean(), difference=np.abs(drawn - full).mean(),
            cached=cached[name], time=seconds[name] / seconds["in full"],
        )  # fmt: skip
    text = json.dumps(
        dict(
            num=args.num,
            seed=args.seed,
            rows={k: {m: round(float(x), 4) for m, x in v.items()} for k, v in rows.items()},
        ),
        indent=1,
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
