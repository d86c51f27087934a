"""Sampling on eight devices is sampling on one, and no device holds a whole component."""

import json
from pathlib import Path  # noqa: F401  (the child)

import jax
import numpy as np
import pytest
import skimage.data

from dynaip_jax.layers import kernels
from dynaip_jax.runtime.sharding import make_mesh, parse_mesh
from dynaip_jax.sampling.batches import Asked, draw_together
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.manifest import flatten
from tests.sampling.test_loras import lora
from tests.train.runs import Child

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4")


def draw(bundle, adapter, mesh):
    """The pipeline, eight pictures uint8 `[8, 64, 64, 3]` of two subjects, the last four with a step from the cache, and their
    routing."""
    pipe = DynaIPPipeline.load(bundle, adapter, mesh=mesh)
    noise = np.random.default_rng(0).normal(size=(4, 16, 8, 8)).astype(np.float32)
    pictures, references = [], [skimage.data.chelsea(), skimage.data.coffee()]
    for threshold in (None, 9.0):
        options = dict(noise=noise, steps=2, height=64, width=64, cache_threshold=threshold)
        result = pipe("a cat and a cup", references, **options)
        pictures += [np.asarray(image) for image in result.images]
    return pipe, np.stack(pictures), result.routing


def together(pipe):
    """Two pictures uint8 `[2, 64, 64, 3]` of two calls, in one batch."""
    options = dict(steps=2, height=64, width=64)
    calls = [
        pipe.request(text, [skimage.data.coffee()], seed=n, **options) for n, text in enumerate(("a cup", "a mug"))
    ]
    return np.stack([np.asarray(one.images[0]) for one in draw_together(pipe, [Asked(call, 0) for call in calls])])


def on_meshes(folder, bundle, adapter):
    """In a child with eight devices: pictures and routing on each mesh, and the share of each component's parameters that one
    device holds; and splash attention, a device's heads each."""
    for name in MESHES:
        pipe, pictures, routing = draw(bundle, adapter, parse_mesh(name))
        shares = {}
        for part, tree in (pipe.params | dict(adapter=pipe.adapter[1])).items():
            arrays = flatten(tree).values()
            shares[part] = sum(x.addressable_shards[0].data.size for x in arrays) / sum(x.size for x in arrays)
        if pipe.mesh.size == pipe.mesh.shape["fsdp"]:
            again = DynaIPPipeline.load(bundle, adapter, mesh=parse_mesh(name), offload_text=True, weights="int8")
            kernel = again.params["transformer"]["single_blocks"]["mlp_in"]["kernel"].array.qvalue
            assert kernel.addressable_shards[0].data.size * pipe.mesh.size == kernel.size
            assert {x.sharding.memory_kind for x in jax.tree.leaves(again.params["t5"])} == {"pinned_host"}
            text, same = (p.encode_text(["a cat and a cup"]) for p in (pipe, again))
            jax.tree.map(np.testing.assert_array_equal, same, text)
            assert {x.sharding.memory_kind for x in jax.tree.leaves(same)} == {"device"}
        if name == MESHES[-1]:
            np.save(folder / "together.npy", together(pipe))
        np.savez(folder / f"{name}.npz", pictures=pictures, routing=routing)
        (folder / f"{name}.json").write_text(json.dumps(shares))
    merged = DynaIPPipeline.load(bundle, mesh=parse_mesh(MESHES[2]), loras=folder / "lora.safetensors")
    np.savez(folder / "merged.npz", **{n: np.asarray(x) for n, x in flatten(dict(merged.params)).items()})
    placed = DynaIPPipeline.load(bundle, mesh=parse_mesh(MESHES[2])).params
    assert jax.tree.map(lambda x: x.sharding, dict(merged.params)) == jax.tree.map(lambda x: x.sharding, dict(placed))
    q, k, v = (jax.random.normal(jax.random.key(n), (4, 128, 2, 128)) for n in range(3))
    with jax.set_mesh(make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))):
        split = jax.jit(lambda *x: kernels.splash(*x, 0.1, interpret=True))(q, k, v)
        assert len(split.sharding.device_set) == 8 and split.addressable_shards[0].data.shape == (1, 128, 1, 128)
    np.testing.assert_allclose(split, kernels.xla(q, k, v, 0.1), atol=2e-5)


@pytest.fixture(scope="module")
def eight(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    lora(folder / "lora.safetensors")
    call = "import sys; from tests.sampling import test_meshes as t; t.on_meshes(t.Path(sys.argv[1]), *sys.argv[2:])"
    child = Child(dict(JAX_NUM_CPU_DEVICES="8"), folder / "log", "-c", call, folder, *tiny)
    assert child.end() == 0, child.log.read_text()
    return folder


@pytest.fixture(scope="module")
def one(tiny):
    return draw(*tiny, None)


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_draw_as_one(eight, one, mesh):
    found = np.load(eight / f"{mesh}.npz")
    np.testing.assert_allclose(found["routing"], one[2], atol=1e-6)
    difference = np.abs(found["pictures"].astype(int) - one[1])
    assert difference.max() <= 1 and difference.mean() < 0.01  # rounding to 8 bits


def test_eight_devices_draw_several_calls_as_one(eight, one):
    difference = np.abs(np.load(eight / "together.npy").astype(int) - together(one[0]))
    assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_no_device_holds_a_whole_component(eight, mesh):
    shares = json.loads((eight / f"{mesh}.json").read_text())
    assert shares.keys() == {"transformer", "vae", "t5", "clip_text", "clip_vision", "adapter"}
    assert max(shares.values()) < 0.5, shares


def test_a_lora_is_merged_on_eight_devices_as_on_one(eight, tiny):
    """Bit for bit, and each leaf stays where it was (see the child)."""
    one = DynaIPPipeline.load(tiny[0], loras=eight / "lora.safetensors").params
    plain = flatten(dict(DynaIPPipeline.load(tiny[0]).params))
    found, changed = np.load(eight / "merged.npz"), 0
    for name, x in flatten(dict(one)).items():
        np.testing.assert_array_equal(found[name], np.asarray(x), name)
        changed += not np.array_equal(x, plain[name])
    assert changed == 5
