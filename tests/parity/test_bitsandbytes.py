"""Weights that bitsandbytes quantised, as it saves them, against its own dequantisation; skipped where it is not installed.

Tolerance: one part in a million, the rounding of float32; ours multiplies in another order where scales are quantised too.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tools.convert_torch_weights.opening import open_weights

bnb = pytest.importorskip("bitsandbytes")


def drawn(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def read(layer, path):
    save_file({f"a.{name}": x.contiguous() for name, x in layer.state_dict().items()}, path)
    file = open_weights(path).tensors
    assert list(file) == ["a.weight"]
    return file["a.weight"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind, nested, tmp_path):
    """More blocks than are nested together, and the last not full."""
    layer = bnb.nn.Linear4bit(100, 333, bias=False)
    made = dict(requires_grad=False, quant_type=kind, compress_statistics=nested)
    layer.weight = bnb.nn.Params4bit(drawn(333, 100), **made)
    layer = layer.to("cpu")
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).numpy()
    ours = read(layer, tmp_path / "a.safetensors")
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_eight_bits(tmp_path):
    layer = bnb.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(drawn(24, 64), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    state = layer.state_dict()
    theirs = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"]).float().numpy()
    assert np.abs(theirs - drawn(24, 64).numpy()).max() < 0.02
    np.testing.assert_allclose(read(layer, tmp_path / "a.safetensors"), theirs, rtol=1e-6)
