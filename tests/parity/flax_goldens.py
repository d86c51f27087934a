"""Outputs of transformers' Flax models, which version 5 no longer has: computed in a child process with version 4.

`make_goldens` starts this file as a program: it saves each model with random parameters as transformers does
(`config.json`, `flax_model.msgpack`) and, beside them, `goldens.npz` with its inputs and outputs.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TEXT = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=11,
    eos_token_id=59,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=20, patch_size=5
)
T5 = dict(vocab_size=60, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")


def make_goldens(folder: Path, *kinds: str) -> Path:
    """Fills `folder/<kind>` for each of `kinds` ("clip_text", "clip_vision", "t5") and returns `folder`."""
    transformers_4 = Path(sys.prefix) / "transformers-4"
    assert transformers_4.is_dir(), (
        f"{transformers_4} is missing: `make` creates it (transformers 4, for its Flax classes)"
    )
    env = os.environ | {"PYTHONPATH": str(transformers_4), "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, __file__, str(folder), *kinds], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return folder


def _model(kind: str):
    import jax.numpy as jnp
    import transformers as hf

    clip = jnp.clip  # Flax T5 passes it `a_max`, which jax has removed
    jnp.clip = lambda x, *a, a_max=None, **k: clip(x, *a, **k) if a_max is None else jnp.minimum(x, a_max)
    if kind == "clip_text":
        return hf.FlaxCLIPTextModel(hf.CLIPTextConfig(**TEXT), _do_init=False)
    if kind == "clip_vision":
        return hf.FlaxCLIPVisionModel(hf.CLIPVisionConfig(**VISION, hidden_act="gelu"), _do_init=False)
    return hf.FlaxT5EncoderModel(hf.T5Config(**T5), _do_init=False)


def _save(folder: Path, kind: str) -> None:
    import jax

    rng = np.random.default_rng(0)
    model = _model(kind)
    params = jax.tree.map(lambda p: rng.normal(0.1, 0.3, p.shape).astype(np.float32), model.params_shape_tree)
    model.save_pretrained(folder / kind, params=params)

    def run(x, **options):
        return jax.jit(lambda p: model(x, params=p, **options))(params)

    if kind == "clip_vision":
        x = dict(pixel_values=rng.normal(size=(2, 20, 20, 3)).astype(np.float32))
        out = run(x["pixel_values"].transpose(0, 3, 1, 2), output_hidden_states=True)
        y = dict(states=np.stack(out.hidden_states), pooled=out.pooler_output)
    elif kind == "clip_text":
        x = dict(input_ids=rng.integers(1, 58, (3, 11)).astype(np.int32))
        x["input_ids"][:2, 6:] = TEXT["eos_token_id"]
        out = run(x["input_ids"])
        y = dict(last=out.last_hidden_state, pooled=out.pooler_output)
    else:
        x = dict(input_ids=rng.integers(0, 60, (2, 150)).astype(np.int32))
        y = dict(last=run(x["input_ids"]).last_hidden_state)
    np.savez(folder / kind / "goldens.npz", **x, **y)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        _save(Path(sys.argv[1]), name)
