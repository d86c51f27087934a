"""The folder of a run: what may start in it, on a disk and in a bucket."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage.codec import to_dict
from tests.fake_bucket import FakeBucket
from train import config as config_
from train.checksums import COMMITTED
from train.workdir import (
    DISCARDED,
    LOCK,
    RUN_FILE,
    check_free,
    check_step,
    check_workdir,
    claim_workdir,
    go_back,
    only_trainer,
    read_config,
    steps_in,
    write_whole,
)


def test_an_older_run_goes_on_with_the_defaults(config, tmp_path):
    saved = to_dict(config)
    for name in ("query", "merge"):
        del saved["adapter"][name]
    (tmp_path / RUN_FILE).write_text(json.dumps(dict(base="f", config=saved)))
    check_workdir(tmp_path, config, dict(base="f"), resume=True, overwrite=False)
    other = config_.override(config, ["--adapter.merge", "concat"])
    with pytest.raises(UserError, match="adapter.merge: 'sum' -> 'concat'"):
        check_workdir(tmp_path, other, dict(base="f"), resume=True, overwrite=False)


def test_a_folder_in_a_bucket_is_claimed_checked_and_emptied(config, bucket):
    folder = epath.Path(f"{bucket}/runs/one")
    check_workdir(folder, config, dict(base="f"), resume=True, overwrite=False)
    claim_workdir(folder, config, dict(base="f"), overwrite=False)
    assert read_config(folder) == config
    with pytest.raises(UserError, match=r"`workdir` gs://bucket/runs/one: holds a run; pass `resume`"):
        check_workdir(folder, config, dict(base="f"), resume=False, overwrite=False)
    with pytest.raises(UserError, match="config differs: batch: 4 -> 8"):
        check_workdir(folder, dataclasses.replace(config, batch=8), dict(base="f"), resume=True, overwrite=False)
    (folder / "samples" / "step_000001.png").write_bytes(b"")
    claim_workdir(folder, config, dict(base="f"), overwrite=True)
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    epath.Path(f"{bucket}/other/file").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds files that are not a run's"):
        check_workdir(f"{bucket}/other", config, dict(base="f"), resume=True, overwrite=False)


def test_one_trainer_at_a_time(tmp_path):
    run = tmp_path / "deep" / "run"
    check_free(run)
    with only_trainer(run):
        with pytest.raises(UserError, match=f"`workdir` {run}: process {os.getpid()} on .* trains in it; wait"):
            check_free(run)
        with pytest.raises(UserError, match="trains in it"), only_trainer(run):
            pass
        assert (run / LOCK).is_file()
    check_free(run)
    assert not list(run.iterdir())
    (run / LOCK).write_text("{}")  # as a kill leaves it
    with only_trainer(run):
        pass


def test_an_overwritten_run_keeps_its_lock_and_links_lead_nowhere(config, tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("years of work")
    with only_trainer(run):
        claim_workdir(run, config, dict(base="f"), overwrite=False)
        (run / "samples").symlink_to(mine)
        (run / "checkpoints").mkdir()
        claim_workdir(run, config, dict(base="f"), overwrite=True)
        assert {path.name for path in run.iterdir()} == {RUN_FILE, LOCK}
    assert (mine / "thesis").exists()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_that_is_overwritten_half_has_no_half_checkpoint(config, tmp_path, bucket, place, monkeypatch):
    """Every file that goes may be the last one before a kill."""
    gone = []
    for number in range(1, 40):
        run = epath.Path(tmp_path if place == "disk" else bucket) / f"run{number}"
        claim_workdir(run, config, dict(base="f"), overwrite=False)
        files = [run / "checkpoints" / step / name for step in "24" for name in ("a/b", "z", COMMITTED)]
        for file in files:
            write_whole_in(file, "x")
        gone.clear()

        def killed(remove, number=number):
            def removed(self, path, *args, **options):
                if len(gone) == number:
                    raise KeyboardInterrupt
                gone.append(path)
                return remove(self, path, *args, **options)

            return removed

        with monkeypatch.context() as patch:
            patch.setattr(FakeBucket, "rm_file", killed(FakeBucket.rm_file))
            patch.setattr(shutil, "rmtree", lambda path: gone.append(path) or (Path(path) / "4" / "z").unlink())
            try:
                claim_workdir(run, config, dict(base="f"), overwrite=True)
                done = True
            except KeyboardInterrupt:
                done = False
        for step in steps_in(run):
            assert all(file.is_file() for file in files if file.parts[-2] == str(step) or file.parts[-3] == str(step))
        claim_workdir(run, config, dict(base="f"), overwrite=False)
        assert not (run / DISCARDED).exists()
        if done:
            break
    assert done and gone


def test_what_kills_left_half_written_goes(config, tmp_path):
    for folder in ("", "samples", "tensorboard"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f".{RUN_FILE}.12345678.partial").write_text("{")
    for path in (tmp_path / "samples", tmp_path / "tensorboard"):
        for file in path.iterdir():
            file.rename(path / ".other.12345678.partial")
    with pytest.raises(UserError, match="holds files that are not a run's"):
        check_workdir(tmp_path, config, dict(base="f"), resume=True, overwrite=False)
    claim_workdir(tmp_path, config, dict(base="f"), overwrite=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [RUN_FILE]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_later_checkpoints_are_set_aside(tmp_path, bucket, place, capsys):
    run = epath.Path(tmp_path if place == "disk" else bucket) / "run"
    for step in (2, 4, 10):
        write_whole_in(run / "checkpoints" / str(step) / "state" / "file", str(step))
        write_whole_in(run / "checkpoints" / str(step) / COMMITTED, "")
    if place == "bucket":
        write_whole_in(run / "checkpoints" / "12" / "state" / "file", "half")
    write_whole_in(run / "metrics.jsonl", "lines")
    with pytest.raises(UserError, match=f"`resume_from` 6: no such checkpoint in {run}; it has 2, 4, 10; choose one"):
        check_step(run, 6)
    check_step(run, 2)
    go_back(run, 10)
    assert steps_in(run) == [2, 4, 10] and not (run / "set_aside").exists()
    go_back(run, 4)
    go_back(run, 2)
    assert steps_in(run) == [2]
    aside = run / "set_aside"
    assert [(aside / name / "state" / "file").read_text() for name in ("1/10", "2/4")] == ["10", "4"]
    assert (aside / "1" / "metrics.jsonl").read_text() == "lines" == (run / "metrics.jsonl").read_text()
    assert f"checkpoints after step 4 (10) are set aside in {aside / '1'}\n" in capsys.readouterr().err


def write_whole_in(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
