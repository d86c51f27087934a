"""The pictures of a row: sampled in batches, or put together from the cases themselves.

Axis letters: n cases, b cases of a batch, s subjects, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from PIL import Image, ImageFilter

from dynaip_jax import images
from dynaip_jax.sampling.conditions import Conditions, adapter_options, reference_pixels
from dynaip_jax.sampling.denoise import generate
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland.cases import Cases, batches
from dynaip_jax.shapeland.settings import Setting
from dynaip_jax.shapeland.world import SIZE, caption
from dynaip_jax.types import ImagePrompt

MARGIN = 3  # pixels by which given regions reach beyond the subject


def draw(
    pipe: DynaIPPipeline, cases: Cases, setting: Setting, seed: int, done: Callable[[], object] = lambda: None
) -> np.ndarray:
    """The pictures of a row, uint8 `[n, H, W, 3]`. Calls `done` after each sampled batch."""
    if setting.source == "truth":
        return cases.renders
    if setting.source == "references":
        return np.stack([_pasted(r) for r in cases.references])
    pictures = []
    for numbers, new in batches(len(cases.scenes)):
        pictures.append(_sample(pipe, cases, setting, seed, numbers)[:new])
        done()
    return np.concatenate(pictures)


def _pasted(references: np.ndarray) -> np.ndarray:
    """References `[s, H, W, 3]` side by side in one picture, each as wide as its column; its upper and lower edges fill the rest."""
    edges = np.linspace(0, SIZE, len(references) + 1).round().astype(int)
    columns = []
    for reference, width in zip(references, np.diff(edges), strict=True):
        small = np.asarray(Image.fromarray(reference).resize((width, width), Image.Resampling.BICUBIC))
        above = (SIZE - width) // 2
        columns.append(np.pad(small, ((above, SIZE - width - above), (0, 0), (0, 0)), mode="edge"))
    return np.concatenate(columns, axis=1)


def _sample(pipe: DynaIPPipeline, cases: Cases, setting: Setting, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Pictures uint8 `[b, H, W, 3]` of the cases of these `numbers`, with the bundle's own defaults."""
    family = pipe.family
    options = SampleOptions(
        image_scale=setting.image_scale,
        text_gain=setting.text_gain,
        granularity=setting.granularity,
        merge=setting.merge,
    ).filled(pipe.defaults, multiple=family.multiple, takes_guidance=family.takes_guidance)
    image_prompt = _image_prompt(pipe, cases, setting, options, numbers) if setting.source == "adapter" else None
    prompts = [caption(cases.scenes[n]) for n in numbers]
    negative = [] if options.negative_prompt is None else [options.negative_prompt] * len(prompts)
    conditions = Conditions(pipe.encode_text(prompts + negative), image_prompt)
    latents = noise(seed, numbers, family.latent(SIZE, SIZE))
    return images.to_uint8(generate(pipe.parts, conditions, latents, options).pictures)


def _image_prompt(
    pipe: DynaIPPipeline, cases: Cases, setting: Setting, options: SampleOptions, numbers: np.ndarray
) -> ImagePrompt:
    """The image prompts of a batch of cases."""
    pixels = np.stack([reference_pixels(pipe.family, list(cases.references[n]), options.fit) for n in numbers])
    places: dict[str, np.ndarray] = {}
    if pixels.shape[1] > 1 and setting.region == "auto":
        scenes = [cases.scenes[n] for n in numbers]
        classes = [[s.kind for s in scene.subjects] for scene in scenes]
        places["words"] = np.stack(
            [pipe.tokenizers.words(caption(scene), names) for scene, names in zip(scenes, classes, strict=True)]
        )
    if pixels.shape[1] > 1 and setting.region == "given":
        places["region"] = np.stack([images.regions(widened(cases.masks[n]), pipe.family.multiple) for n in numbers])
    image_prompt, _ = pipe.image_prompt(pixels, **adapter_options(options, **places))
    if not setting.double_only:
        return image_prompt
    first_single = pipe.family.sites.double
    return image_prompt._replace(
        image_gain=image_prompt.image_gain.at[first_single:].set(0),
        text_gain=image_prompt.text_gain.at[first_single:].set(0),
    )


def noise(seed: int, numbers: np.ndarray, latent: tuple[int, int, int]) -> jax.Array:
    """Initial latents `[b, c, h, w]`, each a function of (seed, number of the case)."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return jax.vmap(lambda key: jax.random.normal(key, latent))(keys)


def widened(masks: np.ndarray) -> list[np.ndarray]:
    """Masks `[s, H, W]` in [0, 1], each wider by `MARGIN` pixels."""
    maximum = ImageFilter.MaxFilter(2 * MARGIN + 1)
    wide = [Image.fromarray(np.round(m * 255).astype(np.uint8)).filter(maximum) for m in masks]
    return [np.asarray(m, np.float32) / 255 for m in wide]
