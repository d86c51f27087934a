"""What a backbone family is to the rest of the house: one object says its components, geometry, text, velocity and schedule.

Pipeline, trainer, planner, evaluator, quantizer, exporter and the converter's front door speak to `Family` alone. A new family is a
file in `models/`, one beside this, its presets, its converter table: nothing else changes.
Axis letters as in `dynaip_jax.types`; h, w latent pixels; H, W picture pixels.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dynaip_jax import flow
from dynaip_jax.errors import UserError, reason
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.layers.basic import SEEN, shapes_of
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import Injection, Seen
from dynaip_jax.layers.step_cache import StepCache
from dynaip_jax.models.siglip import SiglipVision, SiglipVisionConfig
from dynaip_jax.public_names import PublicNames
from dynaip_jax.runtime import shapes
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import from_dict
from dynaip_jax.types import ImagePrompt, Sites, TextCondition

REFERENCE_ENCODER = "clip_vision"
SIGLIP = "siglip"  # the encoder of reference pictures that some adapters of others read in its place
FLOAT32 = Compute(dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"))


class Component(NamedTuple):
    """A network by its config class and module class; `options`: what `init` needs besides the arrays of `inputs_spec`."""

    config: Any
    module: Any
    options: Callable[[Any], dict[str, Any]] = lambda config: {}

    def init(self, network: Any, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of a `network` of this component, each in the box that holds its logical axis names."""
        config = network.config
        inputs = {k: jnp.zeros(v.shape, v.dtype) for k, v in self.module.inputs_spec(config).items()}
        return network.init(key, **inputs, **self.options(config))["params"]

    def abstract(self, config: Any) -> dict[str, Any]:
        """The nested tree of shapes and dtypes of its parameters at the sizes of `config`, float32, nothing allocated."""
        return nn.meta.unbox(_abstract_boxed(self, self.module(config)))


@lru_cache(maxsize=64)
def _abstract_boxed(component: Component, network: Any) -> dict[str, Any]:
    """Kept: to find the shapes of a network's parameters is to trace all of it."""
    return shapes.kept(shapes.named(network), lambda: shapes_of(lambda: component.init(network, jax.random.key(0))))


class Matrices(NamedTuple):
    """Parameters whose path matches `pattern`, as matrices: axes that go in and axes that come out; the others count matrices."""

    pattern: str
    into: tuple[int, ...]
    out: tuple[int, ...]


class Preset(NamedTuple):
    """A published model: the configs of its components, and what else `bundle.json` says of it."""

    configs: Mapping[str, Any]
    schedule: Mapping[str, Any]
    text: Mapping[str, int]
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Family(abc.ABC):
    """A backbone family at given sizes: hashable, so that compiled functions take it as a static argument.

    `configs`, `computes`: by component, as items; `text`: token lengths by encoder, as items of `bundle.json`'s "text".
    """

    name: ClassVar[str]  # in bundle.json and adapter.json
    components: ClassVar[Mapping[str, Component]]
    text_encoders: ClassVar[tuple[str, ...]]
    exact: ClassVar[tuple[str, ...]] = ("vae",)  # computed in float32 whatever is asked for
    blocks: ClassVar[tuple[str, ...]]  # names of the transformer's stacks of blocks
    matrices: ClassVar[tuple[Matrices, ...]]  # of the transformer; the first match wins
    presets: ClassVar[Mapping[str, Callable[[], Preset]]]  # published sizes by bundle name
    other_encoders: ClassVar[Mapping[str, Component]] = {SIGLIP: Component(SiglipVisionConfig, SiglipVision)}
    reads_pictures: ClassVar[bool] = False  # whether the transformer reads reference pictures by itself

    configs: tuple[tuple[str, Any], ...]
    computes: tuple[tuple[str, Compute], ...]
    schedule: ScheduleConfig
    text: tuple[tuple[str, int], ...]
    injection: Injection = Injection()

    @classmethod
    def of(
        cls, bundle: Bundle, compute: Compute = Compute(), *, reference: bool = True, encoder: str = REFERENCE_ENCODER
    ) -> Family:
        """The family of a `bundle`, its networks computed as `compute` says; `reference`: with the `encoder` of reference pictures.

        Raises `UserError` for configs that are missing, wrong or do not belong together.
        """
        names = [name for name in cls.components if name != REFERENCE_ENCODER] + ([encoder] if reference else [])
        known = {**cls.components, **cls.other_encoders}
        configs = {name: bundle.config(name, known[name].config) for name in names}
        plain = Compute(dtype=compute.dtype, param_dtype=compute.param_dtype)
        computes = {name: FLOAT32 if name in cls.exact else plain for name in names} | dict(transformer=compute)
        text = bundle.manifest["text"]
        try:
            schedule = from_dict(ScheduleConfig, bundle.manifest["schedule"])
        except (TypeError, ValueError) as e:
            raise UserError(f"{bundle.path}: schedule in bundle.json: {reason(e)}; convert the model again") from e
        family = cls(tuple(configs.items()), tuple(computes.items()), schedule, tuple(text.items()))
        family.check(bundle.path)
        needed = {"steps", "height", "width"} | ({"guidance"} if family.takes_guidance else set())
        if missing := needed - bundle.manifest["defaults"].keys():
            raise UserError(f"{bundle.path}: defaults in bundle.json lack {min(missing)}; convert the model again")
        return family

    # --- its networks

    def config(self, name: str) -> Any:
        """The architecture of a component."""
        return dict(self.configs)[name]

    def compute(self, name: str) -> Compute:
        """How a component is computed."""
        return dict(self.computes)[name]

    def component(self, name: str) -> Component:
        """The classes of a component."""
        return self.other_encoders[name] if name in self.other_encoders else self.components[name]

    @property
    def encoder(self) -> str:
        """The component that reads reference pictures."""
        return SIGLIP if SIGLIP in dict(self.configs) else REFERENCE_ENCODER

    def module(self, name: str) -> Any:
        """The network of a component, which takes parameters in full precision."""
        wiring = (self.injection,) if name == "transformer" else ()
        return self.component(name).module(self.config(name), self.compute(name), *wiring)

    def init_params(self, name: str, key: jax.Array, *, boxed: bool = False) -> dict[str, Any]:
        """Freshly initialised parameters of a component; `boxed` leaves each in the box that holds its logical axis names."""
        params = self.component(name).init(self.module(name), key)
        return params if boxed else nn.meta.unbox(params)

    def abstract_params(self, name: str, *, boxed: bool = False) -> dict[str, Any]:
        """The nested tree of shapes and dtypes of a component's parameters, nothing allocated; `boxed`: see `init_params`."""
        parameters = _abstract_boxed(self.component(name), self.module(name))
        return jax.tree.map(lambda x: x, parameters) if boxed else nn.meta.unbox(parameters)

    def with_compute(self, name: str, **changes: Any) -> Family:
        """The same, with a component computed otherwise."""
        computes = dict(self.computes)
        computes[name] = dataclasses.replace(computes[name], **changes)
        return dataclasses.replace(self, computes=tuple(computes.items()))

    def with_injection(self, injection: Injection) -> Family:
        """The same, for an adapter whose term is computed as `injection` says."""
        return dataclasses.replace(self, injection=injection)

    @abc.abstractmethod
    def check(self, where: Any) -> None:
        """Raises `UserError`, naming `where`, if the components do not belong together."""

    def public_names(self) -> PublicNames:
        """The names that its weights have in public files, such as LoRAs. Raises `UserError` where they are not known."""
        raise UserError(f"`loras`: layers of the family {self.name!r} have no known names in LoRAs; leave them out")

    # --- text

    @abc.abstractmethod
    def load_tokenizers(self, folder: Path) -> Tokenizers:
        """The tokenizers of a bundle, in `folder`."""

    @abc.abstractmethod
    def text_ids_spec(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids, int32 `[b, t]`, by text encoder."""

    @property
    @abc.abstractmethod
    def text_rows(self) -> int:
        """Rows of a prompt in the transformer."""

    @abc.abstractmethod
    def encode_text(self, params: Mapping[str, Any], ids: Mapping[str, Any]) -> TextCondition:
        """The text condition of token ids; `params`: by text encoder."""

    # --- pictures and latents

    @property
    def downsample(self) -> int:
        """Picture pixels a side per latent pixel."""
        return self.config("vae").downsample

    @property
    def multiple(self) -> int:
        """Picture pixels a side per token: heights and widths are multiples of it."""
        return 2 * self.downsample

    def latent(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(c, h, w)` of the latents of a picture of `height` x `width` pixels."""
        return self.config("vae").z_channels, height // self.downsample, width // self.downsample

    def tokens(self, latent: tuple[int, ...]) -> int:
        """Image tokens of latents of shape `(..., h, w)`."""
        return (latent[-2] // 2) * (latent[-1] // 2)

    @abc.abstractmethod
    def pack(self, latents: jax.Array) -> jax.Array:
        """Latents `[b, c, h, w]` -> tokens `[b, i, channels]`."""

    @abc.abstractmethod
    def unpack(self, tokens: jax.Array, height: int, width: int) -> jax.Array:
        """The inverse of `pack`; sizes in latent pixels."""

    def encode(self, params: Any, pictures: ArrayLike) -> jax.Array:
        """Pictures `[b, H, W, 3]` in [-1, 1] -> what the autoencoder says of their latents, moments `[b, h, w, 2c]`."""
        return self.module("vae").apply({"params": params}, pictures, method="encode")

    def latents(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Scaled latents `[b, c, h, w]` from moments: their mean, or with `noise` a draw."""
        return self.module("vae").apply({}, moments, noise, method="latents")

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Latents `[b, c, h, w]` -> pictures `[b, H, W, 3]`, about [-1, 1]."""
        return self.module("vae").apply({"params": params}, latents, method="decode")

    # --- reference pictures

    def vision(self, params: Any, pixels: ArrayLike, levels: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """CLIP's hidden states `levels`, each `[b, m, c]`, of `pixels` `[b, S, S, 3]`."""
        states, _ = self.module("clip_vision").apply({"params": params}, pixels, layers=levels)
        return states

    def reference_ids(self, number: int, height: int, width: int) -> np.ndarray:
        """Positions `[1, r, axes]` of the tokens of the `number`-th picture that the transformer reads by itself, counted from 0; sizes
        in latent pixels. Only where `reads_pictures`: others refuse pictures by it."""
        raise NotImplementedError

    def pooled_vision(self, params: Any, pixels: ArrayLike) -> jax.Array:
        """The pooled state `[b, c]` of the `encoder` for `pixels` `[b, S, S, 3]`: CLIP's after its last norm and before any
        projection, SigLIP's after its head."""
        if self.encoder == SIGLIP:
            return self.module(SIGLIP).apply({"params": params}, pixels)
        last = self.config("clip_vision").num_hidden_layers
        _, pooled = self.module("clip_vision").apply({"params": params}, pixels, layers=(last,))
        return pooled

    # --- the transformer

    @property
    @abc.abstractmethod
    def takes_guidance(self) -> bool:
        """Whether guidance is an input of the transformer."""

    @property
    @abc.abstractmethod
    def sites(self) -> Sites:
        """Where it can read an image prompt."""

    @abc.abstractmethod
    def velocity(
        self,
        params: Any,
        tokens: jax.Array,
        t: jax.Array,
        text: TextCondition,
        size: tuple[int, int],
        *,
        guidance: jax.Array | None = None,
        image_prompt: ImagePrompt | None = None,
        cache: StepCache | None = None,
        mutable: Any = False,
    ) -> Any:
        """The velocity `[b, i, c]`, float32, of noisy `tokens` `[b, i, c]` at times `t` `[b]`; with a cache, that and the next cache.
        With `mutable` collections (`SEEN`), all that and what blocks kept in them.

        `params`: of the transformer, in the form of its `Compute.weights`; `size`: of the latents, `(h, w)`; `guidance` `[b]` where
        `takes_guidance`, otherwise None.
        """

    def seen(self, params: Any, *inputs: Any, **named: Any) -> dict[str, Seen]:
        """What the blocks' injections saw in a call of `velocity`, whose arguments these are, without a cache: by the name of a stack of
        blocks, each array with a leading axis of blocks. Stacks that read no image prompt are left out."""
        _, state = self.velocity(params, *inputs, **named, mutable=[SEEN])
        return {name: state[SEEN][name]["injection"][0] for name in self.blocks if name in state.get(SEEN, {})}

    def step_cache(self, batch: int, image_rows: int, threshold: jax.Array) -> StepCache:
        """The cache before the first step."""
        return StepCache.empty((batch, image_rows, self.sites.width), self.compute("transformer").dtype, threshold)

    @abc.abstractmethod
    def fresh(self, params: Any) -> Any:
        """Random parameters of a transformer as training from scratch starts with them: its velocity is 0."""

    @abc.abstractmethod
    def forward_flops(self, image_rows: int, text_rows: int) -> int:
        """FLOPs of one forward pass of the transformer on one sample. Counts matrix products and attention at two FLOPs per
        multiply-add; ignores norms and activations."""

    # --- schedule

    def times(self, steps: int, tokens: int) -> np.ndarray:
        """Sampling times `[steps + 1]`, float32, from 1 down to 0, for a picture of `tokens` image tokens."""
        return flow.schedule(steps, tokens, self.schedule)

    def shift(self, tokens: int) -> float:
        """The factor by which training times are shifted, as the sampler's are."""
        return self.schedule.factor(tokens)
