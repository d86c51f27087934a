"""CP and PF by a vision model: is it the same subject, and is it what the prompt says?

The scale is DreamBench++'s, 0 to 4 (Peng et al., arXiv 2406.16855); the questions are our own.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dynaip_jax.errors import UserError, reason
from dynaip_jax.measuring.client import REMEDY, Cache, Endpoint, Reply, Unanswered, key_of
from dynaip_jax.measuring.sets import Case

TOP = 4  # of the scale
SIDE = 512  # pixels of a picture that is shown
ATTEMPTS = 3  # at an answer that holds a score
GIVE_UP = 5  # questions in a row without an answer, after which no more are asked
PICTURE_TOKENS = 800  # of a picture, for an estimate; servers count differently
ANSWER = 'Answer with one JSON object and nothing else: {"reason": "two sentences at most", "score": N}, where N is 0, 1, 2, 3 or 4.'
SAME = """You are shown two pictures. The first shows a subject{words}. The second was made by a program that was asked to show the very same subject
in another situation. Judge only whether it is the same one: its shape and proportions, its colours and where they are, its texture, marks
and lettering, and, of a person or an animal, the face. Pose, viewpoint, size, clothing, surroundings, light and drawing style may differ and
do not count, unless they hide what makes the subject recognisable. The quality of the picture does not count.
4: the same one beyond doubt. 3: the same one with small deviations. 2: alike, but some of what sets it apart is wrong or missing.
1: no more than something of the same kind. 0: the subject is not there, or is something else.
"""
STYLE = """You are shown two pictures. The first shows a style. The second was made by a program that was asked to show something else in that style.
Judge only whether the style is the same: brushwork or line, palette, light, texture and the way that forms are simplified. What is shown does
not count.
4: one hand could have made both. 3: the same style with small deviations. 2: alike in some respects. 1: a faint likeness. 0: another style.
"""
FOLLOWS = """You are shown a picture that a program made for this description:

{prompt}

Judge only whether the picture shows what the description says: every thing and how many of it, what it is like, what it does, how things are
placed, the surroundings and the style. Beauty does not count, nor what is shown beside that.
4: all of it. 3: all that matters, a detail is missing or wrong. 2: about half. 1: little of it. 0: none of it.
"""


class Question(NamedTuple):
    """One thing to be judged: `measure` "cp" or "pf", of picture `picture`; `messages`: as the endpoint takes them."""

    measure: str
    picture: int
    messages: list[dict[str, Any]]


class Cost(NamedTuple):
    """`asked`: questions, each with its repeats; `answered`: of them, from before; tokens that the rest is estimated to take."""

    asked: int
    answered: int
    input_tokens: int
    output_tokens: int

    def price(self, per_million: tuple[float, float]) -> float:
        """Of the rest, in the currency of the prices for a million tokens in and out."""
        return (self.input_tokens * per_million[0] + self.output_tokens * per_million[1]) / 1e6


def questions(case: Case, number: int, picture: np.ndarray, references: Sequence[np.ndarray]) -> Iterator[Question]:
    """What is to be judged of a picture uint8 `[H, W, 3]`, by its number among all: each subject, of which `references` has the first picture,
    then the prompt."""
    shown = _shown(picture)
    for subject, reference in zip(case.subjects, references, strict=True):
        words = f", called {json.dumps(subject.words, ensure_ascii=False)}" if subject.words else ""
        text = STYLE if case.kind == "style" else SAME.format(words=words)
        yield Question("cp", number, _asked(text, [_shown(reference), shown]))
    yield Question("pf", number, _asked(FOLLOWS.format(prompt=json.dumps(case.prompt, ensure_ascii=False)), [shown]))


def _asked(text: str, pictures: Sequence[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [dict(type="text", text=text + ANSWER)]
    parts += [dict(type="image_url", image_url=dict(url=picture)) for picture in pictures]
    return [dict(role="user", content=parts)]


def _shown(picture: np.ndarray) -> str:
    return data_uri(picture, SIDE)


def data_uri(picture: np.ndarray, side: int, quality: int = 90) -> str:
    """A picture uint8 `[H, W, 3]`, its longer side at most `side` pixels, as a JPEG in an address."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def score_in(text: str) -> int | None:
    """The score that an answer gives, None if it gives none, or one that is not on the scale."""
    for part in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            value = json.loads(part)["score"]
        except (ValueError, KeyError, TypeError):
            continue
        return int(value) if type(value) in (int, float) and value in range(TOP + 1) else None
    return None


def reason_in(text: str) -> str:
    """Why, as an answer says."""
    for part in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            return str(json.loads(part)["reason"])[:400]
        except (ValueError, KeyError, TypeError):
            continue
    return ""


Item = TypeVar("Item")
Made = TypeVar("Made")


def in_threads(function: Callable[[Item], Made], items: Sequence[Item], count: int) -> list[Made]:
    """`function` of every item, so many at once, in threads that end with the process, whatever they wait for. Raises what the first one
    that fails raises."""
    work: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for pair in enumerate(items):
        work.put(pair)
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                n, item = work.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((n, function(item), None))
            except BaseException as e:  # raised by the caller; nothing more is begun
                over.set()
                results.put((n, None, e))

    for _ in range(min(count, len(items))):
        threading.Thread(target=run, name="judge", daemon=True).start()
    made: dict[int, Any] = {}
    try:
        while len(made) < len(items):
            n, value, error = results.get()
            if error is not None:
                raise error
            made[n] = value
    finally:
        over.set()
    return [made[n] for n in range(len(items))]


class Verdict(NamedTuple):
    """The mean score of a question's repeats in [0, 1] (None: no repeat was answered), how many were not, and one reason."""

    score: float | None
    lost: int
    reason: str


class Judge:
    """Asks questions of an endpoint, each `repeats` times, several at once, and keeps every reply in a cache."""

    def __init__(self, endpoint: Endpoint, cache: Cache, repeats: int = 1, at_once: int = 4):
        self.endpoint, self.cache, self.repeats, self.at_once = endpoint, cache, repeats, at_once
        self._failed = 0  # questions in a row

    def ask(self, asked: Sequence[Question], step: Callable[[], object] = lambda: None) -> list[Verdict]:
        """A verdict a question. Raises `UserError` if the server refuses, or leaves too many in a row without an answer."""

        def one(question: Question) -> Verdict:
            verdict = self._verdict(question)
            step()
            return verdict

        return in_threads(one, asked, self.at_once)

    def cost(self, asked: Sequence[Question]) -> Cost:
        """What is left to be asked, and how many tokens that may take: as many as the answers that are there, on average."""
        done = sum(self._known(q, r) is not None for q in asked for r in range(self.repeats))
        rest = len(asked) * self.repeats - done
        counted = [reply for reply in self.cache.replies if reply.input_tokens]
        if counted:
            told = ([reply.input_tokens for reply in counted], [reply.output_tokens for reply in counted])
            taken = [rest * sum(tokens) // len(counted) for tokens in told]
        else:
            left = [q for q in asked for r in range(self.repeats) if self._known(q, r) is None]
            taken = [sum(map(_tokens, left)), 60 * rest]
        return Cost(len(asked) * self.repeats, done, *taken)

    def _known(self, question: Question, repeat: int) -> str | None:
        """A reply with a score that is there already."""
        for attempt in range(ATTEMPTS):
            reply = self.cache.get(key_of(self.endpoint, question.messages, repeat, attempt))
            if reply is None or score_in(reply.text) is not None:
                return None if reply is None else reply.text
        return None

    def _verdict(self, question: Question) -> Verdict:
        texts = [self._answer(question, repeat) for repeat in range(self.repeats)]
        found = [text for text in texts if text is not None]
        scores = [score_in(text) or 0 for text in found]
        mean = sum(scores) / (TOP * len(scores)) if scores else None
        return Verdict(mean, len(texts) - len(found), reason_in(found[0]) if found else "")

    def _answer(self, question: Question, repeat: int) -> str | None:
        """A reply that holds a score; None if there is none in so many attempts."""
        for attempt in range(ATTEMPTS):
            key = key_of(self.endpoint, question.messages, repeat, attempt)
            reply = self.cache.get(key) or self._asked_anew(key, question)
            if reply is None:
                return None
            if score_in(reply.text) is not None:
                return reply.text
        return None

    def _asked_anew(self, key: str, question: Question) -> Reply | None:
        if self._failed >= GIVE_UP:
            return None
        try:
            reply = self.endpoint.ask(question.messages)
        except Unanswered as e:
            self._failed += 1
            if self._failed >= GIVE_UP:
                raise UserError(
                    f"{self.endpoint.url}: no answer to {GIVE_UP} questions in a row ({reason(e)}); {REMEDY}"
                ) from e
            return None
        self._failed = 0
        self.cache.put(key, reply)
        return reply


def _tokens(question: Question) -> int:
    parts = question.messages[0]["content"]
    return sum(len(part["text"]) // 4 if part["type"] == "text" else PICTURE_TOKENS for part in parts)
