"""The adapter on FLUX.2 [klein] base 4B at about 512 x 512 pixels.

Command:   python -m train.main --config configs/flux2_klein_512.py --workdir runs/klein-512 \\
               --bundle bundles/flux2-klein-base-4b --data.path data/subjects
Hardware:  8 chips of 16 GiB (TPU v5e 2x4); on another number of devices set --mesh.fsdp and --batch
Memory:    12.4 GiB a chip of v5e:2x4, 20.2 of v6e:2x2, by the compiler (`dynaip plan`)
Speed:     not measured
"""

from dynaip_jax.data.config import DataConfig
from dynaip_jax.runtime.sharding import MeshConfig
from train.config import AdapterChoices, SampleConfig, TrainConfig

CONFIG = TrainConfig(
    bundle="bundles/flux2-klein-base-4b",
    data=DataConfig(resolution=512, workers=4),
    adapter=AdapterChoices(blocks="all"),  # 25 blocks, of which 5 are double; not measured
    mesh=MeshConfig(data=1, fsdp=-1),
    sample=SampleConfig(every=1000, size=512),
    batch=64,
)
