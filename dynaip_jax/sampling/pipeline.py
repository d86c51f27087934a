"""From a prompt and reference pictures to pictures: encode -> bank -> compiled denoising loop -> decode."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig, abstract_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.families.quantize import model as transformer_model
from dynaip_jax.families.quantize import quantized
from dynaip_jax.families.registry import COMPONENTS, FAMILIES, abstract_params
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.images import files as images
from dynaip_jax.layers import attention as ops
from dynaip_jax.models.flux import FluxConfig, StepCache
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.compiling import QUICK
from dynaip_jax.runtime.sharding import MeshConfig, abstract, make_mesh, on_host, on_one_device, to_device
from dynaip_jax.storage.bundle import Bundle, read_adapter_manifest, read_adapter_weights
from dynaip_jax.types import MERGES, WEIGHTS, ImagePrompt

Picture = str | Path | np.ndarray | Image.Image
TRUE_CFG = 4.0  # scale used with a negative prompt when none is given


class TextCondition(NamedTuple):
    """`states` `[b, t, c]` of T5 and `pooled` `[b, c]` of CLIP."""

    states: jax.Array
    pooled: jax.Array


class Generation(NamedTuple):
    """`images`; their `seeds` (None with injected noise); `routing`: float32 `[s, 3]`, low, mid and high weight of each
    reference (averaged over tokens for a token router), or None without references; `settings`: every option as it was
    used, defaults filled in; `warnings`: lines worth showing."""

    images: list[Image.Image]
    seeds: list[int] | None
    routing: np.ndarray | None
    settings: dict[str, Any]
    warnings: list[str]


class DynaIPPipeline:
    """A base model, optionally with an adapter, ready to make pictures. Made by `load`."""

    def __init__(
        self,
        bundle: Bundle,
        configs: dict[str, Any],
        params: dict[str, Any],
        tokenizers: Tokenizers,
        adapter: tuple[DynaIPConfig, Any] | None,
        mesh: Mesh | None = None,
    ):
        self.bundle = bundle
        self.mesh = mesh
        self.configs = configs
        self.params = params
        self.tokenizers = tokenizers
        self.adapter = adapter
        self.defaults = bundle.manifest["defaults"]
        self.schedule = flow.ScheduleConfig(**bundle.manifest["schedule"])

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
        one of `kernels.KERNELS`. `weights`: of its blocks, one of `types.WEIGHTS`; 8 bits halve their memory at an error.
        `offload_text`: T5 waits in the host's memory and is on the devices only while it encodes.
        Raises `UserError` if anything on disk is not what it should be or does not fit together.
        """
        opened = Bundle.open(bundle, FAMILIES)
        if dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
        compute = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))

        names = ["transformer", "vae", "t5", "clip_text"] + (["clip_vision"] if adapter is not None else [])
        configs = {}
        for name in names:
            kind = jnp.float32 if name == "vae" else compute
            configs[name] = opened.config(name, COMPONENTS[name].config, dtype=kind, param_dtype=kind)
        if weights not in WEIGHTS:
            raise UserError(f"--weights {weights}: expected one of {', '.join(WEIGHTS)}")
        configs["transformer"] = dataclasses.replace(configs["transformer"], attention=attention, weights=weights)
        transformer_model(
            configs["transformer"]
        )  # if it needs qwix and that is not here, says so before anything is read
        _check_widths(opened, configs)
        adapter_config = None if adapter is None else _adapter_config(adapter, opened, configs, any_base, compute)
        if adapter_config is not None:
            configs["transformer"] = dataclasses.replace(
                configs["transformer"], reference_query=adapter_config.query, reference_merge=adapter_config.merge
            )

        grid = None if mesh is None else make_mesh(mesh)

        def targets(boxed: Any) -> Any:
            return on_one_device(nn.meta.unbox(boxed)) if grid is None else abstract(boxed, grid)

        in_host = {"t5"} if offload_text else set()
        if weights != "full":
            in_host.add("transformer")  # until its weights are rounded, one after the other
        params = {}
        for name in names:
            target = targets(abstract_params(name, configs[name], boxed=True))
            params[name] = opened.load(name, on_host(target) if name in in_host else target)
        params["transformer"] = quantized(configs["transformer"], params["transformer"])
        lengths = opened.manifest["text"]
        tokenizers = Tokenizers.load(opened.path / "tokenizers", lengths["t5_length"], lengths["clip_length"])
        with_adapter = None
        if adapter is not None and adapter_config is not None:
            target = targets(abstract_adapter_params(adapter_config, boxed=True))
            with_adapter = adapter_config, read_adapter_weights(adapter, target)
        return cls(opened, configs, params, tokenizers, with_adapter, grid)

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Sequence[Picture] = (),
        *,
        masks: Sequence[str | Path | np.ndarray] = (),
        words: Sequence[str] = (),
        regions: Literal["auto", "none"] | None = None,
        negative_prompt: str | None = None,
        true_cfg: float | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        noise: np.ndarray | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image_scale: float | Sequence[float] = 1.0,
        text_gain: float | Sequence[float] = 0.0,
        granularity: Sequence[float] | None = None,
        merge: Literal["sum", "concat"] | None = None,
        image_start: float = 0.0,
        image_end: float = 1.0,
        fit: Literal["pad", "crop"] = "pad",
        cache_threshold: float | None = None,
        progress: bool = False,
    ) -> Generation:
        """Makes pictures. Every option left at None takes the bundle's default.

        - `prompt`: one, or several, whose pictures are made in one batch: first all of the first prompt, and so on;
        - `references`: one picture a subject; `masks`: none, or one a reference, white where that subject may appear in the output;
        - `words`: none, or one a reference: the words of the prompt that name that subject ("" where there are none);
        - `regions`: "auto" finds where each subject belongs from the attention to its words, "none" lets all act everywhere;
          None = auto if there are words. Masks win over both;
        - `seed`: image k of the `num_images` of each prompt uses seed + k, so that each can be made again alone; or `noise`
          `[b, c, h, w]`, initial latents, for each prompt the same;
        - `guidance`: scale embedded by a guidance-distilled base; `true_cfg`: scale against `negative_prompt`, two passes a step
          (a base that needs it says so in its bundle's defaults, and then steers away from the empty prompt; 1 = off);
        - `height`, `width`: pixels, multiples of 16;
        - `image_scale`, `text_gain`: gain of the image prompt in the image and text branch, for all subjects or one each.
          text_gain 0 is the Dynamic Decoupling Strategy; with image_scale 0 as well the base model is left exactly as it is;
        - `granularity`: non-negative (low, mid, high) in place of the router's weights;
        - `merge`: whether several subjects are summed, or compete for each row ("concat"); None = as the adapter says;
        - `image_start`, `image_end`: the part of the steps, in [0, 1], in which the image prompt acts;
        - `fit`: "pad" or "crop" references to CLIP's square;
        - `cache_threshold`: First Block Cache: a step in which the first block's share has changed by no more than this part since
          the last whole step takes what the other blocks add from there; decided for the batch as one. None = off.

        Raises `UserError` for options that do not fit the model or each other, and for non-finite results.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("--prompt: none given; expected at least one")
        references, masks, words = list(references), list(masks), list(words)
        self._check_image_options(references, masks, image_scale, text_gain, granularity, image_start, image_end)
        transformer = self.configs["transformer"]
        region_mode = _check_regions(references, masks, words, regions)
        if merge not in (None, *MERGES):
            raise UserError(f"--merge {merge}: expected sum or concat")
        if merge is not None:
            transformer = dataclasses.replace(transformer, reference_merge=merge)
        height, width = (v if v is not None else self.defaults[k] for k, v in (("height", height), ("width", width)))
        vae = self.configs["vae"]
        multiple = 2 * vae.downsample
        for option, size in (("--height", height), ("--width", width)):
            if size <= 0 or size % multiple:
                near = max(multiple, round(size / multiple) * multiple)
                raise UserError(f"{option} {size}: expected a positive multiple of {multiple}; try {near}")
        steps = self.defaults["steps"] if steps is None else steps
        if steps < 1:
            raise UserError(f"--steps {steps}: expected at least 1")
        if cache_threshold is not None and not 0 < cache_threshold < np.inf:
            raise UserError(f"--cache-threshold {cache_threshold}: expected a positive number, such as 0.1")
        guidance = self._guidance(guidance)
        negative_prompt, cfg = _true_cfg(negative_prompt, true_cfg, self.defaults.get("true_cfg"))

        latent = (vae.z_channels, height // vae.downsample, width // vae.downsample)
        noise, seeds = _initial_noise(noise, seed, num_images, latent)
        each = len(noise)
        noise, seeds = np.concatenate([noise] * len(prompts)), seeds and seeds * len(prompts)

        notes = [
            f"prompt: the {encoder} encoder takes no more; it does not see: {tail!r}"
            for text in (*prompts, negative_prompt or "")
            for encoder, tail in self.tokenizers.cut(text).items()
        ]
        for note in notes:
            warnings.warn(note, stacklevel=2)
        image_prompt, routing = None, None
        if references:
            size = self.configs["clip_vision"].image_size
            pixels = np.stack([images.clip_pixels(_rgb(r), size, fit) for r in references])
            region = None
            if masks:
                region = images.regions([_mask(m, height, width) for m in masks], multiple)[None]
            named = [w for w in words if w]
            rows = np.stack(
                [self.tokenizers.t5_words(p, named) for p in prompts]
            )  # checked even where they are not used
            if len(prompts) > 1:
                rows = np.repeat(rows, each, axis=0)
            image_prompt, weights = self.image_prompt(
                pixels[None],
                image_gain=image_scale,
                text_gain=text_gain,
                granularity=granularity,
                region=region,
                words=rows if region_mode == "auto" and not masks else None,
            )
            routing = np.asarray(weights[0]).reshape(len(references), -1, 3).mean(axis=1)

        text = self.encode_text(prompts + ([negative_prompt] if negative_prompt is not None else []))
        if len(prompts) > 1:  # a row for each picture, then the negative one as often
            negative = [len(prompts)] * (len(noise) if negative_prompt is not None else 0)
            order = np.array([p for p in range(len(prompts)) for _ in range(each)] + negative)
            text = jax.tree.map(lambda x: x[order], text)
        times = flow.schedule(steps, (latent[1] // 2) * (latent[2] // 2), self.schedule)
        with self._on_mesh(), _progress_bar(steps, progress) as reporting:
            args = (jnp.asarray(noise), text, image_prompt, jnp.asarray(times))
            options = dict(
                guidance=None if guidance is None else jnp.float32(guidance),
                true_cfg=None if cfg is None else jnp.float32(cfg),
                window=jnp.array([image_start, image_end], jnp.float32),
                cache_threshold=None if cache_threshold is None else jnp.float32(cache_threshold),
            )
            params = self.params["transformer"]
            program = layouts.lower(denoising_loop, transformer, params, args, options, reporting=reporting).compile()
            self.params["transformer"] = params = layouts.arranged(program, params)
            latents, reused = program(params, (args, options))
            latents.block_until_ready()
        with self._on_mesh():
            decoded = np.asarray(decode(vae, self.params["vae"], latents))
        if not np.isfinite(decoded).all():
            self._blame_nan()
        settings: dict[str, Any] = dict(prompt=prompt, steps=steps, guidance=guidance, height=height, width=width)
        if cfg is not None:
            settings |= dict(negative_prompt=negative_prompt, true_cfg=cfg)
        if reused is not None:
            settings |= dict(cache_threshold=cache_threshold, cached_steps=int(reused))
        if routing is not None:
            settings |= dict(
                image_scale=image_scale,
                text_gain=text_gain,
                granularity=granularity,
                merge=transformer.reference_merge,
                words=words,
                regions="masks" if masks else region_mode,
                image_start=image_start,
                image_end=image_end,
                fit=fit,
                routing=routing.round(4).tolist(),
            )
        return Generation([Image.fromarray(images.to_uint8(p)) for p in decoded], seeds, routing, settings, notes)

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """T5 states `[n, t, c]` and CLIP pooled vectors `[n, c]` of `prompts`."""
        with self._on_mesh():
            return encode_text(
                self.configs["t5"],
                self.configs["clip_text"],
                to_device(self.params["t5"]),
                self.params["clip_text"],
                self.tokenizers.t5(prompts),
                self.tokenizers.clip(prompts),
            )

    def image_prompt(self, pixels: np.ndarray, **options: Any) -> tuple[ImagePrompt, jax.Array]:
        """The `ImagePrompt` and routing weights of reference pixels `[b, s, size, size, 3]`; `options`: see `DynaIP`."""
        if self.adapter is None:
            raise ValueError("this pipeline was loaded without an adapter")
        config, params = self.adapter
        options = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in options.items()}
        with self._on_mesh():
            return make_image_prompt(
                self.configs["clip_vision"], config, self.params["clip_vision"], params, pixels, options
            )

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _guidance(self, guidance: float | None) -> float | None:
        if self.configs["transformer"].guidance_embed:
            return self.defaults["guidance"] if guidance is None else guidance
        if guidance is not None:
            raise UserError(
                f"--guidance {guidance}: this model has no guidance embedding; leave it out (or use --true-cfg)"
            )
        return None

    def _check_image_options(self, references, masks, image_scale, text_gain, granularity, start, end) -> None:
        if references and self.adapter is None:
            raise UserError("--reference: no adapter is loaded; pass --adapter DIR, or leave the references out")
        if self.adapter is not None and not references:
            raise UserError(
                "--adapter: no reference picture to use it on; pass --reference IMG, or leave the adapter out"
            )
        if masks and len(masks) != len(references):
            raise UserError(
                f"--mask: {len(masks)} masks for {len(references)} references; pass one for each reference, or none"
            )
        for option, value in (("--image-scale", image_scale), ("--text-gain", text_gain)):
            values = np.atleast_1d(np.asarray(value, np.float32))
            if not np.isfinite(values).all() or (len(values) != 1 and len(values) != len(references)):
                raise UserError(
                    f"{option} {value}: expected one finite number, or one for each of {len(references)} references"
                )
        if granularity is not None:
            weights = np.asarray(granularity, np.float32)
            if (
                weights.shape[-1:] != (3,)
                or not np.isfinite(weights).all()
                or (weights < 0).any()
                or (weights.sum(-1) <= 0).any()
            ):
                raise UserError(
                    f"--granularity {granularity}: expected three non-negative numbers (low, mid, high), not all zero"
                )
        if not 0 <= start < end <= 1:
            raise UserError(f"--image-start {start} --image-end {end}: expected 0 <= start < end <= 1")

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
            "output: the picture is not finite although all weights are; try --dtype float32, a lower --guidance or --image-scale"
        )


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def encode_text(t5, clip, t5_params, clip_params, t5_ids, clip_ids) -> TextCondition:
    """T5 states and CLIP's pooled vector of token ids `[b, t]`, `[b, 77]`."""
    states = COMPONENTS["t5"].module(t5).apply({"params": t5_params}, t5_ids)
    _, pooled = COMPONENTS["clip_text"].module(clip).apply({"params": clip_params}, clip_ids)
    return TextCondition(states, pooled)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def make_image_prompt(
    vision, config: DynaIPConfig, vision_params, params, pixels, options
) -> tuple[ImagePrompt, jax.Array]:
    """CLIP features of `pixels` `[b, s, size, size, 3]`, then the adapter: `ImagePrompt` and routing weights `[b, s, 3]`."""
    b, s = pixels.shape[:2]
    clip = COMPONENTS["clip_vision"].module(vision)
    features, _ = clip.apply(
        {"params": vision_params}, pixels.reshape(b * s, *pixels.shape[2:]), layers=config.hmoe.levels
    )
    features = [f.reshape(b, s, *f.shape[1:]) for f in features]
    adapter: Any = DynaIP(config)
    return adapter.apply({"params": params}, features, **options)


def denoising_loop(
    config: FluxConfig,
    params: Any,
    noise: jax.Array,
    text: TextCondition,
    image_prompt: ImagePrompt | None,
    times: jax.Array,
    *,
    guidance: jax.Array | None,
    true_cfg: jax.Array | None,
    window: jax.Array,
    cache_threshold: jax.Array | None = None,
    reporting: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The whole denoising loop: noise `[b, c, h, w]` -> latents `[b, c, h, w]`, float32, and with a cache the number of steps that
    took the blocks' work from it.

    `text`: a row (the prompt), or two (prompt, negative prompt) with `true_cfg`: v = v_neg + true_cfg (v - v_neg), where the
    negative pass has no image prompt; either for all pictures, or b rows of each for a prompt a picture. `image_prompt` is
    shared by all of the batch, or one a picture; it acts where window[0] <= step / steps < window[1].
    `times` `[steps + 1]` as from `flow.schedule`. `cache_threshold`: see `models.flux.StepCache`; None: every step runs all blocks.
    """
    b, _, h, w = noise.shape
    branches = 1 if true_cfg is None else 2
    states, pooled = (jnp.repeat(x, branches * b // len(x), axis=0) for x in text)
    if image_prompt is not None and branches == 2:
        on = jnp.repeat(jnp.array([1.0, 0.0]), b)[:, None]
        image_prompt = image_prompt.tiled(branches).scaled(on)
    model: Any = transformer_model(config)
    fixed = dict(
        img_ids=jnp.asarray(ops.image_ids(h, w)),
        txt=states,
        txt_ids=jnp.zeros((1, states.shape[1], 3)),
        pooled=pooled,
        guidance=None if guidance is None else jnp.broadcast_to(guidance, (branches * b,)),
    )

    cache = None
    if cache_threshold is not None:
        cache = StepCache.empty(config, branches * b, h // 2 * (w // 2), cache_threshold)

    def velocity(x, t, done, cache):
        prompt = image_prompt
        if prompt is not None:
            prompt = prompt.scaled(((window[0] <= done) & (done < window[1])).astype(jnp.float32))
        rows = jnp.concatenate([x] * branches)
        v = model.apply(
            {"params": params}, rows, timesteps=jnp.full(branches * b, t), image_prompt=prompt, cache=cache, **fixed
        )
        if cache is not None:
            v, cache = v
        if reporting:
            jax.debug.callback(_step_done)
        return v if true_cfg is None else v[b:] + true_cfg * (v[:b] - v[b:]), cache

    latents, cache = flow.euler(velocity, ops.pack_latents(noise), times, cache)
    return ops.unpack_latents(latents, h, w), None if cache is None else cache.reused


denoise = jax.jit(denoising_loop, static_argnums=0, static_argnames="reporting")


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def decode(config, params, latents: jax.Array) -> jax.Array:
    """Latents `[b, c, h, w]` -> pictures `[b, H, W, 3]`, about [-1, 1]."""
    return COMPONENTS["vae"].module(config).apply({"params": params}, latents, method="decode")


def _adapter_config(path, bundle: Bundle, configs: dict, any_base: bool, dtype) -> DynaIPConfig:
    """The adapter's config, checked against the base and its CLIP."""
    manifest = read_adapter_manifest(path, base=bundle, any_base=any_base)
    try:
        stored = manifest["config"]
        hmoe = stored["hmoe"] | dict(dtype=dtype, param_dtype=dtype)
        config = DynaIPConfig(**stored | dict(hmoe=hmoe, dtype=dtype, param_dtype=dtype))
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"--adapter {path}: config in adapter.json: {e}; export the adapter again") from e
    vision, base = configs["clip_vision"], configs["transformer"]
    if vision.hidden_size != config.hmoe.clip_width or max(config.hmoe.levels) > vision.num_hidden_layers:
        raise UserError(
            f"--adapter {path}: needs a CLIP of width {config.hmoe.clip_width} with layers {config.hmoe.levels}"
            f"{' (openai/clip-vit-large-patch14)' if config.hmoe.clip_width == 1024 else ''}; the model's has width "
            f"{vision.hidden_size} and {vision.num_hidden_layers} layers; convert the model again with that --clip-vision"
        )
    for name in ("depth", "depth_single_blocks", "num_heads", "head_dim"):
        if getattr(config, name) != getattr(base, name):
            raise UserError(
                f"--adapter {path}: made for {name} {getattr(config, name)}; the model has {getattr(base, name)}; use its own base"
            )
    return config


def _check_widths(bundle: Bundle, configs: dict) -> None:
    transformer = configs["transformer"]
    for what, needed, found in (
        ("t5 width", transformer.context_in_dim, configs["t5"].d_model),
        ("clip_text width", transformer.vec_in_dim, configs["clip_text"].hidden_size),
        ("vae latent channels x 4", transformer.in_channels, 4 * configs["vae"].z_channels),
    ):
        if needed != found:
            raise UserError(
                f"{bundle.path}: {what} is {found}, the transformer takes {needed}; convert parts that belong together"
            )


def _check_regions(references, masks, words: list[str], regions: str | None) -> str:
    """ "auto" or "none", as asked for or by default."""
    if regions not in (None, "auto", "none"):
        raise UserError(f"--regions {regions}: expected auto or none")
    if words and len(words) != len(references):
        raise UserError(
            f"--subject: words for {len(words)} subjects and {len(references)} references; give one a reference, or none"
        )
    regions = regions or ("auto" if any(words) else "none")
    if regions == "auto" and references and not masks and not (words and all(words)):
        raise UserError(
            f"--regions auto: {sum(map(bool, words))} of {len(references)} references have words of the prompt; give each its "
            "own with --subject IMG=WORDS, or pass --mask or --regions none"
        )
    return regions


def _true_cfg(negative: str | None, scale: float | None, usual: float | None) -> tuple[str | None, float | None]:
    """The negative prompt and its scale, None without a second pass. `usual`: the scale that the base asks for, if any."""
    if negative is None and usual is None and scale is not None:
        raise UserError(
            f"--true-cfg {scale}: needs something to steer away from; pass --negative-prompt (it may be empty)"
        )
    if scale is None:
        scale = usual if usual is not None else None if negative is None else TRUE_CFG
    if scale is None or (scale == 1 and negative is None):
        return None, None
    return negative or "", scale


def _initial_noise(noise, seed, num_images, latent: tuple[int, int, int]) -> tuple[np.ndarray, list[int] | None]:
    if noise is not None:
        if seed is not None or num_images is not None:
            raise UserError("--noise: it fixes what --seed and --num-images would choose; pass either")
        noise = np.asarray(noise)
        if noise.ndim != 4 or noise.shape[1:] != latent or noise.shape[0] < 1 or noise.dtype.kind != "f":
            expected = f"[b, {', '.join(map(str, latent))}]"
            raise UserError(
                f"--noise: found {noise.dtype} {list(noise.shape)}; expected floats {expected} for this size of picture"
            )
        if not np.isfinite(noise).all():
            raise UserError("--noise: holds NaN or infinity; expected finite numbers")
        return noise.astype(np.float32), None
    num_images = 1 if num_images is None else num_images
    if num_images < 1:
        raise UserError(f"--num-images {num_images}: expected at least 1")
    seeds = [(0 if seed is None else seed) + k for k in range(num_images)]
    if not 0 <= seeds[0] <= seeds[-1] < 2**32:
        raise UserError(f"--seed {seeds[0]}: expected a number from 0 to {2**32 - num_images}")
    return np.stack([np.asarray(jax.random.normal(jax.random.key(s), latent)) for s in seeds]), seeds


def _rgb(picture: Picture) -> np.ndarray:
    """uint8 `[H, W, 3]` from a path, PIL image or array."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    return picture if isinstance(picture, np.ndarray) else images.load_image(picture)


def _mask(mask: str | Path | np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 `[height, width]` in [0, 1] from a file or such an array."""
    if not isinstance(mask, np.ndarray):
        return images.load_mask(mask, height, width)
    if mask.shape != (height, width):
        raise UserError(
            f"masks: an array of shape {list(mask.shape)}; expected [{height}, {width}], the picture's size"
        )
    return mask.astype(np.float32)


_bars: list[Any] = []  # the compiled loop calls `_step_done`; a bar is here only while a caller watches


def _step_done() -> None:
    if _bars:
        _bars[-1].update()


class _progress_bar:
    """Shows a bar over `steps` for the time of the block if `show`; the value of the block says whether it does."""

    def __init__(self, steps: int, show: bool):
        self.steps, self.show = steps, show

    def __enter__(self) -> bool:
        if self.show:
            from tqdm import tqdm

            _bars.append(tqdm(total=self.steps, desc="denoising", unit="step"))
        return self.show

    def __exit__(self, *error) -> None:
        if self.show:
            jax.effects_barrier()
            _bars.pop().close()
