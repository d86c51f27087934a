"""The embedded tiny model on scikit-image's photographs: shows in seconds, on a CPU, that training works.

Command:   python -m train.main --config configs/debug.py --workdir runs/debug
Hardware:  any CPU
Memory:    below 2 GiB
Speed:     see docs/performance.md
"""

from dynaip_jax.data.sources import DataConfig
from train.config import AdapterChoices, OptimConfig, TrainConfig

CONFIG = TrainConfig(
    data=DataConfig(path="photographs", resolution=128, aspects=("1:1",), clip_size=32, workers=1),
    adapter=AdapterChoices(levels=(2, 3, 4), expert_width=64),
    optim=OptimConfig(rate=1e-3, warmup=10, decay_steps=1000, ema=0.99),
    steps=100,
    batch=4,
    dtype="float32",
    remat="none",
    log_every=10,
    save_every=50,
)
