"""The `dynaip` command. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax.commandline import Parser, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.sampling.options import reference_options
from dynaip_jax.version import __version__

EXAMPLES = """examples:
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

EVALUATE_EXAMPLES = """examples:
  dynaip evaluate shapeland --rows default dds-off text-only --subjects 1
      what Dynamic Decoupling changes, and what the base does without references
  dynaip evaluate shapeland --adapter adapters/mine --num 64 --json > mine.json
      all rows of an adapter of your own, on a quarter of the cases
"""


PLAN_EXAMPLES = """examples:
  dynaip plan --config configs/flux_dev_1024.py --topology v5e:4x4
      training at 1024 pixels on 16 chips of a TPU v5e
  dynaip plan --config configs/flux_dev_1024.py --topology v5e:16x16 --mesh data=16,fsdp=16 --batch 256
      the same on 256 chips; a recipe's fields are set as in train.main
  dynaip plan --config configs/flux_dev_1024.py --topology v6e:2x2 --job sample
      one picture on four chips
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="dynaip",
        description="DynaIP in JAX: pictures of your subject from a reference image and a prompt, without fine-tuning.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dynaip_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser(
        "sample",
        help="make pictures",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes pictures from a prompt and reference pictures. Options left out take the model's own defaults.",
    )
    files = p.add_argument_group("model and files")
    files.add_argument(
        "--model", type=Path, metavar="BUNDLE", help="converted base model (default: the embedded one of Shapeland)"
    )
    files.add_argument("--adapter", type=Path, metavar="DIR", help="trained adapter; without it plain text to image")
    files.add_argument(
        "--any-base", action="store_true", help="accept an adapter trained on another base of the same sizes"
    )
    files.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
    files.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices that share the work, such as tensor=4 or data=2,fsdp=4 (default: one device)",
    )
    files.add_argument(
        "--attention",
        choices=("auto", "xla", "per_head", "splash", "cudnn"),
        default="auto",
        help="kernel of the transformer (default: auto)",
    )
    files.add_argument(
        "--weights",
        choices=("full", "int8", "fp8"),
        default="full",
        help="of the transformer's blocks: 8 bits need half the memory, at an error (needs qwix; default: full)",
    )
    files.add_argument(
        "--offload-text",
        action="store_true",
        help="keep T5 in the host's memory and on the device only while it encodes (needs 9.5 GB less there for FLUX.1)",
    )
    files.add_argument(
        "--output", type=Path, required=True, metavar="OUT.png", help="the picture, or the grid of several"
    )
    files.add_argument("--overwrite", action="store_true", help="replace existing pictures")

    what = p.add_argument_group("what to make")
    what.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="give several to draw them in one batch"
    )
    what.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from (true CFG: two passes a step)")
    what.add_argument(
        "--true-cfg",
        type=float,
        metavar="X",
        help="scale of true CFG (default: the model's own, if any; else 4 with a negative prompt)",
    )
    what.add_argument("--height", type=int, metavar="PX", help="multiple of 16")
    what.add_argument("--width", type=int, metavar="PX", help="multiple of 16")
    what.add_argument("--steps", type=int, metavar="N")
    what.add_argument("--guidance", type=float, metavar="X", help="embedded guidance scale (dev models)")
    what.add_argument("--seed", type=int, metavar="N", help="image k uses seed N + k (default 0)")
    what.add_argument("--num-images", type=int, metavar="N")
    what.add_argument(
        "--cache-threshold",
        type=float,
        metavar="X",
        help="First Block Cache: steps whose first block changes less than X take the other blocks' share from before: faster, "
        "at an error (default: off)",
    )
    what.add_argument(
        "--noise", type=Path, metavar="FILE.npy", help="initial latents [b, 16, h/8, w/8] in place of a seed"
    )

    ref = p.add_argument_group("reference pictures")
    ref.add_argument(
        "--reference", type=_reference, action="append", default=[], metavar="IMG", help="a subject; repeat for more"
    )
    ref.add_argument(
        "--subject",
        type=_subject,
        action="append",
        dest="reference",
        metavar="IMG=WORDS",
        help="a subject and the words of the prompt that name it: it appears where the picture attends to them; repeat for more",
    )
    ref.add_argument(
        "--regions",
        choices=("auto", "none"),
        help="where each subject may appear: from its words, or everywhere (default: auto with --subject; masks win)",
    )
    ref.add_argument(
        "--mask",
        type=Path,
        action="append",
        default=[],
        metavar="IMG",
        help="white where that subject may appear in the output; none, or one a subject, in the same order; wins over words",
    )
    ref.add_argument(
        "--fit", choices=("pad", "crop"), help="how a reference that is not square becomes so (default pad)"
    )
    ref.add_argument("--image-scale", type=float, metavar="X", help="strength in the image branch (default 1; 0 = off)")
    ref.add_argument("--text-gain", type=float, metavar="X", help="strength in the text branch (default 0 = DDS)")
    ref.add_argument(
        "--granularity",
        type=float,
        nargs=3,
        metavar=("LOW", "MID", "HIGH"),
        help="weights of CLIP's levels (default: router)",
    )
    ref.add_argument(
        "--merge",
        choices=("sum", "concat"),
        help="several subjects: add them up, or let them compete (default: the adapter's)",
    )
    ref.add_argument(
        "--image-start", type=float, metavar="F", help="share of steps before the reference acts (default 0)"
    )
    ref.add_argument(
        "--image-end", type=float, metavar="F", help="share of steps after which it no longer acts (default 1)"
    )
    p.set_defaults(run=sample)

    p = commands.add_parser(
        "demo",
        help="one figure of what the method does, and its measurements, with the embedded model",
        description="Draws a figure with the embedded model of Shapeland (references, text only, DDS off and on, granularity,\n"
        "two subjects) and prints a short table of measurements; with a picture of your own only the figure.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--reference", type=Path, metavar="IMG", help="a drawing of your own, seen close (needs --prompt)")
    p.add_argument("--prompt", metavar="TEXT", help='what to make of it: "a heart on the left on snow at dusk"')
    p.add_argument("--output", type=Path, default=Path("demo.png"), metavar="OUT.png", help="default: demo.png")
    p.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    p.set_defaults(run=demo)

    p = commands.add_parser(
        "evaluate", help="measure how well subjects and prompts are kept", description="Measures an adapter."
    )
    worlds = p.add_subparsers(dest="world", required=True, metavar="WORLD")
    p = worlds.add_parser(
        "shapeland",
        help="drawn scenes of which everything is known",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="CP (is it the same subject?), PF (is it what the prompt says?) and CP·PF on identities and scenes that\n"
        "nobody was trained on, for the default settings and their alternatives, with 95 % intervals.",
    )
    p.add_argument(
        "--model",
        type=Path,
        metavar="BUNDLE",
        help="a base model of Shapeland, from python -m train.shapeland (default: the embedded one)",
    )
    p.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="an adapter for it (default: the embedded one, if --model is left out)",
    )
    p.add_argument("--judge", type=Path, metavar="FILE", help="the judge's weights (default: the embedded ones)")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (a wrong name lists them all)")
    p.add_argument(
        "--subjects", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], metavar="S", help="default: 1 2 3"
    )
    p.add_argument("--num", type=int, default=256, metavar="N", help="cases a row (default 256)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of cases and noise (default 0)")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.set_defaults(run=evaluate)

    p = commands.add_parser(
        "plan",
        help="does a recipe fit a TPU topology or these devices, and how fast could it be",
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compiles a recipe's real programs, for TPUs on any machine (needs libtpu: pip install 'jax[tpu]'), and prints\n"
        "memory, exchanges between chips and what the data sheet allows. Exit status 1 if it does not fit. Runs in a checkout.",
    )
    p.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="a recipe, such as configs/flux_dev_1024.py"
    )
    p.add_argument("--topology", metavar="NAME", help="of TPUs, such as v5e:4x4 (default: the devices that are here)")
    p.add_argument(
        "--mesh", metavar="AXES", help="such as data=2,fsdp=8 (default: the recipe's; for sampling tensor=-1)"
    )
    p.add_argument("--job", choices=("train", "sample"), default="train", help="default: train")
    p.add_argument(
        "--weights",
        choices=("full", "int8", "fp8"),
        default="full",
        help="when sampling: see dynaip sample (default: full)",
    )
    p.add_argument("--offload-text", action="store_true", help="when sampling: see dynaip sample")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(run=plan)
    return parser


def sample(args: argparse.Namespace) -> int:
    """`dynaip sample`."""
    options = {
        name: getattr(args, name)
        for name in (
            "negative_prompt",
            "true_cfg",
            "height",
            "width",
            "steps",
            "guidance",
            "seed",
            "num_images",
            "fit",
            "regions",
            "image_scale",
            "text_gain",
            "granularity",
            "merge",
            "image_start",
            "image_end",
            "cache_threshold",
        )
        if getattr(args, name) is not None
    }
    if not args.reference:
        for name in ("mask", *reference_options()):
            if getattr(args, name) not in (None, []):
                raise UserError(
                    f"--{name.replace('_', '-')}: needs a reference picture to act on; pass --reference IMG"
                )

    from dynaip_jax import images

    count = args.num_images or 1
    if args.noise is not None:
        options["noise"] = _load_noise(args.noise)
        count = len(options["noise"]) if options["noise"].ndim else 1
    each, count = count, count * len(args.prompt)
    outputs = [args.output]
    if count > 1:
        outputs += [args.output.with_name(f"{args.output.stem}_{k}.png") for k in range(count)]
    for path in outputs:
        images.check_png_path(path, overwrite=args.overwrite)
    references = [images.load_image(r.picture) for r in args.reference]
    if any(r.words for r in args.reference):
        options["words"] = [r.words for r in args.reference]

    import warnings

    from dynaip_jax.runtime.sharding import parse_mesh
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    model, adapter = args.model, args.adapter
    if model is None:
        from dynaip_jax.shapeland import default

        model, embedded = default.paths()
        adapter = adapter or (embedded if references else None)
        from dynaip_jax.shapeland.world import caption_words

        print(
            "note: using the embedded model of Shapeland, which knows these words: "
            f"{' '.join(caption_words())}; pass --model for another",
            file=sys.stderr,
        )
    mesh = parse_mesh(args.mesh) if args.mesh else None
    pipe = DynaIPPipeline.load(
        model,
        adapter,
        dtype=args.dtype,
        any_base=args.any_base,
        mesh=mesh,
        attention=args.attention,
        weights=args.weights,
        offload_text=args.offload_text,
    )
    with warnings.catch_warnings(action="ignore"):
        prompt = args.prompt if len(args.prompt) > 1 else args.prompt[0]
        result = pipe(prompt, references, masks=args.mask, progress=sys.stderr.isatty(), **options)
    for note in result.warnings:
        print(f"warning: {note}", file=sys.stderr)

    settings = result.settings | dict(
        program=f"dynaip_jax {__version__}",
        model=str(model),
        base=pipe.bundle.fingerprint,
        adapter=None if adapter is None else str(adapter),
        reference=[str(r.picture) for r in args.reference],
        mask=[str(m) for m in args.mask],
        noise=None if args.noise is None else str(args.noise),
    )
    if "cached_steps" in settings:
        print(f"{settings['cached_steps']} of {settings['steps']} steps from the cache", file=sys.stderr)
    if result.routing is not None:
        for subject, (low, mid, high) in zip(args.reference, result.routing, strict=True):
            print(f"{subject.picture}: routing weights low {low:.3f}, mid {mid:.3f}, high {high:.3f}", file=sys.stderr)
    seeds: list[int | None] = list(result.seeds) if result.seeds else [None] * len(result.images)
    singles = outputs[1:] if count > 1 else outputs
    for k, (image, path, seed) in enumerate(zip(result.images, singles, seeds, strict=True)):
        own = settings | dict(prompt=args.prompt[k // each], seed=seed)
        images.save_png(image, path, own, overwrite=args.overwrite)
        print(path)
    if count > 1:
        images.save_png(images.grid(result.images), args.output, settings | dict(seed=seeds), overwrite=args.overwrite)
        print(args.output)
    return 0


def demo(args: argparse.Namespace) -> int:
    """`dynaip demo`."""
    from dynaip_jax import images

    if (args.reference is None) != (args.prompt is None):
        given, missing = ("--reference", "--prompt") if args.prompt is None else ("--prompt", "--reference")
        raise UserError(f"{given}: given without {missing}; expected both, or neither; add {missing}")
    images.check_png_path(args.output, overwrite=args.overwrite)

    from dynaip_jax.shapeland import demo as figure

    figure.draw(args.output, args.reference, args.prompt, overwrite=args.overwrite)
    print(args.output)
    if args.reference is None:
        print(f"\n{figure.measures()}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`dynaip evaluate shapeland`."""
    if args.num < 1:
        raise UserError(f"--num {args.num}: expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected a number from 0 to {2**32 - 1}")

    from dynaip_jax.sampling.pipeline import DynaIPPipeline
    from dynaip_jax.shapeland import default, measure, scoring
    from dynaip_jax.storage.tensors import read_tree

    model, adapter, stored = args.model, args.adapter, []
    if model is None:
        model, embedded = default.paths()
        stored = [] if adapter else measure.retrained()
        adapter = adapter or embedded
    names = args.rows
    if names is not None:
        stored = [row for row in stored if row["name"] in names]
        names = [name for name in names if name not in {row["name"] for row in stored}]
    pipe = DynaIPPipeline.load(model, adapter)
    subjects = sorted(set(args.subjects))
    measure.check(pipe, names, subjects)
    judge = read_tree(args.judge or default.JUDGE)
    calibrations = {s: scoring.calibrate(judge, s) for s in subjects}
    rows = measure.evaluate(
        pipe, judge, names, subjects, args.seed, args.num, progress=sys.stderr.isatty(), calibrations=calibrations
    )
    rows += [row for row in stored if row["subjects"] in subjects]
    for doubt in scoring.doubts(calibrations):
        print(f"warning: {doubt}", file=sys.stderr)
    if args.json:
        import json

        known = {s: calibration._asdict() for s, calibration in calibrations.items()}
        print(json.dumps(dict(rows=rows, seed=args.seed, num=args.num, model=str(model), judge=known), indent=1))
        return 0
    print(f"The judge on true renders:\n\n{scoring.judge_table(calibrations)}\n\n{measure.table(rows)}")
    return 0


def plan(args: argparse.Namespace) -> int:
    """`dynaip plan`."""
    import importlib
    import os

    if args.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    root = args.config.resolve().parent.parent
    if not (root / "train" / "plan.py").is_file():
        raise UserError(
            f"--config {args.config}: {root} is no checkout of dynaip_jax; expected a recipe in its configs/; run plan there"
        )
    sys.path.insert(0, str(root))  # `train` is not installed: its name is too common
    recipes, recipe_plan = (importlib.import_module(f"train.{name}") for name in ("config", "plan"))
    from dynaip_jax.planner import report as reports
    from dynaip_jax.planner.topologies import devices
    from dynaip_jax.runtime.sharding import MeshConfig, make_mesh, parse_mesh

    config = recipes.override(recipes.load(args.config), args.rest)
    options: dict[str, Any] = {}
    if args.job == "sample":
        options = dict(weights=args.weights, offload_text=args.offload_text)
    elif args.weights != "full" or args.offload_text:
        raise UserError(
            "--job train: --weights and --offload-text are about sampling; leave them out or add --job sample"
        )
    usual = config.mesh if args.job == "train" else MeshConfig(data=1, fsdp=1, tensor=-1)
    mesh = make_mesh(parse_mesh(args.mesh) if args.mesh else usual, devices(args.topology))
    report = reports.make(recipe_plan.job(config, mesh, args.job, **options), mesh)
    if args.json:
        import json

        print(json.dumps(report, indent=1))
    else:
        print(reports.text(report))
    return 0 if report["fits"] else 1


class Subject(NamedTuple):
    """A reference and the words of the prompt that name it, "" for none."""

    picture: Path
    words: str


def _reference(given: str) -> Subject:
    return Subject(Path(given), "")


def _subject(given: str) -> Subject:
    picture, _, words = given.rpartition("=")
    if not picture or not words.strip():
        raise UserError(f"--subject {given}: expected IMG=WORDS, such as {given.rstrip('=')}='red star'; add the words")
    return Subject(Path(picture), words)


def _load_noise(path: Path):
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"--noise {path}: cannot be read as a NumPy array ({e}); expected a .npy file of floats") from e


def run(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` and runs its command; raises `UserError` for what it cannot take."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if rest and args.run is not plan:  # a recipe has fields of its own
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


def main() -> int:
    """Entry point of the `dynaip` script."""
    if sys.argv[1:2] != ["plan"]:  # which says how long compiling takes
        keep_compiled()
    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
