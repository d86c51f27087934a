"""Compiled programs are kept on disk, so that a command's next run starts sooner."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled() -> None:
    """Has JAX keep what takes a second or longer to compile in the folder that `JAX_COMPILATION_CACHE_DIR` names (empty: not at
    all), by default `$XDG_CACHE_HOME/dynaip_jax/compiled`. Does not import JAX, which reads the variable when it is imported."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.setdefault(VARIABLE, str(Path(home, "dynaip_jax", "compiled")))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)
