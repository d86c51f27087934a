"""Pictures of several calls in one batch, so that one compiled program makes them all.

Axis letters as in `dynaip_jax.types`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.sampling.conditions import Conditions, adapter_options, reference_pixels
from dynaip_jax.sampling.denoise import generate, on_mesh
from dynaip_jax.sampling.natives import encoded, fitted
from dynaip_jax.sampling.pipeline import DynaIPPipeline, Generation
from dynaip_jax.sampling.request import Request
from dynaip_jax.sampling.settings import record
from dynaip_jax.types import ImagePrompt, TextCondition

WITHOUT = dict(
    adapter=None, adapter_fingerprint=None, any_base=False
)  # settings of a picture that the adapter has no part in


class Asked(NamedTuple):
    """A picture of a call: its number among those of the call."""

    request: Request
    number: int


def shape(request: Request) -> Hashable:
    """What the denoising program of a call depends on, but for the number of pictures: those of one shape share one program."""
    o, where = request.options, [name for name, value in request.where.items() if value is not None]
    multiple = 2 * request.size[0] // request.latent[1]
    natives = tuple(fitted(picture, multiple).shape for picture in request.natives.pictures)
    given = tuple(x is not None for x in (o.true_cfg, o.cache_threshold, o.guidance))
    return (o.height, o.width, o.steps, len(request.subjects.references), tuple(where), o.merge, natives, given)


def alike(request: Request) -> Hashable:
    """What all calls of a batch have in common besides their shape: numbers that the program takes once for the whole batch."""
    o = request.options
    return o.guidance, o.true_cfg, o.cache_threshold, o.image_start, o.image_end, o.granularity is None


def settings_of(shared: dict[str, Any], request: Request, number: int) -> dict[str, Any]:
    """What the PNG file of a picture of the call says, but for routing and steps from a cache, which are known once it is drawn.
    `shared`: what those of all pictures of a model say."""
    return _generation(shared, Asked(request, number), [], None, None).settings_of(0)


def draw_together(pipe: DynaIPPipeline, asked: Sequence[Asked]) -> list[Generation | None]:
    """The pictures `asked` for, each as a generation of one; None for a picture that is not finite. All calls have the same `shape`,
    and are `alike`. Raises `OutOfMemory`."""
    first = asked[0].request
    image_prompt, routing = _image_prompts(pipe, asked)
    noise = np.concatenate([request.latents([number]) for request, number in asked])
    made = generate(pipe.parts, Conditions(_texts(pipe, asked), image_prompt), noise, first.options)
    pictures = np.asarray(made.pictures)
    drawn: list[Generation | None] = []
    for n, one in enumerate(asked):
        finite = bool(np.isfinite(pictures[n]).all())
        own = [Image.fromarray(images.to_uint8(pictures[n]))] if finite else []
        weights = None if routing is None else routing[n]
        drawn.append(_generation(dict(pipe.settings), one, own, weights, made.reused) if finite else None)
    return drawn


def _generation(
    shared: dict[str, Any], asked: Asked, pictures: list[Image.Image], routing: np.ndarray | None, reused: int | None
) -> Generation:
    request, number = asked
    own = number % request.each
    settings = record(
        request.prompt, request.options, request.subjects, request.mode, request.noise, routing=routing, reused=reused
    )
    return Generation(
        images=pictures,
        prompts=[request.prompts[number // request.each]],
        seeds=None if request.seeds is None else [request.seeds[own]],
        routing=routing,
        options=request.options,
        settings=shared | ({} if request.subjects.references else WITHOUT) | settings | request.natives.settings,
        warnings=request.notes,
        rows=None if request.noise is None else [own],
    )


def _texts(pipe: DynaIPPipeline, asked: Sequence[Asked]) -> TextCondition:
    """A row a picture, then the negative prompts' in the same number, and the pictures that the model reads by itself."""
    negative = [r.options.negative_prompt for r, _ in asked if r.options.negative_prompt is not None]
    text = pipe.encode_text([r.prompts[number // r.each] for r, number in asked] + negative)
    if not asked[0].request.natives.pictures:
        return text
    with on_mesh(pipe.mesh):
        own = {id(r): encoded(pipe.family, pipe.parts.vae, r.natives) for r, _ in asked}
    each = [own[id(r)] for r, _ in asked] * (2 if negative else 1)
    tokens = jnp.concatenate([natives.tokens for natives in each if natives is not None])
    shared = own[id(asked[0].request)]
    assert shared is not None
    return text._replace(references=shared._replace(tokens=tokens))


def _image_prompts(pipe: DynaIPPipeline, asked: Sequence[Asked]) -> tuple[ImagePrompt | None, np.ndarray | None]:
    """One image prompt a picture, and the routing weights `[b, s, 3]`."""
    subjects = len(asked[0].request.subjects.references)
    if not subjects:
        return None, None
    pixels = np.stack([reference_pixels(pipe.family, r.subjects.references, r.options.fit) for r, _ in asked])
    told = [_told(one, subjects) for one in asked]
    options = {
        name: None if x is None else np.stack([np.asarray(t[name]) for t in told]) for name, x in told[0].items()
    }
    image_prompt, weights = pipe.image_prompt(pixels, **options)
    if weights is None:
        return image_prompt, None
    return image_prompt, np.asarray(weights).reshape(len(asked), subjects, -1, 3).mean(axis=2)


def _told(asked: Asked, subjects: int) -> dict[str, np.ndarray | None]:
    """What the adapter is told of one picture: gains `[s]`, granularity `[s, 3]`, its region `[s, i]` or words `[s, t]`."""
    request, number = asked
    options = jax.tree.map(np.asarray, adapter_options(request.options, **request.where))
    for name in ("image_gain", "text_gain"):
        options[name] = np.broadcast_to(options[name], (subjects,))
    if options["granularity"] is not None:
        options["granularity"] = np.broadcast_to(options["granularity"], (subjects, 3))
    if options.get("region") is not None:
        options["region"] = options["region"][0]
    if options.get("words") is not None:
        options["words"] = options["words"][number // request.each]
    return options
