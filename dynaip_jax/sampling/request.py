"""What a call asks for, checked against a model before its weights are needed.

Axis letters as in `dynaip_jax.types`; n prompts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.conditions import Picture, Subjects, places
from dynaip_jax.sampling.natives import Natives
from dynaip_jax.sampling.notes import notes
from dynaip_jax.sampling.opening import Described
from dynaip_jax.sampling.options import MOST, SampleOptions, shown, texts
from dynaip_jax.types import TextCondition


@dataclass(frozen=True)
class Request:
    """The pictures of a call: `each` of every prompt, first all of the first prompt.

    `prompt`: as it was given; `options`: defaults filled in; `mode`: where subjects may appear; `noise` `[each, c, h, w]` or `seeds`,
    one of both; `where`: `region` `[1, s, i]`, or `words` `[n, s, t]`, for the adapter; `notes`: lines worth showing; `natives`:
    pictures that the model reads by itself.
    """

    prompt: str | list[str]
    prompts: list[str]
    each: int
    subjects: Subjects
    mode: str
    options: SampleOptions
    latent: tuple[int, int, int]
    noise: np.ndarray | None
    seeds: list[int] | None
    where: Mapping[str, np.ndarray | None]
    notes: list[str]
    natives: Natives = Natives()

    def __len__(self) -> int:
        return len(self.prompts) * self.each

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        assert self.options.height is not None and self.options.width is not None
        return self.options.height, self.options.width

    @property
    def texts(self) -> list[str]:
        """What the text encoders are to read: the prompts, then the negative one if there is one."""
        negative = self.options.negative_prompt
        return self.prompts + ([] if negative is None else [negative])

    def latents(self, pictures: Sequence[int]) -> np.ndarray:
        """Initial latents `[b, c, h, w]` of some pictures, by their numbers in the call."""
        own = [k % self.each for k in pictures]
        if self.noise is not None:
            return self.noise[own]
        assert self.seeds is not None
        return np.stack([np.asarray(jax.random.normal(jax.random.key(self.seeds[k]), self.latent)) for k in own])

    def text(self, encoded: TextCondition, pictures: Sequence[int]) -> TextCondition:
        """Of what was made of `texts`: the rows of all pictures of a single prompt, otherwise a row for each of some `pictures`; then
        the negative prompt's as often."""
        if len(self.prompts) == 1:
            return encoded
        rows = self._prompts_of(pictures)
        negative = self.options.negative_prompt is not None
        order = np.array(rows + [len(self.prompts)] * (len(rows) if negative else 0))
        return jax.tree.map(lambda x: x[order], encoded)

    def words(self, made: Any, pictures: Sequence[int]) -> Any:
        """Of `words` `[n, s, t]`: those of all pictures of a single prompt, otherwise `[b, s, t]` for some pictures."""
        return made if made is None or len(self.prompts) == 1 else made[np.array(self._prompts_of(pictures))]

    def _prompts_of(self, pictures: Sequence[int]) -> list[int]:
        return [k // self.each for k in pictures]


def make_request(
    model: Described,
    prompt: str | Sequence[str],
    references: Picture | Sequence[Picture] = (),
    *,
    masks: Picture | Sequence[Picture] = (),
    words: str | Sequence[str] = (),
    native_references: Picture | Sequence[Picture] = (),
    noise: np.ndarray | None = None,
    options: SampleOptions | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Request:
    """Checks a call; arguments as in `DynaIPPipeline.__call__`. Raises `UserError` for what does not fit the model or each other."""
    prompts = texts("prompt", prompt)
    if not prompts:
        raise UserError("`prompt`: none given; expected at least one")
    subjects = Subjects.read(references, masks, words)
    if not isinstance(options, (SampleOptions, type(None))):
        raise UserError(f"`options` {shown(options)}: expected a SampleOptions")
    given = changed(options or SampleOptions(), changes or {})
    mode = _check(model, subjects, given)
    family = model.family
    used = given.filled(model.defaults, multiple=family.multiple, takes_guidance=family.takes_guidance)
    assert used.height is not None and used.width is not None
    size = used.height, used.width
    latent = family.latent(*size)
    start, seeds = initial_noise(noise, given, latent)
    each = len(start) if start is not None else len(seeds or ())
    if len(prompts) * each > MOST:
        raise UserError(
            f"`num_images`: {len(prompts)} prompts of {each} pictures; expected at most {MOST} pictures in all"
        )
    if used.merge is None and model.adapter is not None:
        used = changed(used, dict(merge=model.adapter.merge))
    where: Mapping[str, np.ndarray | None] = {}
    if subjects.references:
        where = places(family, model.tokenizers, prompts, subjects, mode, size)
    return Request(
        prompt=prompt if isinstance(prompt, str) else prompts,
        prompts=prompts,
        each=each,
        subjects=subjects,
        mode=mode,
        options=used,
        latent=latent,
        noise=start,
        seeds=seeds,
        where=where,
        notes=notes(model.tokenizers, prompts, subjects, mode, given, used),
        natives=Natives.read(native_references, family),
    )


def warn(request: Request, level: int) -> None:
    """Gives the notes of a request as warnings, `level` calls up."""
    for note in request.notes:
        warnings.warn(note, stacklevel=level + 1)


def changed(options: SampleOptions, changes: Mapping[str, Any]) -> SampleOptions:
    """`options` with `changes` by name. Raises `UserError` for a name that is no option."""
    names = {f.name for f in dataclasses.fields(SampleOptions)}
    if unknown := sorted(changes.keys() - names):
        raise UserError(f"`{unknown[0]}`: no such option; expected some of {', '.join(sorted(names))}")
    return dataclasses.replace(options, **changes)


def initial_noise(
    noise: np.ndarray | None, options: SampleOptions, latent: tuple[int, int, int]
) -> tuple[np.ndarray | None, list[int] | None]:
    """Initial latents `[b, *latent]` as given, or the seeds that they are drawn from."""
    if noise is None:
        return None, options.seeds()
    if options.seed is not None or options.num_images is not None:
        raise UserError("`noise`: it fixes what `seed` and `num_images` would choose; pass either")
    try:
        noise = np.asarray(noise)
    except (ValueError, TypeError) as e:
        raise UserError(f"`noise` {shown(noise)}: expected an array of floats") from e
    if noise.ndim != 4 or noise.shape[1:] != latent or noise.shape[0] < 1 or noise.dtype.kind != "f":
        expected = f"[b, {', '.join(map(str, latent))}]"
        raise UserError(
            f"`noise`: found {noise.dtype} {list(noise.shape)}; expected floats {expected} for this size of picture"
        )
    if not np.isfinite(noise).all():
        raise UserError("`noise`: holds NaN or infinity; expected finite numbers")
    return noise.astype(np.float32), None


def _check(model: Described, subjects: Subjects, options: SampleOptions) -> str:
    """Where subjects may appear. Raises `UserError` for references without adapter, the reverse, and what does not fit them."""
    if subjects.references and model.adapter is None:
        raise UserError("`references`: no adapter is loaded; pass `adapter`, or leave the references out")
    if model.adapter is not None and not subjects.references:
        raise UserError("`adapter`: no reference picture to use it on; pass `references`, or leave the adapter out")
    if options.granularity is not None and model.adapter is not None and not isinstance(model.adapter, DynaIPConfig):
        raise UserError(f"`granularity`: this adapter reads {model.adapter.reads}, which has no levels; leave it out")
    blocks, adapter = options.block_scale, model.adapter
    if blocks is not None and adapter is not None and len(blocks) != adapter.injected:
        raise UserError(
            f"`block_scale`: {len(blocks)} numbers; expected {adapter.injected}, one for each block that the adapter acts in"
        )
    mode = subjects.regions(options.regions)
    options.check_gains(len(subjects.references))
    return mode
