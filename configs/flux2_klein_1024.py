"""The adapter on FLUX.2 [klein] base 4B at about 1024 x 1024 pixels, started from what `flux2_klein_512` made, at four times the tokens.

Command:   python -m train.export --workdir runs/klein-512 --out adapters/klein-512
           python -m train.main --config configs/flux2_klein_1024.py --workdir runs/klein-1024 \\
               --bundle bundles/flux2-klein-base-4b --data.path data/subjects --init-adapter adapters/klein-512
Hardware:  8 chips of 16 GiB (TPU v5e 2x4); on another number of devices set --mesh.fsdp and --batch
Memory:    8.7 GiB a chip of v5e:2x4, 16.4 of v6e:2x2, by the compiler (`dynaip plan`)
Speed:     not measured
"""

from dataclasses import replace

from configs.flux2_klein_512 import CONFIG as AT_512

CONFIG = replace(
    AT_512,
    data=replace(AT_512.data, resolution=1024),
    sample=replace(AT_512.sample, size=1024),
    batch=16,
    steps=20_000,
)
