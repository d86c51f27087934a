"""CLIP, DINO and DINOv2 as measures: public checkpoints -> folders that `dynaip evaluate set` takes.

python -m tools.convert_torch_weights.measures --source clip-vit-base-patch32/ --out measures/clip-b32
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaip_jax import reading
from dynaip_jax.commandline import argument, parse, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.families.tokenizers import CLIP_LENGTH, check_tokenizer
from dynaip_jax.interrupts import at_stake
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.dino import DinoConfig
from dynaip_jax.storage.bundle import write_bundle
from tools.convert_torch_weights import clip_files, dino
from tools.convert_torch_weights.hub import local
from tools.convert_torch_weights.selection import shapes_of
from tools.convert_torch_weights.sources import Source, read_config, read_json, snapshot, tensors_of
from tools.convert_torch_weights.writing import converted, key, plan, progress, table

EXAMPLES = """
examples:
  python -m tools.convert_torch_weights.measures --source clip-vit-base-patch32/ --out measures/clip-b32
  python -m tools.convert_torch_weights.measures --source dino-vits16/ --out measures/dino-s16
  python -m tools.convert_torch_weights.measures --source dinov2-small/ --out measures/dinov2-s14
"""
KINDS = dict(clip="clip", vit="dino", dinov2="dino")  # what config.json says -> the family of the measure


@dataclass(frozen=True)
class Arguments:
    """Converts CLIP, DINO or DINOv2 into a measure for dynaip evaluate."""

    source: Path = argument(
        "a transformers folder (openai/clip-vit-base-patch32, openai/clip-vit-large-patch14, facebook/dino-vits8, facebook/dino-vits16, "
        "facebook/dinov2-small ...), or hf://owner/name",
        unit="DIR",
    )
    out: Path = argument("the folder to write", unit="MEASURE")
    overwrite: bool = argument("replace an existing measure", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the source, then writes the measure."""
    args = parse(Arguments, argv, "python -m tools.convert_torch_weights.measures", EXAMPLES)
    family, components, tokenizers = read_measure(local(args.source, "source"))
    planned = plan(components, "keep")
    print(table(planned))
    with at_stake(f"nothing is written to {args.out}"), progress("converting", planned) as step:
        write_bundle(
            args.out,
            converted(planned),
            family=family,
            schedule={},
            text=dict(clip_length=CLIP_LENGTH) if family == "clip" else {},
            defaults={},
            tokenizers=tokenizers,
            overwrite=args.overwrite,
            resume=key(planned),
            step=step,
        )
    print(f"wrote {args.out}")
    return 0


def read_measure(path: Path) -> tuple[str, dict[str, Source], dict[str, Path]]:
    """The family ("clip", "dino"), the components and the tokenizers of a transformers folder. Raises `UserError` for any other."""
    if not reading.is_dir(path):
        raise UserError(f"`source` {path}: no such folder; expected a transformers folder of CLIP, DINO or DINOv2")
    path = snapshot(path)
    kind = read_json(path / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{path / 'config.json'}: of a {kind!r}; expected one of {', '.join(KINDS)}; pass a folder of CLIP, DINO or DINOv2"
        )
    tensors, files = tensors_of(path, "model")
    if KINDS[kind] == "dino":
        config = read_config(path, DinoConfig.from_hf)
        return "dino", dict(dino=Source(config, tensors, files, dino.params_from_torch)), {}
    shapes = shapes_of(tensors)
    projections = {
        "clip_projection": (clip_files.projection_config(shapes), clip_files.projection_params),
        "text_projection": (
            clip_files.projection_config(shapes, clip_files.TEXT_PROJECTIONS),
            clip_files.text_projection_params,
        ),
    }
    found: dict[str, Any] = dict(
        clip_vision=(read_config(path, CLIPVisionConfig.from_hf), clip_files.vision_params),
        clip_text=(read_config(path, CLIPTextConfig.from_hf), clip_files.text_params),
        **projections,
    )
    for name, (config, _) in found.items():
        if config is None:
            raise UserError(
                f"`source` {path}: has no {name}; expected a whole CLIPModel, both towers; use another folder"
            )
    check_tokenizer(path)
    components = {name: Source(config, tensors, files, make) for name, (config, make) in found.items()}
    return "clip", components, dict(clip=path)


if __name__ == "__main__":
    sys.exit(run_cli(main))
