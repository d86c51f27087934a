"""`dynaip sample`: pictures from a prompt and reference pictures."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from dynaip_jax import interrupts
from dynaip_jax.app import naming, recipe
from dynaip_jax.app.saving import Saving
from dynaip_jax.commandline import argument, flag, parse
from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import read_bytes
from dynaip_jax.sampling.options import MOST, SEEDS, SampleOptions, reference_options, texts
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    import numpy as np

    from dynaip_jax.sampling.opening import Opened
    from dynaip_jax.sampling.pipeline import Generation
    from dynaip_jax.sampling.request import Request

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
  dynaip sample --model bundles/flux-dev --lora style.safetensors=0.8 --prompt "a cat" --output cat.png
      with a LoRA, in any of the usual formats
  dynaip sample ... --granularity 0 0 1         high-level look only; LOW MID HIGH replace the router's weights
  dynaip sample ... --text-gain 0.3             let some pose and light of the reference through (0 = DDS, the default)
"""
EACH = dict(image_scale=1, text_gain=1, granularity=3)  # options with so many numbers for all subjects, or for each
PROG = "dynaip sample"
NOISE_BYTES = 1 << 30  # of a file
FLAGS = dict(
    bundle="--model",
    references="--reference",
    words="--subject IMG=WORDS",
    masks="--mask",
    native_references="--native-reference",
    loras="--lora",
)
IDENTITIES = (  # options, and the settings that say what they were
    ("bundle", "base"),
    ("bundle", "model_fingerprint"),
    ("adapter", "adapter_fingerprint"),
    ("loras", "lora_fingerprint"),
)
FILES, PICTURE, REFERENCE = "model and file", "picture", "reference"  # headings in help


@dataclass(frozen=True)
class Arguments(recipe.Sources):
    """Makes pictures from a prompt and reference pictures. Options left out take the model's own defaults."""

    model: str | None = argument(
        "converted base model", default=None, usual="the embedded one of Shapeland", unit="BUNDLE", group=FILES
    )
    adapter: str | None = argument(
        "trained adapter, or XLabs' or InstantX's file; without it plain text to image",
        default=None,
        unit="DIR_OR_FILE",
        group=FILES,
    )
    lora: tuple[str, ...] = argument(
        "a LoRA that is merged into the weights, as strongly as scale says (default 1); repeat for more",
        default=(),
        unit="FILE[=scale]",
        group=FILES,
        repeat=True,
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
    output: str | None = argument(
        "the picture, or the grid of several; {prompt}, {seed}, {n}, {date} and {time} stand for what they say (needed)",
        default=None,
        unit="OUT.png",
        group=FILES,
    )
    overwrite: bool = argument("replace existing pictures", default=False, group=FILES)

    prompt: tuple[str, ...] = argument(
        "give several to draw them in one batch (needed)", default=(), unit="TEXT", group=PICTURE, repeat=True
    )
    random_seed: bool = argument("a seed by chance, which is said, in place of 0", default=False, group=PICTURE)
    noise: Path | None = argument(
        "initial latents [b, c, h, w] in place of a seed", default=None, unit="FILE.npy", group=PICTURE
    )
    noise_row: int | None = argument("one of the b alone, counted from 0", default=None, unit="K", group=PICTURE)

    reference: tuple[Path, ...] = argument(
        "a subject; repeat for more", default=(), unit="IMG", group=REFERENCE, repeat=True
    )
    subject: tuple[str, ...] = argument(
        "a subject and the words of the prompt that name it (dog#2: the second dog): it appears where the picture attends to them; repeat for more",
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

    native_reference: tuple[Path, ...] = argument(
        "a picture that the model reads by itself, without and beside the adapter (models that can); repeat for more",
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
    kind = _with_options()
    args, like = parse(kind, argv, PROG, EXAMPLES), recipe.Like()
    if args.like or args.options or args.preset:
        argv, like = recipe.complete(kind, args, argv, lambda words: parse(kind, words, PROG))
        args = parse(kind, argv, PROG)
    _check_needed(args)
    given, subjects = _given_options(args), _subjects(args, argv)
    _check_subjects(args, given, subjects)
    options = SampleOptions(**given)

    from dynaip_jax import images
    from dynaip_jax.sampling.request import make_request

    noise = None if args.noise is None else _load_noise(args.noise, args.noise_row, like)
    if noise is None:
        options = _with_seed(options, args.random_seed)
    each, seed = (options.num_images or 1, options.seed or 0) if noise is None else (len(noise), None)
    if each * len(args.prompt) > MOST:
        raise UserError(f"`num_images`: {len(args.prompt)} prompts of {each} pictures; expected at most {MOST} in all")
    outputs = naming.outputs(args.output, args.prompt, each, seed, time.localtime())
    for path in outputs:
        images.check_png_path(path, overwrite=args.overwrite)
    pictures = [images.load_image(subject.picture) for subject in subjects]
    like.check("references", "reference_fingerprint", [images.digest(picture) for picture in pictures])

    opened = _open(args, bool(subjects))
    request = make_request(
        opened.model,
        args.prompt if len(args.prompt) > 1 else args.prompt[0],
        pictures,
        masks=args.mask,
        words=[subject.words for subject in subjects] if any(subject.words for subject in subjects) else (),
        native_references=args.native_reference,
        noise=noise,
        options=options,
    )
    digests = request.natives.settings.get("native_reference_fingerprint", [])
    like.check("native_references", "native_reference_fingerprint", digests)
    like.check("masks", "mask_fingerprint", [images.digest(mask.values) for mask in request.subjects.masks])
    for option, setting in IDENTITIES:
        like.check(option, setting, opened.settings.get(setting))
    for note in [*opened.notes, *request.notes]:
        print(f"warning: {UserError(note).told(lambda name: FLAGS.get(name) or flag(name))}", file=sys.stderr)
    saving = Saving(outputs, _given_files(args, subjects), overwrite=args.overwrite)
    with interrupts.at_stake(saving.lost):
        _make(opened, request, subjects, saving)
    return 1 if saving.elsewhere else 0


def _make(opened: Opened, request: Request, subjects: Sequence[Subject], saving: Saving) -> None:
    """Reads the weights, and makes and saves the pictures."""
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    with task(f"loading {opened.model.bundle.path}"):
        pipe = DynaIPPipeline.read(opened)
    for part in pipe.draw(request, progress=True):
        if not saving.done:
            _tell(part, subjects)
        with interrupts.finishing():
            saving.add(part)
    saving.grid()


def _check_needed(args: Any) -> None:
    """Raises `UserError` for what is missing whatever else is asked for, and for two answers to one question."""
    if not args.prompt:
        raise UserError("`prompt`: none given; expected at least one; pass --prompt TEXT")
    if args.output is None:
        raise UserError("`output`: none given; expected the picture's name; pass --output OUT.png")
    chosen = [name for name in ("noise", "random_seed", "seed") if getattr(args, name) not in (None, False)]
    if len(chosen) > 1:
        raise UserError(f"`{chosen[0]}`: it fixes what `{chosen[1]}` would choose; pass either")
    if args.noise_row is not None and args.noise is None:
        raise UserError("`noise_row`: no noise to take it from; pass --noise FILE.npy, or leave it out")


def _check_subjects(args: Any, given: dict[str, Any], subjects: Sequence[Subject]) -> None:
    """Raises `UserError` for what acts on subjects where there are none, and for an adapter that is missing or accepted without need."""
    if not subjects:
        for name in ("mask", *reference_options()):
            if name in given or (name == "mask" and args.mask):
                raise UserError(f"`{name}`: needs a reference picture to act on; pass --reference IMG")
    elif args.model is not None and args.adapter is None:
        raise UserError("`references`: no adapter is loaded; pass --adapter DIR, or leave the references out")
    if args.any_base and args.adapter is None:
        raise UserError("`any_base`: no adapter to accept; pass --adapter DIR, or leave it out")
    texts("prompt", args.prompt)
    texts("words", [subject.words for subject in subjects])


def _with_options() -> type[Any]:
    """`Arguments` and a flag for each field of `SampleOptions`, None where it is not given."""
    hints = get_type_hints(SampleOptions) | dict.fromkeys(EACH, tuple[float, ...])
    flags: list[tuple[str, Any, Any]] = []
    for f in fields(SampleOptions):
        group = REFERENCE if f.metadata["reference"] else PICTURE
        field = argument(f.metadata["doc"], default=None, usual=f.default, unit=f.metadata["unit"], group=group)
        flags.append((f.name, hints[f.name] | None, field))
    doc = dict(__doc__=Arguments.__doc__)
    return make_dataclass("SampleArguments", flags, bases=(Arguments,), frozen=True, namespace=doc)


def _given_options(args: Any) -> dict[str, Any]:
    """The fields of `SampleOptions` that are given; numbers for all subjects alike, or for each of them."""
    given = {f.name: value for f in fields(SampleOptions) if (value := getattr(args, f.name)) is not None}
    for name, size in EACH.items():
        numbers = given.get(name, ())
        if len(numbers) == 1 and size == 1:
            given[name] = numbers[0]
        elif len(numbers) > size > 1 and len(numbers) % size == 0:
            given[name] = tuple(numbers[n : n + size] for n in range(0, len(numbers), size))
    return given


def _with_seed(options: SampleOptions, by_chance: bool) -> SampleOptions:
    """The options with a seed, which is said if it was drawn."""
    if by_chance:
        options = replace(options, seed=secrets.randbelow(SEEDS + 1 - (options.num_images or 1)))
        print(f"seed {options.seed}", file=sys.stderr)
    options.seeds()
    return options


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


def _load_noise(path: Path, row: int | None, like: recipe.Like) -> np.ndarray:
    """Initial latents `[b, c, h, w]`, or one `row` of them, of which the pipeline checks the rest."""
    import numpy as np

    from dynaip_jax import images
    from dynaip_jax.storage.arrays import read_array

    expected = "expected a .npy file of floats [b, c, h, w]"
    try:
        noise = read_array(read_bytes(path, NOISE_BYTES), "f")
    except (OSError, ValueError) as e:
        raise UserError(
            f"`noise` {path}: cannot be read as a NumPy array ({reason(e)}); {expected}; save it anew"
        ) from e
    if noise.ndim != 4 or not noise.size:
        raise UserError(f"`noise` {path}: found {noise.dtype} {list(noise.shape)}; {expected}; save another")
    if len(noise) > MOST:
        raise UserError(f"`noise` {path}: {len(noise)} noises, one a picture; expected at most {MOST}; split the file")
    if row is not None and not 0 <= row < len(noise):
        raise UserError(f"`noise_row` {row}: expected a number from 0 to {len(noise) - 1}, a row of {path}")
    noise = noise if row is None else noise[row : row + 1]
    like.check("noise", "noise_fingerprint", [images.digest(one) for one in noise.astype(np.float32)])
    return noise


def _open(args: Arguments, with_references: bool) -> Opened:
    """The model, whose weights are still to be read."""
    from dynaip_jax.runtime.sharding import parse_mesh
    from dynaip_jax.sampling.loras import parse as parse_lora
    from dynaip_jax.sampling.opening import open_model

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
    return open_model(
        model,
        adapter,
        dtype=args.dtype,
        any_base=args.any_base,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
        attention=args.attention,
        weights=args.weights,
        offload_text=args.offload_text,
        loras=[parse_lora(text) for text in args.lora],
    )


def _given_files(args: Arguments, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the settings of a picture say of the files it was made from."""
    return dict(
        reference=[str(subject.picture) for subject in subjects],
        mask=[str(mask) for mask in args.mask],
        **(dict(native_reference=[str(file) for file in args.native_reference]) if args.native_reference else {}),
        noise=None if args.noise is None else str(args.noise),
    ) | ({} if args.noise_row is None else dict(noise_row=args.noise_row))


def _tell(part: Generation, subjects: Sequence[Subject]) -> None:
    """Lines on stderr about how the pictures were made."""
    if "cached_steps" in part.settings:
        print(f"{part.settings['cached_steps']} of {part.settings['steps']} steps from the cache", file=sys.stderr)
    if part.routing is not None:
        for subject, (low, mid, high) in zip(subjects, part.routing, strict=True):
            print(f"{subject.picture}: routing weights low {low:.3f}, mid {mid:.3f}, high {high:.3f}", file=sys.stderr)
