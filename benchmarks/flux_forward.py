"""One forward of a mid-sized FLUX on CPU: ours against diffusers eager, the adapter's extra cost, compile time, CLI start.

python -m benchmarks.flux_forward [--family flux2] [--dtype bfloat16] [--repeats N] [--json]

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.output import show
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig, init_adapter_params
from dynaip_jax.families.flux2 import positions, text_positions
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.packing import image_ids
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.models.flux2 import Flux2, Flux2Config
from dynaip_jax.runtime.programs import options_for
from dynaip_jax.types import ImagePrompt, Sites
from tools.convert_torch_weights import flux as convert_flux
from tools.convert_torch_weights import flux2 as convert_flux2

GRID, TEXT, REFERENCE_TOKENS, CLIP_WIDTH = 32, 256, 257, 1024
SIZES = dict(num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=12, joint_attention_dim=1024)
NAMES = dict(  # of inputs, ours and diffusers'
    img="hidden_states",
    img_ids="img_ids",
    txt="encoder_hidden_states",
    txt_ids="txt_ids",
    timesteps="timestep",
    pooled="pooled_projections",
    guidance="guidance",
)


class Pair(NamedTuple):
    """The same network twice: diffusers' and ours with its parameters, and positions of image and text rows."""

    theirs: Any
    ours: Any
    params: Any
    img_ids: np.ndarray
    txt_ids: np.ndarray


def flux() -> Pair:
    """A small FLUX.1-dev."""
    from diffusers import FluxTransformer2DModel

    theirs: Any = FluxTransformer2DModel(
        **SIZES, axes_dims_rope=(8, 28, 28), pooled_projection_dim=768, guidance_embeds=True
    )
    config = convert_flux.config_from_diffusers(dict(theirs.config))
    params = convert_flux.params_from_torch(theirs.state_dict(), config)
    return Pair(theirs, Flux(config), params, image_ids(2 * GRID, 2 * GRID), np.zeros((1, TEXT, 3), np.float32))


def flux2() -> Pair:
    """A small FLUX.2 [klein]."""
    from diffusers import Flux2Transformer2DModel

    theirs: Any = Flux2Transformer2DModel(**SIZES, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False)
    config = convert_flux2.config_from_diffusers(dict(theirs.config))
    params = convert_flux2.params_from_torch(theirs.state_dict(), config)
    return Pair(theirs, Flux2(config), params, positions(GRID, GRID), text_positions(TEXT))


PAIRS = dict(flux=flux, flux2=flux2)


def main() -> int:
    """Prints one line a figure, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=PAIRS, default="flux")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    import torch

    runs, compile_s = programs(args.family, args.dtype)
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


def programs(family: str, dtype: str) -> tuple[dict[str, Callable[[], np.ndarray]], float]:
    """The forwards to be compared, by name, and how long ours took to compile. `dtype`: of weights and activations."""
    import torch

    torch.manual_seed(0)
    pair = PAIRS[family]()
    model, config = pair.theirs.eval().to(getattr(torch, dtype)), pair.ours.config
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), pair.params)
    ours = type(pair.ours)(config, Compute(dtype=dtype, param_dtype=dtype))
    rng = np.random.default_rng(0)
    spec = pair.ours.inputs_spec(config, 1, GRID * GRID, TEXT)
    x = {k: rng.normal(size=s.shape).astype(np.float32) for k, s in spec.items()}
    x |= dict(img_ids=pair.img_ids, txt_ids=pair.txt_ids, timesteps=np.array([0.5], np.float32))

    forward = jax.jit(ours.apply, compiler_options=options_for("cpu"))
    start = time.perf_counter()
    plain = forward.lower({"params": params}, **x).compile()
    compile_s = time.perf_counter() - start
    prompt = jax.tree.map(lambda y: y.astype(dtype), image_prompt(config, rng))
    adapted = forward.lower({"params": params}, **x, image_prompt=prompt).compile()
    tensors = {
        NAMES[k]: torch.tensor(v[0]) if k in ("img_ids", "txt_ids") else torch.tensor(v).to(getattr(torch, dtype))
        for k, v in x.items()
    }

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return model(**tensors).sample.float().numpy()

    runs = dict(
        ours=lambda: np.asarray(plain({"params": params}, **x)),
        ours_adapter=lambda: np.asarray(adapted({"params": params}, **x, image_prompt=prompt)),
    )
    return dict(diffusers=theirs) | runs, compile_s


def image_prompt(config: FluxConfig | Flux2Config, rng: np.random.Generator) -> ImagePrompt:
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
