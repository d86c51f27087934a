"""`dynaip sample`: pictures from a prompt and reference pictures."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax import interrupts
from dynaip_jax.app import asking, recipe
from dynaip_jax.app.opening import FILES
from dynaip_jax.app.options import PICTURE, given_options, with_options
from dynaip_jax.app.saving import Saving
from dynaip_jax.commandline import argument
from dynaip_jax.errors import UserError
from dynaip_jax.sampling import naming
from dynaip_jax.sampling.options import MOST, SEEDS, SampleOptions
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
  dynaip sample --model bundles/flux-dev --adapter adapters/dynaip --jobs jobs.jsonl --steps 28
      one generation a line: {"prompt": "a dog in a garden", "references": ["dog.jpg"], "seed": 3, "output": "dog.png"}; a list that
      was stopped is gone on with by the same command
  dynaip sample ... --granularity 0 0 1         high-level look only; LOW MID HIGH replace the router's weights
  dynaip sample ... --text-gain 0.3             let some pose and light of the reference through (0 = DDS, the default)
"""
PROG = "dynaip sample"
FLAGS = asking.FLAGS


@dataclass(frozen=True)
class Arguments(asking.Asking):
    """Makes pictures from a prompt and reference pictures. Options left out take the model's own defaults."""

    output: str | None = argument(
        "the picture, or the grid of several; {prompt}, {seed}, {n}, {date} and {time} stand for what they say (needed)",
        default=None,
        unit="OUT.png",
        group=FILES,
    )
    jobs: Path | None = argument(
        "a list of generations, one a line, each with its own prompt, output, references and options; what is given here holds for "
        "lines that do not say otherwise; pictures that are there already are not drawn again",
        default=None,
        unit="JOBS.jsonl",
        group=FILES,
    )

    prompt: tuple[str, ...] = argument(
        "give several to draw them in one batch (needed)", default=(), unit="TEXT", group=PICTURE, repeat=True
    )
    random_seed: bool = argument("a seed by chance, which is said, in place of 0", default=False, group=PICTURE)
    noise: Path | None = argument(
        "initial latents [b, c, h, w] in place of a seed", default=None, unit="FILE.npy", group=PICTURE
    )
    noise_row: int | None = argument("one of the b alone, counted from 0", default=None, unit="K", group=PICTURE)


def main(argv: Sequence[str]) -> int:
    """Makes the pictures, and prints the name of each file."""
    args, argv, like = asking.read(with_options(Arguments), argv, PROG, EXAMPLES)
    if args.jobs is not None:
        from dynaip_jax.app import jobs

        return jobs.main(args, given_options(args))
    _check_needed(args)
    given, subjects = given_options(args), asking.subjects_of(args, argv)
    asking.check_subjects(args, given, subjects)
    options = SampleOptions(**given)

    from dynaip_jax import images

    noise = None if args.noise is None else _load_noise(args.noise, args.noise_row, like)
    if noise is None:
        options = _with_seed(options, args.random_seed)
    each, seed = (options.num_images or 1, options.seed or 0) if noise is None else (len(noise), None)
    if each * len(args.prompt) > MOST:
        raise UserError(f"`num_images`: {len(args.prompt)} prompts of {each} pictures; expected at most {MOST} in all")
    outputs = naming.outputs(args.output, args.prompt, each, seed, time.localtime())
    for path in outputs:
        images.check_png_path(path, overwrite=args.overwrite)
    asked = asking.opened(args, subjects, like, noise)
    request = asked.request(options)
    asking.check_like(asked, request, like)
    saving = Saving(outputs, _given_files(args, subjects), overwrite=args.overwrite)
    with interrupts.at_stake(saving.lost):
        _make(asked.opened, request, subjects, saving)
    return 1 if saving.elsewhere else 0


def _make(opened: Opened, request: Request, subjects: Sequence[asking.Subject], saving: Saving) -> None:
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
    asking.check_prompt(args)
    chosen = [name for name in ("noise", "random_seed", "seed") if getattr(args, name) not in (None, False)]
    if len(chosen) > 1:
        raise UserError(f"`{chosen[0]}`: it fixes what `{chosen[1]}` would choose; pass either")
    if args.noise_row is not None and args.noise is None:
        raise UserError("`noise_row`: no noise to take it from; pass --noise FILE.npy, or leave it out")


def _with_seed(options: SampleOptions, by_chance: bool) -> SampleOptions:
    """The options with a seed, which is said if it was drawn."""
    if by_chance:
        options = replace(options, seed=secrets.randbelow(SEEDS + 1 - (options.num_images or 1)))
        print(f"seed {options.seed}", file=sys.stderr)
    options.seeds()
    return options


def _load_noise(path: Path, row: int | None, like: recipe.Like) -> np.ndarray:
    """Initial latents `[b, c, h, w]`, or one `row` of them, of which the pipeline checks the rest."""
    import numpy as np

    from dynaip_jax import images
    from dynaip_jax.sampling.noise import read_noise

    noise = read_noise(path, row)
    like.check("noise", "noise_fingerprint", [images.digest(one) for one in noise.astype(np.float32)])
    return noise


def _given_files(args: Arguments, subjects: Sequence[asking.Subject]) -> dict[str, Any]:
    """What the settings of a picture say of the files it was made from."""
    noise = dict(noise=None if args.noise is None else str(args.noise))
    row = {} if args.noise_row is None else dict(noise_row=args.noise_row)
    return asking.given_files(args, subjects) | noise | row


def _tell(part: Generation, subjects: Sequence[asking.Subject]) -> None:
    """Lines on stderr about how the pictures were made."""
    if "cached_steps" in part.settings:
        print(f"{part.settings['cached_steps']} of {part.settings['steps']} steps from the cache", file=sys.stderr)
    asking.routing_lines(part.routing, subjects)
