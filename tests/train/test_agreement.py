"""Processes compare what they were told and see; the others are played here, and real ones in `test_devices`."""

import dataclasses
import json

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from dynaip_jax.errors import UserError
from train import agreement
from train.agreement import agree_on_compiled, check_config, check_identity, check_shared


@pytest.fixture
def others(monkeypatch):
    """Has another process on host "b" say what `others.append`ed functions make of our own words."""
    changes = []

    def from_all(text):
        change = changes.pop(0) if changes else None
        return [text, text if change is None else change(text)]

    monkeypatch.setattr(agreement, "_from_all", from_all)
    return changes


def on_b(**changes):
    """The words of a process whose facts differ by `changes`."""
    return lambda text: json.dumps(["b", json.loads(text)[1] | changes])


def test_options_that_differ_are_named_with_their_process(config, others):
    check_config(config, resume=False)
    for changes, found in (
        ({"`optim.rate`": 0.5}, "`optim.rate` 0.5; process 0 .* has 0.001; start all processes with the same options"),
        ({"`steps`": 9}, "`steps` 9; process 0"),
        ({"`resume`": True}, "`resume` True; process 0 .* has False"),
        ({"`sample.prompts`": ["x"]}, r"`sample.prompts` \['x'\]; process 0 .* has \[\]"),
    ):
        others.append(on_b(**changes))
        with pytest.raises(UserError, match=rf"process 1 \(b\): {found}"):
            check_config(config, resume=False)


def test_where_a_host_has_its_data_is_its_own_affair(config, others, monkeypatch):
    """What lies there is not."""
    said = []
    monkeypatch.setattr(agreement, "_from_all", lambda text: said.append(json.loads(text)[1]) or [text])
    elsewhere = dataclasses.replace(config, bundle="/b", data=dataclasses.replace(config.data, path="/x", workers=9))
    for one in (config, elsewhere):
        check_config(one)
    assert said[0] == said[1]
    monkeypatch.undo()


def test_other_data_are_named(others):
    check_identity(dict(base="a", data="b"))
    others.append(on_b(**{"its data": "c"}))
    with pytest.raises(
        UserError, match=r"process 1 \(b\): its data 'c'; process 0 .* has 'b'; give all hosts the same data"
    ):
        check_identity(dict(base="a", data="b"))


@pytest.mark.parametrize("seen", [True, False])
def test_a_folder_that_another_process_does_not_see(others, monkeypatch, tmp_path, seen):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others += [None, None, lambda text: json.dumps(["b", seen])]
    if seen:
        check_shared(epath.Path(tmp_path))
    else:
        with pytest.raises(
            UserError, match=r"`workdir` .*: process 1 \(b\) of 2 processes do not see what process 0 wrote"
        ):
            check_shared(epath.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "backend, seen, kept", [("cpu", True, False), ("tpu", True, True), ("tpu", False, False), ("alone", False, True)]
)
def test_all_processes_load_compiled_programs_or_none(others, monkeypatch, capsys, tmp_path, backend, seen, kept):
    monkeypatch.setattr(jax, "process_count", lambda: 1 if backend == "alone" else 2)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    others += [None, None, lambda text: json.dumps(["b", seen])]
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
        agree_on_compiled()
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert ("compiled programs are not kept: not all processes see" in capsys.readouterr().err) == (
        backend == "tpu" and not seen
    )
