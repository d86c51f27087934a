"""What is to be planned: the programs of a job, and all that stays in memory. Sampling is here; a recipe's training is in
`train/plan.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.families.base import Family
from dynaip_jax.families.quantize import abstract_quantized
from dynaip_jax.families.registry import family_of
from dynaip_jax.layers.compute import Compute
from dynaip_jax.planner import flops
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.sharding import abstract, on_host
from dynaip_jax.sampling.conditions import encode_text, make_image_prompt
from dynaip_jax.sampling.denoise import decode, denoising_loop
from dynaip_jax.storage.bundle import Bundle


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
    """The programs of `dynaip sample` for `images` pictures of `size` pixels a side of one subject, in bfloat16, with true CFG if the
    model asks for it; `weights` and `offload_text` as in `DynaIPPipeline.load`."""
    compute = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, weights=weights)
    family = family_of(bundle, compute, reference=adapter is not None)
    parts = {name: abstract(family.abstract_params(name, boxed=True), mesh) for name, _ in family.configs}
    parts["transformer"] = abstract_quantized(family, parts["transformer"])
    encoders = {name: parts[name] for name in family.text_encoders}
    guided = bundle.manifest["defaults"].get("true_cfg") is not None
    ids = family.text_ids_spec(2 if guided else 1)
    text = jax.eval_shape(family.encode_text, encoders, ids)
    latents = jax.ShapeDtypeStruct((images, *family.latent(size, size)), jnp.float32)
    tokens = family.tokens(latents.shape)
    passes = steps * (2 if guided else 1)
    picture = passes * family.forward_flops(tokens, family.text_rows)
    programs = [
        Program(
            "encode text",
            lambda: encode_text.lower(family, encoders, ids),
            runs=1,
            flops=2 * (2 if guided else 1) * family.text_rows * count(parts[family.text_encoders[0]]),
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
        picture += passes * flops.injection(family, adapter, rows, reference)
    programs += [
        Program(
            "denoise",
            lambda: _lower_denoising(family, parts["transformer"], latents, text, prompt, steps, guided),
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
    work = flops.bank(adapter, vision.tokens) + 2 * vision.tokens * count(parts["clip_vision"])
    program = Program(
        "references", lambda: make_image_prompt.lower(*args), runs=1, flops=work, components=("clip_vision", "adapter")
    )
    return program, prompt


def _lower_denoising(
    family: Family, params: Any, latents: Any, text: Any, prompt: Any, steps: int, guided: bool
) -> Any:
    """The denoising loop of latents `[b, c, h, w]`, lowered; `guided`: with true CFG."""
    scalar, window = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (2,)))
    times = jax.ShapeDtypeStruct((steps + 1,), jnp.float32)
    options = dict(
        guidance=scalar if family.takes_guidance else None,
        true_cfg=scalar if guided else None,
        window=window,
        cache_threshold=None,
        ticket=None,
    )
    return layouts.lower(denoising_loop, family, params, (latents, text, prompt, times), options)


def count(tree: Any) -> int:
    """Parameters in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
