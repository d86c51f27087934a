"""Where the words that name subjects stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynaip_jax.errors import UserError

Span = tuple[int, int]
NUMBERED = re.compile(r"(.*\S)\s*#(\d{1,6})\s*", re.DOTALL)


def find(prompt: str, phrase: str) -> list[Span]:
    """The places of a phrase as whole words, in any case and spacing; words joined by a hyphen are one word."""
    return _find(prompt, phrase, r"(?<!\w)(?<!\w-)", r"(?!\w)(?!-\w)")


def choose(prompt: str, phrases: Sequence[str]) -> list[Span]:
    """A place of its own for each phrase: those that say which (`star#2`) first, then the longest ones.

    The same words given twice take their first and their second place. Raises `UserError` for a phrase that is not in the prompt,
    or not often enough.
    """
    asked = [_numbered(prompt, phrase) for phrase in phrases]
    chosen: dict[int, Span] = {}
    for s in sorted(range(len(phrases)), key=lambda s: (asked[s][1] is None, -len(asked[s][0]))):
        text, number = asked[s]
        places = find(prompt, text)
        option = f"`words`, subject {s + 1}: its words {text!r}"
        if not places:
            raise UserError(f"{option} are not in the prompt; expected words that stand in it; change either")
        if number is not None and not 1 <= number <= len(places):
            raise UserError(
                f"{option} stand in the prompt {len(places)} time(s); there is no #{number}; choose one that there is"
            )
        wanted = places if number is None else places[number - 1 : number]
        free = [place for place in wanted if not any(overlap(place, other) for other in chosen.values())]
        if not free:
            raise UserError(
                f"{option} stand in the prompt {len(places)} time(s), all taken by other subjects; expected a place for "
                "each; name them all in the prompt, or choose other words"
            )
        chosen[s] = free[0]
    return [chosen[s] for s in range(len(phrases))]


def doubts(prompt: str, phrases: Sequence[str]) -> list[str]:
    """A line for each phrase that stands in the prompt at more places than subjects name, and does not say which is meant."""
    chosen = choose(prompt, phrases)
    lines = []
    for s, phrase in enumerate(phrases):
        text, number = _numbered(prompt, phrase)
        places = find(prompt, text)
        left = [place for place in places if not any(overlap(place, other) for other in chosen)]
        if number is None and left:
            lines.append(
                f"`words`, subject {s + 1}: {text!r} stands in the prompt {len(places)} times; #{places.index(chosen[s]) + 1} is "
                f"taken; {text}#{places.index(left[0]) + 1} would name another"
            )
        joined = [a for a, _ in _find(prompt, text, r"(?<!\w)", r"(?!\w)") if all(a != start for start, _ in places)]
        if number is None and joined:
            word = next(m[0] for m in re.finditer(r"[\w-]+", prompt) if m.start() <= joined[0] < m.end())
            lines.append(f"`words`, subject {s + 1}: {text!r} stands in {word!r} too, which is taken for another word")
    return lines


def _find(prompt: str, phrase: str, before: str, after: str) -> list[Span]:
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    places = re.finditer(f"{before}{pattern}{after}", prompt, re.IGNORECASE)
    return [m.span() for m in places] if pattern else []


def _numbered(prompt: str, phrase: str) -> tuple[str, int | None]:
    """The words of a phrase and which of their places is meant. What stands in the prompt as it is has no number."""
    numbered = NUMBERED.fullmatch(phrase)
    if numbered is None or find(prompt, phrase):
        return phrase, None
    return numbered[1], int(numbered[2])


def overlap(one: Span, other: Span) -> bool:
    """Whether two places share a character."""
    return one[0] < other[1] and other[0] < one[1]
