"""One forward of a mid-sized FLUX on CPU: ours against diffusers eager, the adapter's extra cost, compile time, CLI start.

python -m benchmarks.flux_forward [--repeats N] [--json]

The two programs take turns in one process, on the same random weights and inputs, so that the ratio is fair on a busy
machine; absolute times are not. Needs the `test` extra (torch, diffusers).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.output import show
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig, init_adapter_params
from dynaip_jax.layers.packing import image_ids
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.types import ImagePrompt, Sites
from tools.convert_torch_weights import flux as convert_flux

GRID, TEXT, REFERENCE_TOKENS, CLIP_WIDTH = 32, 256, 257, 1024


def main() -> int:
    """Prints one line a figure, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    runs, compile_s = programs()
    outputs = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    result = dict(
        forward_s=median,
        ratio_ours_to_diffusers=median["ours"] / median["diffusers"],
        ratio_adapter_on_to_diffusers=median["ours_adapter"] / median["diffusers"],
        adapter_overhead=median["ours_adapter"] / median["ours"] - 1,
        max_difference=float(np.abs(outputs["ours"] - outputs["diffusers"]).max() / np.abs(outputs["diffusers"]).max()),
        compile_s=compile_s,
        help_s=_help_seconds(),
        machine=f"{platform.processor() or platform.machine()}, {jax.device_count()} device, torch threads {torch.get_num_threads()}",
        versions=dict(jax=jax.__version__, torch=torch.__version__, python=platform.python_version()),
    )
    show(result, args.json)
    return 0


def programs() -> tuple[dict[str, Callable[[], np.ndarray]], float]:
    """The forwards to be compared, by name, and how long ours took to compile."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(
        num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=12, axes_dims_rope=(8, 28, 28)
    )
    widths = dict(joint_attention_dim=1024, pooled_projection_dim=768)
    model: Any = FluxTransformer2DModel(**sizes, **widths, guidance_embeds=True)
    model.eval()
    config = convert_flux.config_from_diffusers(dict(model.config))
    params = jax.device_put(convert_flux.params_from_torch(model.state_dict(), config))
    rng = np.random.default_rng(0)
    spec = Flux.inputs_spec(config, 1, GRID * GRID, TEXT)
    x = {k: rng.normal(size=s.shape).astype(np.float32) for k, s in spec.items()}
    ids = dict(img_ids=image_ids(2 * GRID, 2 * GRID), txt_ids=np.zeros((1, TEXT, 3), np.float32))
    x |= ids | dict(timesteps=np.array([0.5], np.float32))

    forward = jax.jit(Flux(config).apply)
    start = time.perf_counter()
    plain = forward.lower({"params": params}, **x).compile()
    compile_s = time.perf_counter() - start
    prompt = image_prompt(config, rng)
    adapted = forward.lower({"params": params}, **x, image_prompt=prompt).compile()
    tensors = {k: torch.tensor(v) for k, v in x.items()}

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return model(
                hidden_states=tensors["img"],
                encoder_hidden_states=tensors["txt"],
                pooled_projections=tensors["pooled"],
                timestep=tensors["timesteps"],
                guidance=tensors["guidance"],
                img_ids=tensors["img_ids"][0],
                txt_ids=tensors["txt_ids"][0],
            ).sample.numpy()

    ours = dict(
        ours=lambda: np.asarray(plain({"params": params}, **x)),
        ours_adapter=lambda: np.asarray(adapted({"params": params}, **x, image_prompt=prompt)),
    )
    return dict(diffusers=theirs) | ours, compile_s


def image_prompt(config: FluxConfig, rng: np.random.Generator) -> ImagePrompt:
    """Of one reference, for the double blocks, by a fresh adapter."""
    sites = Sites(config.depth, config.depth_single_blocks, config.num_heads, config.head_dim, config.hidden_size)
    adapter = DynaIPConfig.for_base(sites, CLIP_WIDTH, blocks="double")
    features = [jnp.asarray(rng.normal(size=(1, 1, REFERENCE_TOKENS, CLIP_WIDTH)), jnp.float32)] * 3
    weights = init_adapter_params(adapter, jax.random.key(0))
    prompt, _ = jax.jit(lambda p, f: DynaIP(adapter).apply({"params": p}, f, text_gain=0.0))(weights, features)
    return prompt


def _help_seconds() -> float:
    """Wall time of `dynaip --help`, best of three, as installed beside this interpreter."""
    command = [str(Path(sys.executable).parent / "dynaip"), "--help"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
