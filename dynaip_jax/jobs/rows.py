"""The lines of a list of jobs: one generation each."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax import images, reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.sampling import naming
from dynaip_jax.sampling.noise import read_noise
from dynaip_jax.sampling.opening import Described
from dynaip_jax.sampling.options import SampleOptions, reference_options, shown
from dynaip_jax.sampling.request import Request, make_request

LARGEST = 1 << 28  # bytes of a list
LINE = 1 << 20  # bytes of a line
FILES = ("references", "masks", "native_references")  # names of files, one or a list of them
PLAIN = ("prompt", "words", "noise", "noise_row", "output")
OPTIONS = tuple(f.name for f in dataclasses.fields(SampleOptions))
DATED = re.compile(r"\{(date|time)\}")


class Job(NamedTuple):
    """A line of a list, as it is given: `options` of `SampleOptions` and the other arguments, with files as paths from where the command
    runs. `line`: its number, counted from 1; `output`: the picture's file in `folder`, or that of the grid of several, which may be a
    template."""

    line: int
    prompt: str | list[str]
    output: str
    folder: Path = Path()
    references: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    native_references: tuple[str, ...] = ()
    noise: str | None = None
    noise_row: int | None = None
    options: Mapping[str, Any] = {}

    def request(self, model: Described) -> Request:
        """The checked call. Raises `UserError` for what does not fit the model or each other, and for files that cannot be read."""
        noise = None if self.noise is None else read_noise(Path(self.noise), self.noise_row)
        return make_request(
            model if self.references or model.adapter is None else model._replace(adapter=None),
            self.prompt,
            [_picture(file) for file in self.references],
            masks=list(self.masks),
            words=list(self.words),
            native_references=list(self.native_references),
            noise=noise,
            options=SampleOptions(**self.options),
        )

    def outputs(self, request: Request) -> list[str]:
        """The file of the picture; of several the grid's file, then one each."""
        seed = None if request.seeds is None else request.seeds[0]
        names = naming.outputs(self.output, request.prompts, request.each, seed, None)
        return [str(self.folder / name) for name in names]

    @property
    def files(self) -> dict[str, Any]:
        """What the settings of a picture say of the files that it was made from."""
        natives = dict(native_reference=list(self.native_references)) if self.native_references else {}
        row = {} if self.noise_row is None else dict(noise_row=self.noise_row)
        return dict(reference=list(self.references), mask=list(self.masks), **natives, noise=self.noise) | row


def _picture(file: str) -> np.ndarray:
    """A reference. Lines that follow each other often have the same, which is decoded once."""
    try:
        facts = os.stat(file)
    except (OSError, ValueError):
        return images.load_image(file)  # says what is wrong
    return _decoded(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _decoded(file: str, changed: int, size: int) -> np.ndarray:
    """The picture in a file, as it was when it last changed."""
    return images.load_image(file)


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Job], dict[int, UserError]]:
    """The jobs of a JSON lines file, and what is wrong with each other line, by its number. `defaults`: options of lines that do not
    have them. Files are taken from the folder of the list. Raises `UserError` for a list that cannot be read, and for an empty one."""
    expected = 'expected lines such as {"prompt": "a cup", "output": "cup.png"}'
    try:
        lines = reading.read_bytes(path, LARGEST).splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"`jobs` {path}: cannot be read ({reason(e)}); {expected}; check the path") from e
    jobs, failures = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            jobs.append(_job(number, _object(line, expected), path.parent, defaults))
        except UserError as e:
            failures[number] = e
    if not jobs and not failures:
        raise UserError(f"`jobs` {path}: holds no line; {expected}; write one a picture")
    return jobs, failures


def _object(line: bytes, expected: str) -> dict[str, Any]:
    try:
        values = reading.parse_json(line, LINE)
    except ValueError as e:
        raise UserError(f"not JSON ({reason(e)}); {expected}; mend the line") from e
    if not isinstance(values, dict):
        raise UserError(f"a JSON {type(values).__name__}; {expected}; mend the line")
    return values


def _job(number: int, values: dict[str, Any], folder: Path, defaults: Mapping[str, Any]) -> Job:
    """A line's job. Raises `UserError` for names that are no options, and for values of another type that nobody checks later."""
    if unknown := sorted(values.keys() - {*FILES, *PLAIN, *OPTIONS}):
        listed = "model, adapter and the like belong on the command line" if unknown[0] in LOADING else LISTED
        raise UserError(f"`{unknown[0]}`: no option of a line; {listed}; correct it")
    for name in ("prompt", "output"):
        if values.get(name) is None:
            raise UserError(f"`{name}`: missing; expected one in every line; add it")
    output = _text("output", values["output"])
    if dated := DATED.search(output):
        raise UserError(
            f"`output` {output}: {dated[0]} would be another name when the list is gone on with; leave it out"
        )
    given = {name: tuple(str(folder / text) for text in _texts(name, values.get(name))) for name in FILES}
    noise, row = values.get("noise"), values.get("noise_row")
    if row is not None and (type(row) is not int or noise is None):
        raise UserError(f"`noise_row` {shown(row)}: expected a whole number, beside `noise` FILE.npy; mend it")
    options = {name: values[name] for name in OPTIONS if values.get(name) is not None}
    if noise is not None:  # it fixes what these would choose
        defaults = {name: value for name, value in defaults.items() if name not in ("seed", "num_images")}
    if not given["references"]:
        defaults = {name: value for name, value in defaults.items() if name not in reference_options()}
    return Job(
        number,
        values["prompt"],
        output,
        folder,
        words=tuple(_texts("words", values.get("words"))),
        noise=None if noise is None else str(folder / _text("noise", noise)),
        noise_row=row,
        options={**defaults, **options},
        **given,
    )


LOADING = ("model", "adapter", "lora", "loras", "dtype", "mesh", "attention", "weights", "offload_text", "any_base")
LISTED = f"expected some of {', '.join((*PLAIN, *FILES))} and the options of dynaip sample"


def _texts(name: str, value: Any) -> Iterable[str]:
    """A text or a list of texts, as a list."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    return [_text(name, item) for item in items]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise UserError(f"`{name}` {shown(value)}: expected text; mend it")
    return value
