"""Looking inside a generation: where the adapter's attention goes, block by block, at some of its steps.

Nothing of it touches the sampling itself: a picture is drawn as always, its latents are stored at the steps asked for, and the
transformer reads them once more, with its blocks keeping what they see. Axis letters as in `dynaip_jax.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.errors import OutOfMemory, UserError
from dynaip_jax.families.base import Family
from dynaip_jax.layers.injection import Seen, reference_weights
from dynaip_jax.runtime import memory
from dynaip_jax.sampling.conditions import Conditions
from dynaip_jax.sampling.denoise import decoded, on_mesh
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.pipeline import DynaIPPipeline, Generation
from dynaip_jax.sampling.progress import SILENT, Progress
from dynaip_jax.sampling.request import Request
from dynaip_jax.types import KV, ImagePrompt, TextCondition


class Maps(NamedTuple):
    """What the injected blocks do at one step, float32; text rows before image rows.

    `weights` `[l, n, s, m]`: the attention of row n to token m of a subject's reference, mean of heads; rows sum to 1 over m (`merge`
    "concat": over s and m). `strength` `[l, n, s]`: the size of what that brings the row, before its gain: the norm over heads and
    head size. `gain` `[l, n, s]`: what it is multiplied by. `region` `[l, s, i]`: where subjects belong, None for everywhere.
    """

    weights: np.ndarray
    strength: np.ndarray
    gain: np.ndarray
    region: np.ndarray | None


class Glance(NamedTuple):
    """One step: its number from 0, its time (1: noise, 0: picture), the picture as it is expected there, uint8 `[H, W, 3]`, and maps."""

    step: int
    time: float
    expected: np.ndarray
    maps: Maps


class Looking(NamedTuple):
    """A generation of one picture, and what was seen of it. `text_rows`: of the rows in maps; `grid`: rows and columns of image tokens;
    `names`: of the blocks."""

    made: Generation
    glances: list[Glance]
    text_rows: int
    grid: tuple[int, int]
    names: list[str]

    def over_picture(self) -> np.ndarray:
        """Where subjects act: the size of what they bring to image tokens, gain and all, `[l, s, rows, columns]`, mean of the steps."""
        brought = np.mean([each.maps.strength * each.maps.gain for each in self.glances], axis=0)[:, self.text_rows :]
        own = brought[:, : self.grid[0] * self.grid[1]]
        return np.moveaxis(own, 1, 2).reshape(*own.shape[::2], *self.grid)

    def over_references(self) -> np.ndarray:
        """What rows look at: their attention to each token of a reference, mean of image rows and mean of text rows, `[2, l, s, m]`, mean of
        the steps."""
        weights = np.mean([each.maps.weights for each in self.glances], axis=0)
        parts = weights[:, self.text_rows :], weights[:, : self.text_rows]
        return np.stack([part.mean(axis=1) for part in parts])

    def regions(self) -> np.ndarray | None:
        """Where each subject belongs, `[steps, s, rows, columns]`, mean of the blocks; None for everywhere."""
        found = [each.maps.region for each in self.glances if each.maps.region is not None]
        if not found:
            return None
        return np.stack([region.mean(axis=0).reshape(-1, *self.grid) for region in found])


def evenly(count: int, steps: int) -> list[int]:
    """`count` of the numbers from 0 to `steps` - 1, as far apart as they can be, the last step among them."""
    count = min(count, steps)
    return sorted({round((k + 1) * steps / count) - 1 for k in range(count)})


def look(pipe: DynaIPPipeline, request: Request, steps: Sequence[int], progress: Progress = SILENT) -> Looking:
    """Draws the one picture of a `request` with references, and looks at these of its steps; `progress`: what is told of the drawing.
    Raises `UserError` for another request."""
    if len(request) != 1:
        raise UserError(f"`num_images`: {len(request)} pictures; expected one to look into; leave the others out")
    if not request.subjects.references:
        raise UserError("`references`: none given; expected at least one, whose maps these are; pass `references`")
    stored: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def store(step: int, latents: np.ndarray, expected: np.ndarray) -> None:
        if step in steps:
            stored[step] = (latents[:1], expected[:1])
        if progress.view is not None:
            progress.view(step, latents, expected)

    (made,) = pipe.draw(request, dataclasses.replace(progress, view=store))
    conditions, _ = pipe.conditions(request)
    height, width = request.latent[1:]
    times = pipe.family.times(made.options.steps or 0, pipe.family.tokens(request.latent))
    glances = []
    for step in sorted(stored):
        latents, expected = stored[step]
        share = step / (made.options.steps or 1)
        acts = (made.options.image_start <= share) & (share < made.options.image_end)
        try:
            maps = glance(pipe, conditions, latents, float(times[step]), made.options, 1.0 if acts else 0.0)
        except OutOfMemory as e:
            raise UserError(
                f"out of memory for maps of {request.size[1]} x {request.size[0]} pixels ({e}); expected less; take a smaller `height` "
                "and `width`"
            ) from e
        glances.append(Glance(step, float(times[step]), shown(pipe, expected), maps))
    side = pipe.family.multiple // pipe.family.downsample
    grid = height // side, width // side
    return Looking(made, glances, pipe.family.text_rows, grid, block_names(pipe.family, conditions.image_prompt))


def glance(
    pipe: DynaIPPipeline,
    conditions: Conditions,
    latents: np.ndarray,
    time: float,
    options: SampleOptions,
    share: float = 1.0,
) -> Maps:
    """The maps of one forward of noisy `latents` `[1, c, h, w]` at a `time`, with the prompt alone (no true CFG); gains are multiplied
    by `share`. Raises `OutOfMemory`. `options`: as from `SampleOptions.filled`; `conditions`: with an image prompt, text of which the first row counts."""
    family = pipe.family
    if options.merge is not None:
        family = family.with_injection(dataclasses.replace(family.injection, merge=options.merge))
    assert conditions.image_prompt is not None
    states, pooled, references = conditions.text
    text = TextCondition(states[:1], None if pooled is None else pooled[:1], references)
    guidance = None if options.guidance is None else jnp.full(1, options.guidance, jnp.float32)
    args = (
        jnp.asarray(latents),
        jnp.full(1, time, jnp.float32),
        text,
        conditions.image_prompt.scaled(jnp.float32(share)),
    )
    with memory.watched(), on_mesh(pipe.mesh):
        *maps, region = pipe.parts.transformer.run(seen_maps, family, args, dict(guidance=guidance))
    weights, strength, gain = map(np.asarray, maps)
    return Maps(weights, strength, gain, None if region is None else np.asarray(region))


def seen_maps(
    family: Family,
    params: object,
    latents: jax.Array,
    time: jax.Array,
    text: TextCondition,
    image_prompt: ImagePrompt,
    *,
    guidance: jax.Array | None,
) -> tuple[jax.Array | None, ...]:
    """The program of `glance`: the fields of `Maps`."""
    size = latents.shape[-2:]
    seen = family.seen(params, family.pack(latents), time, text, size, guidance=guidance, image_prompt=image_prompt)
    banks = [bank for bank in (image_prompt.double, image_prompt.single) if bank is not None]
    stacks = [_block_maps(family.injection.merge, *pair) for pair in zip(seen.values(), banks, strict=True)]
    regions = [one.region[:, 0] for one in seen.values() if one.region is not None]
    fields = (jnp.concatenate(parts) for parts in zip(*stacks, strict=True))
    return (*fields, jnp.concatenate(regions) if regions else None)


def _block_maps(merge: str, seen: Seen, bank: KV) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights, strength and gain of a stack of blocks, one block after the other: the weights of all heads are large."""

    def one(block: tuple[jax.Array, KV]) -> tuple[jax.Array, jax.Array]:
        query, (k, v) = block
        weights = reference_weights(query, k, merge)
        each = jnp.einsum("bhnsm,bsmhd->bnshd", weights, jnp.broadcast_to(v, (1, *v.shape[1:])).astype(jnp.float32))
        return weights.mean(axis=1)[0], jnp.sqrt(jnp.sum(each[0] ** 2, axis=(-2, -1)))

    weights, strength = jax.lax.map(one, (seen.query, bank))
    return weights, strength, seen.gain[:, 0]


def shown(pipe: DynaIPPipeline, latents: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` of latents `[1, c, h, w]`."""
    from dynaip_jax import images

    with on_mesh(pipe.mesh):
        return images.to_uint8(np.asarray(decoded(pipe.family, pipe.parts.vae, jnp.asarray(latents)))[0])


def block_names(family: Family, image_prompt: ImagePrompt | None) -> list[str]:
    """Of the injected blocks: "double 0", ..., "single 0", ..."""
    assert image_prompt is not None
    names = [f"double {n}" for n in range(family.sites.double)]
    return names + ([] if image_prompt.single is None else [f"single {n}" for n in range(family.sites.single)])
