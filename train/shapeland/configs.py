"""Sizes of Shapeland's networks, and the recipes of its base model and adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

from dynaip_jax.data.config import DataConfig
from dynaip_jax.families.flux import Flux1
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.shapeland.world import vocabulary
from train.config import AdapterChoices, OptimConfig, TrainConfig

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<mask>")
WORDS = [*SPECIAL, *vocabulary()]
END = SPECIAL.index("</s>")
MASK = SPECIAL.index("<mask>")
TOKENS = dict(t5_length=24, clip_length=32)
LEVELS = (2, 4, 6)  # layers of CLIP that the adapter sees
TRUE_CFG = 2.5
STEPS = 16  # of sampling

CONFIGS: dict[str, Any] = dict(
    vae=VAEConfig(resolution=64, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8),
    t5=T5Config(vocab_size=len(WORDS), d_model=128, d_kv=16, d_ff=256, num_heads=8, num_layers=2),
    clip_text=CLIPTextConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(WORDS), max_position_embeddings=TOKENS["clip_length"], eos_token_id=END,
    ),
    clip_vision=CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=8,
    ),
    transformer=FluxConfig(
        in_channels=32, out_channels=32, vec_in_dim=128, context_in_dim=128, hidden_size=128, num_heads=4, depth=4,
        depth_single_blocks=2, axes_dim=(8, 12, 12), guidance_embed=False,
    ),
)  # fmt: skip

FAMILY = Flux1(
    tuple(CONFIGS.items()), tuple((name, Compute()) for name in CONFIGS), ScheduleConfig(), tuple(TOKENS.items())
)

DATA = DataConfig(resolution=64, aspects=("1:1",), clip_size=64, crop_reference=0.85, workers=0)
BASE = TrainConfig(
    data=DATA,
    adapter=AdapterChoices(levels=LEVELS, expert_width=256),
    optim=OptimConfig(kind="muon", rate=1.5e-3, warmup=100, decay_steps=4200, final=0.02, ema=0.997),
    trainable="base",
    fresh_base=True,
    steps=4200,
    batch=64,
    time_mean=0.8,  # towards noise, where it is decided what is drawn
    time_std=1.2,
    dtype="float32",
    remat="none",
    log_every=25,
    save_every=250,
    keep=1,
)
FURTHER = dataclasses.replace(  # of a base that is not fresh, together with the adapter
    BASE,
    data=dataclasses.replace(DATA, drop_image=0.4, flip_reference=0.0),
    adapter=dataclasses.replace(BASE.adapter, blocks="all"),
    optim=dataclasses.replace(BASE.optim, rate=7.5e-4, muon_rate=0.01),
    random_granularity=0.3,
    trainable="all",
    fresh_base=False,
    time_mean=0.3,
)
ADAPTER = dataclasses.replace(
    BASE,
    optim=dataclasses.replace(BASE.optim, decay_steps=1400),
    adapter=dataclasses.replace(BASE.adapter, blocks="all"),
    random_granularity=0.3,
    time_mean=0.4,
    trainable="adapter",
    fresh_base=False,
    steps=1400,
)


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The recipe with another number of steps; its learning rate decays over all of them."""
    decay_steps = max(steps, config.optim.warmup + 1)
    return dataclasses.replace(config, steps=steps, optim=dataclasses.replace(config.optim, decay_steps=decay_steps))
