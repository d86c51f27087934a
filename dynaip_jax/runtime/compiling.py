"""Compiled programs are kept on disk, so that the next process starts sooner."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaip_jax.runtime.repairing import repair

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OTHERS = 0o022  # permissions of others to write
# what else JAX is to know of its cache, unless the user says otherwise: programs worth keeping, in seconds; bytes of all of them
DEFAULTS = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1, JAX_COMPILATION_CACHE_MAX_SIZE=4 * 2**30)


def keep_compiled() -> None:
    """Has JAX keep what it compiles in the folder that `JAX_COMPILATION_CACHE_DIR` names (empty: not at all), by default
    `$XDG_CACHE_HOME/dynaip_jax/compiled`, 4 GiB at most, so that the next process starts sooner. Commands do so by themselves; in
    Python call it once, before or after JAX is imported.

    A folder that cannot be written, or that another user may write to, is not used: programs in it are run as they are. stderr says
    so once. What a kill or a full disk left damaged there is removed. Does not import JAX, which reads the variables when it is
    imported.
    """
    folder = os.environ.get(VARIABLE)
    own = folder is None
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(home, "dynaip_jax", "compiled")
    settings: dict[str, Any] = {name: os.environ.get(name, str(usual)) for name, usual in DEFAULTS.items()}
    if folder and "://" not in folder:
        if problem := _problem(Path(folder), own):
            print(
                f"note: compiled programs are not kept: {problem}; name a folder of your own in {VARIABLE}",
                file=sys.stderr,
            )
            folder = ""
        else:
            repair(Path(folder))
    os.environ.update(settings | {VARIABLE: folder})
    if "jax" in sys.modules:
        _tell_jax(folder, settings)


def _tell_jax(folder: str, settings: Mapping[str, str]) -> None:
    """The same for a JAX that has read its variables already."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    for name, value in settings.items():
        config.update(name.lower(), type(DEFAULTS[name])(value))
    if config.jax_compilation_cache_dir != folder:
        config.update(VARIABLE.lower(), folder)
        compilation_cache.reset_cache()  # it may have found that there is none


def _problem(folder: Path, own: bool) -> str | None:
    """Why a folder cannot be used, after it has been made; `own`: nobody but this project uses it."""
    if str(folder).startswith("~"):
        return "there is no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if own and found.st_uid == os.geteuid() and found.st_mode & OTHERS:
            folder.chmod(0o700)
            found = folder.stat()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        return f"{folder} cannot be written ({e.strerror or e})"
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS:
        return f"another user may write to {folder}"
    return None
