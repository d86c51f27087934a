"""What a PNG file says of how its picture was made, and what draws it again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dynaip_jax import images, reading
from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.sampling.conditions import Subjects
from dynaip_jax.sampling.options import SampleOptions, reference_options
from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS, read_adapter_manifest
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.identity import identity
from dynaip_jax.version import __version__

ALWAYS = ("steps", "guidance", "height", "width")
LOADED = ("model", "adapter", "dtype", "weights", "attention", "any_base")  # not the mesh: that is the machine's


def made_with(
    bundle: Bundle, adapter: str | Path | None, compute: Compute, *, any_base: bool, mesh: Mesh | None
) -> dict[str, Any]:
    """The settings that all pictures of a loaded pipeline share: the program, the model and the adapter with what tells them from
    others, and how the transformer is computed (`compute`)."""
    found = None
    if adapter is not None:
        folder = as_path(adapter)
        with contextlib.suppress(OSError):  # whoever reads the weights says so
            if reading.is_file(folder):
                found = identity({}, folder)
            else:
                manifest = read_adapter_manifest(folder, base=bundle, any_base=any_base)
                found = identity(manifest, folder / ADAPTER_WEIGHTS)
    return dict(
        program=f"dynaip_jax {__version__}",
        model=str(bundle.path),
        base=bundle.fingerprint,
        model_fingerprint=identity(bundle.manifest),
        adapter=None if adapter is None else str(adapter),
        adapter_fingerprint=found,
        dtype=np.dtype(compute.dtype).name,
        weights=compute.weights,
        attention=compute.attention,
        any_base=any_base,
        mesh=None if mesh is None else ",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
    )


def record(
    prompt: str | Sequence[str],
    used: SampleOptions,
    subjects: Subjects,
    mode: str,
    noise: np.ndarray | None,
    *,
    routing: np.ndarray | None = None,
    reused: int | None = None,
) -> dict[str, Any]:
    """The settings that all pictures of a call share, as JSON holds them. `used`: options, filled; `mode`: where subjects may appear;
    `noise`: as it was given; `routing` `[s, 3]`; `reused`: steps from the cache."""
    settings: dict[str, Any] = dict(prompt=prompt if isinstance(prompt, str) else list(prompt))
    settings |= {name: getattr(used, name) for name in ALWAYS}
    if used.true_cfg is not None:
        settings |= dict(negative_prompt=used.negative_prompt, true_cfg=used.true_cfg)
    if reused is not None:
        settings |= dict(cache_threshold=used.cache_threshold, cached_steps=reused)
    if subjects.references:
        settings |= {name: getattr(used, name) for name in reference_options()}
        settings |= dict(words=list(subjects.words), regions=mode)
        settings |= dict(routing=None if routing is None else routing.round(4).tolist())
        settings |= dict(reference=list(subjects.reference_paths), mask=list(subjects.mask_paths))
        settings["reference_fingerprint"] = [images.digest(picture) for picture in subjects.references]
        settings["mask_fingerprint"] = [images.digest(mask.values) for mask in subjects.masks]
    if noise is not None:
        settings["noise_fingerprint"] = [images.digest(row) for row in noise]
    return settings


def replay(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The arguments that draw the picture of these settings again, by name: those of `SampleOptions`, of `DynaIPPipeline.load`
    (the bundle as "model", "lora"s as FILE=scale), and "prompt", "reference", "words", "mask", "native_reference", "noise", "noise_row",
    in lists where there may be several.

    `file`: what errors call them. Settings of older versions do for what they hold. Raises `UserError` for settings that
    are none, or of pictures that were in memory alone.
    """
    options = {f.name for f in dataclasses.fields(SampleOptions)} - {"seed", "num_images", "regions"}
    values = {name: settings[name] for name in (*LOADED, *sorted(options)) if settings.get(name) is not None}
    values |= _loras(settings, file)
    values["prompt"] = _texts(settings, "prompt", file)
    if not values["prompt"]:
        raise UserError(f"{file}: its settings name no prompt; expected a picture of dynaip sample; use another one")
    if "true_cfg" not in values:
        values["true_cfg"] = 1.0  # a model may ask for more by itself
    values |= _start(settings, len(values["prompt"]), file)
    references, masks, words = (_texts(settings, name, file) for name in ("reference", "mask", "words"))
    if natives := _texts(settings, "native_reference", file):
        values["native_reference"] = natives
    if references:
        values |= dict(reference=references, mask=masks, words=words)
        if settings.get("regions") in ("auto", "none"):
            values["regions"] = settings["regions"]
    if len(references) < 2:
        values.pop("merge", None)  # acts on several alone
    return values


def _loras(settings: Mapping[str, Any], file: str) -> dict[str, list[str]]:
    """The LoRAs that weights were merged with, each with its scale."""
    paths, scales = _texts(settings, "lora", file), settings.get("lora_scale", [])
    if not isinstance(scales, list) or len(scales) != len(paths) or not all(isinstance(x, int | float) for x in scales):
        raise UserError(f"{file}: `lora` without a scale each; expected the settings as they were written")
    return dict(lora=[f"{path}={scale}" for path, scale in zip(paths, scales, strict=True)]) if paths else {}


def _texts(settings: Mapping[str, Any], name: str, file: str) -> list[str]:
    """A text or several, as a list; empty if there are none."""
    value = settings.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if None in found:
        raise UserError(f"{file}: some `{name}` was in memory, not in a file; expected files; draw it from Python")
    if not all(isinstance(text, str) for text in found):
        raise UserError(f"{file}: `{name}` in its settings is no text; expected the settings as they were written")
    return found


def _start(settings: Mapping[str, Any], prompts: int, file: str) -> dict[str, Any]:
    """Seeds, or the noise in place of them."""
    seed = settings.get("seed")
    if isinstance(seed, list) and seed and all(isinstance(one, int) for one in seed):
        each = len(seed) // prompts
        if seed != [seed[0] + k for k in range(each)] * prompts:
            raise UserError(f"{file}: its seeds do not follow each other; expected the settings as they were written")
        return dict(seed=seed[0], num_images=each)
    if isinstance(seed, int):
        return dict(seed=seed)
    noise = settings.get("noise")
    if noise is None:
        raise UserError(f"{file}: made from noise in memory, not in a file; expected a file; draw it from Python")
    return dict(noise=noise) | {name: settings[name] for name in ("noise_row",) if name in settings}
