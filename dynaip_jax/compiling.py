"""How long programs take to compile: kept on disk, and compiled with little effort where they are a small part of the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# `compiler_options` of jax.jit: at FLUX.1's size XLA's TPU compiler takes 122 s of a core for the VAE's decoder, with these 11 s, and 180
# and 16 s for the features of a training step (docs/performance.md)
QUICK = dict(exec_time_optimization_effort=-1.0)


def keep_compiled() -> None:
    """Has JAX keep what takes a second or longer to compile in the folder that `JAX_COMPILATION_CACHE_DIR` names (empty: not at
    all), by default `$XDG_CACHE_HOME/dynaip_jax/compiled`. Does not import JAX, which reads the variable when it is imported."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.setdefault(VARIABLE, str(Path(home, "dynaip_jax", "compiled")))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)
