"""Compiled programs outlive the command."""

import os
import re
import subprocess
import sys


def test_a_second_run_finds_what_the_first_compiled(tiny, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= dict(XDG_CACHE_HOME=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    env |= dict(JAX_DEBUG_LOG_MODULES="jax._src.compiler")  # it says what it finds
    words = ["-m", "dynaip_jax.app.main", "sample", "--model", tiny[0], "--prompt", "a toy", "--steps", "1"]
    size = ["--height", "32", "--width", "32", "--overwrite", "--output", tmp_path / "out.png"]

    def run(what):
        done = subprocess.run([sys.executable, *words, *size], env=env, capture_output=True, text=True, check=True)
        return {w: set(re.findall(rf"(?i)cache {w} for '(jit_\w+)", done.stderr)) for w in ("hit", "miss")}[what]

    large = {"jit_denoising_loop", "jit_decode", "jit_encode_text"}
    assert large <= run("miss")
    assert list((tmp_path / "dynaip_jax" / "compiled").iterdir())
    assert large <= run("hit")
    assert not run("miss")
