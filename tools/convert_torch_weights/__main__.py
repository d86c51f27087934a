"""PyTorch checkpoints -> a dynaip_jax bundle.

python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dynaip_jax.commandline import argument, parse, run_cli
from dynaip_jax.errors import UserError, printable
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage.bundle import RANGES, NewComponent, write_bundle
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import reserve, scratch, sha256_of
from tools.convert_torch_weights.registry import LAYOUTS
from tools.convert_torch_weights.sources import Layout, Source, Sources, clip_vision, read

EXAMPLES = """
examples:
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --clip-vision clip-vit-large-patch14/ --out bundles/flux-dev
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --source my-finetune.safetensors --out bundles/mine
  python -m tools.convert_torch_weights --source FLUX.1-dev/ --out bundles/flux-dev --dry-run
"""
STAGING_FROM = 1 << 26  # leaves of at least so many bytes are built on disk, not in memory


@dataclass(frozen=True)
class Arguments:
    """Converts PyTorch checkpoints (safetensors) into a dynaip_jax bundle."""

    source: tuple[Path, ...] = argument(
        "a diffusers folder, or a BFL or diffusers single file of the transformer or the VAE; may be repeated: a later source "
        "replaces the same component of an earlier one",
        unit="DIR_OR_FILE",
        repeat=True,
    )
    clip_vision: Path | None = argument("a transformers CLIP folder, for reference images", default=None, unit="DIR")
    out: Path = argument("the folder to write", unit="BUNDLE")
    dtype: Literal["keep", "float32", "bfloat16"] = argument("of the weights written", default="keep")
    t5_length: int | None = argument("T5 tokens a prompt", default=None, usual="512 dev, 256 schnell", unit="N")
    dry_run: bool = argument("check every name and shape, write nothing", default=False)
    overwrite: bool = argument("replace an existing bundle", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks all sources, then writes the bundle."""
    args = parse(Arguments, argv, "python -m tools.convert_torch_weights", EXAMPLES)
    least, most = RANGES["t5_length"]
    if args.t5_length is not None and not least <= args.t5_length <= most:
        raise UserError(f"`t5_length` {args.t5_length}: expected at least {least} and at most {most}")

    convert(args.source, args.clip_vision, args.out, args.dtype, args.t5_length, args.dry_run, args.overwrite)
    return 0


def convert(
    paths: Sequence[Path],
    vision: Path | None,
    out: Path,
    dtype: str = "keep",
    t5_length: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Checks the sources and, unless `dry_run`, writes the bundle `out`. Raises `UserError` for what does not fit."""
    sources, layout = Sources({}, {}, None), LAYOUTS[0]
    for path in paths:
        layout, new = read(path, LAYOUTS)
        sources = sources.joined(new)
    if vision is not None:
        sources.components["clip_vision"] = clip_vision(vision)

    for name, source in sources.components.items():
        source.convert(source.tensors, source.config, check_only=True)
        size = sum(f.stat().st_size for f in source.files) / 2**30
        where = source.files[0] if len(source.files) == 1 else f"{source.files[0].parent} ({len(source.files)} files)"
        print(f"{name:12} {len(source.tensors):5} tensors {size:8.3f} GiB  {printable(where)}")
    content = layout.manifest(sources, t5_length)
    if dry_run:
        print("all names and shapes fit; nothing written (--dry-run)")
        _tell_missing(layout, sources)
        return
    with at_stake(f"nothing is written to {out}"):
        write_bundle(
            out,
            _converted(sources.components, out, dtype),
            family=layout.family,
            **content,
            tokenizers=sources.tokenizers,
            overwrite=overwrite,
        )
    print(f"wrote {out}")
    _tell_missing(layout, sources)


def _tell_missing(layout: Layout, sources: Sources) -> None:
    """Says on stderr what a bundle of these sources cannot be used without."""
    names = [*layout.folders, *(f"{name} tokenizer" for name in layout.tokenizers)]
    present = {*sources.components, *(f"{name} tokenizer" for name in sources.tokenizers)}
    if missing := [name for name in names if name not in present]:
        print(
            f"note: the sources lack {', '.join(missing)}; a bundle without them makes no pictures; add a --source that has them",
            file=sys.stderr,
        )


def _converted(components: Mapping[str, Source], out: Path, dtype: str) -> Iterator[NewComponent]:
    """Converts one component at a time; large leaves are memory-mapped files beside `out` that go away afterwards."""
    for name, source in components.items():
        print(f"{name}: converting", file=sys.stderr)
        with scratch(out) as staging:
            count = iter(range(1_000_000))

            def empty(shape, leaf_dtype, staging=staging, count=count):
                size = int(np.prod(shape)) * np.dtype(leaf_dtype).itemsize
                if size < STAGING_FROM:
                    return np.empty(shape, leaf_dtype)
                path = staging / str(next(count))
                array = np.memmap(path, dtype=leaf_dtype, mode="w+", shape=shape)
                reserve(path)
                return array

            options = dict(empty=empty) if dtype == "keep" else dict(empty=empty, dtype=np.dtype(dtype))
            params = source.convert(source.tensors, source.config, **options)
            provenance = [dict(file=f.name, sha256=sha256_of(f)) for f in source.files]
            yield NewComponent(name, to_dict(source.config), params, provenance)


if __name__ == "__main__":
    sys.exit(run_cli(main))
