"""What a command is doing: lines where there is no terminal, a bar where there is one."""

import sys
import time

from dynaip_jax import tasks


def test_a_line_every_so_often_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(tasks, "EVERY", 0.1)
    with tasks.task("denoising", 28) as step:
        for _ in range(5):
            step()
        time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("denoising: 5 of 28 steps, 0:00")
    with tasks.task("loading"):
        time.sleep(0.15)
    assert capsys.readouterr().err == "loading: 0:00\n"


def test_nothing_is_said_of_what_is_quick_or_not_to_be_shown(capsys):
    with tasks.task("loading"):
        pass
    with tasks.task("denoising", 3, show=False) as step:
        step(3)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with tasks.task("denoising", 2) as step:
        step(2)
    shown = capsys.readouterr().err
    assert "denoising" in shown and "2/2" in shown
    with tasks.task("loading the model"):
        pass
    assert "loading the model [00:00]" in capsys.readouterr().err


def test_words():
    assert tasks.line("denoising", 80, 5, 28, "step") == "denoising: 5 of 28 steps, 1:20, 6:08 left"
    assert tasks.line("denoising", 3, 0, 1, "step") == "denoising: 0 of 1 step, 0:03"
    assert tasks.line("sampling", 3, 0, 2, "batch") == "sampling: 0 of 2 batches, 0:03"
    assert tasks.line("compiling", 3700, 0, None, "step") == "compiling: 1:01:40"
    assert tasks.line("converting", 10, 512, 1024, "MiB") == "converting: 512 of 1024 MiB, 0:10, 0:10 left"
