"""Shapes of parameters outlive the process that traced a network for them."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dynaip_jax.families.registry import family_of, open_bundle
from dynaip_jax.layers.basic import shapes_of
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime import shapes
from dynaip_jax.runtime.compiling import VARIABLE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "shapes"


def traced(family, name):
    return shapes_of(lambda: family.component(name).init(family.module(name), jax.random.key(0)))


def fails():
    raise AssertionError("traced again")


def boxed(tree):
    return jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


@pytest.mark.parametrize("which", ["tiny", "tiny2"])
def test_every_component_is_as_it_was_traced(which, folder, request):
    family = family_of(open_bundle(request.getfixturevalue(which)[0]), Compute(), reference=True)
    for name, _ in family.configs:
        module = family.module(name)
        found = shapes.kept(shapes.named(module), lambda name=name: traced(family, name))
        again = shapes.kept(shapes.named(module), fails)
        assert boxed(again) == boxed(found) == boxed(traced(family, name))
        assert jax.tree.structure(again) == jax.tree.structure(found)


def test_other_sizes_and_precisions_are_others(folder, tiny):
    family = family_of(open_bundle(tiny[0]), Compute(), reference=True)
    half = family.with_compute("transformer", param_dtype=jnp.dtype("bfloat16"))
    names = {shapes.named(f.module("transformer")) for f in (family, half)}
    larger = dataclasses.replace(family.config("transformer"), depth=3)
    assert len(names | {shapes.named(family.module("transformer").clone(config=larger))}) == 3


def test_what_other_code_found_is_found_again(folder, monkeypatch):
    one, other = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, {"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    assert shapes.kept("net", lambda: one) == one == shapes.kept("net", lambda: other)
    monkeypatch.setattr(shapes, "_made_by", lambda: "newer")
    assert shapes.kept("net", lambda: other) == other == shapes.kept("net", fails)
    assert len(list(folder.iterdir())) == 1


def test_damage_costs_time_alone(folder):
    tree = {"a": {"b": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2, 4), jnp.float32), ("embed", None))}}
    shapes.kept("net", lambda: tree)
    (file,) = folder.iterdir()
    whole = json.loads(file.read_bytes())
    for damage in (
        b"",
        b"\xff",
        b"{}",
        b"[]",
        json.dumps(whole | dict(shapes={"a": [1]})).encode(),
        file.read_bytes()[:-9],
    ):
        file.write_bytes(damage)
        assert boxed(shapes.kept("net", lambda: tree)) == boxed(tree)
        assert json.loads(file.read_bytes()) == whole


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    tree = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    (tmp_path / "file").touch()
    for name in ("", "gs://bucket/compiled", str(tmp_path / "none"), str(tmp_path / "file")):
        monkeypatch.setenv(VARIABLE, name)
        assert shapes.kept("net", lambda: tree) == tree
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "shapes").touch()  # in the way of the folder
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert shapes.kept("net", lambda: tree) == tree
