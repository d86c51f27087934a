"""How long programs take to compile: kept on disk, and compiled with little effort where they are a small part of the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from dynaip_jax.runtime.repairing import repair

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# what else JAX is to know of its cache, unless the user says otherwise: programs worth keeping, in seconds; bytes of all of them
DEFAULTS = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1, JAX_COMPILATION_CACHE_MAX_SIZE=4 * 2**30)
# `compiler_options` of jax.jit: at FLUX.1's size XLA's TPU compiler takes 122 s of a core for the VAE's decoder, with these 11 s, and 180
# and 16 s for the features of a training step (docs/performance.md)
QUICK = dict(exec_time_optimization_effort=-1.0)


def keep_compiled() -> None:
    """Has JAX keep what it compiles in the folder that `JAX_COMPILATION_CACHE_DIR` names (empty: not at all), by default
    `$XDG_CACHE_HOME/dynaip_jax/compiled`, 4 GiB at most. Does not import JAX, which reads the variables when it is imported. What a
    kill or a full disk left damaged there is removed."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    settings: dict[str, Any] = {VARIABLE: str(Path(home, "dynaip_jax", "compiled"))} | DEFAULTS
    for name, usual in settings.items():
        value = os.environ.setdefault(name, str(usual))
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name.lower(), type(usual)(value))
    if (folder := os.environ[VARIABLE]) and "://" not in folder:
        repair(Path(folder))
