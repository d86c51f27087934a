"""The embedded model of Shapeland on scikit-image's photographs: shows in about a minute, on a CPU, that training works.

Command:   python -m train.main --config configs/debug.py --workdir runs/debug
Hardware:  any CPU
Memory:    below 2 GiB
Speed:     see docs/performance.md
"""

from dynaip_jax.data.config import DataConfig
from train.config import AdapterChoices, OptimConfig, TrainConfig

CONFIG = TrainConfig(
    data=DataConfig(path="photographs", resolution=64, aspects=("1:1",), clip_size=64, workers=1),
    adapter=AdapterChoices(levels=(2, 4, 6), expert_width=128),
    optim=OptimConfig(rate=1e-3, warmup=10, decay_steps=1000, ema=0.99),
    steps=100,
    batch=4,
    dtype="float32",
    remat="none",
    log_every=10,
    save_every=50,
)
