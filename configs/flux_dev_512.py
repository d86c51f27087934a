"""The adapter on FLUX.1-dev at about 512 x 512 pixels.

Command:   python -m train.main --config configs/flux_dev_512.py --workdir runs/flux-512 \\
               --bundle bundles/flux-dev --data.path data/subjects
Hardware:  16 chips of 16 GiB (TPU v5e 4x4) or 8 GPUs of 80 GB; on another number of devices set --mesh.fsdp and --batch
Memory:    7.4 of 16 GiB a chip on v5e:4x4 by `dynaip plan` (docs/performance.md)
Speed:     not measured
"""

from dynaip_jax.data.config import DataConfig
from dynaip_jax.runtime.sharding import MeshConfig
from train.config import AdapterChoices, SampleConfig, TrainConfig

CONFIG = TrainConfig(
    bundle="bundles/flux-dev",
    data=DataConfig(resolution=512, workers=4),
    adapter=AdapterChoices(blocks="double"),  # all 57 blocks need three times the bank; not measured on FLUX.1
    mesh=MeshConfig(data=1, fsdp=-1),
    sample=SampleConfig(every=1000, size=512),
    batch=64,
)
