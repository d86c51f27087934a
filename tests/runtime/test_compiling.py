"""Compiled programs outlive the command."""

import os
import pwd
import re
import stat
import subprocess
import sys

import pytest

from dynaip_jax.runtime import compiling


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


@pytest.fixture
def told(monkeypatch, capsys):
    """Calls keep_compiled with these variables -> the folder that JAX is told of ("": none), what stderr says."""
    monkeypatch.setattr(compiling, "_tell_jax", lambda folder, settings: None)

    def call(**variables):
        for name in (compiling.VARIABLE, "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        compiling.keep_compiled()
        return os.environ[compiling.VARIABLE], capsys.readouterr().err

    yield call
    monkeypatch.delenv(compiling.VARIABLE, raising=False)


def test_without_a_home_nothing_is_kept_and_that_is_said_once(told, monkeypatch, capsys):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    folder, said = told()
    assert folder == "" and said == (
        "note: compiled programs are not kept: there is no home folder; name a folder of your own in JAX_COMPILATION_CACHE_DIR\n"
    )
    compiling.keep_compiled()
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_not_used(told, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder, said = told(HOME=tmp_path / "file")
    assert folder == "" and "cannot be written (Not a directory)" in said

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    folder, said = told(HOME=tmp_path)
    assert folder == "" and "cannot be written (Read-only file system)" in said


def test_a_folder_of_ones_own_is_made_and_is_private(told, tmp_path):
    expected = tmp_path / ".cache" / "dynaip_jax" / "compiled"
    assert told(HOME=tmp_path) == (str(expected), "")
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700
    expected.chmod(0o775)  # as an umask of 002 left it
    assert told(HOME=tmp_path) == (str(expected), "")
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700
    assert told(XDG_CACHE_HOME=tmp_path / "xdg")[0].startswith(str(tmp_path / "xdg"))


def test_a_folder_that_others_may_write_to_is_not_used(told, tmp_path, monkeypatch):
    """What is in it is run."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    asked = {compiling.VARIABLE: tmp_path / "shared"}
    folder, said = told(**asked)
    assert folder == "" and f"another user may write to {tmp_path / 'shared'}" in said
    (tmp_path / "shared").chmod(0o755)
    assert told(**asked) == (str(tmp_path / "shared"), "")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert told(**asked)[0] == ""


def test_the_users_word_is_kept(told):
    assert told(**{compiling.VARIABLE: ""}) == ("", "")
    assert told(**{compiling.VARIABLE: "gs://bucket/compiled"}) == ("gs://bucket/compiled", "")


@pytest.mark.parametrize("first", ["", "import jax; jax.jit(lambda x: x + 1)(1.0)"])
def test_python_keeps_programs_when_it_asks_for_it(tmp_path, first):
    """Before JAX is imported, or after JAX has compiled something."""
    code = (
        f"{first}\nimport dynaip_jax; dynaip_jax.keep_compiled()\nimport jax, jax.numpy as jnp\n"
        "jax.jit(lambda x: jnp.sin(x @ x))(jnp.ones((64, 64))).block_until_ready()"
    )
    env = {k: v for k, v in os.environ.items() if k != compiling.VARIABLE}
    env |= dict(XDG_CACHE_HOME=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert list((tmp_path / "dynaip_jax" / "compiled").glob("*-cache"))


def test_two_processes_share_the_folder(tiny, tmp_path):
    """Both start with an empty one and compile the same programs; neither fails nor complains."""
    env = {k: v for k, v in os.environ.items() if k != compiling.VARIABLE}
    env |= dict(XDG_CACHE_HOME=str(tmp_path / "cache"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    words = ["-m", "dynaip_jax.app.main", "sample", "--model", tiny[0], "--prompt", "a toy", "--steps", 1]
    size = ["--height", 32, "--width", 32, "--output"]
    both = [
        subprocess.Popen(
            [*map(str, [sys.executable, *words, *size, tmp_path / f"{k}.png"])],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    for process in both:
        said = [line for line in process.communicate()[1].splitlines() if not re.fullmatch(r"\w+.*: \d+:\d\d", line)]
        assert (process.returncode, said) == (0, [])
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
