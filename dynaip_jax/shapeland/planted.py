"""Do maps say where a subject is? A subject is planted: a true render with a known mask, noised, of which the model makes one step.

Axis letters: n cases, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.eval.maps import overlap
from dynaip_jax.eval.statistics import bootstrap_intervals
from dynaip_jax.families.base import Family
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.sampling import looking
from dynaip_jax.sampling.conditions import Conditions, adapter_options, reference_pixels
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import world
from dynaip_jax.shapeland.cases import Cases, make_cases
from dynaip_jax.types import ImagePrompt

TIMES = (0.8, 0.6, 0.4, 0.2)  # at which a case is looked at; 1 is noise


class Planted(NamedTuple):
    """`overlaps` `[n]`: of each case the intersection over union of its mask and of the map, mean of blocks and `TIMES`; `blocks` `[l]`: means
    over cases of the maps of one block each; `others` `[n]`: of the map and the mask of another case, which is what chance gives."""

    overlaps: np.ndarray
    blocks: np.ndarray
    others: np.ndarray

    def line(self) -> str:
        """What was measured, as text."""
        mean, (low, high) = self.overlaps.mean(), bootstrap_intervals(self.overlaps[None].astype(float))[0]
        blocks = ", ".join(f"{value:.2f}" for value in self.blocks)
        return (
            f"IoU of map and planted subject: {mean:.3f} [{low:.3f}, {high:.3f}], {len(self.overlaps)} cases; with the mask of another "
            f"case: {self.others.mean():.3f}; by block: {blocks}"
        )


def measure(pipe: DynaIPPipeline, num: int, seed: int = 0, done: Callable[[], object] = lambda: None) -> Planted:
    """Measures `num` cases of one subject, each a function of (seed, its number); calls `done` after each."""
    cases = make_cases(1, seed, num)
    family = pipe.family
    options = SampleOptions().filled(pipe.defaults, multiple=family.multiple, takes_guidance=family.takes_guidance)
    maps = []
    for n in range(num):
        maps.append(_map(pipe, cases, n, options, seed))
        done()
    masks = [world.render(scene).masks[0] for scene in cases.scenes]
    whole = [each.mean(axis=0) for each in maps]
    pairs = list(zip(whole, masks, strict=True))
    blocks = [[overlap(heat, mask) for heat in each] for each, mask in zip(maps, masks, strict=True)]
    return Planted(
        np.array([overlap(heat, mask) for heat, mask in pairs]),
        np.mean(blocks, axis=0),
        np.array([overlap(heat, mask) for heat, mask in zip(whole, [*masks[1:], masks[0]], strict=True)]),
    )


def _map(pipe: DynaIPPipeline, cases: Cases, n: int, options: SampleOptions, seed: int) -> np.ndarray:
    """The map of case `n`, mean of `TIMES`, `[l, rows, columns]`."""
    scene, family = cases.scenes[n], pipe.family
    picture = world.render(scene).image
    clean = np.asarray(_encoded(family, pipe.parts.vae, jnp.asarray(picture[None] / 127.5 - 1, jnp.float32)))
    noise = np.random.default_rng((seed, n)).standard_normal(clean.shape).astype(np.float32)
    conditions = Conditions(pipe.encode_text([world.caption(scene)]), _image_prompt(pipe, cases, n, options))
    side = family.multiple // family.downsample
    grid = clean.shape[2] // side, clean.shape[3] // side
    found = []
    for time in TIMES:
        maps = looking.glance(pipe, conditions, (1 - time) * clean + time * noise, time, options)
        found.append((maps.strength * maps.gain)[:, family.text_rows :, 0].reshape(-1, *grid))
    return np.mean(found, axis=0)


def _image_prompt(pipe: DynaIPPipeline, cases: Cases, n: int, options: SampleOptions) -> ImagePrompt:
    pixels = reference_pixels(pipe.family, list(cases.references[n]), options.fit)[None]
    return pipe.image_prompt(pixels, **adapter_options(options))[0]


@partial(Quick, static_argnums=0)
def _encoded(family: Family, vae: Any, pictures: jax.Array) -> jax.Array:
    return family.latents(family.encode(vae, pictures))
