"""What the benchmarks print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints one line a figure, or one JSON object."""
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:30} {value}")
