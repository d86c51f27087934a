"""The loader of adapters for PyTorch in `examples/` gives what the library gives, to 1e-5."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig, init_adapter_params
from dynaip_jax.adapters.hmoe import HMoEConfig
from dynaip_jax.storage.adapter import write_adapter
from dynaip_jax.storage.codec import to_dict
from examples import load_adapter_torch
from tests.parity.test_clip import assert_close

SIZES = dict(clip_width=12, expert_width=20, width=16, levels=(1, 3, 4))
KINDS = dict(
    image=({}, "all"),
    token=(dict(router="token"), "double"),
    resampled=(dict(resampler_tokens=5, resampler_depth=2, resampler_heads=4), "all"),
    fixed=(dict(weights=(1.0, 2.0, 1.0)), "double"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_its_banks_are_those_of_the_library(kind, tmp_path):
    hmoe, blocks = KINDS[kind]
    config = DynaIPConfig(
        HMoEConfig(**SIZES, **hmoe), blocks=blocks, depth=2, depth_single_blocks=3, num_heads=2, head_dim=8
    )
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: init_adapter_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), tree)
    write_adapter(
        tmp_path / "a", to_dict(config), params, base=dict(family="flux", fingerprint=""), step=0, conventions={}
    )
    features = [rng.normal(size=(2, 1, 7, 12)).astype(np.float32) for _ in range(3)]
    prompt, routing = jax.jit(DynaIP(config).apply)({"params": params}, features)
    adapter = load_adapter_torch.Adapter(tmp_path / "a")
    assert list(adapter.levels) == [1, 3, 4]
    banks, weights = adapter([torch.tensor(x[:, 0]) for x in features])
    assert len(banks) == (2 if blocks == "all" else 1)
    for bank, kv in zip(banks, (prompt.double, prompt.single), strict=False):
        for theirs, ours in zip(bank, kv, strict=True):
            assert_close(theirs.numpy(), np.moveaxis(np.asarray(ours)[:, :, 0], 2, 3))
    shown = np.asarray(routing)[:, 0]
    np.testing.assert_allclose(
        np.broadcast_to(weights, (2, 7, 3)), np.broadcast_to(shown.reshape(2, -1, 3), (2, 7, 3)), atol=1e-5
    )


def test_it_is_short_and_needs_torch_alone():
    lines = Path(load_adapter_torch.__file__).read_text().splitlines()
    code = lines[lines.index("import json") :]
    assert len(lines) <= 60
    imported = {line.split()[1].split(".")[0] for line in code if line.startswith(("import", "from"))}
    assert imported == {"json", "pathlib", "safetensors", "torch"}
