"""How well subjects and prompts are kept, measured in Shapeland on identities and scenes that nobody was trained on.

A *case* is a prompt, a close view of each of its subjects, and noise; all rows are measured on the same cases.

- PF (prompt following): share of what the prompt says that the judge finds in the picture: each class, each class in its
  column, the background, the number of subjects; 2 s + 2 things in all.
- CP (concept preservation): cosine of the judge's identity embeddings of the picture and of a true render of the same
  subjects in another pose, mean over the subjects, in units in which two true renders of one identity get 1 on average
  and those of two identities of one class get 0. It is not clipped.
- CP·PF: their product in each case.

Axis letters: n cases, s subjects, k classes, H, W pixels, i image tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import jax
import numpy as np
from PIL import Image, ImageFilter

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.conditions import Conditions, adapter_options, reference_pixels
from dynaip_jax.sampling.denoise import generate
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland import world as synthetic
from dynaip_jax.shapeland.judge import Verdict, judge
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES, POSITIONS, SIZE, Scene
from dynaip_jax.types import ImagePrompt

SUBJECTS = (1, 2, 3)
BATCH = 64  # cases sampled at once
RESAMPLES = 1000  # of the bootstrap
HELD_OUT, FIRST_HELD_OUT = 512, 1_000_000  # test scenes that calibrate the judge: how many, from which on
TRUSTED = 0.98  # accuracy below which the judge's word is not worth much
MARGIN = 3  # pixels by which given regions reach beyond the subject


@dataclass(frozen=True)
class Setting:
    """What a row of the table does. `source`: where its pictures come from: the model with or without image prompt, the
    references themselves, or a true render. The rest are options of sampling (see `DynaIPPipeline`); `region`: "auto" binds
    each subject to the name of its class in the prompt, "given" is the truth; `double_only`: no injection into single blocks."""

    asks: str
    subjects: tuple[int, ...] = SUBJECTS
    source: Literal["adapter", "text", "references", "truth"] = "adapter"
    image_scale: float = 1.0
    text_gain: float = 0.0
    granularity: tuple[float, float, float] | None = None
    region: Literal["auto", "given", "none"] = "auto"
    merge: Literal["sum", "concat"] | None = None
    double_only: bool = False

    @property
    def sampled(self) -> bool:
        return self.source in ("adapter", "text")


SEVERAL = (2, 3)
ROWS = {
    "default": Setting("DDS on, router, image scale 1, regions found by class names"),
    "text-only": Setting("anchor: the base model, without references", source="text"),
    "reference-pasted": Setting("anchor: the references themselves, side by side", source="references"),
    "true-render": Setting("anchor: what there was to draw", source="truth"),
    "dds-off": Setting("is it better to keep the text branch?", text_gain=1.0),
    "dds-half": Setting("or half of it?", text_gain=0.5),
    "text-branch-alone": Setting("what does the text branch carry?", image_scale=0.0, text_gain=1.0),
    "low-layer": Setting("what does CLIP's low layer carry?", granularity=(1, 0, 0)),
    "mid-layer": Setting("and the middle one?", granularity=(0, 1, 0)),
    "last-layer": Setting("and the last one?", granularity=(0, 0, 1)),
    "equal-weights": Setting("is the router better than no router?", granularity=(1, 1, 1)),
    "granularity-low": Setting("weights pushed to the low layer", granularity=(3, 1, 0)),
    "granularity-high": Setting("weights pushed to the last layer", granularity=(0, 1, 3)),
    "double-blocks": Setting("are the single blocks needed?", double_only=True),
    "regions-none": Setting("without regions", subjects=SEVERAL, region="none"),
    "regions-given": Setting("true regions", subjects=SEVERAL, region="given"),
    "concat": Setting("references compete instead of adding up", subjects=SEVERAL, merge="concat"),
    "scale-half": Setting("image scale 0.5", image_scale=0.5),
    "scale-high": Setting("image scale 1.5", image_scale=1.5),
}


class Row(TypedDict):
    """One line of the table, as JSON has it; `*_ci`: 95 % bootstrap interval over cases. `asks`, `seed` and `steps`: only of
    what was trained differently (`retrained`)."""

    name: str
    subjects: int
    n: int
    cp: float
    pf: float
    cp_pf: float
    cp_ci: list[float]
    pf_ci: list[float]
    cp_pf_ci: list[float]
    asks: NotRequired[str]
    seed: NotRequired[int]
    steps: NotRequired[int]


class Truth(NamedTuple):
    """What is to be seen in pictures; `position` is -1 for classes that are not there."""

    position: np.ndarray  # [n, k]
    background: np.ndarray  # [n]
    number: np.ndarray  # [n], of subjects


class Calibration(NamedTuple):
    """The judge on true renders of one number of subjects: mean cosine between two renders of one identity (`same`) and of
    two identities of a class (`other`); `accuracy` by what is asked."""

    same: float
    other: float
    accuracy: dict[str, float]


class Cases(NamedTuple):
    """Cases 0 to n - 1 of one number of subjects. Pictures are uint8."""

    scenes: list[Scene]  # the prompts'
    references: np.ndarray  # [n, s, H, W, 3], close views
    reposed: np.ndarray  # [n, H, W, 3], the same subjects in the same columns, all else drawn again
    renders: np.ndarray  # [n, H, W, 3], the prompts drawn: what could be asked for at most
    masks: np.ndarray  # float32 [n, s, H, W], where subjects are in the prompts' scenes


def evaluate(
    pipe: DynaIPPipeline,
    judge_params: Any,
    rows: Sequence[str] | None = None,
    subjects: Sequence[int] = SUBJECTS,
    seed: int = 0,
    num: int = 256,
    progress: bool = False,
    calibrations: dict[int, Calibration] | None = None,
) -> list[Row]:
    """Measures `rows` (names in `ROWS`; None: all that the pipeline can do) with each number of `subjects` they apply to, on
    `num` cases each. `calibrations`: from `calibrate`, if known. Raises `UserError` for rows that do not fit the pipeline."""
    names = check(pipe, rows, subjects)
    jobs = [(s, name) for s in subjects for name in names if s in ROWS[name].subjects]
    found = []
    with _bar(sum(ROWS[name].sampled for _, name in jobs) * len(list(_batches(num))), progress) as done:
        for s in dict.fromkeys(s for s, _ in jobs):
            known = (calibrations or {}).get(s) or calibrate(judge_params, s)
            cases = make_cases(s, seed, num)
            for name in (name for t, name in jobs if t == s):
                pictures = draw(pipe, cases, ROWS[name], seed, done)
                cp, pf = scores(judge_params, pictures, cases, known)
                found.append(_row(name, s, cp, pf))
    return found


def check(pipe: DynaIPPipeline, rows: Sequence[str] | None, subjects: Sequence[int]) -> list[str]:
    """The names of `rows`, or of all that `pipe` can do. Raises `UserError` for what it cannot."""
    size = [pipe.defaults[k] for k in ("height", "width")]
    if size != [SIZE, SIZE]:
        raise UserError(
            f"--model {pipe.bundle.path}: draws {size[1]} x {size[0]} pixels; expected a model of Shapeland, {SIZE} x {SIZE}; "
            "leave --model out"
        )
    if rows is None:
        return [name for name, setting in ROWS.items() if _lacks(pipe, setting) is None]
    for name in rows:
        if name not in ROWS:
            raise UserError(f"--rows {name}: no such row; expected some of {', '.join(ROWS)}")
        lack = _lacks(pipe, ROWS[name])
        if lack is not None:
            raise UserError(f"--rows {name}: {lack}")
        if not set(ROWS[name].subjects) & set(subjects):
            raise UserError(
                f"--rows {name}: is about {_listed(ROWS[name].subjects)} subjects, --subjects {_listed(subjects)}; "
                "pass numbers that both have"
            )
    return list(dict.fromkeys(rows))


def _lacks(pipe: DynaIPPipeline, setting: Setting) -> str | None:
    """Why `pipe` cannot do a row; None if it can."""
    if setting.source != "adapter":
        return None
    if pipe.adapter is None:
        return "needs an adapter, and none is loaded; pass --adapter DIR"
    if setting.double_only and pipe.adapter[0].blocks != "all":
        return "this adapter has no injection into single blocks that could be left out; leave the row out"
    return None


# --- cases


def make_cases(subjects: int, seed: int, num: int) -> Cases:
    """The cases of a seed: each is a function of (seed, its number, the number of subjects) alone."""
    scenes, references, reposed, renders, masks = [], [], [], [], []
    for n in range(num):
        rng = synthetic.generator(seed, "test", n)
        scene = synthetic.sample_scene(rng, subjects)
        close = [synthetic.render(synthetic.close_view(rng, s)).image for s in scene.subjects]
        fresh = repose(rng, scene)._replace(background=scene.background, light=scene.light)
        scenes.append(scene)
        references.append(np.stack(close))
        renders.append(synthetic.render(fresh).image)
        reposed.append(synthetic.render(repose(rng, scene)).image)
        masks.append(synthetic.render(scene).masks)
    return Cases(scenes, *(np.stack(x) for x in (references, reposed, renders, masks)))


def repose(rng: np.random.Generator, scene: Scene) -> Scene:
    """The subjects of a scene in their columns, all else drawn again: places, turns, light, background."""
    subjects = [(s.kind, s.identity) for s in scene.subjects]
    while True:
        again = synthetic.sample_scene(rng, subjects=subjects)
        if [s.position for s in again.subjects] == [s.position for s in scene.subjects]:
            return again


def truth(scenes: Sequence[Scene]) -> Truth:
    """What the judge should say of scenes."""
    position = np.full((len(scenes), len(CLASSES)), -1)
    for n, scene in enumerate(scenes):
        for s in scene.subjects:
            position[n, CLASSES.index(s.kind)] = list(POSITIONS).index(s.position)
    background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])
    return Truth(position, background, np.array([len(scene.subjects) for scene in scenes]))


# --- pictures


def draw(
    pipe: DynaIPPipeline, cases: Cases, setting: Setting, seed: int, done: Callable[[], object] = lambda: None
) -> np.ndarray:
    """A row's pictures of the cases, uint8 `[n, H, W, 3]`; calls `done` after each sampled batch."""
    if setting.source == "truth":
        return cases.renders
    if setting.source == "references":
        return np.stack([_pasted(r) for r in cases.references])
    pictures = []
    for some, kept in _batches(len(cases.scenes)):
        pictures.append(_sample(pipe, cases, setting, seed, some)[:kept])
        done()
    return np.concatenate(pictures)


def _pasted(references: np.ndarray) -> np.ndarray:
    """References `[s, H, W, 3]` in one picture, each small enough for its column; what is above and below goes on as its
    edges are."""
    edges = np.linspace(0, SIZE, len(references) + 1).round().astype(int)
    columns = []
    for reference, width in zip(references, np.diff(edges), strict=True):
        small = np.asarray(Image.fromarray(reference).resize((width, width), Image.Resampling.BICUBIC))
        above = (SIZE - width) // 2
        columns.append(np.pad(small, ((above, SIZE - width - above), (0, 0), (0, 0)), mode="edge"))
    return np.concatenate(columns, axis=1)


def _sample(pipe: DynaIPPipeline, cases: Cases, setting: Setting, seed: int, some: np.ndarray) -> np.ndarray:
    """uint8 `[b, H, W, 3]` of the cases whose numbers are in `some`, with the bundle's own defaults."""
    family = pipe.family
    scenes = [cases.scenes[n] for n in some]
    prompts = [synthetic.caption(scene) for scene in scenes]
    used = SampleOptions(
        image_scale=setting.image_scale,
        text_gain=setting.text_gain,
        granularity=setting.granularity,
        merge=setting.merge,
    ).filled(pipe.defaults, multiple=family.multiple, takes_guidance=family.takes_guidance)
    image_prompt = None
    if setting.source == "adapter":
        image_prompt = _image_prompt(pipe, cases, setting, used, some, prompts)
    if setting.merge is not None:
        family = family.with_injection(dataclasses.replace(family.injection, merge=setting.merge))
    negative = [] if used.negative_prompt is None else [used.negative_prompt] * len(prompts)
    conditions = Conditions(pipe.encode_text(prompts + negative), image_prompt)
    noise = _noise(seed, some, family.latent(SIZE, SIZE))
    return images.to_uint8(generate(pipe.parts._replace(family=family), conditions, noise, used).pictures)


def _image_prompt(
    pipe: DynaIPPipeline, cases: Cases, setting: Setting, used: SampleOptions, some: np.ndarray, prompts: list[str]
) -> ImagePrompt:
    """The references of the cases `some`, as a row of the table uses them."""
    size = pipe.family.config("clip_vision").image_size
    pixels = np.stack([reference_pixels(list(cases.references[n]), size, used.fit) for n in some])
    places: dict[str, Any] = {}
    if pixels.shape[1] > 1 and setting.region == "auto":
        names = [[s.kind for s in cases.scenes[n].subjects] for n in some]
        places["words"] = np.stack([pipe.tokenizers.words(p, n) for p, n in zip(prompts, names, strict=True)])
    if pixels.shape[1] > 1 and setting.region == "given":
        places["region"] = np.stack([images.regions(_grown(cases.masks[n]), pipe.family.multiple) for n in some])
    image_prompt, _ = pipe.image_prompt(pixels, **adapter_options(used, **places))
    if not setting.double_only:
        return image_prompt
    first_single = pipe.family.sites.double
    return image_prompt._replace(
        image_gain=image_prompt.image_gain.at[first_single:].set(0),
        text_gain=image_prompt.text_gain.at[first_single:].set(0),
    )


def _noise(seed: int, some: np.ndarray, latent: tuple[int, int, int]) -> jax.Array:
    """Initial latents `[b, c, h, w]`, each a function of (seed, number of the case)."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), some)
    return jax.vmap(lambda key: jax.random.normal(key, latent))(keys)


def _grown(masks: np.ndarray) -> list[np.ndarray]:
    """Masks `[s, H, W]`, each a little wider."""
    wider = ImageFilter.MaxFilter(2 * MARGIN + 1)
    grown = [Image.fromarray(np.round(m * 255).astype(np.uint8)).filter(wider) for m in masks]
    return [np.asarray(m, np.float32) / 255 for m in grown]


# --- judging


def read(judge_params: Any, pictures: np.ndarray) -> Verdict:
    """The verdict on uint8 `[n, H, W, 3]`, as NumPy arrays."""
    parts = [
        jax.tree.map(lambda x, k=kept: x[:k], judge(judge_params, pictures[some]))
        for some, kept in _batches(len(pictures))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def calibrate(judge_params: Any, subjects: int) -> Calibration:
    """What the judge makes of `HELD_OUT` true scenes of so many subjects, each drawn in two poses."""
    scenes = []
    for n in range(FIRST_HELD_OUT, FIRST_HELD_OUT + HELD_OUT):
        rng = synthetic.generator(0, "test", n)
        scene = synthetic.sample_scene(rng, subjects)
        scenes += [scene, repose(rng, scene)]
    verdict = read(judge_params, np.stack([synthetic.render(scene).image for scene in scenes]))
    asked = truth(scenes)
    there = asked.position >= 0
    same, other, won = [], [], []
    for k in range(len(CLASSES)):
        of_class = verdict.identity[there[:, k], k]  # the two poses of a scene follow each other
        cosines = of_class[::2] @ of_class[1::2].T
        own = np.diag(cosines)
        others = cosines[~np.eye(len(own), dtype=bool)].reshape(len(own), -1)
        same.append(own)
        other.append(others.mean(axis=1))
        won.append((own[:, None] > others).mean(axis=1))
    return Calibration(
        same=float(np.concatenate(same).mean()),
        other=float(np.concatenate(other).mean()),
        accuracy=dict(
            classes=float(((verdict.present > 0) == there).all(axis=1).mean()),
            position=float((verdict.position.argmax(-1) == asked.position)[there].mean()),
            background=float((verdict.background.argmax(-1) == asked.background).mean()),
            count=float((verdict.number.argmax(-1) == asked.number).mean()),
            identity=float(np.concatenate(won).mean()),
        ),
    )


def scores(judge_params: Any, pictures: np.ndarray, cases: Cases, known: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """CP and PF, `[n]` each, of one picture `[n, H, W, 3]` a case."""
    asked = truth(cases.scenes)
    there = asked.position >= 0
    seen, target = read(judge_params, pictures), read(judge_params, cases.reposed)
    cosine = np.einsum("nkd,nkd->nk", seen.identity, target.identity)
    cp = ((cosine * there).sum(axis=1) / asked.number - known.other) / (known.same - known.other)
    present = (seen.present > 0) & there
    in_place = present & (seen.position.argmax(-1) == asked.position)
    met = [
        present.sum(axis=1),
        in_place.sum(axis=1),
        seen.background.argmax(-1) == asked.background,
        seen.number.argmax(-1) == asked.number,
    ]
    return cp, np.sum(met, axis=0) / (2 * asked.number + 2)


def doubts(calibrations: dict[int, Calibration]) -> list[str]:
    """A line for each thing that the judge does not see well enough in true renders."""
    return [
        f"the judge reads {what} of {s} subject{'s' * (s > 1)} right in {share:.1%} of true renders, less than {TRUSTED:.0%}"
        for s, known in calibrations.items()
        for what, share in known.accuracy.items()
        if what != "identity" and share < TRUSTED
    ]


def _row(name: str, subjects: int, cp: np.ndarray, pf: np.ndarray) -> Row:
    values = np.stack([cp, pf, cp * pf])
    n = len(cp)
    means = values[:, np.random.default_rng(0).integers(n, size=(RESAMPLES, n))].mean(axis=-1)
    intervals = np.percentile(means, [2.5, 97.5], axis=1).T.round(4).tolist()
    cp_, pf_, both = values.mean(axis=1).round(4).tolist()
    return Row(
        name=name, subjects=subjects, n=n, cp=cp_, pf=pf_, cp_pf=both,
        cp_ci=intervals[0], pf_ci=intervals[1], cp_pf_ci=intervals[2],
    )  # fmt: skip


# --- reports


def retrained() -> list[Row]:
    """The stored rows of adapters that were trained differently; none if there is no such file."""
    return json.loads(default.RETRAINED.read_text())["rows"] if default.RETRAINED.is_file() else []


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, 95 % intervals in brackets."""
    lines: list[Sequence[str]] = [("row", "subjects", "cases", "CP", "", "PF", "", "CP·PF", "", "asks")]
    for row in rows:
        cells = [
            text
            for value, (low, high) in (
                (row["cp"], row["cp_ci"]), (row["pf"], row["pf_ci"]), (row["cp_pf"], row["cp_pf_ci"])
            )
            for text in (f"{value:.3f}", f"[{low:.3f}, {high:.3f}]")
        ]  # fmt: skip
        asks = ROWS[row["name"]].asks if row["name"] in ROWS else row.get("asks", "trained differently")
        lines.append((row["name"], str(row["subjects"]), str(row["n"]), *cells, asks))
    return _aligned(lines)


def judge_table(calibrations: dict[int, Calibration]) -> str:
    """The judge on true renders as aligned text: its accuracies, and the cosines that CP takes for 1 and 0."""
    names = list(next(iter(calibrations.values())).accuracy)
    lines: list[Sequence[str]] = [("subjects", *names, "cos same", "cos other")]
    lines += [
        (str(s), *(f"{c.accuracy[n]:.3f}" for n in names), f"{c.same:.3f}", f"{c.other:.3f}")
        for s, c in calibrations.items()
    ]
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], object]]:
    """What to call after each of `total` batches; shows a bar if `show`."""
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="sampling", unit="batch") as bar:
        yield bar.update


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _batches(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of batches of one size, and how many of each are new: the last batch is filled up with the last index."""
    size = min(BATCH, count)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
