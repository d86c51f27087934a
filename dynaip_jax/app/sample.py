"""`dynaip sample`: pictures from a prompt and reference pictures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from dynaip_jax import interrupts
from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import MOST, Levels, SampleOptions, reference_options
from dynaip_jax.tasks import task
from dynaip_jax.version import __version__

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
  dynaip sample ... --granularity 0 0 1         high-level look only; LOW MID HIGH replace the router's weights
  dynaip sample ... --text-gain 0.3             let some pose and light of the reference through (0 = DDS, the default)
"""
FLAGS = dict(bundle="--model", references="--reference", words="--subject IMG=WORDS", masks="--mask")
FILES, PICTURE, REFERENCE = "model and file", "picture", "reference"  # headings in help
GRID_PIXELS = 100_000_000  # at most, of the grid of several pictures


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
    output: str = argument("the picture, or the grid of several", unit="OUT.png", group=FILES)
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
    from dynaip_jax.sampling.request import make_request

    noise = None if args.noise is None else _load_noise(args.noise)
    each = (options.num_images or 1) if noise is None else len(noise) if noise.ndim else 1
    if each * len(args.prompt) > MOST:
        raise UserError(f"`num_images`: {len(args.prompt)} prompts of {each} pictures; expected at most {MOST} in all")
    outputs = _outputs(args.output, each * len(args.prompt))
    for path in outputs:
        images.check_png_path(path, overwrite=args.overwrite)
    pictures = [images.load_image(subject.picture) for subject in subjects]

    opened, made_with = _open(args, bool(subjects))
    request = make_request(
        opened.model,
        args.prompt if len(args.prompt) > 1 else args.prompt[0],
        pictures,
        masks=args.mask,
        words=[subject.words for subject in subjects] if any(subject.words for subject in subjects) else (),
        noise=noise,
        options=options,
    )
    for note in request.notes:
        print(f"warning: {note}", file=sys.stderr)
    saving = Saving(outputs, made_with | _given_files(args, subjects), overwrite=args.overwrite)
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


def _outputs(output: str, count: int) -> list[str | Path]:
    """The file of the picture, as it was given; of several the grid's file, then one each."""
    path = Path(output)
    each = [path.with_name(f"{path.stem}_{k}.png") for k in range(count)] if path.name else []
    return [output, *each] if count > 1 else [output]


def _open(args: Arguments, with_references: bool) -> tuple[Opened, dict[str, Any]]:
    """The model, whose weights are still to be read, and what the settings of a picture say of it."""
    from dynaip_jax.runtime.sharding import parse_mesh
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
    opened = open_model(
        model,
        adapter,
        dtype=args.dtype,
        any_base=args.any_base,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
        attention=args.attention,
        weights=args.weights,
        offload_text=args.offload_text,
    )
    return opened, dict(
        program=f"dynaip_jax {__version__}",
        model=str(model),
        base=opened.model.bundle.fingerprint,
        adapter=None if adapter is None else str(adapter),
    )


def _given_files(args: Arguments, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the settings of a picture say of the files it was made from."""
    return dict(
        reference=[str(subject.picture) for subject in subjects],
        mask=[str(mask) for mask in args.mask],
        noise=None if args.noise is None else str(args.noise),
    )


def _tell(part: Generation, subjects: Sequence[Subject]) -> None:
    """Lines on stderr about how the pictures were made."""
    if "cached_steps" in part.settings:
        print(f"{part.settings['cached_steps']} of {part.settings['steps']} steps from the cache", file=sys.stderr)
    if part.routing is not None:
        for subject, (low, mid, high) in zip(subjects, part.routing, strict=True):
            print(f"{subject.picture}: routing weights low {low:.3f}, mid {mid:.3f}, high {high:.3f}", file=sys.stderr)


class Saving:
    """Writes pictures with their settings as they are done, then the grid of several; prints the names, and knows what is lost.

    `outputs`: as from `_outputs`; `made_with`: settings that all have; `elsewhere`: whether a picture lies under another name.
    """

    def __init__(self, outputs: Sequence[str | Path], made_with: dict[str, Any], *, overwrite: bool):
        self._outputs, self._made_with, self._overwrite = outputs, made_with, overwrite
        self._singles = outputs[1:] or outputs
        self._cells: list[Any] = []
        self._seeds: list[int | None] = []
        self._settings: dict[str, Any] = {}
        self.elsewhere = False

    @property
    def done(self) -> int:
        """Pictures that are saved."""
        return len(self._cells)

    def lost(self) -> str:
        """What there will not be if the command ends now."""
        if self.done < len(self._singles):
            one = len(self._singles) == 1
            return (
                "the picture is lost"
                if one
                else f"{len(self._singles) - self.done} of {len(self._singles)} pictures are lost"
            )
        return "there is no grid" if len(self._outputs) > 1 else ""

    def add(self, part: Generation) -> None:
        """Saves some pictures."""
        self._settings = self._settings or part.settings | self._made_with
        seeds: list[int | None] = list(part.seeds) if part.seeds else [None] * len(part.images)
        for image, prompt, seed in zip(part.images, part.prompts, seeds, strict=True):
            own = part.settings | self._made_with | dict(prompt=prompt, seed=seed)
            self._keep(image, self._singles[self.done], own)
            self._seeds.append(seed)
            self._cells.append(self._cell(image))

    def grid(self) -> None:
        """Saves the grid, if there are several pictures."""
        from dynaip_jax import images

        if len(self._outputs) > 1:
            self._keep(images.grid(self._cells), self._outputs[0], self._settings | dict(seed=self._seeds))

    def _cell(self, image: Any) -> Any:
        """The picture, smaller where the grid would have too many pixels."""
        share = (GRID_PIXELS / (image.width * image.height * len(self._singles))) ** 0.5
        if share >= 1:
            return image
        return image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))))

    def _keep(self, image: Any, path: str | Path, settings: dict[str, Any]) -> None:
        from dynaip_jax import images

        kept = images.keep_png(image, path, settings, overwrite=self._overwrite)
        if kept.reason is not None:
            self.elsewhere = True
            print(f"warning: {path}: cannot be written ({kept.reason}); saved as {kept.path}", file=sys.stderr)
        _print_name(kept.path)


def _print_name(path: Path) -> None:
    """Prints a name on stdout. That nobody reads it any more, or that it cannot be shown, stops nothing."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(str(path).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
