"""Which subjects of a picture have collapsed: regions are compared with the pictures of every subject, which a mean over the whole
picture (CLIP-I) does not do.

What is measured is the Subject Collapse Rate's (arXiv 2603.26078, of which we have read the abstract); how, is our own.
Axis letters: s subjects, r regions, d embedding, y, x patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynaip_jax.images import NEUTRAL

LEAST, MOST = 0.02, 12  # of a region: its share of the picture; of regions in a picture
ROUNDS = 20  # of k-means


def collapsed(regions: np.ndarray, subjects: np.ndarray, given: bool) -> np.ndarray:
    """Whether each subject has collapsed, bool `[s]`, from embeddings of length 1 of a picture's `regions` `[r, d]` and of the `subjects` `[s, d]`.

    A region keeps its subject if it is nearer to the subject's pictures than to those of every other, and nearer than those of any other
    subject are. `given`: region n is where subject n was to appear; otherwise each subject gets the region that makes the sum of
    likenesses largest, and one that gets none has collapsed.
    """
    from scipy.optimize import linear_sum_assignment

    count, lost = len(subjects), np.ones(len(subjects), bool)
    if not len(regions):
        return lost
    likeness = regions @ subjects.T
    between = subjects @ subjects.T - 2 * np.eye(count)
    rows, columns = (range(count), range(count)) if given else linear_sum_assignment(-likeness)
    for r, s in zip(rows, columns, strict=True):
        others = np.delete(likeness[r], s)
        lost[s] = likeness[r, s] <= max(others.max(initial=-1), between[s].max(initial=-1))
    return lost


def found_regions(patches: np.ndarray, subjects: int) -> list[np.ndarray]:
    """Regions of a picture, bool `[y, x]` each, from embeddings `[y, x, d]` of its patches: connected parts of clusters, without the cluster
    that fills most of the border, the largest first. Two alike subjects that do not touch are two regions."""
    from scipy.ndimage import label

    height, width, depth = patches.shape
    labels = clusters(patches.reshape(-1, depth), subjects + 1).reshape(height, width)
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    background = np.bincount(border, minlength=subjects + 1).argmax()
    parts: list[np.ndarray] = []
    for k in range(subjects + 1):
        if k != background:
            named, count = label(labels == k)
            parts += [named == n for n in range(1, count + 1)]
    large = [part for part in parts if part.sum() >= LEAST * height * width]
    return sorted(large, key=lambda part: -part.sum())[:MOST]


def clusters(points: np.ndarray, count: int) -> np.ndarray:
    """k-means: the cluster of each of `points` `[n, d]`, int `[n]`. The first centre is the point farthest from the mean, the next the one
    farthest from all centres, and so on: the same for the same points."""
    centres = points[np.linalg.norm(points - points.mean(axis=0), axis=1).argmax()][None]
    while len(centres) < min(count, len(points)):
        distance = np.linalg.norm(points[:, None] - centres[None], axis=-1).min(axis=1)
        centres = np.concatenate([centres, points[distance.argmax()][None]])
    labels = np.zeros(len(points), int)
    for _ in range(ROUNDS):
        new = np.linalg.norm(points[:, None] - centres[None], axis=-1).argmin(axis=1)
        if (new == labels).all() and _:
            break
        labels = new
        centres = np.stack(
            [points[labels == k].mean(axis=0) if (labels == k).any() else centres[k] for k in range(len(centres))]
        )
    return labels


def cut_out(picture: np.ndarray, regions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The box around each region of a picture uint8 `[H, W, 3]`, what lies outside the region in grey, in the middle of a square. Regions: bool
    `[y, x]` of any size, over the whole picture."""
    height, width = picture.shape[:2]
    cut = []
    for region in regions:
        rows = np.arange(height) * region.shape[0] // height
        columns = np.arange(width) * region.shape[1] // width
        mask = region[rows][:, columns]
        ys, xs = np.nonzero(mask)
        if not len(ys):
            cut.append(np.full((16, 16, 3), NEUTRAL, np.uint8))
            continue
        box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        part = np.where(mask[box][..., None], picture[box], np.array(NEUTRAL, np.uint8))
        side = max(part.shape[:2])
        side += side // 6  # measures cut off a margin
        square = np.full((max(side, 16), max(side, 16), 3), NEUTRAL, np.uint8)
        top, left = ((square.shape[0] - n) // 2 for n in part.shape[:2])
        square[top : top + part.shape[0], left : left + part.shape[1]] = part
        cut.append(square)
    return cut
