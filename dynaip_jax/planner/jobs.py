"""Will it fit, and how fast could it be? Compiles jitted programs for a TPU topology on a plain CPU machine, or for the devices that
are here, and reads memory and collectives off what the compiler made.

The roofline is what the chip's data sheet allows (`chips.CHIPS`), not a prediction of what will be reached.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.families.quantize import abstract_quantized
from dynaip_jax.families.registry import family_of
from dynaip_jax.layers.compute import Compute
from dynaip_jax.planner import chips, flops, hlo
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.sharding import abstract, on_host
from dynaip_jax.sampling.conditions import encode_text, make_image_prompt
from dynaip_jax.sampling.denoise import decode, denoising_loop
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
    compute = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, weights=weights)
    family = family_of(bundle, compute, reference=adapter is not None)
    parts = {name: abstract(family.abstract_params(name, boxed=True), mesh) for name, _ in family.configs}
    parts["transformer"] = abstract_quantized(family, parts["transformer"])
    encoders = {name: parts[name] for name in family.text_encoders}
    ids = family.text_ids_spec()
    text = jax.eval_shape(family.encode_text, encoders, ids)
    latents = jax.ShapeDtypeStruct((images, *family.latent(size, size)), jnp.float32)
    tokens = family.tokens(latents.shape)
    picture = steps * family.forward_flops(tokens, family.text_rows)
    programs = [
        Program(
            "encode text",
            lambda: encode_text.lower(family, encoders, ids),
            runs=1,
            flops=2 * family.text_rows * _count(parts[family.text_encoders[0]]),
            components=family.text_encoders,
        )
    ]
    prompt = None
    if adapter is not None:
        family = family.with_injection(adapter.injection)
        parts["adapter"] = abstract(abstract_adapter_params(adapter, family.compute("clip_vision"), boxed=True), mesh)
        program, prompt = _references(family, adapter, parts)
        programs.append(program)
        rows, reference = tokens + family.text_rows, family.config("clip_vision").tokens
        picture += steps * flops.injection(family, adapter, rows, reference)
    programs += [
        Program(
            "denoise",
            lambda: _lower_denoising(family, parts["transformer"], latents, text, prompt, steps),
            runs=1,
            flops=images * picture,
            components=("transformer",),
            reads=steps,
        ),
        Program("decode", lambda: decode.lower(family, parts["vae"], latents), runs=1, flops=0, components=("vae",)),
    ]
    offloaded = family.text_encoders[0]
    return Job(programs, parts | ({offloaded: on_host(parts[offloaded])} if offload_text else {}), images)


def _references(family: Family, adapter: DynaIPConfig, parts: Mapping[str, Any]) -> tuple[Program, Any]:
    """The program that reads one reference, and the shapes of the image prompt that it makes."""
    vision = family.config("clip_vision")
    pixels = jax.ShapeDtypeStruct((1, 1, vision.image_size, vision.image_size, 3), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    args = (family, adapter, parts["clip_vision"], parts["adapter"], pixels, dict(image_gain=scalar, text_gain=scalar))
    prompt, _ = make_image_prompt.eval_shape(*args)
    work = flops.bank(adapter, vision.tokens) + 2 * vision.tokens * _count(parts["clip_vision"])
    program = Program(
        "references", lambda: make_image_prompt.lower(*args), runs=1, flops=work, components=("clip_vision", "adapter")
    )
    return program, prompt


def _lower_denoising(family: Family, params: Any, latents: Any, text: Any, prompt: Any, steps: int) -> Any:
    """The denoising loop of latents `[b, c, h, w]`, lowered."""
    scalar, window = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (2,)))
    times = jax.ShapeDtypeStruct((steps + 1,), jnp.float32)
    options = dict(
        guidance=scalar if family.takes_guidance else None,
        true_cfg=None,
        window=window,
        cache_threshold=None,
        ticket=None,
    )
    return layouts.lower(denoising_loop, family, params, (latents, text, prompt, times), options)


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
    chip = chips.chip(kind)
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
    program: Program, read: int, found: dict[str, Any], count: int, chip: chips.Chip | None
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
