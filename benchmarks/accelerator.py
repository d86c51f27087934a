"""FLUX.1-dev's sizes on an accelerator: seconds a picture, MFU and the adapter's cost, against diffusers with torch.compile.

python -m benchmarks.accelerator [--size full|small] [--repeats N] [--out FILE.json]

Random weights, 1024 x 1024 pixels, bfloat16, 28 steps; training steps at 512 and 1024. Ours and theirs run one after the other, each
in a process of its own. On a CPU the size is small: it shows that the script works, and the result says "measured": false.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REFERENCE_TOKENS, CLIP_WIDTH = 257, 1024


class Size(NamedTuple):
    """What is run: fields of `FluxConfig`, tokens of text, grid of packed image tokens a side, steps, training grids, side of the
    matrices whose product is the ceiling."""

    flux: dict[str, Any]
    text: int
    grid: int
    steps: int
    training: tuple[int, ...]
    matrix: int


SIZES = {
    "full": Size({}, 512, 64, 28, (32, 64), 8192),
    "small": Size(
        dict(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4, context_in_dim=128), 32, 8, 2, (4, 8), 512
    ),
}


def main() -> int:
    """Runs both and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: full on an accelerator, small on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the JSON too")
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(dict(ours=ours, theirs=theirs)[args.only](SIZES[args.size], args.repeats)))
        return 0
    size = args.size or _usual_size()
    result: dict[str, Any] = dict(size=size, machine=platform.processor() or platform.machine())
    for name in ("ours", "theirs"):
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", "benchmarks.accelerator", "--only", name, "--size", size]
            child = subprocess.run(
                [*command, "--repeats", str(args.repeats)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
            errors.seek(0)
            lines = errors.read().strip().splitlines()
        if child.returncode:
            result[name] = dict(not_measured=lines[-1] if lines else f"exit status {child.returncode}")
        else:
            result[name] = json.loads(child.stdout.splitlines()[-1])
    result["measured"] = size == "full" and "not_measured" not in result["ours"]
    pictures = [result[name].get("picture_s", {}).get("1 subject") for name in ("ours", "theirs")]
    result["ratio_ours_to_theirs"] = pictures[0] / pictures[1] if all(pictures) else None
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0 if "not_measured" not in result["ours"] else 1


def _usual_size() -> str:
    """Asked in a process of its own: JAX would take the accelerator's memory here."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    child = subprocess.run(asked, capture_output=True, text=True, check=True)
    return "small" if child.stdout.strip() == "cpu" else "full"


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of a run, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Ours:
    """A model of a size, random, with its adapter, and what is timed of it."""

    def __init__(self, size: Size, repeats: int):
        import jax
        import jax.numpy as jnp

        from dynaip_jax.adapters.dynaip import DynaIPConfig, init_adapter_params
        from dynaip_jax.families.flux import Flux1
        from dynaip_jax.flow import ScheduleConfig
        from dynaip_jax.layers.compute import Compute
        from dynaip_jax.models.clip import CLIPVisionConfig
        from dynaip_jax.models.flux import FluxConfig
        from dynaip_jax.types import TextCondition

        self.size, self.repeats, self.half = size, repeats, jnp.bfloat16
        self.compute = Compute(dtype=self.half, param_dtype=self.half)
        flux = FluxConfig(**size.flux)
        configs = (("transformer", flux), ("clip_vision", CLIPVisionConfig.large()))
        computes = tuple((name, self.compute) for name, _ in configs)
        self.family = Flux1(configs, computes, ScheduleConfig(), (("t5_length", size.text),))
        self.config = DynaIPConfig.for_base(self.family.sites, CLIP_WIDTH, blocks="double")
        self.keys = iter(jax.random.split(jax.random.key(0), 99))
        self.params = jax.jit(lambda key: self.family.init_params("transformer", key))(next(self.keys))
        self.adapter = jax.jit(lambda key: init_adapter_params(self.config, key, self.compute))(next(self.keys))
        self.text = TextCondition(self.normal(1, size.text, flux.context_in_dim), self.normal(1, flux.vec_in_dim))

    def normal(self, *shape: int) -> Any:
        """Random bfloat16."""
        import jax

        return jax.random.normal(next(self.keys), shape, self.half)

    def ceiling(self) -> float:
        """FLOP/s of a large matrix product."""
        import jax

        matrix, product = self.normal(self.size.matrix, self.size.matrix), jax.jit(lambda a: a @ a)
        return 2 * self.size.matrix**3 / _median(lambda: product(matrix).block_until_ready(), 10 * self.repeats)

    def pictures(self) -> dict[str, float]:
        """Seconds of the denoising loop with 0, 1, 2 and 4 subjects."""
        import jax
        import jax.numpy as jnp

        from dynaip_jax.adapters.dynaip import DynaIP
        from dynaip_jax.runtime.layouts import Arranged
        from dynaip_jax.sampling.denoise import denoising_loop

        size, family, weights = self.size, self.family, Arranged(self.params)
        noise = self.normal(1, 16, 2 * size.grid, 2 * size.grid).astype(jnp.float32)
        times = jnp.asarray(family.times(size.steps, size.grid**2))
        options = dict(guidance=jnp.float32(3.5), true_cfg=None, window=jnp.array([0.0, 1.0]))
        bank = jax.jit(lambda p, f: DynaIP(self.config, self.compute).apply({"params": p}, f, text_gain=0.0)[0])

        def seconds(subjects: int) -> float:
            features = [self.normal(1, subjects, REFERENCE_TOKENS, CLIP_WIDTH) for _ in range(3)]
            args = (noise, self.text, bank(self.adapter, features) if subjects else None, times)
            run = lambda: jax.block_until_ready(weights.run(denoising_loop, family, args, options))
            return _median(run, self.repeats)

        return {f"{s} subject{'s' * (s != 1)}": seconds(s) for s in (0, 1, 2, 4)}

    def training(self, grid: int, ceiling: float) -> dict[str, float]:
        """Seconds of a training step on `grid` x `grid` tokens, and its share of the `ceiling`."""
        import jax
        import jax.numpy as jnp

        from dynaip_jax.adapters.dynaip import init_adapter_params
        from dynaip_jax.layers.compute import Compute
        from dynaip_jax.planner import flops
        from train import config as config_
        from train.constants import Constants
        from train.state import init_state
        from train.step import Features, train_step

        compute = Compute(dtype=self.half)
        constants = Constants(
            family=self.family.with_compute("transformer", remat="full"), adapter=self.config, adapter_compute=compute,
            optim=config_.OptimConfig(), accumulate=1, guidance=1.0, random_granularity=0.0, time_mean=0.0, time_std=1.0,
            fixed_noise=False, seed=0,
        )  # fmt: skip
        latents = self.normal(1, 16, 2 * grid, 2 * grid)
        levels = tuple(self.normal(1, 1, REFERENCE_TOKENS, CLIP_WIDTH) for _ in range(3))
        features = Features(latents, latents, jnp.full(1, 0.5), self.text.states, self.text.pooled, levels, jnp.ones(1))
        fresh = lambda key: dict(adapter=init_adapter_params(self.config, key, compute))
        state = jax.jit(lambda key: init_state(constants.optim, fresh(key)))(next(self.keys))
        step = jax.jit(train_step, static_argnums=0, donate_argnums=1)

        def once() -> None:
            nonlocal state
            state, metrics = step(constants, state, dict(transformer=self.params), features)
            metrics["loss"].block_until_ready()

        spent = _median(once, self.repeats)
        work = flops.training_step(self.family, self.config, grid**2, base_trained=False)
        return dict(step_s=spent, mfu=work / spent / ceiling)


def ours(size: Size, repeats: int) -> dict[str, Any]:
    """Pictures with 0, 1, 2 and 4 subjects, training steps, and a matrix product as the ceiling."""
    import jax

    model = Ours(size, repeats)
    ceiling, seconds = model.ceiling(), model.pictures()
    plain, forward = seconds["0 subjects"], model.family.forward_flops(size.grid**2, size.text)
    return dict(
        device=jax.devices()[0].device_kind,
        versions=dict(jax=jax.__version__, python=platform.python_version()),
        picture_s=seconds,
        adapter_overhead={k: v / plain - 1 for k, v in seconds.items() if v is not plain},
        ceiling_flops=ceiling,
        mfu=size.steps * forward / plain / ceiling,
        training={f"{16 * grid} pixels": model.training(grid, ceiling) for grid in size.training},
    )


def theirs(size: Size, repeats: int) -> dict[str, Any]:
    """diffusers' transformer under torch.compile in a Euler loop, without and with its IP-Adapter in the double blocks."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor, FluxTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flux = dict(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, context_in_dim=4096) | size.flux
    head = flux["hidden_size"] // flux["num_heads"]
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = FluxTransformer2DModel(
            num_layers=flux["depth"], num_single_layers=flux["depth_single_blocks"], attention_head_dim=head,
            num_attention_heads=flux["num_heads"], joint_attention_dim=flux["context_in_dim"],
            guidance_embeds=True,
        ).eval()  # fmt: skip
        tokens = size.grid**2
        rows = torch.arange(tokens)
        ids = torch.stack([torch.zeros_like(rows), rows // size.grid, rows % size.grid], dim=-1).to(torch.float32)
        fixed: dict[str, Any] = dict(
            encoder_hidden_states=torch.randn(1, size.text, flux["context_in_dim"]),
            pooled_projections=torch.randn(1, 768), guidance=torch.full((1,), 3.5), img_ids=ids,
            txt_ids=torch.zeros(size.text, 3), return_dict=False,
        )  # fmt: skip
        noise, reference = torch.randn(1, tokens, 64), [torch.randn(1, REFERENCE_TOKENS, CLIP_WIDTH)]
    forward = torch.compile(model)
    times = torch.linspace(1, 0, size.steps + 1).tolist()

    def picture(**more: Any) -> None:
        x = noise
        with torch.no_grad():
            for t, following in zip(times[:-1], times[1:], strict=True):
                v = forward(hidden_states=x, timestep=torch.full((1,), t, device=device), **fixed, **more)[0]
                x = x + (following - t) * v
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = {"0 subjects": _median(picture, repeats)}
    processors = dict(model.attn_processors)
    for name in processors:
        if name.startswith("transformer_blocks"):
            processors[name] = FluxIPAdapterAttnProcessor(
                flux["hidden_size"], CLIP_WIDTH, num_tokens=(REFERENCE_TOKENS,), device=device, dtype=torch.bfloat16
            )
    model.set_attn_processor(processors)
    adapted = dict(joint_attention_kwargs=dict(ip_hidden_states=reference))
    seconds["1 subject"] = _median(lambda: picture(**adapted), repeats)
    return dict(device=device, versions=dict(torch=torch.__version__), picture_s=seconds)


if __name__ == "__main__":
    sys.exit(main())
