"""Will it fit, and how fast could it be? Compiles jitted programs for a TPU topology on a plain CPU machine, or for the devices that
are here, and reads memory and collectives off what the compiler made.

The roofline is what the chip's data sheet allows (`flops.CHIPS`), not a prediction of what will be reached.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.families.quantize import abstract_quantized
from dynaip_jax.families.registry import COMPONENTS, abstract_params, config_to_dict
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.planner import flops, hlo
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.sharding import abstract, on_host
from dynaip_jax.sampling.pipeline import TextCondition, decode, denoising_loop, encode_text, make_image_prompt
from dynaip_jax.storage.bundle import Bundle

GIB = 2**30


class Program(NamedTuple):
    """A jitted function to be compiled: how to lower it; how often it runs in one step or picture; FLOPs of one run on all
    devices; the components whose parameters it is given; how often a run reads them."""

    name: str
    lower: Callable[[], Any]
    runs: int
    flops: int
    components: tuple[str, ...]
    reads: int = 1


class Job(NamedTuple):
    """`components`: name -> abstract tree of all that stays in memory; `images`: made or trained on by one step."""

    programs: Sequence[Program]
    components: Mapping[str, Any]
    images: int


# --- models that are not here


def published(name: str) -> Bundle | None:
    """A bundle without weights in the published sizes of "flux-dev" or "flux-schnell"; None for another name."""
    if name not in ("flux-dev", "flux-schnell"):
        return None
    transformer = FluxConfig.dev() if name == "flux-dev" else FluxConfig.schnell()
    vision = CLIPVisionConfig.large()
    configs = dict(
        transformer=transformer,
        vae=VAEConfig.flux(),
        t5=T5Config.xxl(),
        clip_text=CLIPTextConfig.large(),
        clip_vision=vision,
    )
    schedule = dict(dynamic=name == "flux-dev")
    steps, tokens = (28, 512) if name == "flux-dev" else (4, 256)
    manifest = dict(
        family="flux",
        fingerprint="",
        components={k: dict(config=config_to_dict(c)) for k, c in configs.items()},
        schedule=schedule,
        text=dict(t5_length=tokens, clip_length=77),
        defaults=dict(steps=steps, guidance=3.5, height=1024, width=1024),
    )
    return Bundle(Path(name), manifest)


def sampling(
    bundle: Bundle,
    adapter: DynaIPConfig | None,
    mesh: Mesh,
    *,
    size: int,
    steps: int,
    images: int = 1,
    weights: str = "full",
    offload_text: bool = False,
) -> Job:
    """The programs of `dynaip sample` for `images` pictures of `size` pixels a side of one subject, in bfloat16; `weights` and
    `offload_text` as in `DynaIPPipeline.load`."""
    half = jnp.bfloat16
    names = ["transformer", "vae", "t5", "clip_text"] + (["clip_vision"] if adapter else [])
    configs = {}
    for name in names:
        kind = jnp.float32 if name == "vae" else half
        configs[name] = bundle.config(name, COMPONENTS[name].config, dtype=kind, param_dtype=kind)
    configs["transformer"] = dataclasses.replace(configs["transformer"], weights=weights)
    parts = {name: abstract(abstract_params(name, config, boxed=True), mesh) for name, config in configs.items()}
    parts["transformer"] = abstract_quantized(configs["transformer"], parts["transformer"])
    vae, transformer = configs["vae"], configs["transformer"]
    side = size // vae.downsample
    tokens = (side // 2) ** 2
    lengths = bundle.manifest["text"]
    shape = jax.ShapeDtypeStruct
    ids = [shape((1, lengths[name]), jnp.int32) for name in ("t5_length", "clip_length")]
    rows_of_text = ((1, lengths["t5_length"], transformer.context_in_dim), (1, transformer.vec_in_dim))
    text = TextCondition._make(shape(x, half) for x in rows_of_text)
    latents = shape((images, vae.z_channels, side, side), jnp.float32)
    scalar = shape((), jnp.float32)
    guidance = scalar if transformer.guidance_embed else None
    schedule = flow.ScheduleConfig(**bundle.manifest["schedule"])
    times = shape(flow.schedule(steps, tokens, schedule).shape, jnp.float32)
    rows = tokens + lengths["t5_length"]
    picture = steps * flops.transformer(transformer, tokens, lengths["t5_length"])
    programs = [
        Program(
            "encode text",
            lambda: encode_text.lower(configs["t5"], configs["clip_text"], parts["t5"], parts["clip_text"], *ids),
            runs=1,
            flops=2 * lengths["t5_length"] * _count(parts["t5"]),
            components=("t5", "clip_text"),
        )
    ]
    prompt = None
    if adapter is not None:
        parts["adapter"] = abstract(abstract_adapter_params(adapter, boxed=True), mesh)
        vision = configs["clip_vision"]
        pixels = shape((1, 1, vision.image_size, vision.image_size, 3), jnp.float32)
        options = dict(image_gain=scalar, text_gain=scalar)
        prompt, _ = make_image_prompt.eval_shape(
            vision, adapter, parts["clip_vision"], parts["adapter"], pixels, options
        )
        programs.append(
            Program(
                "references",
                lambda: make_image_prompt.lower(
                    vision, adapter, parts["clip_vision"], parts["adapter"], pixels, options
                ),
                runs=1,
                flops=flops.bank(adapter, vision.tokens) + 2 * vision.tokens * _count(parts["clip_vision"]),
                components=("clip_vision", "adapter"),
            )
        )
        picture += steps * flops.injection(transformer, adapter, rows, vision.tokens)
    programs += [
        Program(
            "denoise",
            lambda: layouts.lower(
                denoising_loop, configs["transformer"], parts["transformer"], (latents, text, prompt, times),
                dict(guidance=guidance, true_cfg=None, window=shape((2,), jnp.float32)), reporting=False,
            ),
            runs=1,
            flops=images * picture,
            components=("transformer",),
            reads=steps,
        ),
        Program("decode", lambda: decode.lower(vae, parts["vae"], latents), runs=1, flops=0, components=("vae",)),
    ]  # fmt: skip
    return Job(programs, parts | (dict(t5=on_host(parts["t5"])) if offload_text else {}), images)


# --- compiling and reading


def devices(topology: str | None) -> list[Any]:
    """The devices of a TPU `topology` ("v5e:4x4"), or the ones that are here. Raises `UserError` for a topology that is not known
    and where libtpu, which compiles for it, is not installed."""
    if topology is None:
        return jax.devices()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    alone = set(topology.partition(":")[2].split("x")) == {"1"}  # libtpu takes four chips a host for granted
    hosts = dict(chips_per_host_bounds=[1, 1, 1]) if alone else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **hosts).devices)
    except Exception as e:  # what libtpu raises has no class of its own
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology {topology}: compiling for TPUs needs libtpu, which is not here; pip install 'jax[tpu]'"
            ) from e
        raise UserError(
            f"--topology {topology}: refused by libtpu ({' '.join(str(e).split())[:160]}); expected such as v5e:4x4, v5p:2x2x1, "
            "v6e:2x4"
        ) from e


# without these libtpu looks for the machine's TPUs, complains that there are none, and lets one process at a time compile
QUIET = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def make(job: Job, mesh: Mesh) -> dict[str, Any]:
    """Compiles a job's programs and reports on them; see `text` for what is in it. `fits` is whether the device's memory, if
    known, holds everything; `problem` names what does not."""
    kind = mesh.devices.flat[0].device_kind
    chip = flops.chip(kind)
    components = {
        name: dict(parameters=_count(tree), bytes_per_chip=_bytes_per_chip(tree))
        for name, tree in job.components.items()
    }
    resident = sum(part["bytes_per_chip"] for part in components.values())
    programs, used, problem = [], resident, None
    for program in job.programs:
        began = time.monotonic()
        try:
            with jax.set_mesh(mesh):
                compiled = program.lower().compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            problem = f"{program.name}: {_refusal(str(e))}"
            break
        memory = compiled.memory_analysis()
        scratch = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own = sum(components[name]["bytes_per_chip"] for name in program.components)
        needed = resident - own + memory.argument_size_in_bytes + scratch
        used = max(used, needed)
        found = hlo.count(compiled.as_text())
        programs.append(
            dict(
                name=program.name,
                runs=program.runs,
                flops_per_chip=program.flops / mesh.devices.size,
                compiled_flops=found.product_flops,
                kernels=found.kernels,
                arguments_bytes=memory.argument_size_in_bytes,
                scratch_bytes=scratch,
                needed_bytes=needed,
                collectives=found.collectives,
                compile_seconds=round(time.monotonic() - began, 1),
            )
            | _roofline(program, memory.argument_size_in_bytes, found.collectives, mesh.devices.size, chip)
        )
    available = None if chip is None else int(chip.memory)
    if problem is None and available is not None and used > available:
        worst = max(programs, key=lambda p: p["needed_bytes"])
        problem = (
            f"{worst['name']}: needs {worst['needed_bytes'] / GIB:.2f} GiB a chip, {available / GIB:.1f} are there: "
            f"parameters {resident / GIB:.2f}, scratch {worst['scratch_bytes'] / GIB:.2f}"
        )
    step = None
    if chip is not None and problem is None:
        step = sum(p["runs"] * p["roofline_seconds"] for p in programs)
    return dict(
        device=kind,
        devices=mesh.devices.size,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        components=components,
        programs=programs,
        hbm=dict(used=used, available=available),
        step_seconds=step,
        images_per_second=None if not step else job.images / step,
        compile_seconds=round(sum(p["compile_seconds"] for p in programs), 1),
        fits=problem is None,
        problem=problem,
    )


def _roofline(
    program: Program, read: int, found: dict[str, Any], count: int, chip: flops.Chip | None
) -> dict[str, Any]:
    """Seconds of one run by products, memory (arguments read as often as the program says) and links, and the longest of them."""
    if chip is None:
        return {}
    seconds = dict(
        compute=program.flops / count / chip.flops,
        memory=program.reads * read / chip.memory_rate,
        links=sum(kind["bytes"] for kind in found.values()) / chip.link_rate,
    )
    return dict(seconds=seconds, roofline_seconds=max(seconds.values()))


def _refusal(message: str) -> str:
    """What the compiler says of memory, in a line."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", message)
    return f"needs {found[1]} of {found[2]} {found[3]}" if found else " ".join(message.split())[:200]


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes_per_chip(tree: Any) -> int:
    """What stays in a device's own memory."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != "pinned_host"
    )


# --- reports


def text(report: dict[str, Any]) -> str:
    """A report as lines for a terminal."""
    mesh = " x ".join(f"{k} {v}" for k, v in report["mesh"].items())
    lines = [f"{report['devices']} x {report['device']}, mesh {mesh}", ""]
    for name, part in report["components"].items():
        lines.append(
            f"{name:12} {part['parameters'] / 1e6:10.1f} M parameters {part['bytes_per_chip'] / GIB:8.3f} GiB a chip"
        )
    lines.append("")
    for p in report["programs"]:
        kernels = f" and {p['kernels']} runs of kernels" if p["kernels"] else ""
        lines.append(
            f"{p['name']}: {p['flops_per_chip'] / 1e12:.2f} TFLOP a chip by formula, {p['compiled_flops'] / 1e12:.2f} in compiled "
            f"products{kernels}, {p['needed_bytes'] / GIB:.2f} GiB in all ({p['scratch_bytes'] / GIB:.2f} scratch), compiled in "
            f"{p['compile_seconds']} s"
        )
        for kind, total in p["collectives"].items():
            lines.append(f"    {kind:18} {total['count']:6} times {total['bytes'] / GIB:9.3f} GiB")
        if "seconds" in p:
            parts = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in p["seconds"].items())
            lines.append(f"    at best {p['roofline_seconds'] * 1e3:.1f} ms ({parts})")
    used, available = report["hbm"]["used"], report["hbm"]["available"]
    there = "of an unknown amount" if available is None else f"of {available / GIB:.1f}"
    lines += ["", f"memory: {used / GIB:.2f} {there} GiB a chip"]
    if report["step_seconds"]:
        lines.append(
            f"at best {report['step_seconds']:.3f} s a step, {report['images_per_second']:.3g} images/s (by the data sheet)"
        )
    lines.append("fits" if report["fits"] else f"does not fit: {report['problem']}")
    return "\n".join(lines)
