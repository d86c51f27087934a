"""Planning: published sizes, and what the command line takes."""

import jax

from dynaip_jax.families.registry import FAMILIES, open_bundle, published
from dynaip_jax.planner import jobs
from dynaip_jax.runtime.sharding import MeshConfig, make_mesh
from dynaip_jax.storage.bundle import Bundle


def test_other_commands_take_no_fields(dynaip):
    status, _, stderr = dynaip("sample", "--prompt", "x", "--output", "o.png", "--batch", 4)
    assert status == 2 and "unrecognized arguments: --batch 4" in stderr


def sizes(model, *names):
    """Parameters of parts of a published model."""
    bundle = published(model)
    components = FAMILIES[bundle.manifest["family"]].components
    trees = {name: components[name].abstract(bundle.config(name, components[name].config)) for name in names}
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}


def test_published_sizes():
    """11.9 B and 4.8 B are those of FLUX.1-dev's checkpoints, 3.88 B, 9.08 B and 84.0 M of FLUX.2 [klein]'s."""
    assert sizes("flux-dev", "transformer", "t5") == dict(transformer=11_901_408_320, t5=4_762_310_656)
    klein = sizes("flux2-klein-base-4b", "transformer", "vae", "qwen3")
    assert {name: round(size / 1e6) for name, size in klein.items()} == dict(transformer=3876, vae=84, qwen3=3114)
    assert round(sizes("flux2-klein-9b", "transformer")["transformer"] / 1e6) == 9079
    assert published("sd3") is None


def test_a_model_that_asks_for_guidance_is_planned_with_both_passes(tiny2):
    """Twice the work, and text for two prompts."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    plain = open_bundle(tiny2[0])
    defaults = plain.manifest["defaults"] | dict(true_cfg=4.0)
    guided = Bundle(plain.path, plain.manifest | dict(defaults=defaults))
    one, two = (
        {p.name: p for p in jobs.sampling(bundle, None, mesh, size=64, steps=2).programs} for bundle in (plain, guided)
    )
    assert two["denoise"].flops == 2 * one["denoise"].flops and two["encode text"].flops == 2 * one["encode text"].flops
    rows = [p["denoise"].lower().as_text().count("tensor<2x128x") for p in (one, two)]
    assert rows[0] == 0 < rows[1]
