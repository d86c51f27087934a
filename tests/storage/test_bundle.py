"""Bundles on disk and in a bucket."""

import dataclasses
import json
import os
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.storage.bundle import (
    LARGEST_TOKENIZER_FILE,
    Bundle,
    NewComponent,
    _quiet,
    replace_component,
    write_bundle,
)
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
        "format", "format_version", "family", "fingerprint", "components", "schedule", "text", "defaults", "checksums",
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


def test_a_bundle_in_a_bucket(tmp_path, served_bucket):
    path = f"{served_bucket}/models/one"
    local = write(tmp_path / "bundle")
    with pytest.raises(UserError, match="`bundle` gs://bucket/models/one: no such folder"):
        Bundle.open(path, FAMILIES)
    replace_component(local, path, "vae", params(2), dict(step=1))
    remote = Bundle.open(path, FAMILIES)
    assert remote.fingerprint == local.fingerprint and str(remote.path) == path
    np.testing.assert_array_equal(remote.load("vae", target(params(2)))["bias"], params(2)["bias"])
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


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def without_checksums(path):
    manifest = json.loads((path / BUNDLE_FILE).read_text())
    del manifest["checksums"]
    (path / BUNDLE_FILE).write_text(json.dumps(manifest))
    return Bundle.open(path, FAMILIES)


def test_every_file_is_the_one_that_was_written(tmp_path):
    bundle = write(tmp_path / "bundle")
    files = [f for f in sorted(bundle.path.rglob("*")) if f.is_file() and f.name != BUNDLE_FILE]
    assert sorted(bundle.manifest["checksums"]) == [f.relative_to(bundle.path).as_posix() for f in files]
    for file in files:
        whole = file.read_bytes()
        part = file.relative_to(bundle.path).parts[0]
        if whole:
            flip(file)
            with pytest.raises(
                UserError, match=f"{file}: damaged or changed.*; copy or convert .* .verify=False in Python"
            ):
                bundle.part(part)
        file.unlink()
        with pytest.raises(
            UserError, match=f"{part}: cannot be compared with bundle.json .*; expected all of its files"
        ):
            bundle.part(part)
        assert bundle.part(part, verify=False) == bundle.path / part
        file.write_bytes(whole)
    assert bundle.load("vae", target(params(1)))["bias"].shape == (4,)


def test_bundles_of_before_checksums_are_read(tmp_path):
    write(tmp_path / "bundle")
    old = without_checksums(tmp_path / "bundle")
    np.testing.assert_array_equal(old.load("vae", target(params(1)))["bias"], params(1)["bias"])
    replace_component(old, tmp_path / "new", "vae", params(2), dict(step=1))
    new = Bundle.open(tmp_path / "new", FAMILIES)
    for name in ("transformer", "vae", "tokenizers"):
        assert new.part(name)
    change(tmp_path / "new", checksums={"vae/../../x": "0"})
    with pytest.raises(UserError, match="its checksums name no files of vae, or others"):
        Bundle.open(tmp_path / "new", FAMILIES).part("vae")


def test_a_copy_does_not_take_damage_for_whole(tmp_path):
    bundle = write(tmp_path / "bundle")
    damaged = next(f for f in (bundle.path / "transformer").rglob("*") if f.is_file() and f.stat().st_size)
    flip(damaged)
    replace_component(bundle, tmp_path / "new", "vae", params(2), dict(step=1))
    with pytest.raises(UserError, match="damaged or changed"):
        Bundle.open(tmp_path / "new", FAMILIES).load("transformer", target(params(0)))


def test_an_old_bundle_that_lacks_files_is_one_line(tmp_path, capfd):
    write(tmp_path / "bundle")
    bundle = without_checksums(tmp_path / "bundle")
    files = [f for f in (bundle.path / "vae").rglob("*") if f.is_file()]
    for file in files:
        whole = file.read_bytes()
        for content in (None, b"", whole[: len(whole) // 2]):
            file.unlink() if content is None else file.write_bytes(content)
            try:
                bundle.load("vae", target(params(1)))
            except UserError as e:
                assert "\n" not in str(e) and "vae" in str(e)
            file.write_bytes(whole)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text=dict(t5_length=10**9)), "t5_length 1000000000: expected a number from 1 to 16384"),
        (dict(text=dict(t5_length="6")), "text.t5_length '6': expected a whole number"),
        (dict(defaults=dict(steps=0)), "steps 0: expected a number from 1"),
        (dict(schedule=[]), r"schedule \[\]: expected an object"),
        (dict(fingerprint=3), "fingerprint 3: expected text"),
        (dict(checksums=dict(a=1)), "checksums.a 1: expected text"),
        (dict(components=dict(vae=dict(config=3))), "no components, each with its config"),
        (dict(family="\x1b[2J" * 200), r"unknown family|family"),
    ],
)
def test_fields_of_other_types_and_sizes(tmp_path, changes, message):
    path = write(tmp_path / "bundle").path
    change(path, **changes)
    with pytest.raises(UserError, match=f"bundle.json: .*{message}") as e:
        Bundle.open(path, FAMILIES)
    assert len(str(e.value)) <= 300 and "\x1b" not in str(e.value)


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


def written_with(tokenizer, path):
    """The tokenizer's files in a bundle that is made with the folder `tokenizer`."""
    part = NewComponent("transformer", dict(width=4), params(0), [])
    facts = dict(family="flux", schedule={}, text={}, defaults={})
    write_bundle(path, [part], **facts, tokenizers=dict(t5=tokenizer))
    return {file.name: file.read_text() for file in (path / "tokenizers" / "t5").iterdir()}


def test_of_a_tokenizer_known_files_are_taken(tmp_path):
    folder = tmp_path / "words"
    (folder / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "spiece.model", "pytorch_model.bin", "id_rsa", "deep/vocab.json"):
        (folder / name).write_text(name)
    (folder / "surplus").symlink_to("/etc/passwd")
    assert written_with(folder, tmp_path / "bundle").keys() == {"tokenizer.json", "spiece.model"}


@pytest.mark.parametrize("kind", ["secret", "dead link", "fifo", "folder", "large", "blobs of another"])
def test_no_link_is_followed_out_of_a_tokenizer(tmp_path, kind):
    folder, secret = tmp_path / "model" / "snapshots" / "1" / "tokenizer", tmp_path / "secret"
    folder.mkdir(parents=True)
    secret.write_text("mine")
    bad, found = folder / "tokenizer.json", "a link, or no plain file"
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "folder":
        bad.mkdir()
    elif kind == "large":
        with open(bad, "wb") as file:
            file.truncate(LARGEST_TOKENIZER_FILE + 1)
        found = f"{LARGEST_TOKENIZER_FILE + 1} bytes; expected at most"
    elif kind == "blobs of another":
        (tmp_path / "mine").mkdir()
        secret.rename(tmp_path / "mine" / "key")
        (tmp_path / "model" / "blobs").symlink_to(tmp_path / "mine")
        bad.symlink_to("../../../blobs/key")
    else:
        bad.symlink_to(secret if kind == "secret" else "nowhere")
    with pytest.raises(UserError, match=f"tokenizer.json: {found}"):
        written_with(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_downloaded_snapshot_links_to_its_own_files(tmp_path):
    model = tmp_path / "models--a--b"
    folder = model / "snapshots" / "1" / "tokenizer"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "abc").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../../blobs/abc")
    assert written_with(folder, tmp_path / "bundle") == {"tokenizer.json": "{}"}


def test_of_a_bundle_components_and_tokenizers_are_copied(tmp_path):
    bundle = write(tmp_path / "bundle")
    (bundle.path / "secrets").mkdir()
    replace_component(bundle, tmp_path / "new", "transformer", params(7), {})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "bundle.json",
        "tokenizers",
        "transformer",
        "vae",
    ]
    shutil.rmtree(bundle.path / "vae")
    (bundle.path / "vae").symlink_to("/etc")
    with pytest.raises(UserError, match="vae: a link, or no plain file"):
        replace_component(bundle, tmp_path / "newer", "transformer", params(7), {})
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize(
    "late", ["Event loop is closed", "Encountered error while reading array index: (slice(0, 2, 1),)."]
)
def test_reads_that_end_after_one_that_failed_print_nothing(monkeypatch, late):
    """Orbax leaves them behind; Python prints what they raise when it collects them. Other errors are still printed."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    _quiet.__wrapped__()
    for text in (late, "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(what.exc_value) for what in printed] == ["another"]
