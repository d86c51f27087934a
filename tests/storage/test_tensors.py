"""Safetensors files, whole and in shards."""

import json

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.storage.tensors import TensorFile
from tests.conftest import FIXTURES


def test_the_index_of_a_sharded_file_must_be_true(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"a": "gone.safetensors"})))
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        TensorFile(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="not a safetensors index"):
        TensorFile(index)
    whole = TensorFile(FIXTURES / "vae_tiny_bfl.safetensors.index.json")
    assert len(whole.files) == 6 and whole.shape("in.image") == whole["in.image"].shape
