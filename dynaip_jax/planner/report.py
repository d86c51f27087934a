"""Will it fit, and how fast could it be? Compiles a job's programs, for a TPU topology on a plain CPU machine or for the devices that are
here, and reads memory and collectives off what the compiler made.

The roofline is what the chip's data sheet allows (`chips.CHIPS`), not a prediction of what will be reached.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from dynaip_jax.planner import chips, hlo
from dynaip_jax.planner.jobs import Job, Program, count

GIB = 2**30


def make(job: Job, mesh: Mesh) -> dict[str, Any]:
    """Compiles a job's programs and reports on them; see `text` for what is in it. `fits` is whether the device's memory, if
    known, holds everything; `problem` names what does not."""
    kind = mesh.devices.flat[0].device_kind
    chip = chips.chip(kind)
    components = {
        name: dict(parameters=count(tree), bytes_per_chip=_bytes_per_chip(tree))
        for name, tree in job.components.items()
    }
    resident = sum(part["bytes_per_chip"] for part in components.values())
    programs, problem = [], None
    for program in job.programs:
        own = sum(components[name]["bytes_per_chip"] for name in program.components)
        try:
            programs.append(_compiled(program, mesh, chip, elsewhere=resident - own))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            problem = f"{program.name}: {_refusal(str(e))}"
            break
    used = max([resident, *(p["needed_bytes"] for p in programs)])
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


def _compiled(program: Program, mesh: Mesh, chip: chips.Chip | None, elsewhere: int) -> dict[str, Any]:
    """A program's part of the report; `elsewhere`: bytes a chip of what stays in memory beside its arguments."""
    began = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = program.lower().compile()
    memory, counts = compiled.memory_analysis(), hlo.count(compiled.as_text())
    scratch = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments = memory.argument_size_in_bytes
    return dict(
        name=program.name,
        runs=program.runs,
        flops_per_chip=program.flops / mesh.devices.size,
        compiled_flops=counts.product_flops,
        kernels=counts.kernels,
        written_bytes=counts.written_bytes,
        copied_bytes=counts.copied_bytes,
        arguments_bytes=arguments,
        scratch_bytes=scratch,
        needed_bytes=elsewhere + arguments + scratch,
        collectives=counts.collectives,
        compile_seconds=round(time.monotonic() - began, 1),
    ) | _roofline(program, arguments, counts.collectives, mesh.devices.size, chip)


def _roofline(
    program: Program, read: int, exchanges: dict[str, Any], devices: int, chip: chips.Chip | None
) -> dict[str, Any]:
    """Seconds of one run by products, memory (arguments read as often as the program says) and links, and the longest of them."""
    if chip is None:
        return {}
    seconds = dict(
        compute=program.flops / devices / chip.flops,
        memory=program.reads * read / chip.memory_rate,
        links=sum(kind["bytes"] for kind in exchanges.values()) / chip.link_rate,
    )
    return dict(seconds=seconds, roofline_seconds=max(seconds.values()))


def _refusal(message: str) -> str:
    """What the compiler says of memory, in a line."""
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", message)
    return f"needs {match[1]} of {match[2]} {match[3]}" if match else " ".join(message.split())[:200]


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
        lines.append(
            f"    writes {p['written_bytes'] / GIB:.2f} GiB to a chip's memory, {p['copied_bytes'] / GIB:.2f} of it plain copies"
        )
        for kind, total in p["collectives"].items():
            lines.append(f"    {kind:18} {total['count']:6} times {total['bytes'] / GIB:9.3f} GiB")
        if "seconds" in p:
            parts = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in p["seconds"].items())
            lines.append(f"    at best {p['roofline_seconds'] * 1e3:.1f} ms ({parts})")
    used, available = report["hbm"]["used"], report["hbm"]["available"]
    capacity = "of an unknown amount" if available is None else f"of {available / GIB:.1f}"
    lines += ["", f"memory: {used / GIB:.2f} {capacity} GiB a chip"]
    if report["step_seconds"]:
        lines.append(
            f"at best {report['step_seconds']:.3f} s a step, {report['images_per_second']:.3g} images/s (by the data sheet)"
        )
    lines.append("fits" if report["fits"] else f"does not fit: {report['problem']}")
    return "\n".join(lines)
