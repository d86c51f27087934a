"""The `dynaip` command: its list of commands, its version, and how quickly it answers."""

import subprocess
import sys

import pytest

from dynaip_jax.version import __version__

HEAVY = ("jax", "numpy", "transformers", "orbax")


@pytest.mark.parametrize(
    ("words", "expected", "heavy"),
    (
        (("--help",), "examples:", (*HEAVY, "tyro")),
        (("--version",), f"dynaip_jax {__version__}", (*HEAVY, "tyro")),
        (("evaluate", "--help"), "shapeland", (*HEAVY, "tyro")),
        (("sample", "--help"), "examples:", HEAVY),
        (("plan", "--help"), "examples:", HEAVY),
        (("serve", "--help"), "examples:", (*HEAVY, "gradio", "matplotlib")),
    ),
)
def test_help_is_quick_and_loads_nothing_heavy(words, expected, heavy):
    command = [sys.executable, "-X", "importtime", "-m", "dynaip_jax.app.main", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert expected in result.stdout
    for name in heavy:
        assert not any(line.endswith(f" {name}") for line in result.stderr.splitlines())


def test_help_names_every_command(dynaip):
    status, stdout, _ = dynaip("--help")
    assert status == 0
    for line in ("  sample    make pictures", "  demo ", "  evaluate ", "  plan "):
        assert line in stdout
    assert "  shapeland  drawn scenes" in dynaip("evaluate", "--help")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ((), "no command given; expected one of sample, demo, evaluate, plot, sweep, maps, routing, serve, plan; see dynaip --help"),
        (("simple",), "simple: no such command; expected one of sample, demo, evaluate, plot, sweep, maps, routing, serve, plan; see dynaip --help"),
        (("--quiet",), "--quiet: no such command; expected one of sample, demo, evaluate, plot, sweep, maps, routing, serve, plan; see dynaip --help"),
        (("evaluate",), "no command given; expected one of shapeland, set; see dynaip evaluate --help"),
        (("demo", "--prompt", "a star"), "--prompt: given without --reference; expected both, or neither; add --reference"),
        (("demo", "--size", "3"), "unrecognized arguments: --size 3; see dynaip demo --help"),
    ),
)  # fmt: skip
def test_errors(dynaip, words, message):
    assert dynaip(*words) == (2, "", f"error: {message}\n")
