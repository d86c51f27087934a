"""What a call accepts although it is lost or changes nothing, in lines for whoever asked for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dynaip_jax.families import words
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.sampling.conditions import Subjects
from dynaip_jax.sampling.options import SampleOptions, reference_options

LONGEST = 120  # characters of what is quoted


def notes(
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    subjects: Subjects,
    mode: str,
    given: SampleOptions,
    used: SampleOptions,
) -> list[str]:
    """Lines of one call. `mode`: where subjects may appear, from `Subjects.regions`; `given`: its options, `used`: the same, filled."""
    labels = ["prompt"] if len(prompts) == 1 else [f"prompt {n}" for n in range(1, len(prompts) + 1)]
    texts = [*zip(labels, prompts, strict=True), ("negative prompt", used.negative_prompt or "")]
    lines = [line for label, text in texts for line in _of_text(tokenizers, label, text)]
    lines += [note for mask in subjects.masks for note in mask.notes]
    lines += _of_options(given, used)
    if subjects.references:
        lines += _of_places(subjects, mode, given)
        lines += _of_references(len(subjects.references), given, used)
        if mode == "auto" and len(subjects.references) > 1:
            for label, text in zip(labels, prompts, strict=True):
                where = "" if len(prompts) == 1 else f"{label}: "
                lines += [where + doubt for doubt in words.doubts(text, subjects.words)]
    else:
        lines += _without_references(given)
    return lines


def _of_text(tokenizers: Tokenizers, label: str, text: str) -> Iterator[str]:
    for encoder, tail in tokenizers.cut(text).items():
        yield f"{label}: the {encoder} encoder takes no more; it does not see: {_short(tail)!r}"
    by_words: dict[tuple[str, ...], list[str]] = {}
    for encoder, strange in tokenizers.unknown(text).items():
        by_words.setdefault(tuple(strange), []).append(encoder)
    for lost, encoders in by_words.items():
        yield f"{label}: not in the vocabulary of {' and '.join(encoders)}: {_short(', '.join(lost))}"


def _of_options(given: SampleOptions, used: SampleOptions) -> Iterator[str]:
    if given.negative_prompt is not None and used.true_cfg == 1:
        yield "`negative_prompt`: with `true_cfg` 1 it changes nothing"


def _of_places(subjects: Subjects, mode: str, given: SampleOptions) -> Iterator[str]:
    if mode == "masks" and given.regions is not None:
        yield f"`regions` {given.regions}: `masks` say where subjects appear; it changes nothing"
    if not any(subjects.words):
        return
    if mode == "masks":
        yield "`words`: `masks` say where subjects appear; the words change nothing"
    elif mode == "none":
        yield "`words`: with `regions` none they change nothing"
    elif len(subjects.references) == 1:
        yield "`words`: one subject alone has the whole picture to itself; its words change nothing; `masks` would give it a place"


def _of_references(count: int, given: SampleOptions, used: SampleOptions) -> Iterator[str]:
    if given.merge is not None and count == 1:
        yield f"`merge` {given.merge}: with one reference it changes nothing"
    steps = used.steps or 0
    at = np.arange(steps, dtype=np.float32) / np.float32(steps)
    if not np.any((np.float32(used.image_start) <= at) & (at < np.float32(used.image_end))):
        yield (
            f"`image_start` {used.image_start} `image_end` {used.image_end}: none of {steps} steps lies in there, the references "
            f"do not act; the last begins at {at[-1]:.3g}"
        )


def _without_references(given: SampleOptions) -> Iterator[str]:
    defaults = {f.name: f.default for f in dataclasses.fields(SampleOptions)}
    for name in reference_options():
        if getattr(given, name) != defaults[name]:
            yield f"`{name}`: without a reference picture it changes nothing"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
