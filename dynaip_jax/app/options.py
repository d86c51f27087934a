"""Flags for the fields of `SampleOptions`, which several commands have."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import Any, get_type_hints

from dynaip_jax.commandline import argument
from dynaip_jax.sampling.options import SampleOptions

EACH = dict(image_scale=1, text_gain=1, granularity=3)  # options with so many numbers for all subjects, or for each
PICTURE, REFERENCE = "picture", "reference"  # headings in help


def with_options(cls: type[Any]) -> type[Any]:
    """The arguments `cls` and a flag for each field of `SampleOptions`, None where it is not given."""
    hints = get_type_hints(SampleOptions) | dict.fromkeys(EACH, tuple[float, ...])
    flags: list[tuple[str, Any, Any]] = []
    for f in fields(SampleOptions):
        group = REFERENCE if f.metadata["reference"] else PICTURE
        field = argument(f.metadata["doc"], default=None, usual=f.default, unit=f.metadata["unit"], group=group)
        flags.append((f.name, hints[f.name] | None, field))
    doc = dict(__doc__=cls.__doc__)
    return make_dataclass("SampleArguments", flags, bases=(cls,), frozen=True, namespace=doc)


def given_options(args: Any) -> dict[str, Any]:
    """The fields of `SampleOptions` that are given; numbers for all subjects alike, or for each of them."""
    given = {f.name: value for f in fields(SampleOptions) if (value := getattr(args, f.name)) is not None}
    for name, size in EACH.items():
        numbers = given.get(name, ())
        if len(numbers) == 1 and size == 1:
            given[name] = numbers[0]
        elif len(numbers) > size > 1 and len(numbers) % size == 0:
            given[name] = tuple(numbers[n : n + size] for n in range(0, len(numbers), size))
    return given
