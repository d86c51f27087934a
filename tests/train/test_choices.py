"""What a run asks of its adapter reaches the base; runs written before a choice existed go on with its default."""

import json

import pytest

from dynaip_jax.errors import UserError
from tests.train.runs import tiny_recipe
from train import assemble as models
from train import config as config_
from train.checkpoint import RUN_FILE, check_workdir


@pytest.fixture(scope="module")
def config(tiny):
    return tiny_recipe(tiny)


def test_query_and_merge_reach_adapter_and_transformer(config):
    chosen = config_.override(config, ["--adapter.query", "after_rope", "--adapter.merge", "concat"])
    recipe = models.make_recipe(chosen, models.open_bundle(chosen))
    injection = recipe.family.injection
    assert (recipe.adapter.query, recipe.adapter.merge) == ("after_rope", "concat")
    assert (injection.query, injection.merge) == ("after_rope", "concat")


def test_an_older_run_goes_on_with_the_defaults(config, tmp_path):
    saved = config_.to_dict(config)
    for name in ("query", "merge"):
        del saved["adapter"][name]
    (tmp_path / RUN_FILE).write_text(json.dumps(dict(base="f", config=saved)))
    check_workdir(tmp_path, config, "f", resume=True, overwrite=False)
    other = config_.override(config, ["--adapter.merge", "concat"])
    with pytest.raises(UserError, match="adapter.merge: 'sum' -> 'concat'"):
        check_workdir(tmp_path, other, "f", resume=True, overwrite=False)
