"""Bundles on disk and in a bucket."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.storage.bundle import Bundle, NewComponent, replace_component, write_bundle
from dynaip_jax.storage.folders import as_path, copy_tree
from dynaip_jax.storage.manifest import BUNDLE_FILE, fingerprint, flatten


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    depth: int = 2


FAMILIES = {"flux": None}  # any collection of names


def params(seed, dtype=np.float32):
    values = np.random.default_rng(seed).normal(size=(3, 4)).astype(dtype)
    return dict(block=dict(kernel=values), bias=values[0])


def target(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def write(path, **options):
    words = path.parent / "words"
    words.mkdir(exist_ok=True)
    (words / "tokenizer.json").write_text("{}")
    parts = [NewComponent(n, dict(width=4), params(k), [dict(file=n)]) for k, n in enumerate(("transformer", "vae"))]
    facts = dict(family="flux", schedule=dict(shift=True), text=dict(t5_length=6), defaults=dict(steps=3))
    write_bundle(path, parts, **facts, tokenizers=dict(t5=words), **options)
    return Bundle.open(path, FAMILIES)


def test_what_is_written_is_read(tmp_path):
    bundle = write(tmp_path / "bundle")
    assert list(json.loads((tmp_path / "bundle" / BUNDLE_FILE).read_text())) == [
        "format", "format_version", "family", "fingerprint", "components", "schedule", "text", "defaults",
    ]  # fmt: skip
    assert bundle.fingerprint == fingerprint(params(0))
    assert bundle.manifest["components"]["vae"] == dict(
        config=dict(width=4), parameters=16, dtype="float32", provenance=[dict(file="vae")]
    )
    for name, seed in (("transformer", 0), ("vae", 1)):
        loaded = flatten(bundle.load(name, target(params(seed))))
        for key, x in flatten(params(seed)).items():
            np.testing.assert_array_equal(loaded[key], x)
    assert bundle.config("vae", Config) == Config(width=4)
    assert not list(bundle.path.rglob("commit_success.txt"))  # it would name a folder of this machine
    assert (bundle.path / "tokenizers" / "t5" / "tokenizer.json").read_text() == "{}"


def test_one_component_is_replaced(tmp_path):
    bundle, other = write(tmp_path / "bundle"), params(7, np.float16)
    replace_component(bundle, tmp_path / "new", "transformer", other, dict(step=5), config=dict(width=8))
    new = Bundle.open(tmp_path / "new", FAMILIES)
    assert new.fingerprint == fingerprint(other) != bundle.fingerprint
    assert new.manifest["components"] == bundle.manifest["components"] | dict(
        transformer=dict(
            config=dict(width=8), parameters=16, dtype="float16", provenance=[dict(file="transformer"), dict(step=5)]
        )
    )
    np.testing.assert_array_equal(new.load("transformer", target(other))["bias"], other["bias"])
    np.testing.assert_array_equal(new.load("vae", target(params(1)))["bias"], params(1)["bias"])
    with pytest.raises(UserError, match="`bundle` .*/new: already exists"):
        replace_component(bundle, tmp_path / "new", "vae", params(1), dict(step=5))


def test_a_bundle_in_a_bucket(tmp_path, bucket):
    """All but restoring weights, for which TensorStore asks Google's servers."""
    path = f"{bucket}/models/one"
    local = write(tmp_path / "bundle")
    with pytest.raises(UserError, match="`bundle` gs://bucket/models/one: no such folder"):
        Bundle.open(path, FAMILIES)
    replace_component(local, path, "vae", params(2), dict(step=1))
    remote = Bundle.open(path, FAMILIES)
    assert remote.fingerprint == local.fingerprint and str(remote.path) == path
    copy_tree(remote.path, tmp_path / "back")
    back = Bundle.open(tmp_path / "back", FAMILIES)
    np.testing.assert_array_equal(back.load("vae", target(params(2)))["bias"], params(2)["bias"])
    np.testing.assert_array_equal(back.load("transformer", target(params(0)))["bias"], params(0)["bias"])
    assert (back.path / "tokenizers" / "t5" / "tokenizer.json").is_file()
    (as_path(path) / BUNDLE_FILE).write_text("{")
    with pytest.raises(UserError, match="gs://bucket/models/one/bundle.json: not readable as JSON"):
        Bundle.open(path, FAMILIES)


def change(path, **changes):
    manifest = json.loads((path / BUNDLE_FILE).read_text())
    (path / BUNDLE_FILE).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "`bundle` {path}: no such folder; expected one with bundle.json"),
        (lambda path: (path / BUNDLE_FILE).unlink(), "`bundle` {path}: no bundle.json in it"),
        (lambda path: (path / "model_index.json").touch(), "`bundle` {path}: a diffusers folder; .*--source {path} --out BUNDLE"),
        (lambda path: change(path, format="zip"), 'bundle.json: not a dynaip-bundle file; expected "format": "dynaip-bundle"'),
        (lambda path: change(path, format_version=9), "format version 9; this program reads version 1"),
        (lambda path: change(path, family="sd3"), "unknown family 'sd3'; expected one of flux"),
        (lambda path: change(path, components=[]), "bundle.json: no components"),
    ],
)  # fmt: skip
def test_what_is_no_bundle(tmp_path, damage, message):
    path = write(tmp_path / "bundle").path
    damage(path)
    with pytest.raises(UserError, match=message.format(path=path)):
        Bundle.open(path, FAMILIES)


def test_weights_that_do_not_fit(tmp_path):
    bundle = write(tmp_path / "bundle")
    wider = params(0) | dict(bias=np.zeros(5, np.float32))
    with pytest.raises(UserError, match=r"do not fit the config in bundle.json: bias: found \(4,\), expected \(5,\)"):
        bundle.load("transformer", target(wider))
    with pytest.raises(UserError, match="has no clip_vision .only transformer, vae.; .* --clip-vision CLIP_FOLDER"):
        bundle.config("clip_vision", Config)
    shutil.rmtree(bundle.path / "vae")
    with pytest.raises(UserError, match="vae: missing; expected the weights of vae"):
        bundle.load("vae", target(params(1)))
