"""Names of pictures: of each of several, and from a template such as `{prompt}_{seed}.png`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynaip_jax.errors import UserError

FIELD = re.compile(r"\{([a-z_]+)\}")
FIELDS = ("prompt", "seed", "n", "date", "time")
LONGEST = 40  # characters of a prompt


def outputs(
    output: str, prompts: Sequence[str], each: int, seed: int | None, now: time.struct_time | None
) -> list[str]:
    """The file of the picture; of several the grid's file, then one each. First come all pictures of the first prompt.

    `each`: pictures a prompt; `seed`: of the first, None with noise of one's own. `{seed}` and the like in the name stand for what they
    say (None for `now`: no date and no time); where pictures do not get names of their own by it, they are numbered. Raises `UserError` for a field that there is not.
    """
    count = each * len(prompts)
    dated = {} if now is None else dict(date=time.strftime("%Y-%m-%d", now), time=time.strftime("%H%M%S", now))
    first = "noise" if seed is None else str(seed)
    if count == 1:
        return [_filled(output, dated | dict(prompt=_word(prompts[0]), seed=first, n="0"))]
    whole = _word(prompts[0]) if len(prompts) == 1 else f"{len(prompts)}_prompts"
    seeds = first if seed is None or each == 1 else f"{seed}-{seed + each - 1}"
    grid = _filled(output, dated | dict(prompt=whole, seed=seeds, n="grid"))
    singles: list[str] = []
    for k in range(count):
        own = first if seed is None else str(seed + k % each)
        singles.append(_filled(output, dated | dict(prompt=_word(prompts[k // each]), seed=own, n=str(k))))
    if len({grid, *singles}) <= count:
        path = Path(grid)
        singles = [str(path.with_name(f"{path.stem}_{k}.png")) for k in range(count)] if path.name else []
    return [grid, *singles]


def _filled(output: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(
                f"`output` {output}: {match[0]} is no field; expected some of {', '.join(f'{{{name}}}' for name in FIELDS)}"
            )
        return values[match[1]]

    return FIELD.sub(value, output)


def _word(text: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[^\w-]+", "_", text)[:LONGEST].strip("_") or "prompt"
