"""The pipeline: a base model, optionally with an adapter, ready to make pictures."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dynaip_jax import choices, images
from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.families.quantize import quantized, weights_model
from dynaip_jax.families.registry import family_of, open_bundle
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime.layouts import Arranged
from dynaip_jax.runtime.sharding import MeshConfig, abstract, make_mesh, on_host, on_one_device, to_device
from dynaip_jax.sampling import progress as progress_
from dynaip_jax.sampling.conditions import (
    Conditions,
    Picture,
    Subjects,
    adapter_options,
    encode_text,
    make_image_prompt,
    places,
    reference_pixels,
)  # fmt: skip
from dynaip_jax.sampling.denoise import Parts, generate, on_mesh
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.storage.adapter import read_adapter_manifest, read_adapter_weights
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import from_dict
from dynaip_jax.types import ImagePrompt, TextCondition


@dataclass(frozen=True)
class Generation:
    """What was made, and how.

    `images`; of each the prompt (`prompts`) and its seed (`seeds`, None with injected noise); `routing`: float32 `[s, 3]`, low, mid
    and high weight of each reference (averaged over tokens for a token router), None without references; `options`: as they
    were used, defaults filled in; `settings`: all that a PNG file says of it, as JSON holds it; `warnings`: lines worth showing.
    """

    images: list[Image.Image]
    prompts: list[str]
    seeds: list[int] | None
    routing: np.ndarray | None
    options: SampleOptions
    settings: dict[str, Any]
    warnings: list[str]


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
        adapter: tuple[DynaIPConfig, Any] | None,
        mesh: Mesh | None = None,
    ):
        self.bundle, self.family, self.tokenizers, self.adapter, self.mesh = bundle, family, tokenizers, adapter, mesh
        self.defaults = MappingProxyType(bundle.manifest["defaults"])
        self._transformer = Arranged(params["transformer"])
        self._params = {name: tree for name, tree in params.items() if name != "transformer"}

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
    ) -> DynaIPPipeline:
        """Reads a bundle and, if given, an adapter made for it.

        `dtype`: "float32" or "bfloat16", of weights and activations; None = float32 on CPU, bfloat16 elsewhere. The VAE decodes
        in float32 always. `any_base` accepts an adapter trained on another base of the same sizes. `mesh`: the devices that share
        the work, each of which reads and holds its part of every component; None = one device. `attention`: of the transformer,
        one of `choices.KERNELS`. `weights`: of its blocks, one of `choices.WEIGHTS`; 8 bits halve their memory at an error.
        `offload_text`: T5 waits in the host's memory and is on the devices only while it encodes.
        Raises `UserError` if anything on disk is not what it should be or does not fit together.
        """
        opened = open_bundle(bundle)
        for name, value, allowed in (
            ("dtype", dtype, (None, *choices.DTYPES)),
            ("attention", attention, choices.KERNELS),
            ("weights", weights, choices.WEIGHTS),
        ):
            if value not in allowed:
                raise UserError(f"`{name}` {value}: expected one of {', '.join(filter(None, allowed))}")
        kind = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        compute = Compute(dtype=kind, param_dtype=kind, attention=attention, weights=weights)
        family = family_of(opened, compute, reference=adapter is not None)
        weights_model(family)  # if it needs qwix and that is not here, says so before anything is read
        adapter_config = None if adapter is None else read_adapter_config(adapter, opened, family, any_base)
        if adapter_config is not None:
            family = family.with_injection(adapter_config.injection)

        grid = None if mesh is None else make_mesh(mesh)

        def targets(boxed: Any) -> Any:
            return on_one_device(nn.meta.unbox(boxed)) if grid is None else abstract(boxed, grid)

        params = _read_params(opened, family, targets, offload_text)
        tokenizers = family.load_tokenizers(opened.path / "tokenizers")
        with_adapter = None
        if adapter is not None and adapter_config is not None:
            target = targets(abstract_adapter_params(adapter_config, family.compute("clip_vision"), boxed=True))
            with_adapter = adapter_config, read_adapter_weights(adapter, target)
        return cls(opened, family, params, tokenizers, with_adapter, grid)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Picture] = (),
        *,
        masks: Sequence[str | Path | np.ndarray] = (),
        words: Sequence[str] = (),
        noise: np.ndarray | None = None,
        options: SampleOptions | None = None,
        progress: bool | Callable[[], object] = False,
        **changes: Any,
    ) -> Generation:
        """Makes pictures.

        - `prompt`: one, or several, whose pictures are made in one batch: first all of the first prompt, and so on;
        - `references`: one picture a subject; `masks`: none, or one a reference, white where that subject may appear in the output;
        - `words`: none, or one a reference: the words of the prompt that name that subject ("" where there are none);
        - `noise` `[b, c, h, w]`: initial latents in place of seeds, for each prompt the same;
        - `options`, and `changes` to them by name: see `SampleOptions`. What stays None takes the bundle's default;
        - `progress`: True shows a bar; a function is called at each step.

        Raises `UserError` for options that do not fit the model or each other, and for non-finite results.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("`prompt`: none given; expected at least one")
        subjects = Subjects(list(references), list(masks), list(words))
        given = changed(options or SampleOptions(), changes)
        mode = self._check(subjects, given)
        used = given.filled(self.defaults, multiple=self.family.multiple, takes_guidance=self.family.takes_guidance)
        latent = self.family.latent(*_size(used))
        start, seeds = initial_noise(noise, given, latent)
        each = len(start)
        notes = self._cut(prompts, used.negative_prompt)
        if used.merge is None and self.adapter is not None:
            used = changed(used, dict(merge=self.adapter[0].merge))
        image_prompt, routing = self._image_prompt(subjects, mode, used, prompts, each)
        conditions = Conditions(self._text(prompts, used.negative_prompt, each), image_prompt)
        noises = np.concatenate([start] * len(prompts))
        with progress_.bar(used.steps or 0, progress is True) as bar:
            watcher = progress if callable(progress) else bar
            made = generate(self.parts, conditions, noises, used, watcher)
        pictures = np.asarray(made.pictures)
        if not np.isfinite(pictures).all():
            self._blame_nan()
        return Generation(
            images=[Image.fromarray(images.to_uint8(p)) for p in pictures],
            prompts=[p for p in prompts for _ in range(each)],
            seeds=None if seeds is None else seeds * len(prompts),
            routing=routing,
            options=used,
            settings=_settings(prompt, used, subjects, mode, routing, made.reused),
            warnings=notes,
        )

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """The text condition of `prompts`, a row each."""
        encoders = {name: to_device(self._params[name]) for name in self.family.text_encoders}
        with on_mesh(self.mesh):
            return encode_text(self.family, encoders, self.tokenizers.ids(prompts))

    def image_prompt(self, pixels: np.ndarray, **options: Any) -> tuple[ImagePrompt, jax.Array]:
        """The `ImagePrompt` and routing weights of reference pixels `[b, s, size, size, 3]`; `options`: see `DynaIP`."""
        if self.adapter is None:
            raise ValueError("this pipeline was loaded without an adapter")
        config, params = self.adapter
        options = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in options.items()}
        with on_mesh(self.mesh):
            return make_image_prompt(self.family, config, self._params["clip_vision"], params, pixels, options)

    def _image_prompt(
        self, subjects: Subjects, mode: str, used: SampleOptions, prompts: Sequence[str], each: int
    ) -> tuple[ImagePrompt | None, np.ndarray | None]:
        """The image prompt of `each` pictures of each prompt, and the routing weights `[s, 3]`; None without references."""
        if not subjects.references:
            return None, None
        where = places(self.family, self.tokenizers, prompts, each, subjects, mode, _size(used))
        size = self.family.config("clip_vision").image_size
        pixels = reference_pixels(subjects.references, size, used.fit)[None]
        image_prompt, weights = self.image_prompt(pixels, **adapter_options(used, **where))
        return image_prompt, np.asarray(weights[0]).reshape(len(subjects.references), -1, 3).mean(axis=1)

    def _check(self, subjects: Subjects, options: SampleOptions) -> str:
        """Where subjects may appear. Raises `UserError` for references without adapter, the reverse, and what does not fit them."""
        if subjects.references and self.adapter is None:
            raise UserError("`references`: no adapter is loaded; pass `adapter`, or leave the references out")
        if self.adapter is not None and not subjects.references:
            raise UserError("`adapter`: no reference picture to use it on; pass `references`, or leave the adapter out")
        mode = subjects.regions(options.regions)
        options.check_gains(len(subjects.references))
        return mode

    def _cut(self, prompts: Sequence[str], negative: str | None) -> list[str]:
        """A line, also given as a warning, for each end of a prompt that an encoder does not see."""
        notes = [
            f"prompt: the {encoder} encoder takes no more; it does not see: {tail!r}"
            for text in (*prompts, negative or "")
            for encoder, tail in self.tokenizers.cut(text).items()
        ]
        for note in notes:
            warnings.warn(note, stacklevel=3)
        return notes

    def _text(self, prompts: list[str], negative: str | None, each: int) -> TextCondition:
        """A row for all pictures of a single prompt, otherwise a row for each picture; then the negative prompt's as often."""
        text = self.encode_text(prompts + ([negative] if negative is not None else []))
        if len(prompts) == 1:
            return text
        rows = [p for p in range(len(prompts)) for _ in range(each)]
        order = np.array(rows + [len(prompts)] * (len(rows) if negative is not None else 0))
        return jax.tree.map(lambda x: x[order], text)

    def _blame_nan(self) -> None:
        trees = dict(self.params) | ({"adapter": self.adapter[1]} if self.adapter else {})
        bad = [
            name
            for name, tree in trees.items()
            if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(to_device(tree)))
        ]
        if bad:
            raise UserError(
                f"{self.bundle.path}: weights of {', '.join(bad)} hold NaN or infinity; convert or export them again"
            )
        raise UserError(
            "output: the picture is not finite although all weights are; try `dtype` float32, a lower `guidance` or `image_scale`"
        )


def changed(options: SampleOptions, changes: Mapping[str, Any]) -> SampleOptions:
    """`options` with `changes` by name. Raises `UserError` for a name that is no option."""
    names = {f.name for f in dataclasses.fields(SampleOptions)}
    if unknown := sorted(changes.keys() - names):
        raise UserError(f"`{unknown[0]}`: no such option; expected some of {', '.join(sorted(names))}")
    return dataclasses.replace(options, **changes)


def initial_noise(
    noise: np.ndarray | None, options: SampleOptions, latent: tuple[int, int, int]
) -> tuple[np.ndarray, list[int] | None]:
    """Initial latents `[b, *latent]`, as given or drawn from the seeds, and those seeds."""
    if noise is None:
        seeds = options.seeds()
        return np.stack([np.asarray(jax.random.normal(jax.random.key(s), latent)) for s in seeds]), seeds
    if options.seed is not None or options.num_images is not None:
        raise UserError("`noise`: it fixes what `seed` and `num_images` would choose; pass either")
    noise = np.asarray(noise)
    if noise.ndim != 4 or noise.shape[1:] != latent or noise.shape[0] < 1 or noise.dtype.kind != "f":
        expected = f"[b, {', '.join(map(str, latent))}]"
        raise UserError(
            f"`noise`: found {noise.dtype} {list(noise.shape)}; expected floats {expected} for this size of picture"
        )
    if not np.isfinite(noise).all():
        raise UserError("`noise`: holds NaN or infinity; expected finite numbers")
    return noise.astype(np.float32), None


def read_adapter_config(path: str | Path, bundle: Bundle, family: Family, any_base: bool) -> DynaIPConfig:
    """The config of the adapter in a folder. Raises `UserError` if it was made for another base or another CLIP."""
    manifest = read_adapter_manifest(path, base=bundle, any_base=any_base)
    try:
        config = from_dict(DynaIPConfig, manifest["config"])
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"`adapter` {path}: config in adapter.json: {e}; export the adapter again") from e
    vision = family.config("clip_vision")
    if vision.hidden_size != config.hmoe.clip_width or max(config.hmoe.levels) > vision.num_hidden_layers:
        raise UserError(
            f"`adapter` {path}: needs a CLIP of width {config.hmoe.clip_width} with layers {config.hmoe.levels}"
            f"{' (openai/clip-vit-large-patch14)' if config.hmoe.clip_width == 1024 else ''}; the model's has width "
            f"{vision.hidden_size} and {vision.num_hidden_layers} layers; convert the model again with that --clip-vision"
        )
    sites = family.sites
    for name, value in (
        ("depth", sites.double), ("depth_single_blocks", sites.single), ("num_heads", sites.heads), ("head_dim", sites.head_dim),
    ):  # fmt: skip
        if getattr(config, name) != value:
            raise UserError(
                f"`adapter` {path}: made for {name} {getattr(config, name)}; the model has {value}; use its own base"
            )
    return config


def _read_params(bundle: Bundle, family: Family, targets: Callable[[Any], Any], offload_text: bool) -> dict[str, Any]:
    """Every component of the family, where it belongs."""
    in_host = {family.text_encoders[0]} if offload_text else set()
    if family.compute("transformer").weights != "full":
        in_host.add("transformer")  # until its weights are rounded, one after the other
    params = {}
    for name, _ in family.configs:
        target = targets(family.abstract_params(name, boxed=True))
        params[name] = bundle.load(name, on_host(target) if name in in_host else target)
    params["transformer"] = quantized(family, params["transformer"])
    return params


def _size(options: SampleOptions) -> tuple[int, int]:
    """Height and width of filled options."""
    assert options.height is not None and options.width is not None
    return options.height, options.width


def _settings(
    prompt: Any, used: SampleOptions, subjects: Subjects, mode: str, routing: np.ndarray | None, reused: int | None
) -> dict[str, Any]:
    """What a PNG file says of how it was made."""
    settings = dict(prompt=prompt) | {name: getattr(used, name) for name in ("steps", "guidance", "height", "width")}
    if used.true_cfg is not None:
        settings |= dict(negative_prompt=used.negative_prompt, true_cfg=used.true_cfg)
    if reused is not None:
        settings |= dict(cache_threshold=used.cache_threshold, cached_steps=reused)
    if routing is not None:
        names = ("image_scale", "text_gain", "granularity", "merge", "image_start", "image_end", "fit")
        settings |= {name: getattr(used, name) for name in names}
        settings |= dict(words=list(subjects.words), regions=mode, routing=routing.round(4).tolist())
    return settings
