"""Shapeland: a world of drawn scenes, 64 x 64 pixels, in which everything about a picture is known exactly.

A *subject* is a shape of some class with an identity out of a continuous space: two colours, a pattern with frequency
and angle, an outline, an emblem. A *scene* puts 1 to 3 subjects of different classes on a background, in some light.
Captions name classes and as much of the scene as they are asked to, never the identity: that can only come from a reference picture.
Everything follows from a seed; edges are anti-aliased from signed distances. Axis letters: H, W pixels, s subjects.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIZE = 64
CLASSES = ("arrow", "circle", "cross", "crown", "fish", "heart", "moon", "square", "star", "triangle")
BACKGROUNDS = ("grass", "sand", "snow", "stone", "water", "wood")
LIGHTS = {"noon": (1.0, 1.0, 1.0), "dusk": (1.0, 0.88, 0.74), "night": (0.66, 0.74, 0.92)}  # factor of each channel
POSITIONS = {"left": 13.0, "middle": 32.0, "right": 51.0}  # centre of the column, pixels
PATTERNS = ("stripes", "checks", "dots", "rings")
EMBLEMS = ("none", "disc", "bar", "plus")
RADII = {1: (15.0, 18.5), 2: (11.0, 13.0), 3: (9.0, 10.5)}  # pixels, by the number of subjects
LARGE = (21.0, 26.0)  # of the one subject of a close view
COLOURS = ("red", "orange", "yellow", "lime", "green", "teal", "cyan", "azure", "blue", "violet", "magenta", "pink")
SAYABLE = ("column", "background", "light")  # what a caption may say of a scene, or leave open
SPLITS = {"train": 0, "judge": 1, "test": 2}  # no identity is in two of them


class Identity(NamedTuple):
    """The look that tells a subject from others of its class: colours RGB in [0, 1], `frequency` cycles across it, `angle` radians, `outline` its width
    in radii and `shade` its grey, `emblem_shade` the emblem's grey."""

    first: tuple[float, float, float]
    second: tuple[float, float, float]
    pattern: str
    frequency: float
    angle: float
    outline: float
    shade: float
    emblem: str
    emblem_shade: float


class Placed(NamedTuple):
    """A subject in a scene: class, identity, column, centre and radius in pixels, rotation in radians."""

    kind: str
    identity: Identity
    position: str
    x: float
    y: float
    radius: float
    rotation: float


class Scene(NamedTuple):
    """All there is to know of a picture; `texture` seeds the background's irregularities."""

    background: str
    light: str
    subjects: tuple[Placed, ...]
    texture: int


class Picture(NamedTuple):
    """`image` uint8 `[H, W, 3]`; `masks` float32 `[s, H, W]` in [0, 1]: how much of each pixel is that subject's."""

    image: np.ndarray
    masks: np.ndarray


def generator(seed: int, split: str, number: int) -> np.random.Generator:
    """The source of all randomness of item `number` of a split."""
    return np.random.default_rng((seed, SPLITS[split], number))


def sample_identity(rng: np.random.Generator) -> Identity:
    """An identity nobody has seen; its two colours can be told apart."""
    h, gap = rng.random(), rng.uniform(0.2, 0.8)
    first, second = (
        colorsys.hsv_to_rgb(hue % 1, float(rng.uniform(0.55, 1)), float(rng.uniform(0.45, 1))) for hue in (h, h + gap)
    )
    return Identity(
        first,
        second,
        pattern=str(rng.choice(PATTERNS)),
        frequency=float(rng.uniform(0.5, 1.0)),
        angle=float(rng.uniform(0, math.pi)),
        outline=float(rng.uniform(0.08, 0.14)),
        shade=float(rng.choice([rng.uniform(0, 0.15), rng.uniform(0.85, 1)])),
        emblem=str(rng.choice(EMBLEMS)),
        emblem_shade=float(rng.integers(2)),
    )


def sample_scene(
    rng: np.random.Generator,
    count: int = 1,
    *,
    subjects: Sequence[tuple[str, Identity]] | None = None,
    large: bool = False,
) -> Scene:
    """A scene of `count` subjects of different classes in different columns, fresh ones unless `subjects` (class, identity)
    are given. `large`: a close view of one subject. A count of 0 is an empty background."""
    if subjects is None:
        kinds = rng.choice(CLASSES, count, replace=False)
        subjects = [(str(kind), sample_identity(rng)) for kind in kinds]
    columns = ["middle"] if large else rng.choice(list(POSITIONS), len(subjects), replace=False)
    placed = []
    for (kind, identity), column in zip(subjects, columns, strict=True):
        radius = rng.uniform(*(LARGE if large else RADII[len(subjects)]))
        jitter, slack = (1.0 if large else 1.5), max(SIZE / 2 - radius - 2, 1)
        x = float(np.clip(POSITIONS[str(column)] + rng.uniform(-jitter, jitter), radius, SIZE - radius))
        placed.append(
            Placed(
                kind,
                identity,
                str(column),
                x=x,
                y=float(SIZE / 2 + rng.uniform(-0.4, 0.4) * slack),
                radius=float(radius),
                rotation=float(rng.uniform(-0.15, 0.15)),
            )
        )
    return Scene(
        str(rng.choice(BACKGROUNDS)), str(rng.choice(list(LIGHTS))), tuple(placed), texture=int(rng.integers(2**31))
    )


def close_view(rng: np.random.Generator, subject: Placed) -> Scene:
    """A reference picture of `subject`: large, on a background and in a light of its own."""
    return sample_scene(rng, subjects=[(subject.kind, subject.identity)], large=True)


def drawing(kind: str, number: int) -> np.ndarray:
    """A close view, uint8 `[H, W, 3]`, of a subject that no model was trained on: a reference picture of that class."""
    rng = generator(0, "test", number)
    return render(sample_scene(rng, subjects=[(kind, sample_identity(rng))], large=True)).image


def caption(scene: Scene, said: Collection[str] = SAYABLE) -> str:
    """The prompt of a scene: classes, and what is `said` of `SAYABLE`."""
    return _sentence(scene, [article(s.kind) for s in scene.subjects], said)


def description(scene: Scene, said: Collection[str] = SAYABLE) -> str:
    """The caption with each subject's look in words, as people write beside pictures: of one subject its colours, pattern and
    emblem, of several the first colour each."""
    if len(scene.subjects) == 1:
        looks = [_look(scene.subjects[0])]
    else:
        looks = [article(_hue(s.identity.first), s.kind) for s in scene.subjects]
    return _sentence(scene, looks, said)


def _look(s: Placed) -> str:
    first, second = _colour(s.identity.first), _colour(s.identity.second)
    emblem = "" if s.identity.emblem == "none" else f" and a {_grey(s.identity.emblem_shade)} {s.identity.emblem}"
    return f"{article(first, s.kind)} with {second} {s.identity.pattern}{emblem}"


def caption_words() -> list[str]:
    """All words of captions, sorted."""
    return sorted({*CLASSES, *BACKGROUNDS, *LIGHTS, *POSITIONS, *"a an and at in large on the".split()})


def vocabulary() -> list[str]:
    """All words of captions and descriptions, sorted."""
    look = {*PATTERNS, *EMBLEMS[1:], *COLOURS, *"black dark white with".split()}
    return sorted({*caption_words(), *look})


def _sentence(scene: Scene, looks: Sequence[str], said: Collection[str]) -> str:
    """The looks of a scene's subjects, each in its place, and the setting."""
    parts = [_place(s, look, "column" in said) for s, look in zip(scene.subjects, looks, strict=True)]
    background = f"on {scene.background}" if "background" in said else ""
    light = f"at {scene.light}" if "light" in said else ""
    return " ".join(filter(None, [_listed(parts), background, light]))


def article(*words: str) -> str:
    """The words with "a" or "an" before them."""
    text = " ".join(words)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _place(s: Placed, look: str, column: bool) -> str:
    if is_large(s):
        return f"a large {look.split(' ', 1)[1]}"
    if not column:
        return look
    return f"{look} {'in' if s.position == 'middle' else 'on'} the {s.position}"


def is_large(s: Placed) -> bool:
    """Whether a subject is seen close."""
    return s.radius >= LARGE[0]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [" ".join(parts[:-1]), *parts[-1:]]))


def _colour(rgb: tuple[float, float, float]) -> str:
    return f"dark {_hue(rgb)}" if max(rgb) < 0.7 else _hue(rgb)


def _hue(rgb: tuple[float, float, float]) -> str:
    return COLOURS[round(colorsys.rgb_to_hsv(*rgb)[0] * len(COLOURS)) % len(COLOURS)]


def _grey(shade: float) -> str:
    return "white" if shade > 0.5 else "black"


def render(scene: Scene) -> Picture:
    """Draws a scene; later subjects lie over earlier ones."""
    canvas = _background(scene)
    masks = np.zeros((len(scene.subjects), SIZE, SIZE), np.float32)
    for n, subject in enumerate(scene.subjects):
        top, left, look, alpha = _draw(subject)
        h, w = alpha.shape
        area = np.s_[top : top + h, left : left + w]
        canvas[area] += alpha[..., None] * (look - canvas[area])
        masks[:n][(slice(None), *area)] *= 1 - alpha
        masks[n][area] = alpha
    lit = np.clip(canvas * np.array(LIGHTS[scene.light], np.float32), 0, 1)
    return Picture(np.round(lit * 255).astype(np.uint8), masks)


def _draw(s: Placed) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Top and left of the part of the picture that a subject reaches, its colours `[h, w, 3]` there and its alpha `[h, w]`."""
    reach = s.radius * 1.15 + 1
    top, bottom = max(0, int(s.y - reach)), min(SIZE, int(s.y + reach) + 2)
    left, right = max(0, int(s.x - reach)), min(SIZE, int(s.x + reach) + 2)
    ys, xs = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
    cos, sin = math.cos(s.rotation), math.sin(s.rotation)
    u = (cos * (xs - s.x) + sin * (ys - s.y)) / s.radius
    v = (-sin * (xs - s.x) + cos * (ys - s.y)) / s.radius
    distance = _distance(_outline(s.kind), u, v) * s.radius  # pixels, negative inside

    i = s.identity
    share = _pattern(i, u, v, s.radius)[..., None]
    look = np.array(i.first, np.float32) * (1 - share) + np.array(i.second, np.float32) * share
    for alpha, shade in (
        (_emblem(i.emblem, u, v, s.radius), i.emblem_shade),
        (_inside(-distance - i.outline * s.radius), i.shade),
    ):
        look = look + alpha[..., None] * (shade - look)
    return top, left, look, _inside(distance)


def _inside(distance: np.ndarray) -> np.ndarray:
    """Share of a pixel that is inside, from its centre's signed distance in pixels."""
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _pattern(i: Identity, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Share of the second colour `[h, w]`, its edges a pixel wide."""
    cos, sin = math.cos(i.angle), math.sin(i.angle)
    a, b = cos * u + sin * v, -sin * u + cos * v
    turn = math.pi * i.frequency
    match i.pattern:
        case "stripes":
            wave = np.sin(turn * a)
        case "checks":
            wave = np.sin(turn * a) * np.sin(turn * b)
        case "dots":
            wave = np.cos(turn * a) * np.cos(turn * b) - 0.35
        case _:
            wave = np.sin(turn * np.hypot(u, v) + i.angle)
    return np.clip(0.5 + wave * radius / turn, 0, 1).astype(np.float32)


def _emblem(kind: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    match kind:
        case "disc":
            distance = np.hypot(u, v) - 0.22
        case "bar":
            distance = np.maximum(np.abs(u) - 0.36, np.abs(v) - 0.11)
        case "plus":
            distance = np.minimum(
                np.maximum(np.abs(u) - 0.32, np.abs(v) - 0.1), np.maximum(np.abs(u) - 0.1, np.abs(v) - 0.32)
            )
        case _:
            return np.zeros_like(u)
    return _inside(distance * radius)


def _distance(corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance `[h, w]` to a closed polygon `[n, 2]`, negative inside."""
    p = np.stack([u, v], -1).reshape(-1, 1, 2)
    a, b = corners, np.roll(corners, -1, axis=0)
    edge, rel = b - a, p - a
    t = np.clip((rel * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    squared = ((rel - t[..., None] * edge) ** 2).sum(-1).min(axis=1)
    above_a, above_b = p[..., 1] >= a[:, 1], p[..., 1] >= b[:, 1]
    side = edge[:, 0] * rel[..., 1] - edge[:, 1] * rel[..., 0]
    crossings = (above_a & ~above_b & (side < 0)) | (~above_a & above_b & (side > 0))
    inside = crossings.sum(axis=1) % 2 == 1
    return (np.sqrt(squared) * np.where(inside, -1, 1)).reshape(u.shape)


@cache
def _outline(kind: str) -> np.ndarray:
    """Corners `[n, 2]` of a class, within about a radius of 1; y points down."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)

    def polar(radius, start=-np.pi / 2, angles=turn):
        return np.stack([radius * np.cos(angles + start), radius * np.sin(angles + start)], -1)

    points: Any
    match kind:
        case "arrow":
            points = [
                (0, -1),
                (0.85, -0.05),
                (0.35, -0.05),
                (0.35, 0.95),
                (-0.35, 0.95),
                (-0.35, -0.05),
                (-0.85, -0.05),
            ]
        case "circle":
            points = polar(0.92)
        case "cross":
            a, b = 0.34, 0.95
            points = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]  # fmt: skip
        case "crown":
            points = [(-0.9, 0.75), (-0.95, -0.6), (-0.45, -0.05), (0, -0.85), (0.45, -0.05), (0.95, -0.6), (0.9, 0.75)]
        case "fish":
            body = polar(1, 0, np.linspace(-0.82 * np.pi, 0.82 * np.pi, 28)) * [0.66, 0.5] + [0.25, 0]
            points = [*body, (-0.95, 0.6), (-0.75, 0), (-0.95, -0.6)]
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            points = np.stack([x, -y - 2], -1) / 16.5
        case "moon":
            outer = polar(0.95, 0, np.linspace(0.28 * np.pi, 1.72 * np.pi, 28))
            inner = polar(0.72, 0, np.linspace(1.6 * np.pi, 0.4 * np.pi, 16)) + [0.42, 0]
            points = np.concatenate([outer, inner]) + [0.15, 0]
        case "square":
            points = [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
        case "star":
            points = polar(np.tile([1.0, 0.45], 5), angles=np.linspace(0, 2 * np.pi, 10, endpoint=False))
        case "triangle":
            points = [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
        case _:
            raise ValueError(f"class {kind!r}: expected one of {CLASSES}")
    return np.asarray(points, np.float32)


def _background(scene: Scene) -> np.ndarray:
    """float32 `[H, W, 3]` in [0, 1]."""
    rng = np.random.default_rng(scene.texture)
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    smooth = _noise(rng, 4)
    match scene.background:
        case "grass":
            base, change = (0.33, 0.6, 0.22), 0.10 * smooth + 0.03 * np.sin(xs * 0.5 + 3 * smooth)
        case "sand":
            base, change = (0.88, 0.77, 0.53), 0.05 * np.sin((ys + 6 * smooth) * 0.35)
        case "snow":
            base, change = (0.90, 0.93, 0.97), 0.06 * smooth
        case "stone":
            base, change = (0.52, 0.51, 0.53), 0.10 * _noise(rng, 9)
        case "water":
            base, change = (0.16, 0.42, 0.72), 0.10 * np.sin(ys * 0.45 + 1.5 * np.sin(xs * 0.1 + 6 * rng.random()))
        case _:
            base, change = (0.50, 0.31, 0.16), 0.04 * smooth - 0.16 * (xs % 16 < 2)
    return np.clip(np.array(base, np.float32) + change[..., None].astype(np.float32), 0, 1)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise `[H, W]` of about unit size, `cells` a side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
