"""What commands that draw are asked for: a prompt, references with their words or masks, options, a model; and the request it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynaip_jax.app import recipe
from dynaip_jax.app.opening import FILES, Loading, open_for
from dynaip_jax.app.options import PICTURE, REFERENCE
from dynaip_jax.commandline import argument, flag, parse
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions, reference_options, texts

if TYPE_CHECKING:
    import numpy as np

    from dynaip_jax.sampling.opening import Opened
    from dynaip_jax.sampling.request import Request

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


@dataclass(frozen=True)
class Asking(Loading, recipe.Sources):
    """What is to be drawn."""

    output: str | None = argument("the picture (needed)", default=None, unit="OUT.png", group=FILES)
    overwrite: bool = argument("replace existing pictures", default=False, group=FILES)

    prompt: tuple[str, ...] = argument("what to draw (needed)", default=(), unit="TEXT", group=PICTURE, repeat=True)

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


class Asked(NamedTuple):
    """A model whose weights are still to be read, and what makes checked requests of options for it."""

    opened: Opened
    request: Callable[[SampleOptions], Request]


def read(kind: type[Any], argv: Sequence[str], prog: str, examples: str) -> tuple[Any, Sequence[str], recipe.Like]:
    """The arguments of a command whose dataclass is `kind`, with those that its files stand for; the words that say the same; and
    what is to be as in a picture."""
    args, like = parse(kind, argv, prog, examples), recipe.Like()
    if args.like or args.options or args.preset:
        argv, like = recipe.complete(kind, args, argv, lambda words: parse(kind, words, prog))
        args = parse(kind, argv, prog)
    return args, argv, like


def subjects_of(args: Any, argv: Sequence[str]) -> list[Subject]:
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


def check_prompt(args: Any) -> None:
    """Raises `UserError` where a prompt or a name for the output is missing."""
    if not args.prompt:
        raise UserError("`prompt`: none given; expected at least one; pass --prompt TEXT")
    if args.output is None:
        raise UserError("`output`: none given; expected the picture's name; pass --output OUT.png")


def check_one_picture(args: Any, given: Mapping[str, Any]) -> None:
    """Raises `UserError` where a command that draws one picture at a time is asked for several."""
    check_prompt(args)
    if len(args.prompt) > 1:
        raise UserError(f"`prompt`: {len(args.prompt)} prompts; expected one; leave the others out")
    for name in ("num_images", "at_once"):
        if given.get(name, 1) != 1:
            raise UserError(f"`{name}` {given[name]}: expected 1, one picture at a time; leave it out")


def check_subjects(args: Any, given: Mapping[str, Any], subjects: Sequence[Subject]) -> None:
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


def opened(args: Any, subjects: Sequence[Subject], like: recipe.Like, noise: np.ndarray | None = None) -> Asked:
    """The model and the requests that arguments ask for; pictures are read now.
    Raises `UserError` for pictures that cannot be read and what does not fit the model, or what a picture was made with."""
    from dynaip_jax import images
    from dynaip_jax.sampling.request import make_request

    pictures = [images.load_image(subject.picture) for subject in subjects]
    like.check("references", "reference_fingerprint", [images.digest(picture) for picture in pictures])
    model = open_for(args, bool(subjects))

    def request(options: SampleOptions) -> Request:
        return make_request(
            model.model,
            args.prompt if len(args.prompt) > 1 else args.prompt[0],
            pictures,
            masks=args.mask,
            words=[subject.words for subject in subjects] if any(subject.words for subject in subjects) else (),
            native_references=args.native_reference,
            noise=noise,
            options=options,
        )

    return Asked(model, request)


def check_like(asked: Asked, request: Request, like: recipe.Like) -> None:
    """Raises `UserError` where a request is not what a picture was made with; says on stderr what is worth showing of it."""
    from dynaip_jax import images

    digests = request.natives.settings.get("native_reference_fingerprint", [])
    like.check("native_references", "native_reference_fingerprint", digests)
    like.check("masks", "mask_fingerprint", [images.digest(mask.values) for mask in request.subjects.masks])
    for option, setting in IDENTITIES:
        like.check(option, setting, asked.opened.settings.get(setting))
    for note in [*asked.opened.notes, *request.notes]:
        print(f"warning: {UserError(note).told(lambda name: FLAGS.get(name) or flag(name))}", file=sys.stderr)


def given_files(args: Any, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What the settings of a picture say of the pictures that it was made from."""
    natives = [str(file) for file in args.native_reference]
    return dict(
        reference=[str(subject.picture) for subject in subjects],
        mask=[str(mask) for mask in args.mask],
        **(dict(native_reference=natives) if natives else {}),
    )


def routing_lines(routing: Any, subjects: Sequence[Subject]) -> None:
    """Lines on stderr of what the router gave each subject's levels, if there is one."""
    if routing is not None:
        for subject, (low, mid, high) in zip(subjects, routing, strict=True):
            print(f"{subject.picture}: routing weights low {low:.3f}, mid {mid:.3f}, high {high:.3f}", file=sys.stderr)
