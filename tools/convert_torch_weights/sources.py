"""What checkpoints hold: component by component, found by the `Layout` of a backbone family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.families.tokenizers import check_tokenizer
from dynaip_jax.storage.bundle import Bundle
from tools.convert_torch_weights import clip, clip_files, siglip
from tools.convert_torch_weights.opening import SHARD, SUFFIXES, in_folder, open_weights
from tools.convert_torch_weights.selection import shapes_of, unprefixed


class Source(NamedTuple):
    """One component: its config, its tensors, the files they lie in, and how to convert them."""

    config: Any
    tensors: Mapping[str, Any]
    files: list[Path]
    convert: Callable[..., dict[str, Any]]


class Sources(NamedTuple):
    """Components by name, tokenizers by the name they have in a bundle, and diffusers' scheduler config, if any."""

    components: dict[str, Source]
    tokenizers: dict[str, Path]
    scheduler: dict[str, Any] | None

    def joined(self, later: Sources) -> Sources:
        """Both; what `later` has too replaces what is here."""
        return Sources(
            self.components | later.components, self.tokenizers | later.tokenizers, later.scheduler or self.scheduler
        )


class Folder(NamedTuple):
    """Where a component lies in a diffusers folder, and how its config and its weights (`stem`.safetensors) are read. `kinds`: what
    its `config.json` calls it (_class_name or model_type)."""

    name: str
    config: Callable[[dict[str, Any]], Any]
    convert: Callable[..., dict[str, Any]]
    stem: str
    kinds: tuple[str, ...] = ()


class Layout(NamedTuple):
    """How the checkpoints of a backbone family lie on disk.

    `pipelines`: class names in `model_index.json`; `folders`: by component; `tokenizers`: name in a bundle -> folder; `own`: whether
    a file is of this family and of no other, by the shapes of its tensors; `single`: the components of a file (its tensors, its files), a `UserError` if it is none; `manifest`: "schedule", "text" and "defaults" of
    `bundle.json` from what was found and a text length; `back`: writes a bundle as "diffusers" or "bfl" into a folder, which then
    holds one of the files `marks`, and tells of each component; `refused`: class names in `model_index.json` -> what they are, of
    relatives that are not known here.
    """

    family: str
    pipelines: tuple[str, ...]
    folders: Mapping[str, Folder]
    tokenizers: Mapping[str, str]
    own: Callable[[Mapping[str, tuple[int, ...]]], bool]
    single: Callable[[Mapping[str, Any], list[Path]], dict[str, Source]]
    manifest: Callable[[Sources, int | None], dict[str, Any]]
    back: Callable[[Bundle, str, Path, Callable[[str], object]], None] | None = None
    marks: tuple[str, ...] = ()
    refused: Mapping[str, str] = MappingProxyType({})


def read(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """What a folder or a file holds, and the layout that it has."""
    if not reading.is_dir(path):
        return single_file(path, layouts)
    path = snapshot(path)
    if reading.is_file(path / "model_index.json"):
        return diffusers_folder(path, layouts)
    if reading.is_file(path / "config.json"):
        return component_folder(path, layouts)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    firsts = [f for f in files if not (shard := SHARD.fullmatch(f.name)) or int(shard["number"]) == 1]
    if not firsts:
        raise UserError(
            f"{path / 'model_index.json'}: missing; expected a diffusers folder, one of its components, or files of weights; check the path"
        )
    layout, sources = layouts[0], Sources({}, {}, None)
    for file in firsts:
        layout, more = single_file(file, layouts)
        if both := sources.components.keys() & more.components.keys():
            raise UserError(
                f"`source` {path}: holds two files of the {min(both)}; expected one; pass the file that is meant"
            )
        sources = sources.joined(more)
    return layout, sources


def snapshot(path: Path) -> Path:
    """The folder of a revision in the hub's cache of a model, if `path` is such a cache, else `path`. Raises `UserError` if it holds
    several and does not say which is meant."""
    if not reading.is_dir(path / "snapshots"):
        return path
    found = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
    main = path / "refs" / "main"
    if reading.is_file(main):
        name = main.read_text(errors="replace").strip()[:100]
        found = [p for p in found if p.name == name] or found
    if len(found) != 1:
        raise UserError(
            f"`source` {path}: a cache of {len(found)} revisions; expected one; pass the folder of the one that is meant, in snapshots/"
        )
    return found[0]


def diffusers_folder(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """A folder as `save_pretrained` of a pipeline writes it. Components whose folder is not there are left out."""
    kind = read_json(path / "model_index.json").get("_class_name")
    kind = kind if isinstance(kind, str) else None
    layout = next((layout for layout in layouts if kind in layout.pipelines), None)
    if what := next((w for layout in layouts for name, w in layout.refused.items() if name == kind), None):
        raise UserError(f"`source` {path}: {what}; use a checkpoint of another kind")
    if layout is None:
        expected = ", ".join(name for layout in layouts for name in layout.pipelines[:3])
        raise UserError(
            f"`source` {path}: unknown family {kind!r}; expected {expected} or another pipeline of these; use such a checkpoint"
        )
    components = {}
    for name, folder in layout.folders.items():
        if reading.exists(path / folder.name):
            components[name] = _in_folder(path / folder.name, folder)
    if not components:
        raise UserError(
            f"`source` {path}: holds none of {', '.join(layout.folders)}; expected one at least; download it again"
        )
    tokenizers = {}
    for name, theirs in layout.tokenizers.items():
        if reading.exists(path / theirs) or name in components:
            tokenizers[name] = _tokenizer(path / theirs)
    scheduler = path / "scheduler" / "scheduler_config.json"
    return layout, Sources(components, tokenizers, read_json(scheduler) if reading.exists(scheduler) else None)


def component_folder(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """A folder of one component, with its config: such as transformer/ of a diffusers folder, or a text encoder's own."""
    config = read_json(path / "config.json")
    kinds = [config.get(key) for key in ("_class_name", "model_type")]
    for layout in layouts:
        for name, folder in layout.folders.items():
            if any(kind in folder.kinds for kind in kinds if isinstance(kind, str)):
                return layout, Sources({name: _in_folder(path, folder)}, {}, None)
    shown = next((k for k in kinds if isinstance(k, str)), None)
    expected = ", ".join(kind for layout in layouts for folder in layout.folders.values() for kind in folder.kinds)
    raise UserError(
        f"{path / 'config.json'}: of a {shown!r}; expected one of {expected}; pass a folder of such a model"
    )


def _in_folder(path: Path, folder: Folder) -> Source:
    config = read_config(path, folder.config)
    tensors, files = tensors_of(path, folder.stem)
    return Source(config, tensors, files, folder.convert)


def _tokenizer(path: Path) -> Path:
    if not reading.is_dir(path):
        raise UserError(f"{path}: missing; expected a tokenizer; download the model again")
    check_tokenizer(path)
    return path


def tokenizers_in(path: Path, layout: Layout) -> dict[str, Path]:
    """The tokenizers in a diffusers folder, in a bundle, or in a folder of them under the names that they have in either."""
    path = snapshot(path) if reading.is_dir(path) else path
    found = {}
    for name, theirs in layout.tokenizers.items():
        places = (path / theirs, path / name, path / "tokenizers" / name)
        place = next((p for p in places if reading.is_dir(p)), None)
        if place is None:
            raise UserError(
                f"`tokenizers` {path}: has no {theirs} or {name}; expected both tokenizers; pass a diffusers folder"
            )
        found[name] = _tokenizer(place)
    return found


def single_file(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """The components in a file, or in the set that a shard is of; configs are read off the shapes."""
    opened = open_weights(path)
    shapes = shapes_of(opened.tensors)
    layout = next((layout for layout in layouts if layout.own(shapes)), layouts[0])
    try:
        return layout, Sources(layout.single(opened.tensors, opened.files), {}, None)
    except UserError as e:
        raise UserError(f"`source` {path}: {e.args[0]}") from e


def one_component(
    pick: Callable[[Mapping[str, tuple[int, ...]]], tuple[str, Any]], prefixes: tuple[str, ...]
) -> Callable[[Mapping[str, Any], list[Path]], dict[str, Source]]:
    """`single` of a layout whose files hold one component, in its makers' names: `pick` says which by the shapes, and its module
    (`layout_of`, `config_from_bfl`, `params_from_torch`)."""

    def single(tensors: Mapping[str, Any], files: list[Path]) -> dict[str, Source]:
        tensors = unprefixed(tensors, prefixes)
        shapes = shapes_of(tensors)
        name, module = pick(shapes)
        if module.layout_of(shapes) != "bfl":
            raise UserError(
                f"a diffusers {name} without its config; expected BFL's layout in a single file; pass the folder that holds model_index.json"
            )
        return {name: Source(module.config_from_bfl(shapes), tensors, files, module.params_from_torch)}

    return single


def clip_vision(path: Path) -> dict[str, Source]:
    """The vision tower in a folder or file of CLIP, and its projection if it is there; or SigLIP's tower."""
    if not reading.exists(path):
        raise UserError(
            f"`clip_vision` {path}: no such folder; expected a transformers CLIP folder (openai/clip-vit-large-patch14)"
        )
    if reading.is_dir(path):
        path = snapshot(path)
        tensors, files = tensors_of(path, "model")
    else:
        tensors, files = open_weights(path)
    shapes, described = shapes_of(tensors), reading.is_file(path / "config.json")
    if siglip.is_siglip(shapes):
        known = read_config(path, siglip.SiglipVisionConfig.from_hf) if described else siglip.config_from_shapes(shapes)
        return {"siglip": Source(known, tensors, files, siglip.params_from_torch)}
    if described:
        config = read_config(path, clip.CLIPVisionConfig.from_hf)
    else:
        _check_vision(path, shapes)
        config = _with_activation(path, clip_files.vision_config(shapes))
    found = {"clip_vision": Source(config, tensors, files, clip_files.vision_params)}
    if (projection := clip_files.projection_config(shapes)) is not None:
        found["clip_projection"] = Source(projection, tensors, files, clip_files.projection_params)
    return found


def _check_vision(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `UserError` for a file that is known to be no vision tower."""
    if not any(n.startswith((clip.VISION, "visual.")) or n.endswith("class_embedding") for n in shapes):
        raise UserError(
            f"`clip_vision` {path}: this is no vision tower; expected CLIP's (openai/clip-vit-large-patch14); pass that"
        )


def _with_activation(path: Path, config: Any) -> Any:
    """`config` with the activation that open_clip's own config, beside the weights, asks for."""
    folder = path if reading.is_dir(path) else path.parent
    if not reading.is_file(folder / "open_clip_config.json"):
        return config
    model = read_json(folder / "open_clip_config.json").get("model_cfg")
    quick = isinstance(model, Mapping) and model.get("quick_gelu") is True
    return dataclasses.replace(config, hidden_act="quick_gelu" if quick else "gelu")


def tensors_of(folder: Path, stem: str) -> tuple[Mapping[str, Any], list[Path]]:
    """The tensors of a component's folder, in whatever files."""
    return in_folder(folder, stem)


def read_config(folder: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What `read` makes of a folder's `config.json`; errors name the file."""
    values = read_json(folder / "config.json")
    try:
        return read(values)
    except UserError as e:
        raise UserError(f"{folder / 'config.json'}: {e}") from e
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        what = f"{e.args[0]} is missing" if isinstance(e, KeyError) else reason(e)
        raise UserError(
            f"{folder / 'config.json'}: {what}; expected a config of this kind of model; download it again"
        ) from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint."""
    return reading.read_json(path, expected="it as save_pretrained writes it", remedy="download it again")
