"""What the page does, apart from how it looks: forms become checked requests, and requests pictures, one after the other."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import secrets
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynaip_jax.app import controls
from dynaip_jax.app.turns import Job, Snapshot, Turns
from dynaip_jax.errors import UserError
from dynaip_jax.reading import parse_json

if TYPE_CHECKING:
    from PIL import Image

    from dynaip_jax.sampling.opening import Opened
    from dynaip_jax.sampling.pipeline import DynaIPPipeline
    from dynaip_jax.sampling.request import Request

SUBJECTS = 4
LOOKS = 4  # steps that maps are made of
KEPT = 400  # pictures; older ones are removed
NAMES = 16  # bytes of a picture's name that is drawn by chance


class Subject(NamedTuple):
    """A reference as the page sends it: the content of a picture file (None: no reference), its words, and the content of a mask's."""

    picture: bytes | None
    words: str = ""
    mask: bytes | None = None


@dataclass(frozen=True)
class Form:
    """What stands in the page: the prompt, values of controls by name, and references."""

    prompt: str
    values: Mapping[str, Any]
    subjects: Sequence[Subject] = ()


@dataclass(frozen=True)
class Drawn:
    """What a job made: files in the studio's folder, and the settings of the first picture. `told`: lines worth showing."""

    files: list[Path]
    settings: dict[str, Any]
    told: list[str]


class Studio:
    """A model that draws for a page. `folder`: where pictures are put, and nothing else is written; `most`: generations that may wait;
    `largest`: bytes of an upload."""

    def __init__(self, opened: Opened, folder: Path, most: int, largest: int):
        from dynaip_jax.sampling.pipeline import DynaIPPipeline
        from dynaip_jax.sampling.preview import Preview

        self.folder, self.most, self.largest = folder, most, largest
        self.pipe: DynaIPPipeline = DynaIPPipeline.read(opened)
        self.plain = self.pipe if self.pipe.adapter is None else self.pipe.without_adapter()
        family = self.pipe.family
        self.controls = controls.controls(self.pipe.defaults, family.multiple, takes_guidance=family.takes_guidance)
        self._preview = Preview.fit(family, self.pipe.parts.vae)
        self._turns, self._kept = Turns(most), deque[Path]()
        self._checking = threading.Lock()

    # --- forms

    def subject(self, sent: str, words: str) -> Subject:
        """A reference as the page's widget sends it: "" or JSON of "picture" and "mask", each a data address. Raises `UserError` for
        another, and for more than `largest` bytes."""
        if len(sent) > 4 * self.largest:
            raise UserError(
                f"`references`: the upload is too large; expected at most {self.largest >> 20} MiB; use a smaller file"
            )
        try:
            holds = parse_json(sent.encode()) if sent else {}
            picture, mask = (holds.get(name) for name in ("picture", "mask"))
        except (ValueError, AttributeError) as e:
            raise UserError("`references`: not as the page sends them; expected a picture file; choose it again") from e
        return Subject(self._content("references", picture), words.strip(), self._content("masks", mask))

    def _content(self, option: str, address: Any) -> bytes | None:
        """The bytes in a data address."""
        if not address:
            return None
        head, _, text = address.partition(",") if isinstance(address, str) else ("", "", "")
        if not (head.startswith("data:") and head.endswith(";base64")):
            raise UserError(f"`{option}`: not an uploaded file; expected the content of one; choose it again")
        if len(text) * 3 // 4 > self.largest:
            raise UserError(f"`{option}`: more than {self.largest >> 20} MiB; expected less; use a smaller file")
        try:
            return base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as e:
            raise UserError(f"`{option}`: the upload is damaged; expected a whole file; choose it again") from e

    def request(self, form: Form, **changes: Any) -> tuple[DynaIPPipeline, Request]:
        """The checked request of a form, and the pipeline for it. Raises `UserError` for what does not fit."""
        used = [subject for subject in form.subjects if subject.picture is not None]
        if len(used) > SUBJECTS:
            raise UserError(f"`references`: {len(used)} pictures; expected at most {SUBJECTS}; leave some out")
        for subject in form.subjects:
            if subject.picture is None and (subject.words or subject.mask):
                raise UserError(
                    "`references`: words or a mask without a picture; expected both; upload one, or clear them"
                )
        given = dict(form.values)
        if not used:
            given = {name: value for name, value in given.items() if not self._about_references(name)}
        if not form.prompt.strip():
            raise UserError("`prompt`: is empty; expected what to draw; write it")
        pipe = self.pipe if used else self.plain
        options = dataclasses.replace(controls.options(given), **changes)
        return pipe, pipe.request(
            form.prompt,
            [subject.picture for subject in used],
            masks=[subject.mask for subject in used if subject.mask],
            words=[subject.words for subject in used] if any(subject.words for subject in used) else (),
            options=options,
        )

    def _about_references(self, name: str) -> bool:
        return any(control.reference for control in self.controls if control.name == name) or name in controls.LEVELS

    # --- jobs

    def generate(self, form: Form) -> Job:
        """A job whose result is `Drawn`. Raises `UserError` for a form that does not fit, and if too many wait."""
        self._check(form)
        return self._turns.submit(lambda job: self._draw(job, *self.request(form)))

    def maps(self, form: Form) -> Job:
        """A job whose result is `Drawn`: a figure of where the references act in the first picture of a form."""
        if all(subject.picture is None for subject in form.subjects):
            raise UserError("`references`: none given; expected at least one, whose maps these are; upload one")
        self._check(form, num_images=1)
        return self._turns.submit(lambda job: self._look(job, *self.request(form, num_images=1)))

    def _check(self, form: Form, **changes: Any) -> None:
        """Raises what `request` does. Forms wait as they were sent, and one at a time is checked: a small file may hold a picture of
        hundreds of megabytes."""
        with self._checking:
            self.request(form, **changes)

    def snapshot(self, job: Job) -> Snapshot:
        """How a job stands."""
        return self._turns.snapshot(job)

    def close(self) -> None:
        """Ends all work."""
        self._turns.close()

    def _progress(self, job: Job, request: Request) -> Any:
        from dynaip_jax.sampling.progress import Progress

        height, width = request.size
        steps = request.options.steps or 0

        def view(step: int, latents: Any, expected: Any) -> None:
            job.step(step + 1, steps, self._preview(expected[0], height, width))

        return Progress(view=view)

    def _draw(self, job: Job, pipe: DynaIPPipeline, request: Request) -> Drawn:
        job.step(0, request.options.steps or 0)
        files, settings = [], []
        for part in pipe.draw(request, self._progress(job, request)):
            for k, image in enumerate(part.images):
                settings.append(part.settings_of(k))
                files.append(self._keep(image, settings[-1]))
        return Drawn(files, settings[0], request.notes)

    def _look(self, job: Job, pipe: DynaIPPipeline, request: Request) -> Drawn:
        from dynaip_jax.app.maps import squares, view
        from dynaip_jax.eval import maps
        from dynaip_jax.sampling import looking

        steps = request.options.steps or 1
        job.step(0, steps)
        look = looking.look(pipe, request, looking.evenly(LOOKS, steps), self._progress(job, request))
        figure = maps.figure([view("", look)], squares(request), look.names, request.prompts[0])
        settings = look.made.settings_of(0)
        return Drawn([self._keep(figure, dict(maps_of=settings))], settings, request.notes)

    def _keep(self, image: Image.Image, settings: dict[str, Any]) -> Path:
        """Writes a PNG of a name that nobody guesses."""
        from dynaip_jax.images import save_png

        path = self.folder / f"{secrets.token_hex(NAMES)}.png"
        try:
            save_png(image, path, settings)
        except UserError as e:
            print(e, file=sys.stderr)
            raise UserError(
                "picture: the page cannot keep it; expected room on its disk; tell who runs the page (its log says more)"
            ) from e
        self._kept.append(path)
        while len(self._kept) > KEPT:
            self._kept.popleft().unlink(missing_ok=True)
        return path

    # --- settings

    def loaded(self, content: bytes) -> tuple[str, dict[str, Any], list[str], list[str]]:
        """What a PNG says of itself: prompt, values of controls, words, and lines worth showing. Raises `UserError` for one that says nothing."""
        from dynaip_jax import images

        if len(content) > self.largest:
            raise UserError(f"`settings`: more than {self.largest >> 20} MiB; expected less; use a smaller file")
        settings = images.read_settings(content)
        prompt, words = settings.get("prompt"), settings.get("words") or []
        if not isinstance(prompt, str) or not all(isinstance(word, str) for word in words):
            raise UserError(
                "`settings`: name no prompt; expected a picture of this page or of dynaip sample; use another"
            )
        told = []
        if count := len(settings.get("reference_fingerprint") or []):
            told.append(
                f"made with {count} reference picture(s), which the file does not hold: upload them to draw it again"
            )
        return prompt, controls.values(settings, self.controls), list(words)[:SUBJECTS], told


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, one, other) of the settings in which two pictures differ, by their labels."""
    names = [name for name in (*one, *(name for name in other if name not in one)) if one.get(name) != other.get(name)]
    return [(controls.label(name), _short(one.get(name)), _short(other.get(name))) for name in names]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
