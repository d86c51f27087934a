"""The adapter on FLUX.1-dev at about 1024 x 1024 pixels, started from what `flux_dev_512` made, at four times the tokens.

Command:   python -m train.export --workdir runs/flux-512 --out adapters/flux-512
           python -m train.main --config configs/flux_dev_1024.py --workdir runs/flux-1024 \\
               --bundle bundles/flux-dev --data.path data/subjects --init-adapter adapters/flux-512
Hardware:  16 chips of 16 GiB (TPU v5e 4x4) or 8 GPUs of 80 GB; on another number of devices set --mesh.fsdp and --batch
Memory:    5.6 of 16 GiB a chip on v5e:4x4 by `dynaip plan` (docs/performance.md)
Speed:     not measured
"""

from dataclasses import replace

from configs.flux_dev_512 import CONFIG as AT_512

CONFIG = replace(
    AT_512,
    data=replace(AT_512.data, resolution=1024),
    sample=replace(AT_512.sample, size=1024),
    batch=16,
    steps=20_000,
)
