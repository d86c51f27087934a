"""What checkpoints hold: component by component, found by the `Layout` of a backbone family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.families.tokenizers import check_tokenizer
from dynaip_jax.storage.tensors import TensorFile
from tools.convert_torch_weights import clip


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
    """Where a component lies in a diffusers folder, and how its config and its weights (`stem`.safetensors) are read."""

    name: str
    config: Callable[[dict[str, Any]], Any]
    convert: Callable[..., dict[str, Any]]
    stem: str


class Layout(NamedTuple):
    """How the checkpoints of a backbone family lie on disk.

    `pipelines`: class names in `model_index.json`; `folders`: by component; `tokenizers`: name in a bundle -> folder; `own`: whether a
    single file is of this family, by the shapes of its tensors; `single`: the component of such a file, with its module (`layout_of`,
    `config_from_bfl`, `params_from_torch`); `manifest`: "schedule", "text" and "defaults" of `bundle.json` from what was found and a text length.
    """

    family: str
    pipelines: tuple[str, ...]
    folders: Mapping[str, Folder]
    tokenizers: Mapping[str, str]
    own: Callable[[Mapping[str, tuple[int, ...]]], bool]
    single: Callable[[Mapping[str, tuple[int, ...]]], tuple[str, Any]]
    manifest: Callable[[Sources, int | None], dict[str, Any]]


def read(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """What a diffusers folder or a single file holds, and the layout that it has."""
    return diffusers_folder(path, layouts) if reading.is_dir(path) else single_file(path, layouts)


def diffusers_folder(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """A folder as `save_pretrained` of a pipeline writes it."""
    kind = read_json(path / "model_index.json").get("_class_name")
    kind = kind if isinstance(kind, str) else None
    layout = next((layout for layout in layouts if kind in layout.pipelines), None)
    if layout is None:
        expected = ", ".join(name for layout in layouts for name in layout.pipelines)
        raise UserError(
            f"`source` {path}: unknown family {kind!r}; expected {expected}; use a checkpoint of such a kind"
        )
    components = {}
    for name, folder in layout.folders.items():
        tensors, files = tensors_of(path / folder.name, folder.stem)
        components[name] = Source(read_config(path / folder.name, folder.config), tensors, files, folder.convert)
    tokenizers = {name: path / folder for name, folder in layout.tokenizers.items()}
    for tokenizer in tokenizers.values():
        if not reading.is_dir(tokenizer):
            raise UserError(f"{tokenizer}: missing; expected a tokenizer; download the model again")
        check_tokenizer(tokenizer)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    return layout, Sources(components, tokenizers, scheduler)


def single_file(path: Path, layouts: tuple[Layout, ...]) -> tuple[Layout, Sources]:
    """One component in its makers' own layout; the config is read off the shapes."""
    file = TensorFile(path)
    shapes = {n: file.shape(n) for n in file}
    layout = next((layout for layout in layouts if layout.own(shapes)), layouts[0])
    name, module = layout.single(shapes)
    if module.layout_of(shapes) != "bfl":
        raise UserError(
            f"`source` {path}: a diffusers {name} without its config; expected BFL's layout in a single file; "
            "pass the folder that holds model_index.json"
        )
    source = Source(module.config_from_bfl(shapes), file, file.files, module.params_from_torch)
    return layout, Sources({name: source}, {}, None)


def clip_vision(path: Path) -> Source:
    """The vision tower in a transformers CLIP folder."""
    if not reading.is_dir(path):
        raise UserError(
            f"`clip_vision` {path}: no such folder; expected a transformers CLIP folder (openai/clip-vit-large-patch14)"
        )
    config = read_config(path, clip.CLIPVisionConfig.from_hf)
    tensors, files = tensors_of(path, "model")
    return Source(config, tensors, files, clip.vision_params_from_torch)


def tensors_of(folder: Path, stem: str) -> tuple[Mapping[str, Any], list[Path]]:
    """The tensors of a component's folder: one safetensors file, a sharded set, or Flax CLIP's msgpack."""
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
        if reading.is_file(folder / name):
            file = TensorFile(folder / name)
            return file, file.files
    msgpack = folder / "flax_model.msgpack"
    if reading.is_file(msgpack):
        return clip.from_flax(msgpack), [msgpack]
    raise UserError(
        f"{folder}: no weights; expected {stem}.safetensors (or its sharded index); "
        "pickled .bin files are not read: save the model again with safe_serialization=True"
    )


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
