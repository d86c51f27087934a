"""The options of a generation as controls of a page: which there are, what they are called, and the way back from what they say.

Everything is read off `SampleOptions`; this file adds how far sliders reach. Imports no library of pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions

LEFT_OUT = ("at_once", "block_scale")  # of the machine, and of one adapter
ROUTER = "router"  # the choice of a granularity that is left to the router
LEVELS = ("granularity_low", "granularity_mid", "granularity_high")
MODEL = "model's own"  # the choice that stands for None
REACH: dict[str, tuple[float, float, float]] = dict(  # of sliders: least, most, step
    true_cfg=(1, 10, 0.1),
    steps=(1, 60, 1),
    guidance=(0, 10, 0.1),
    num_images=(1, 4, 1),
    cache_threshold=(0, 0.5, 0.01),  # 0: off
    image_scale=(0, 2, 0.05),
    text_gain=(0, 1, 0.05),
    image_start=(0, 0.95, 0.05),
    image_end=(0.05, 1, 0.05),
)
FIELDS = {f.name: f for f in dataclasses.fields(SampleOptions) if f.name not in LEFT_OUT}
LABELS = dict(
    prompt="Prompt",
    references="Reference",
    words="Words",
    masks="Mask",
    true_cfg="True CFG",
    regions="Where subjects appear",
)  # where they are more than the name of the option


class Control(NamedTuple):
    """One control: the option it is about, `kind` "slider", "text", "number", "choice" or "switch", its default, and what else it needs:
    `reach` of a slider, `choices`."""

    name: str
    kind: str
    value: Any
    doc: str
    reference: bool
    reach: tuple[float, float, float] | None = None
    choices: tuple[str, ...] = ()


def label(option: str) -> str:
    """What the page calls an option."""
    return LABELS.get(option, option.replace("_", " ").capitalize())


def controls(defaults: Mapping[str, Any], multiple: int, *, takes_guidance: bool) -> list[Control]:
    """A control for each option that the model has, three for the granularity. `defaults`: of the model; `multiple`: of picture sizes."""
    found = []
    for name, field in FIELDS.items():
        if name == "guidance" and not takes_guidance:
            continue
        doc, reference = field.metadata["doc"], field.metadata["reference"]
        value = defaults.get(name) if field.default is None else field.default
        if name == "granularity":
            found.append(Control(name, "switch", True, "left to the router", reference))
            found += [Control(level, "slider", 1.0, doc, reference, (0, 1, 0.05)) for level in LEVELS]
        elif name in ("height", "width"):
            reach = (multiple, max(2 * int(defaults[name]), multiple), multiple)
            found.append(Control(name, "slider", value, doc, reference, reach))
        elif name in REACH:
            least = REACH[name][0]
            found.append(Control(name, "slider", least if value is None else value, doc, reference, REACH[name]))
        elif "choices" in field.metadata:
            own = () if field.default is not None else (MODEL,)
            found.append(
                Control(name, "choice", value or MODEL, doc, reference, choices=(*own, *field.metadata["choices"]))
            )
        else:
            kind = "number" if field.metadata["kind"] == "count" else "text"
            found.append(
                Control(name, kind, (0 if kind == "number" else "") if value is None else value, doc, reference)
            )
    return found


def options(values: Mapping[str, Any]) -> SampleOptions:
    """The options that the values of controls say. Raises `UserError` for values that are none, whatever a request holds."""
    given: dict[str, Any] = {}
    for name in FIELDS:
        value = values.get(name)
        if value is None or value == MODEL or (name == "negative_prompt" and value == ""):
            continue
        if name == "cache_threshold" and value == 0:
            continue
        if name == "granularity":
            if value is not True:
                given[name] = tuple(values.get(level) for level in LEVELS)
            continue
        whole = FIELDS[name].metadata["kind"] == "count"
        given[name] = int(value) if whole and isinstance(value, float) and value.is_integer() else value
    return SampleOptions(**given)


def values(settings: Mapping[str, Any], known: list[Control]) -> dict[str, Any]:
    """What the controls are to say for the settings of a PNG; a control that these do not speak of gets its default. Raises `UserError`
    for settings that no options are."""
    found = {control.name: control.value for control in known}
    for name in FIELDS.keys() & settings.keys() & found.keys():
        value = settings[name]
        if name == "granularity":
            rows = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
            found[name] = rows is None
            if rows is not None:
                given = SampleOptions(granularity=tuple(rows) if isinstance(rows, list) else rows).granularity
                found |= dict(zip(LEVELS, given or (), strict=True))
        elif value is not None and not (name == "regions" and value == "masks"):
            found[name] = getattr(SampleOptions(**_alone(name, value)), name)
            if isinstance(found[name], tuple):
                found[name] = found[name][0]
    if "true_cfg" in found and settings.get("true_cfg") is None:
        found["true_cfg"] = 1.0
    return found


def _alone(name: str, value: Any) -> dict[str, Any]:
    """An option whose partner lets any value pass that has one."""
    if isinstance(value, list):
        value = tuple(value)
    if name == "seed" and isinstance(value, tuple):
        if not value:
            raise UserError("`seed`: none given; expected a number")
        value = value[0]
    return {name: value}
