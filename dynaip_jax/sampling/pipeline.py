"""The pipeline: a base model, optionally with an adapter, ready to make pictures."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dynaip_jax import images
from dynaip_jax.adapters.base import AdapterConfig
from dynaip_jax.errors import OutOfMemory, UserError
from dynaip_jax.families.base import Family
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.runtime import memory
from dynaip_jax.runtime.layouts import Arranged
from dynaip_jax.runtime.sharding import MeshConfig, to_device
from dynaip_jax.sampling.conditions import (
    Conditions,
    Picture,
    adapter_options,
    encode_text,
    make_image_prompt,
    reference_pixels,
)  # fmt: skip
from dynaip_jax.sampling.denoise import Parts, generate, on_mesh
from dynaip_jax.sampling.loras import Given
from dynaip_jax.sampling.natives import encoded
from dynaip_jax.sampling.opening import Described, Opened, open_model, remedies
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.progress import Progress
from dynaip_jax.sampling.request import Request, make_request, warn
from dynaip_jax.sampling.settings import record
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.types import ImagePrompt, TextCondition


@dataclass(frozen=True)
class Generation:
    """What was made, and how.

    `images`; of each the prompt (`prompts`) and its seed (`seeds`, None with injected noise); `routing`: float32 `[s, 3]`, low, mid
    and high weight of each reference (averaged over tokens for a token router), None without references and for adapters that have no router; `options`: as they
    were used, defaults filled in; `settings`: what PNG files say of all of them, as JSON holds it (of one: `settings_of`); `warnings`:
    lines worth showing; `rows`: of each picture its row of injected noise, None with seeds.
    """

    images: list[Image.Image]
    prompts: list[str]
    seeds: list[int] | None
    routing: np.ndarray | None
    options: SampleOptions
    settings: dict[str, Any]
    warnings: list[str]
    rows: list[int] | None = None

    def settings_of(self, k: int) -> dict[str, Any]:
        """What the PNG file of picture `k` says: `settings` with its own prompt, and its seed or its row of the noise."""
        own = self.settings | dict(prompt=self.prompts[k])
        if self.seeds is not None or self.rows is None:
            return own | dict(seed=None if self.seeds is None else self.seeds[k])
        row = self.rows[k]
        return own | dict(seed=None, noise_row=row, noise_fingerprint=[self.settings["noise_fingerprint"][row]])


class DynaIPPipeline:
    """A base model, optionally with an adapter, ready to make pictures. Made by `load`.

    No call changes it: threads may share one, and arrays taken from it stay valid.
    """

    def __init__(
        self,
        bundle: Bundle,
        family: Family,
        params: Mapping[str, Any],
        tokenizers: Tokenizers,
        adapter: tuple[AdapterConfig, Any] | None,
        mesh: Mesh | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        """`settings`: what those of pictures say of how it was loaded (`settings.made_with`)."""
        self.bundle, self.family, self.tokenizers, self.adapter, self.mesh = bundle, family, tokenizers, adapter, mesh
        self.model = Described(bundle, family, tokenizers, None if adapter is None else adapter[0])
        self.defaults, self.settings = self.model.defaults, MappingProxyType(dict(settings))
        self._transformer = Arranged(params["transformer"])
        self._params = {name: tree for name, tree in params.items() if name != "transformer"}

    def without_adapter(self) -> DynaIPPipeline:
        """The same base model, which takes no references; the two share its weights."""
        plain = copy.copy(self)
        plain.adapter, plain.model = None, self.model._replace(adapter=None)
        plain.settings = MappingProxyType(dict(self.settings) | dict(adapter=None, adapter_fingerprint=None))
        return plain

    @property
    def params(self) -> Mapping[str, Any]:
        """Component -> parameters."""
        return MappingProxyType(dict(transformer=self._transformer.params) | self._params)

    @property
    def parts(self) -> Parts:
        """What `denoise.generate` takes."""
        return Parts(self.family, self._transformer, self._params["vae"], self.mesh)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        adapter: str | Path | None = None,
        *,
        dtype: str | None = None,
        any_base: bool = False,
        mesh: MeshConfig | None = None,
        attention: str = "auto",
        weights: str = "full",
        offload_text: bool = False,
        verify: bool = True,
        loras: Given = (),
    ) -> DynaIPPipeline:
        """Reads a bundle and, if given, an adapter made for it: a folder, or a file of XLabs or InstantX.

        `dtype`: "float32" or "bfloat16", of weights and activations; None = float32 on CPU, bfloat16 elsewhere. The VAE decodes
        in float32 always. `any_base` accepts an adapter trained on another base of the same sizes. `mesh`: the devices that share
        the work, each of which reads and holds its part of every component; None = one device. `attention`: of the transformer,
        one of `choices.KERNELS`. `weights`: of its blocks, one of `choices.WEIGHTS`; 8 bits halve their memory at an error.
        `verify`: files are compared with their checksums; False is faster and warns that damage would go unnoticed.
        `offload_text`: T5 waits in the host's memory and is on the devices only while it encodes. `loras`: files that are merged into
        the weights, in their order: a path, or several, each alone or as `(path, scale)`.
        Raises `UserError` if anything on disk is not what it should be or does not fit together.
        """
        opened = open_model(
            bundle,
            adapter,
            dtype=dtype,
            any_base=any_base,
            mesh=mesh,
            attention=attention,
            weights=weights,
            offload_text=offload_text,
            verify=verify,
            loras=loras,
        )
        for note in opened.notes:
            warnings.warn(note, stacklevel=2)
        return cls.read(opened)

    @classmethod
    def read(cls, opened: Opened) -> DynaIPPipeline:
        """Reads the weights of an opened model. Raises `UserError` as `load`."""
        (bundle, family, tokenizers, config), (params, adapter) = opened.model, opened.read()
        with_adapter = None if config is None else (config, adapter)
        return cls(bundle, family, params, tokenizers, with_adapter, opened.mesh, opened.settings)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Picture | Sequence[Picture] = (),
        *,
        masks: Picture | Sequence[Picture] = (),
        words: str | Sequence[str] = (),
        native_references: Picture | Sequence[Picture] = (),
        noise: np.ndarray | None = None,
        options: SampleOptions | None = None,
        progress: bool | Callable[[], object] | Progress = False,
        **changes: Any,
    ) -> Generation:
        """Makes pictures.

        - `prompt`: one, or several, whose pictures are made in one batch: first all of the first prompt, and so on;
        - `references`: one picture a subject; `masks`: none, or one a reference, white where that subject may appear in the output;
          a picture is a path, the bytes of a file, a PIL image, or an array `[H, W, 3]` (see `images.load_image`, `images.read_mask`);
        - `words`: none, or one a reference: the words of the prompt that name that subject ("" where there are none; "star#2":
          the second star);
        - `native_references`: pictures that the model reads by itself, with and without an adapter (models that can);
        - `noise` `[b, c, h, w]`: initial latents in place of seeds, for each prompt the same;
        - `options`, and `changes` to them by name: see `SampleOptions`. What stays None takes the bundle's default;
        - `progress`: True shows a bar; a function is called at each step, and what it raises ends the generation.

        All pictures are made at once unless `at_once` says otherwise or the memory does not hold that; see `draw` for pictures as
        they are done.

        What is accepted although it is lost or changes nothing is said in `warnings` of the result, and as Python warnings.
        Raises `UserError` for options that do not fit the model or each other, for non-finite results, and for too little memory.
        """
        own = dict(masks=masks, words=words, native_references=native_references, noise=noise, options=options)
        request = self.request(prompt, references, **own, **changes)
        warn(request, 2)
        return _joined(request, list(self.draw(request, progress)))

    def request(
        self, prompt: str | Sequence[str], references: Picture | Sequence[Picture] = (), **given: Any
    ) -> Request:
        """Checks a call, whose arguments these are, for `draw`. Raises `UserError` for what does not fit the model or each other."""
        names = ("masks", "words", "native_references", "noise", "options")
        own = {name: given.pop(name) for name in names if name in given}
        return make_request(self.model, prompt, references, **own, changes=given)

    def draw(self, request: Request, progress: bool | Callable[[], object] | Progress = False) -> Iterator[Generation]:
        """Makes the pictures of a checked call, as many at once as `at_once` or the memory allows; gives each part when it is done.

        Raises `UserError` for non-finite results, and if the memory does not hold a single picture.
        """
        shown = Progress.of(progress)
        with self.within_memory(request):
            (text, image_prompt), routing = self.conditions(request)
        at, count = 0, min(request.options.at_once or len(request), len(request))
        whole = 0  # pictures of the last part; the program is compiled for so many
        while at < len(request):
            numbers = list(range(at, min(at + count, len(request))))
            padded = numbers + numbers[-1:] * (whole - len(numbers))
            try:
                with self.within_memory(request, raw=len(padded) > 1):
                    own = request.text(text._replace(references=None), padded)._replace(references=text.references)
                    part = self._part(request, padded, own, image_prompt, routing, shown)
            except OutOfMemory:
                count, whole = (len(padded) + 1) // 2, 0
                continue
            at, whole = at + len(numbers), len(padded)
            yield _first(part, len(numbers))

    def _part(
        self,
        request: Request,
        pictures: Sequence[int],
        text: TextCondition,
        image_prompt: ImagePrompt | None,
        routing: np.ndarray | None,
        shown: Progress,
    ) -> Generation:
        """Some pictures of a call, by their numbers in it; `text`: theirs."""
        if image_prompt is not None:
            image_prompt = image_prompt._replace(words=request.words(image_prompt.words, pictures))
        conditions = Conditions(text, image_prompt)
        made = generate(self.parts, conditions, request.latents(pictures), request.options, shown)
        found = np.asarray(made.pictures)
        if not np.isfinite(found).all():
            raise self.not_finite()
        return Generation(
            images=[Image.fromarray(images.to_uint8(p)) for p in found],
            prompts=[request.prompts[k // request.each] for k in pictures],
            seeds=None if request.seeds is None else [request.seeds[k % request.each] for k in pictures],
            routing=routing,
            options=request.options,
            settings={**self.settings, **self._record(request, routing, made.reused)},
            warnings=request.notes,
            rows=None if request.noise is None else [k % request.each for k in pictures],
        )

    def conditions(self, request: Request) -> tuple[Conditions, np.ndarray | None]:
        """What the pictures of a checked call are conditioned on, a row of text for each of `request.texts`; and the routing weights
        `[s, 3]`, if any."""
        text = self.encode_text(request.texts)
        with on_mesh(self.mesh):
            natives = encoded(self.family, self._params["vae"], request.natives)
        image_prompt, routing = self._image_prompt(request)
        return Conditions(text._replace(references=natives), image_prompt), routing

    def _record(self, request: Request, routing: np.ndarray | None, reused: int | None) -> dict[str, Any]:
        """The settings that all pictures of a call share."""
        asked = (request.prompt, request.options, request.subjects, request.mode, request.noise)
        return record(*asked, routing=routing, reused=reused) | request.natives.settings

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """The text condition of `prompts`, a row each."""
        encoders = {name: to_device(self._params[name]) for name in self.family.text_encoders}
        with on_mesh(self.mesh):
            return encode_text(self.family, encoders, self.tokenizers.ids(prompts))

    def image_prompt(self, pixels: np.ndarray, **options: Any) -> tuple[ImagePrompt, jax.Array | None]:
        """The `ImagePrompt` and DynaIP's routing weights (None: another adapter) of reference pixels `[b, s, size, size, 3]`; `options`: see `DynaIP`."""
        if self.adapter is None:
            raise ValueError("this pipeline was loaded without an adapter")
        config, params = self.adapter
        options = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in options.items()}
        with on_mesh(self.mesh):
            return make_image_prompt(self.family, config, self._params[self.family.encoder], params, pixels, options)

    def _image_prompt(self, request: Request) -> tuple[ImagePrompt | None, np.ndarray | None]:
        """The image prompt of all pictures, or one with words of each prompt, and routing weights `[s, 3]`; None without references."""
        references = request.subjects.references
        if not references:
            return None, None
        pixels = reference_pixels(self.family, references, request.options.fit)[None]
        image_prompt, weights = self.image_prompt(pixels, **adapter_options(request.options, **request.where))
        if weights is None:
            return image_prompt, None
        return image_prompt, np.asarray(weights[0]).reshape(len(references), -1, 3).mean(axis=1)

    @contextlib.contextmanager
    def within_memory(self, request: Request, *, raw: bool = False) -> Iterator[None]:
        """Too little memory in the block is a `UserError` that says what helps, or with `raw` stays an `OutOfMemory`."""
        try:
            with memory.watched():
                yield
        except OutOfMemory as e:
            if raw:
                raise
            height, width = request.size
            in_host = {x.sharding.memory_kind for x in jax.tree.leaves(self._params[self.family.text_encoders[0]])}
            raise UserError(
                f"out of memory for one picture of {width} x {height} pixels ({e}); expected less; take a smaller `height` and "
                f"`width`, or {remedies(self.family, 'pinned_host' in in_host)}"
            ) from e

    def not_finite(self) -> UserError:
        """What to tell of a picture that is not finite: the weights that are not, or what else may help."""
        trees = dict(self.params) | ({"adapter": self.adapter[1]} if self.adapter else {})
        bad = [
            name
            for name, tree in trees.items()
            if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(to_device(tree)))
        ]
        if bad:
            return UserError(
                f"{self.bundle.path}: weights of {', '.join(bad)} hold NaN or infinity; convert or export them again"
            )
        return UserError(
            "output: the picture is not finite although all weights are; try `dtype` float32, a lower `guidance` or `image_scale`"
        )


def _first(part: Generation, count: int) -> Generation:
    """The first pictures of a part."""
    if count == len(part.images):
        return part
    seeds, rows = (None if each is None else each[:count] for each in (part.seeds, part.rows))
    return dataclasses.replace(part, images=part.images[:count], prompts=part.prompts[:count], seeds=seeds, rows=rows)


def _joined(request: Request, parts: Sequence[Generation]) -> Generation:
    """The parts of a call as one; of steps from the cache, the fewest."""
    settings = dict(parts[0].settings)
    if "cached_steps" in settings:
        settings["cached_steps"] = min(part.settings["cached_steps"] for part in parts)
    return dataclasses.replace(
        parts[0],
        images=[image for part in parts for image in part.images],
        prompts=[text for part in parts for text in part.prompts],
        seeds=None if request.seeds is None else [seed for part in parts for seed in part.seeds or ()],
        settings=settings,
        rows=None if request.seeds is not None else [row for part in parts for row in part.rows or ()],
    )
