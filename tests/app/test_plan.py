"""`dynaip plan` runs `train.plan` of the checkout that holds the recipe."""

import json

import pytest

from dynaip_jax.app import main as cli
from dynaip_jax.commandline import run_cli

STAND_IN = """
import json, os, sys
print(json.dumps(dict(words=sys.argv[1:], folder=os.getcwd())))
print("a line", file=sys.stderr)
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def plan(capfd):
    """Runs the command -> (exit status, stdout, stderr), those of the process that it starts among them."""

    def run(*words):
        status = run_cli(cli.run, ["plan", *map(str, words)])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose train.plan tells what it was given."""
    for name in ("train", "configs"):
        (tmp_path / name).mkdir()
    (tmp_path / "train" / "__init__.py").touch()
    (tmp_path / "train" / "plan.py").write_text(STAND_IN)
    return tmp_path


def test_words_status_and_output_pass_through(plan, checkout, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "train").mkdir()
    (elsewhere / "train" / "__init__.py").write_text("raise RuntimeError")  # is not the checkout's
    monkeypatch.chdir(elsewhere)
    words = ("--config", checkout / "configs" / "x.py", "--job", "sample", "--data.path", "photos", "--batch", "-4")
    status, stdout, stderr = plan(*words)
    assert status == 0 and stderr == "a line\n"
    assert json.loads(stdout) == dict(words=list(map(str, words)), folder=str(elsewhere))
    monkeypatch.setenv("STATUS", "1")
    assert plan(*words)[0] == 1


def test_outside_a_checkout(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    status, stdout, stderr = plan("--config", "configs/x.py")
    assert status == 2 and stdout == ""
    assert stderr == (
        f"error: --config configs/x.py: {tmp_path} is no checkout of dynaip_jax; expected a recipe in its configs/; run plan there\n"
    )
    with pytest.raises(SystemExit) as stopped:
        plan("--help")
    assert not stopped.value.code


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("--job", "play", "--config", "x.py"), "--job: invalid choice: 'play' (choose from 'train', 'sample')"),
        ((), "--config FILE"),
    ),
)
def test_errors(plan, words, message):
    status, _, stderr = plan(*words)
    assert status == 2 and message in stderr and stderr.startswith("error: ") and len(stderr.splitlines()) == 1
