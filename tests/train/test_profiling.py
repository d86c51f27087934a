"""A trace of the steps asked for, and of no others."""

import dataclasses

import jax
import pytest

from tests.train.runs import steps
from train.config import ProfileConfig
from train.loop import train
from train.profiling import Profile


def test_a_run_leaves_a_trace_only_if_asked(config, tmp_path):
    short = dataclasses.replace(config, batch=2, steps=3, save_every=3)
    train(dataclasses.replace(short, profile=ProfileConfig(start=2, steps=1)), tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0 and steps(tmp_path / "run") == [3]
    train(dataclasses.replace(short, steps=1), tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize("last, traced", [(9, [3, 4]), (3, [3]), (2, [])])
def test_steps_are_traced_from_the_first_to_the_last_or_the_end_of_the_run(tmp_path, monkeypatch, last, traced):
    running, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    with Profile(ProfileConfig(start=3, steps=2), tmp_path) as profile:
        profile.after(0, ())
        for step in range(1, last + 1):
            if running:
                seen.append(step)
            profile.after(step, ())
    assert seen == traced and not running
