"""The adapter on FLUX.1-dev at about 512 x 512 pixels, over two TPU slices: twice the batch of `flux_dev_512` at the same memory a chip.

Command:   python -m train.main --config configs/flux_dev_512_slices.py --workdir gs://bucket/flux-512 \\
               --bundle bundles/flux-dev --data.path data/subjects --distributed.enabled
Hardware:  two slices of 16 chips of 16 GiB (TPU v5e 4x4), each with a whole copy; only gradients cross the network between them
Memory:    7.4 of 16 GiB a chip on 2xv5e:4x4 by `dynaip plan` (docs/performance.md)
Speed:     not measured
"""

from dataclasses import replace

from configs.flux_dev_512 import CONFIG as ONE_SLICE
from dynaip_jax.runtime.sharding import MeshConfig

CONFIG = replace(ONE_SLICE, mesh=MeshConfig(data=2, fsdp=-1), batch=128, steps=50_000)
