"""Models as their folders describe them: opened and checked at once, read later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynaip_jax import choices, reading
from dynaip_jax.adapters.base import AdapterConfig
from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.adapters.ip_adapter import IPAdapterConfig, abstract_ip_adapter_params
from dynaip_jax.errors import OutOfMemory, UserError, reason
from dynaip_jax.families.base import REFERENCE_ENCODER, Family
from dynaip_jax.families.quantize import quantized, weights_model
from dynaip_jax.families.registry import family_of, open_bundle
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime import memory
from dynaip_jax.runtime.sharding import MeshConfig, abstract, make_mesh, on_host, on_one_device
from dynaip_jax.sampling.conditions import CLIP_PROJECTION
from dynaip_jax.sampling.loras import Given, LoRA, merged, read_loras, record
from dynaip_jax.sampling.public_adapters import PublicFile, clip_projection
from dynaip_jax.sampling.settings import made_with
from dynaip_jax.storage.adapter import read_adapter_manifest, read_adapter_weights
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import from_dict
from dynaip_jax.storage.folders import as_path


class Described(NamedTuple):
    """A base model and the config of an adapter for it, without weights: all that a call is checked against."""

    bundle: Bundle
    family: Family
    tokenizers: Tokenizers
    adapter: AdapterConfig | None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What options stand for that are left out."""
        return MappingProxyType(self.bundle.manifest["defaults"])


class Opened(NamedTuple):
    """A model whose weights are still to be read: the `folder` or file of its adapter, and where they are to be. `settings`: what those of
    pictures say of it, as JSON holds them; `loras`: what is merged into its weights."""

    model: Described
    folder: str | Path | None
    mesh: Mesh | None
    offload_text: bool
    verify: bool
    settings: Mapping[str, Any] = MappingProxyType({})
    loras: tuple[LoRA, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Lines worth showing of what it is loaded from."""
        return [note for lora in self.loras for note in lora.notes]

    def read(self) -> tuple[dict[str, Any], Any]:
        """The parameters of every component, and the adapter's (None without one). Raises `UserError` for files that are damaged or
        of other sizes, and if the memory does not hold them."""
        try:
            with memory.watched():
                params = self._components()
                if self.folder is None or self.model.adapter is None:
                    return params, None
                return params, self._adapter(self.folder, self.model.adapter)
        except OutOfMemory as e:
            raise UserError(
                f"{self.model.bundle.path}: its weights do not fit into memory ({e}); {self.remedies()}"
            ) from e

    def read_encoder(self) -> tuple[Any, Any]:
        """The parameters of CLIP's image encoder and of the adapter alone. Raises `UserError` as `read`."""
        assert self.folder is not None and self.model.adapter is not None, "opened without an adapter"
        target = self._target(self.model.family.abstract_params(REFERENCE_ENCODER, boxed=True))
        vision = self.model.bundle.load(REFERENCE_ENCODER, target, verify=self.verify)
        return vision, self._adapter(self.folder, self.model.adapter)

    def remedies(self) -> str:
        """What makes weights smaller or shares them, of what is not done yet."""
        return remedies(self.model.family, self.offload_text)

    def _adapter(self, path: str | Path, config: AdapterConfig) -> dict[str, Any]:
        compute = self.model.family.compute(self.model.family.encoder)
        if isinstance(config, DynaIPConfig):
            boxed = abstract_adapter_params(config, compute, boxed=True)
            return read_adapter_weights(path, self._target(boxed), verify=self.verify)
        target = self._target(abstract_ip_adapter_params(config, compute))
        params = {"adapter": PublicFile.open(path).read(config, target)}
        if not isinstance(config, IPAdapterConfig):
            return params
        bundle, sizes = self.model.bundle, clip_projection(self.model.bundle)
        matrix = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(sizes, compute.param_dtype), names=("embed", None))
        projection = bundle.load(CLIP_PROJECTION, self._target({"kernel": matrix}), verify=self.verify)
        return params | {CLIP_PROJECTION: projection}

    def _components(self) -> dict[str, Any]:
        family, bundle = self.model.family, self.model.bundle
        in_host = {family.text_encoders[0]} if self.offload_text else set()
        if family.compute("transformer").weights != "full":
            in_host.add("transformer")  # until its weights are rounded, one after the other
        params = {}
        for name, _ in family.configs:
            target = self._target(family.abstract_params(name, boxed=True))
            target = on_host(target) if name in in_host else target
            params[name] = merged(family, name, bundle.load(name, target, verify=self.verify), self.loras)
        params["transformer"] = quantized(family, params["transformer"])
        return params

    def _target(self, boxed: Any) -> Any:
        return on_one_device(nn.meta.unbox(boxed)) if self.mesh is None else abstract(boxed, self.mesh)


def open_model(
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
) -> Opened:
    """Opens a bundle and, if given, an adapter made for it; see `DynaIPPipeline.load`. Reads no weights.

    Raises `UserError` if anything but the weights is not what it should be or does not fit together.
    """
    if any_base and adapter is None:
        raise UserError("`any_base`: no adapter to accept; pass `adapter`, or leave it out")
    opened = open_bundle(bundle)
    for name, value, allowed in (
        ("dtype", dtype, (None, *choices.DTYPES)),
        ("attention", attention, choices.KERNELS),
        ("weights", weights, choices.WEIGHTS),
        ("any_base", any_base, (False, True)),
        ("offload_text", offload_text, (False, True)),
        ("verify", verify, (False, True)),
    ):
        if not isinstance(value, (str, bool, type(None))) or value not in allowed:
            raise UserError(f"`{name}` {value}: expected one of {', '.join(str(x) for x in allowed if x is not None)}")
    if not isinstance(mesh, (MeshConfig, type(None))):
        raise UserError(f"`mesh` {mesh}: expected a MeshConfig, such as parse_mesh makes of data=2,fsdp=4")
    if not verify:
        warnings.warn(f"{bundle}: files are not compared with their checksums (verify=False)", stacklevel=3)
    kind = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    compute = Compute(dtype=kind, param_dtype=kind, attention=attention, weights=weights)
    public = PublicFile.open(adapter) if adapter is not None and reading.is_file(as_path(adapter)) else None
    encoder = REFERENCE_ENCODER if public is None else public.kind.encoder
    family = family_of(opened, compute, reference=adapter is not None, encoder=encoder)
    weights_model(family)  # if it needs qwix and that is not here, says so before anything is read
    config: AdapterConfig | None = None
    if public is not None:
        if any_base:
            raise UserError("`any_base`: the `adapter` is a file that belongs to no one base; leave it out")
        config = public.config(opened, family)
    elif adapter is not None:
        config = read_adapter_config(adapter, opened, family, any_base)
    if config is not None:
        family = family.with_injection(config.injection)
    grid = None if mesh is None else make_mesh(mesh)
    tokenizers = family.load_tokenizers(opened.part("tokenizers", verify=verify))
    merging = tuple(read_loras(loras, family))
    loaded = made_with(opened, adapter, compute, any_base=any_base, mesh=grid) | record(merging)
    model = Described(opened, family, tokenizers, config)
    return Opened(model, adapter, grid, offload_text, verify, loaded, merging)


def remedies(family: Family, offloaded: bool) -> str:
    """What makes weights smaller or shares them, of what is not done yet."""
    ways = [] if family.compute("transformer").weights != "full" else ["`weights` int8"]
    ways += [] if offloaded else ["`offload_text`"]
    return f"try {', '.join([*ways, 'or more devices'])} with `mesh`"


def read_adapter_config(path: str | Path, bundle: Bundle, family: Family, any_base: bool) -> DynaIPConfig:
    """The config of the adapter in a folder. Raises `UserError` if it was made for another base or another CLIP."""
    manifest = read_adapter_manifest(path, base=bundle, any_base=any_base)
    try:
        config = from_dict(DynaIPConfig, manifest["config"])
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"`adapter` {path}: config in adapter.json: {reason(e)}; export the adapter again") from e
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
