"""Public checkpoints -> a dynaip_jax bundle.

python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynaip_jax.commandline import argument, parse, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage.bundle import RANGES, write_bundle
from tools.convert_torch_weights.hub import local
from tools.convert_torch_weights.loras import with_loras
from tools.convert_torch_weights.registry import LAYOUTS
from tools.convert_torch_weights.sources import Layout, Sources, clip_vision, read, tokenizers_in
from tools.convert_torch_weights.writing import converted, export, key, plan, progress, table, verify

EXAMPLES = """
examples:
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --source my-finetune.safetensors --out bundles/mine
  python -m tools.convert_torch_weights --source checkpoint.safetensors --tokenizers FLUX.1-dev/ --out bundles/mine
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --lora style.safetensors=0.8 --out bundles/style
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --out bundles/flux-dev --dry-run
  python -m tools.convert_torch_weights --source bundles/mine --to diffusers --out mine/
"""


@dataclass(frozen=True)
class Arguments:
    """Converts checkpoints (safetensors, GGUF, pickles) into a dynaip_jax bundle."""

    source: tuple[Path, ...] = argument(
        "a diffusers folder or one of its components, a file of weights (safetensors, GGUF, pickle; bare or whole checkpoint), or "
        "hf://owner/name[@revision][/file]; may be repeated: a later source replaces the same component of an earlier one; required "
        "unless there is --clip-vision",
        default=(),
        unit="DIR_OR_FILE",
        repeat=True,
    )
    clip_vision: tuple[Path, ...] = argument(
        "a CLIP folder or file, for reference images; SigLIP's, for InstantX's adapter; repeat it for both",
        default=(),
        unit="DIR_OR_FILE",
        repeat=True,
    )
    tokenizers: Path | None = argument(
        "a diffusers folder or a bundle whose tokenizers the bundle gets, for text encoders in single files",
        default=None,
        unit="DIR",
    )
    lora: tuple[str, ...] = argument(
        "a LoRA that is merged into the weights, as strongly as scale says (default 1); repeat for more",
        default=(),
        unit="FILE[=scale]",
        repeat=True,
    )
    out: Path = argument("the folder to write", unit="BUNDLE")
    to: Literal["bundle", "diffusers", "bfl"] = argument(
        "what is written; diffusers and bfl turn the bundle that is the only --source into public files",
        default="bundle",
    )
    dtype: Literal["keep", "float32", "bfloat16"] = argument("of the weights written", default="keep")
    t5_length: int | None = argument("text tokens a prompt", default=None, usual="512, schnell 256", unit="N")
    dry_run: bool = argument("check every name and shape, print a table, write nothing", default=False)
    verify: bool = argument(
        "compare the bundle at --out with the sources, value by value; write nothing", default=False
    )
    overwrite: bool = argument("replace an existing bundle", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks all sources, then writes the bundle."""
    args = parse(Arguments, argv, "python -m tools.convert_torch_weights", EXAMPLES)
    if not args.source and not args.clip_vision:
        raise UserError(
            "`source`: no value given; expected at least one, or `clip_vision`; pass a folder or file of weights"
        )
    least, most = RANGES["t5_length"]
    if args.t5_length is not None and not least <= args.t5_length <= most:
        raise UserError(f"`t5_length` {args.t5_length}: expected at least {least} and at most {most}")

    if args.to != "bundle":
        if args.lora:
            raise UserError(
                f"`lora`: not merged with `to` {args.to}; expected a bundle that has it; convert with `lora` first"
            )
        for name in ("clip_vision", "tokenizers", "dtype", "t5_length", "dry_run", "verify"):
            if getattr(args, name) != getattr(Arguments, name):
                raise UserError(
                    f"`{name}`: changes nothing with `to` {args.to}, which writes a bundle as it is; leave it out, or convert a bundle with it first"
                )
        export(args.source, args.to, args.out, LAYOUTS, args.overwrite)
        return 0
    convert(
        args.source,
        args.clip_vision,
        args.out,
        args.dtype,
        args.t5_length,
        dry_run=args.dry_run,
        overwrite=args.overwrite,
        check=args.verify,
        tokenizers=args.tokenizers,
        loras=args.lora,
    )
    return 0


def convert(
    paths: Sequence[Path],
    vision: Sequence[Path],
    out: Path,
    dtype: str = "keep",
    t5_length: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    check: bool = False,
    tokenizers: Path | None = None,
    loras: Sequence[str] = (),
) -> None:
    """Checks the sources and, unless `dry_run`, writes the bundle `out`, or, if `check`, compares it with them. Raises `UserError` for
    what does not fit."""
    sources, layout = Sources({}, {}, None), LAYOUTS[0]
    for n, path in enumerate(paths):
        before, (layout, new) = layout, read(local(path, "source"), LAYOUTS)
        if n and layout is not before:
            raise UserError(
                f"`source` {path}: of the family {layout.family}, an earlier one of {before.family}; expected one family; convert each alone"
            )
        sources = sources.joined(new)
    for path in vision:
        sources.components.update(clip_vision(local(path, "clip_vision")))
    if tokenizers is not None:
        sources.tokenizers.update(tokenizers_in(local(tokenizers, "tokenizers"), layout))

    planned = with_loras(plan(sources.components, dtype), layout.family, loras)
    print(table(planned))
    content = layout.manifest(sources, t5_length)
    if check:
        verify(out, layout.family, planned)
        return
    if dry_run:
        print("all names and shapes fit; nothing written (--dry-run)")
        _tell_missing(layout, sources)
        return
    with at_stake(f"nothing is written to {out}"), progress("converting", planned) as step:
        write_bundle(
            out,
            converted(planned),
            family=layout.family,
            **content,
            tokenizers=sources.tokenizers,
            overwrite=overwrite,
            resume=key(planned),
            step=step,
        )
    print(f"wrote {out}")
    _tell_missing(layout, sources)


def _tell_missing(layout: Layout, sources: Sources) -> None:
    """Says on stderr what a bundle of these sources cannot be used without, and what SigLIP is for."""
    if "siglip" in sources.components and "clip_vision" not in sources.components:
        print(
            "note: SigLIP is what InstantX's adapter reads; others read CLIP: add --clip-vision with that",
            file=sys.stderr,
        )
    names = [*layout.folders, *(f"{name} tokenizer" for name in layout.tokenizers)]
    present = {*sources.components, *(f"{name} tokenizer" for name in sources.tokenizers)}
    if missing := [name for name in names if name not in present]:
        print(
            f"note: the sources lack {', '.join(missing)}; a bundle without them makes no pictures; add a --source that has them",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run_cli(main, flags=dict(loras="--lora")))
