"""Planning: published sizes, and what the command line takes."""

import jax

from dynaip_jax.families.flux import Flux1
from dynaip_jax.families.registry import published


def test_other_commands_take_no_fields(dynaip):
    status, _, stderr = dynaip("sample", "--prompt", "x", "--output", "o.png", "--batch", 4)
    assert status == 2 and "unrecognized arguments: --batch 4" in stderr


def test_published_sizes():
    """Parameters of FLUX.1-dev's parts; 11.9 B and 4.8 B are those of the published checkpoints."""
    bundle = published("flux-dev")
    sizes = {}
    for name in ("transformer", "t5"):
        component = Flux1.components[name]
        tree = component.abstract(bundle.config(name, component.config))
        sizes[name] = sum(x.size for x in jax.tree.leaves(tree))
    assert sizes == dict(transformer=11_901_408_320, t5=4_762_310_656)
    assert published("sd3") is None
