"""Safetensors files, whole and in shards."""

import json
import os
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.storage.tensors import TensorFile, read_tree, write_tree
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 9999, "nested more than 32 deep"),
        (dict(weight_map={}), "weight_map is empty"),
        (dict(weight_map=["a"]), "weight_map .*: expected an object"),
        (dict(weight_map={"a": 3}), "weight_map.a 3: expected text"),
        (
            dict(weight_map={"a": "../a.safetensors"}),
            "names '../a.safetensors', no .safetensors file beside it",
        ),
        (dict(weight_map={"a": "/dev/zero"}), "names '/dev/zero'"),
        (dict(weight_map={"a": "a.safetensors", "b": "b.safetensors"}), "b.safetensors: b is not in it; expected what"),
        (dict(weight_map={"b": "b.safetensors"}), "b.safetensors: b is not in it; expected what"),
        (dict(weight_map={"a": "a.safetensors"}), "a.safetensors: c is in it, which the index does not say"),
    ],
)
def test_indices_that_lie(tmp_path, content, message):
    save_file({"a": np.ones(2), "c": np.ones(1)}, tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    if isinstance(content, dict) and "b" in content.get("weight_map", {}) and "a" in content["weight_map"]:
        content["weight_map"]["c"] = "a.safetensors"
    index.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        TensorFile(index)


def write(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": %b, "a": %b}' % ((json.dumps(GOOD).encode(),) * 2), "the name 'a' stands twice"),
        (b" " + json.dumps({"a": GOOD}).encode(), "does not begin with {"),
        (b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode(), "does not begin with {"),
        (b'{"a":' * 9999, "nested more than 32 deep"),
        ({"a": GOOD | dict(dtype="F4")}, "a has the dtype 'F4', expected one of BOOL"),
        ({"a": GOOD | dict(dtype=["F32"])}, "a has the dtype"),
        ({"a": GOOD | dict(shape=[-2])}, "a: bytes 0 to 8 do not fit its shape"),
        ({"a": GOOD | dict(shape=[True, 2])}, "shape of a.* expected a whole number"),
        ({"a": GOOD | dict(shape=2)}, "shape of a 2: expected a list"),
        ({"a": GOOD | dict(shape=[2**40, 2**40])}, "do not fit its shape"),
        ({"a": GOOD | dict(data_offsets=[4, 12])}, "bytes 4 to 12 do not fit"),
        ({"a": GOOD | dict(more=1)}, "a: expected dtype, shape and data_offsets"),
        ({"a": 3}, "a: expected dtype, shape and data_offsets"),
        ({"a": GOOD, "b": GOOD}, "b: bytes 0 to 8 do not fit"),
        ({"a": dict(dtype="F32", shape=[1], data_offsets=[0, 4])}, "bytes, expected"),
        ({"a": GOOD, "__metadata__": {"x": 1}}, "__metadata__.x 1: expected text"),
    ],
)
def test_headers_that_are_not_strict(tmp_path, header, message):
    with pytest.raises(UserError, match=f"f.safetensors: not a whole safetensors file .*{message}"):
        TensorFile(write(tmp_path / "f.safetensors", header))


def test_lengths_that_lie(tmp_path):
    path = tmp_path / "f.safetensors"
    for data in (b"", b"\1", (2**63).to_bytes(8, "little") + b"{}", (99).to_bytes(8, "little") + b"{}", bytes(8)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a whole safetensors file .a header of"):
            TensorFile(path)


def test_values_are_those_that_the_library_wrote(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "f.safetensors"
    kinds = (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        np.int64,
        np.int8,
        np.bool_,
    )
    tensors = {f"t{n}": rng.normal(size=(3, 4, 2)).astype(kind) for n, kind in enumerate(kinds)}
    tensors |= dict(scalar=np.array(3, np.float32), none=np.zeros((0, 3), np.float32))
    save_file(tensors, path, metadata=dict(format="pt"))
    file = TensorFile(path)
    assert file.metadata == dict(format="pt") and set(file) == set(tensors)
    for name, x in tensors.items():
        for found in (file[name], file.part(name, ())):
            assert found.dtype == x.dtype == file.dtype(name) and found.shape == x.shape == file.shape(name)
            np.testing.assert_array_equal(found, x)
    for part in ((slice(1, 3),), (slice(0, 3), slice(1, 2)), (slice(None), slice(None), slice(1, 2)), (slice(2, 2),)):
        np.testing.assert_array_equal(file.part("t1", part), tensors["t1"][part])


@pytest.mark.parametrize("kind", [np.int32, np.bool_, ml_dtypes.float8_e4m3fn])
def test_weights_are_floating_point_numbers(tmp_path, kind):
    save_file({"a": np.ones(3).astype(kind)}, tmp_path / "f.safetensors")
    with pytest.raises(
        UserError, match=f"f.safetensors: a holds {np.dtype(kind)}; expected weights in float16, bfloat16"
    ):
        read_tree(tmp_path / "f.safetensors")


def test_a_name_is_no_group_of_names(tmp_path):
    save_file({"a": np.ones(3), "a.b": np.ones(2)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="a is a tensor and a group of tensors"):
        read_tree(tmp_path / "f.safetensors")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    """In a process of its own: of a memory map this would be the end."""
    path = tmp_path / "f.safetensors"
    save_file({"a": np.ones(1 << 20, np.float32)}, path)
    code = (
        "import os, sys; from dynaip_jax.storage.tensors import TensorFile; from dynaip_jax.errors import UserError\n"
        "file = TensorFile(sys.argv[1]); os.truncate(sys.argv[1], 5000)\n"
        "try:\n    file['a']\nexcept UserError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0 and "was cut short while it was read; expected a whole file" in done.stdout, done


def test_a_full_disk_is_an_os_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_tree(tmp_path / "a.safetensors", dict(a=np.zeros(4096, np.float32)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
