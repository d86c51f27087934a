"""PyTorch checkpoints -> a dynaip_jax bundle.

python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax.commandline import Parser, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.storage.bundle import NewComponent, write_bundle
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import reserve, sha256_of
from dynaip_jax.storage.tensors import TensorFile
from tools.convert_torch_weights import clip, flux, t5, vae

STAGING_FROM = 1 << 26  # leaves of at least so many bytes are built on disk, not in memory


class Source(NamedTuple):
    """One component found: its config, its tensors, the files they lie in, and how to convert them."""

    config: Any
    tensors: Mapping[str, Any]
    files: list[Path]
    convert: Callable[..., dict[str, Any]]


class Found(NamedTuple):
    """What the sources hold together."""

    components: dict[str, Source]
    tokenizers: dict[str, Path]
    scheduler: dict[str, Any] | None


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m tools.convert_torch_weights",
        description="Converts PyTorch checkpoints (safetensors) of FLUX.1 and CLIP vision into a dynaip_jax bundle.",
        epilog="""examples:
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --source my-finetune.safetensors --out bundles/mine
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --out bundles/flux-dev --dry-run""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        required=True,
        metavar="DIR_OR_FILE",
        help="a diffusers FLUX folder, or a BFL or diffusers single file of the transformer or the VAE; may be repeated: "
        "a later source replaces the same component of an earlier one",
    )
    parser.add_argument(
        "--clip-vision", type=Path, metavar="DIR", help="a transformers CLIP folder, for reference images"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16"), default="keep", help="of the weights written"
    )
    parser.add_argument("--t5-length", type=int, metavar="N", help="T5 tokens a prompt (default: 512 dev, 256 schnell)")
    parser.add_argument("--dry-run", action="store_true", help="check every name and shape, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    args = parser.parse_args(argv)
    if args.t5_length is not None and args.t5_length < 1:
        raise UserError(f"--t5-length {args.t5_length}: expected at least 1")

    found = Found({}, {}, None)
    for path in args.source:
        new = _diffusers_folder(path) if path.is_dir() else _single_file(path)
        found = Found(
            found.components | new.components, found.tokenizers | new.tokenizers, new.scheduler or found.scheduler
        )
    if args.clip_vision is not None:
        found.components["clip_vision"] = _clip_vision(args.clip_vision)

    for name, source in found.components.items():
        source.convert(source.tensors, source.config, check_only=True)
        size = sum(f.stat().st_size for f in source.files) / 2**30
        where = source.files[0] if len(source.files) == 1 else f"{source.files[0].parent} ({len(source.files)} files)"
        print(f"{name:12} {len(source.tensors):5} tensors {size:8.3f} GiB  {where}")
    if args.dry_run:
        print("all names and shapes fit; nothing written (--dry-run)")
        return 0

    guided = "transformer" not in found.components or found.components["transformer"].config.guidance_embed
    write_bundle(
        args.out,
        _converted(found.components, args.out, args.dtype),
        family="flux",
        schedule=asdict(_schedule(found.scheduler, guided)),
        text=_text_lengths(found, args.t5_length or (512 if guided else 256)),
        defaults=_defaults(found, guided),
        tokenizers=found.tokenizers,
        overwrite=args.overwrite,
    )
    print(f"wrote {args.out}")
    return 0


def _converted(components: Mapping[str, Source], out: Path, dtype: str) -> Iterator[NewComponent]:
    """Converts one component at a time; large leaves are memory-mapped files beside `out` that go away afterwards."""
    for name, source in components.items():
        print(f"{name}: converting", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
            count = iter(range(1_000_000))

            def empty(shape, leaf_dtype, staging=staging, count=count):
                size = int(np.prod(shape)) * np.dtype(leaf_dtype).itemsize
                if size < STAGING_FROM:
                    return np.empty(shape, leaf_dtype)
                path = Path(staging) / str(next(count))
                array = np.memmap(path, dtype=leaf_dtype, mode="w+", shape=shape)
                reserve(path)
                return array

            options = dict(empty=empty) if dtype == "keep" else dict(empty=empty, dtype=np.dtype(dtype))
            params = source.convert(source.tensors, source.config, **options)
            provenance = [dict(file=f.name, sha256=sha256_of(f)) for f in source.files]
            yield NewComponent(name, to_dict(source.config), params, provenance)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(
            f"{path}: missing; expected it in a folder written by save_pretrained; download it again"
        ) from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); download it again") from e


def _tensors(folder: Path, *stems: str) -> tuple[Mapping[str, Any], list[Path]]:
    """The tensors of a component folder: one safetensors file, a sharded set, or Flax CLIP's msgpack."""
    for stem in stems:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                file = TensorFile(folder / name)
                return file, file.files
    msgpack = folder / "flax_model.msgpack"
    if msgpack.is_file():
        return clip.from_flax(msgpack), [msgpack]
    raise UserError(
        f"{folder}: no weights; expected {' or '.join(f'{s}.safetensors' for s in stems)} (or their sharded index); "
        "pickled .bin files are not read: save the model again with safe_serialization=True"
    )


def _diffusers_folder(path: Path) -> Found:
    index = _read_json(path / "model_index.json")
    if index.get("_class_name") != "FluxPipeline":
        raise UserError(
            f"--source {path}: unknown family {index.get('_class_name')!r}; expected FluxPipeline (FLUX.1-dev, -schnell)"
        )
    plan: dict[str, tuple[str, Callable[..., Any], Callable[..., dict[str, Any]], str]] = {
        "transformer": ("transformer", flux.config_from_diffusers, flux.params_from_torch, "diffusion_pytorch_model"),
        "vae": ("vae", vae.config_from_diffusers, vae.params_from_torch, "diffusion_pytorch_model"),
        "t5": ("text_encoder_2", t5.T5Config.from_hf, t5.params_from_torch, "model"),
        "clip_text": ("text_encoder", clip.CLIPTextConfig.from_hf, clip.text_params_from_torch, "model"),
    }
    components = {}
    for name, (folder, config, convert, stem) in plan.items():
        tensors, files = _tensors(path / folder, stem)
        components[name] = Source(_config(path / folder, config), tensors, files, convert)
    tokenizers = {"clip": path / "tokenizer", "t5": path / "tokenizer_2"}
    for tokenizer in tokenizers.values():
        if not tokenizer.is_dir():
            raise UserError(f"{tokenizer}: missing; expected a tokenizer; download the model again")
    return Found(components, tokenizers, _read_json(path / "scheduler" / "scheduler_config.json"))


def _config(folder: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    values = _read_json(folder / "config.json")
    try:
        return read(values)
    except UserError as e:
        raise UserError(f"{folder / 'config.json'}: {e}") from e
    except (KeyError, TypeError, ValueError) as e:
        what = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(
            f"{folder / 'config.json'}: {what}; expected a config of this kind of model; download it again"
        ) from e


def _single_file(path: Path) -> Found:
    """A transformer or a VAE in BFL's layout; the config is read off the shapes."""
    file = TensorFile(path)
    shapes = {n: file.shape(n) for n in file}
    name, module = (
        ("vae", vae) if any(n.startswith(("encoder.", "decoder.")) for n in shapes) else ("transformer", flux)
    )
    if module.layout_of(shapes) != "bfl":
        raise UserError(
            f"--source {path}: a diffusers {name} without its config; expected BFL's layout in a single file; "
            "pass the folder that holds model_index.json"
        )
    source = Source(module.config_from_bfl(shapes), file, file.files, module.params_from_torch)
    return Found({name: source}, {}, None)


def _clip_vision(path: Path) -> Source:
    if not path.is_dir():
        raise UserError(
            f"--clip-vision {path}: no such folder; expected a transformers CLIP folder (openai/clip-vit-large-patch14)"
        )
    config = _config(path, clip.CLIPVisionConfig.from_hf)
    tensors, files = _tensors(path, "model")
    return Source(config, tensors, files, clip.vision_params_from_torch)


def _schedule(scheduler: dict[str, Any] | None, guided: bool) -> ScheduleConfig:
    if scheduler is None:
        return ScheduleConfig(dynamic=guided)
    names = dict(
        dynamic="use_dynamic_shifting",
        base_tokens="base_image_seq_len",
        max_tokens="max_image_seq_len",
        base_shift="base_shift",
        max_shift="max_shift",
        shift="shift",
    )
    return ScheduleConfig(
        **{ours: scheduler[theirs] for ours, theirs in names.items() if scheduler.get(theirs) is not None}
    )


def _text_lengths(found: Found, t5_length: int) -> dict[str, int]:
    clip_length = 77
    if "clip_text" in found.components:
        clip_length = found.components["clip_text"].config.max_position_embeddings
        config = found.tokenizers["clip"] / "tokenizer_config.json"
        if config.is_file():
            clip_length = int(min(clip_length, _read_json(config).get("model_max_length") or clip_length))
    return dict(t5_length=t5_length, clip_length=clip_length)


def _defaults(found: Found, guided: bool) -> dict[str, Any]:
    downsample = found.components["vae"].config.downsample if "vae" in found.components else 8
    return dict(
        steps=28 if guided else 4, guidance=3.5 if guided else None, height=128 * downsample, width=128 * downsample
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
