"""The folder of a run: what may start in it, on a disk and in a bucket."""

import dataclasses
import json

import pytest
from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage.codec import to_dict
from train import config as config_
from train.workdir import RUN_FILE, check_workdir, claim_workdir, read_config


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
