"""Adapters on disk and in a bucket."""

import json

import jax
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS, read_adapter_manifest, read_adapter_weights, write_adapter
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.manifest import ADAPTER_FILE
from dynaip_jax.storage.tensors import TensorFile, read_tree

BASE = Bundle(as_path("nowhere"), dict(family="flux", fingerprint="f" * 64))
TREE = dict(double=dict(key=np.arange(12, dtype=np.float32).reshape(3, 4)), bias=np.ones(4, np.float32))


def target(**changes):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), TREE | changes)


def write(path, tree=TREE, fingerprint="f" * 64, family="flux"):
    base = dict(family=family, fingerprint=fingerprint)
    write_adapter(path, dict(width=4), tree, base=base, step=7, conventions=dict(guidance=1.0))
    return path


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, bucket):
    return str(tmp_path) if request.param == "disk" else bucket


def test_what_is_written_is_read(place):
    path = write(f"{place}/one")
    manifest = read_adapter_manifest(path, base=BASE)
    assert manifest.pop("checksums").keys() == {ADAPTER_WEIGHTS}
    assert manifest == dict(
        format="dynaip-adapter", format_version=1, config=dict(width=4), base=dict(family="flux", fingerprint="f" * 64),
        training_step=7, conventions=dict(guidance=1.0),
    )  # fmt: skip
    weights = read_adapter_weights(path, target())
    for tree in (weights, read_tree(as_path(path) / ADAPTER_WEIGHTS)):
        assert jax.tree.all(jax.tree.map(np.array_equal, tree, TREE)) and tree.keys() == TREE.keys()
    file = TensorFile(as_path(path) / ADAPTER_WEIGHTS)
    np.testing.assert_array_equal(file.part("double.key", (slice(1, 2), slice(0, 2))), [[4, 5]])
    assert file.shape("bias") == (4,) and sorted(file) == ["bias", "double.key"]


def test_adapters_that_do_not_fit(place):
    with pytest.raises(UserError, match="`adapter` .*/none: no such folder; expected one with adapter.json"):
        read_adapter_manifest(f"{place}/none", base=BASE)
    path = write(f"{place}/sd3", family="sd3")
    with pytest.raises(UserError, match="`adapter` .*/sd3: made for family 'sd3'; the model is 'flux'"):
        read_adapter_manifest(path, base=BASE)
    path = write(f"{place}/other", fingerprint="0" * 64)
    with pytest.raises(UserError, match="`adapter` .*/other: made for another base .* or `any_base` to try"):
        read_adapter_manifest(path, base=BASE)
    assert read_adapter_manifest(path, base=BASE, any_base=True)["training_step"] == 7
    with pytest.raises(
        UserError, match=r"1 tensors do not fit adapter.json; the first, bias: found \(4,\), expected \(5,\)"
    ):
        read_adapter_weights(path, target(bias=np.zeros(5)))
    path = write(f"{place}/nan", TREE | dict(bias=np.array([1, np.nan, 0, 0], np.float32)))
    with pytest.raises(UserError, match="bias holds NaN or infinity"):
        read_adapter_weights(path, target())
    (as_path(path) / ADAPTER_WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="adapter.safetensors: not a whole safetensors file"):
        read_adapter_weights(path, target())
    (as_path(path) / ADAPTER_FILE).unlink()
    with pytest.raises(UserError, match="`adapter` .*/nan: no adapter.json in it"):
        read_adapter_manifest(path, base=BASE)


def test_weights_are_those_that_were_written(place):
    path = as_path(write(f"{place}/one"))
    data = bytearray((path / ADAPTER_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / ADAPTER_WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(
        UserError, match="adapter.safetensors: damaged or changed.*; export the adapter again .verify=False in Python"
    ):
        read_adapter_weights(path, target())
    assert read_adapter_weights(path, target(), verify=False).keys() == TREE.keys()
    manifest = json.loads((path / ADAPTER_FILE).read_text())
    del manifest["checksums"]  # as before there were any
    (path / ADAPTER_FILE).write_text(json.dumps(manifest))
    assert read_adapter_weights(path, target()).keys() == TREE.keys()


def test_weights_are_numbers_with_a_point(place):
    path = write(f"{place}/one", TREE | dict(bias=np.ones(4, np.int32)))
    with pytest.raises(UserError, match="bias holds int32; expected weights in float16"):
        read_adapter_weights(path, target())


@pytest.mark.parametrize("changes", [dict(base=[]), dict(base=dict(family=1)), dict(config=None)])
def test_fields_of_other_types(place, changes):
    path = as_path(write(f"{place}/one"))
    (path / ADAPTER_FILE).write_text(json.dumps(json.loads((path / ADAPTER_FILE).read_text()) | changes))
    with pytest.raises(UserError, match="adapter.json: .*expected .*; export the adapter again"):
        read_adapter_manifest(path, base=BASE)
