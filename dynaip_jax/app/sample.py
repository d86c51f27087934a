"""`dynaip sample`: pictures from a prompt and reference pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import Levels, SampleOptions, reference_options
from dynaip_jax.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from dynaip_jax.sampling.pipeline import DynaIPPipeline, Generation

EXAMPLES = """
examples:
  dynaip sample --prompt "a star on the left on grass at noon" --reference my-star.png --output star.png
      your drawing of a star in a scene, by the embedded model of Shapeland: 64 x 64 pixels, a vocabulary of its own
  dynaip sample --model bundles/flux-dev --adapter adapters/dynaip --prompt "a toy robot on a beach at sunset" \\
      --reference robot.jpg --num-images 4 --output robot.png
      four pictures of the subject in robot.jpg: robot_0.png ... robot_3.png, and robot.png, the grid
  dynaip sample --model bundles/flux-dev --adapter adapters/dynaip --prompt "a dog and a teapot in a garden" \\
      --reference dog.jpg --reference teapot.jpg --mask left.png --mask right.png --output two.png
      two subjects, each where its mask is white
  dynaip sample --model bundles/flux-dev --adapter adapters/dynaip --prompt "a dog and a teapot in a garden" \\
      --subject dog.jpg=dog --subject teapot.jpg=teapot --output two.png
      two subjects, each where the picture attends to its words of the prompt
  dynaip sample ... --granularity 0 0 1         high-level look only; LOW MID HIGH replace the router's weights
  dynaip sample ... --text-gain 0.3             let some pose and light of the reference through (0 = DDS, the default)
"""
FLAGS = dict(bundle="--model", references="--reference", words="--subject IMG=WORDS", masks="--mask")
FILES, PICTURE, REFERENCE = "model and file", "picture", "reference"  # headings in help


@dataclass(frozen=True)
class Arguments:
    """Makes pictures from a prompt and reference pictures. Options left out take the model's own defaults."""

    model: str | None = argument(
        "converted base model", default=None, usual="the embedded one of Shapeland", unit="BUNDLE", group=FILES
    )
    adapter: str | None = argument(
        "trained adapter; without it plain text to image", default=None, unit="DIR", group=FILES
    )
    any_base: bool = argument("accept an adapter trained on another base of the same sizes", default=False, group=FILES)
    dtype: Literal["float32", "bfloat16"] | None = argument(
        "of weights and activations", default=None, usual="float32 on CPU, bfloat16 elsewhere", group=FILES
    )
    mesh: str | None = argument(
        "devices that share the work, such as tensor=4 or data=2,fsdp=4",
        default=None,
        usual="one device",
        unit="AXES",
        group=FILES,
    )
    attention: Literal["auto", "xla", "per_head", "splash", "cudnn"] = argument(
        "kernel of the transformer", default="auto", group=FILES
    )
    weights: Literal["full", "int8", "fp8"] = argument(
        "of the transformer's blocks: 8 bits need half the memory, at an error (needs qwix)",
        default="full",
        group=FILES,
    )
    offload_text: bool = argument(
        "keep the large text encoder in the host's memory, on the device only while it encodes (T5-XXL: 9.5 GB less)",
        default=False,
        group=FILES,
    )
    output: Path = argument("the picture, or the grid of several", unit="OUT.png", group=FILES)
    overwrite: bool = argument("replace existing pictures", default=False, group=FILES)

    prompt: tuple[str, ...] = argument(
        "give several to draw them in one batch", unit="TEXT", group=PICTURE, repeat=True
    )
    noise: Path | None = argument(
        "initial latents [b, 16, h/8, w/8] in place of a seed", default=None, unit="FILE.npy", group=PICTURE
    )

    reference: tuple[Path, ...] = argument(
        "a subject; repeat for more", default=(), unit="IMG", group=REFERENCE, repeat=True
    )
    subject: tuple[str, ...] = argument(
        "a subject and the words of the prompt that name it: it appears where the picture attends to them; repeat for more",
        default=(),
        unit="IMG=WORDS",
        group=REFERENCE,
        repeat=True,
    )
    mask: tuple[Path, ...] = argument(
        "white where that subject may appear in the output; none, or one a subject, in the same order; wins over words",
        default=(),
        unit="IMG",
        group=REFERENCE,
        repeat=True,
    )


class Subject(NamedTuple):
    """A reference and the words of the prompt that name it, "" for none."""

    picture: Path
    words: str


def main(argv: Sequence[str]) -> int:
    """Makes the pictures, and prints the name of each file."""
    args = parse(_with_options(), argv, "dynaip sample", EXAMPLES)
    given = {f.name: value for f in fields(SampleOptions) if (value := getattr(args, f.name)) is not None}
    subjects = _subjects(args, argv)
    if not subjects:
        for name in ("mask", *reference_options()):
            if name in given or (name == "mask" and args.mask):
                raise UserError(f"`{name}`: needs a reference picture to act on; pass --reference IMG")
    elif args.model is not None and args.adapter is None:
        raise UserError("`references`: no adapter is loaded; pass --adapter DIR, or leave the references out")
    options = SampleOptions(**given)

    from dynaip_jax import images

    noise = None if args.noise is None else _load_noise(args.noise)
    each = (options.num_images or 1) if noise is None else len(noise) if noise.ndim else 1
    outputs = _outputs(args.output, each * len(args.prompt))
    for path in outputs:
        images.check_png_path(path, overwrite=args.overwrite)
    pictures = [images.load_image(subject.picture) for subject in subjects]

    import warnings

    pipe, made_with = _load(args, bool(subjects))
    with warnings.catch_warnings(action="ignore"):  # they are in the result too
        result = pipe(
            args.prompt if len(args.prompt) > 1 else args.prompt[0],
            pictures,
            masks=args.mask,
            words=[subject.words for subject in subjects] if any(subject.words for subject in subjects) else (),
            noise=noise,
            options=options,
            progress=sys.stderr.isatty(),
        )
    _tell(result, subjects)
    _save(result, outputs, made_with | _given_files(args, subjects), overwrite=args.overwrite)
    return 0


def _with_options() -> type[Any]:
    """`Arguments` and a flag for each field of `SampleOptions`, None where it is not given."""
    hints = get_type_hints(SampleOptions) | dict(
        image_scale=float, text_gain=float, granularity=Levels
    )  # for all alike
    flags: list[tuple[str, Any, Any]] = []
    for f in fields(SampleOptions):
        group = REFERENCE if f.metadata["reference"] else PICTURE
        field = argument(f.metadata["doc"], default=None, usual=f.default, unit=f.metadata["unit"], group=group)
        flags.append((f.name, hints[f.name] | None, field))
    doc = dict(__doc__=Arguments.__doc__)
    return make_dataclass("SampleArguments", flags, bases=(Arguments,), frozen=True, namespace=doc)


def _subjects(args: Arguments, argv: Sequence[str]) -> list[Subject]:
    """References with and without words, in the order of the command line."""
    plain = (Subject(picture, "") for picture in args.reference)
    named = (_subject(text) for text in args.subject)
    kinds = [word.partition("=")[0] for word in argv]
    return [next(plain if kind == "--reference" else named) for kind in kinds if kind in ("--reference", "--subject")]


def _subject(text: str) -> Subject:
    picture, _, words = text.rpartition("=")
    if not picture or not words.strip():
        raise UserError(f"--subject {text}: expected IMG=WORDS, such as {text.rstrip('=')}='red star'; add the words")
    return Subject(Path(picture), words)


def _load_noise(path: Path) -> np.ndarray:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"`noise` {path}: cannot be read as a NumPy array ({e}); expected a .npy file of floats") from e


def _outputs(output: Path, count: int) -> list[Path]:
    """The file of the picture; of several the grid's file, then one each."""
    each = [output.with_name(f"{output.stem}_{k}.png") for k in range(count)]
    return [output, *each] if count > 1 else [output]


def _load(args: Arguments, with_references: bool) -> tuple[DynaIPPipeline, dict[str, Any]]:
    """The pipeline, and what the settings of a picture say of it."""
    from dynaip_jax.runtime.sharding import parse_mesh
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    model: str | Path | None = args.model
    adapter: str | Path | None = args.adapter
    if model is None:
        from dynaip_jax.shapeland import default
        from dynaip_jax.shapeland.world import caption_words

        model, embedded = default.paths()
        adapter = adapter or (embedded if with_references else None)
        print(
            "note: using the embedded model of Shapeland, which knows these words: "
            f"{' '.join(caption_words())}; pass --model for another",
            file=sys.stderr,
        )
    pipe = DynaIPPipeline.load(
        model,
        adapter,
        dtype=args.dtype,
        any_base=args.any_base,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
        attention=args.attention,
        weights=args.weights,
        offload_text=args.offload_text,
    )
    return pipe, dict(
        program=f"dynaip_jax {__version__}",
        model=str(model),
        base=pipe.bundle.fingerprint,
        adapter=None if adapter is None else str(adapter),
    )


def _given_files(args: Arguments, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the settings of a picture say of the files it was made from."""
    return dict(
        reference=[str(subject.picture) for subject in subjects],
        mask=[str(mask) for mask in args.mask],
        noise=None if args.noise is None else str(args.noise),
    )


def _tell(result: Generation, subjects: Sequence[Subject]) -> None:
    """Lines on stderr about how the pictures were made."""
    for note in result.warnings:
        print(f"warning: {note}", file=sys.stderr)
    if "cached_steps" in result.settings:
        steps = result.settings["steps"]
        print(f"{result.settings['cached_steps']} of {steps} steps from the cache", file=sys.stderr)
    if result.routing is not None:
        for subject, (low, mid, high) in zip(subjects, result.routing, strict=True):
            print(f"{subject.picture}: routing weights low {low:.3f}, mid {mid:.3f}, high {high:.3f}", file=sys.stderr)


def _save(result: Generation, outputs: Sequence[Path], made_with: dict[str, Any], *, overwrite: bool) -> None:
    """Writes each picture with its settings, then the grid of several, and prints their names."""
    from dynaip_jax import images

    settings = result.settings | made_with
    seeds: list[int | None] = list(result.seeds) if result.seeds else [None] * len(result.images)
    singles = outputs[1:] or outputs
    for image, path, prompt, seed in zip(result.images, singles, result.prompts, seeds, strict=True):
        images.save_png(image, path, settings | dict(prompt=prompt, seed=seed), overwrite=overwrite)
        print(path)
    if len(outputs) > 1:
        images.save_png(images.grid(result.images), outputs[0], settings | dict(seed=seeds), overwrite=overwrite)
        print(outputs[0])
