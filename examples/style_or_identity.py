"""Style against identity: which of CLIP's levels a reference is read from. Low ones hold detail, the last one the concept.

python examples/style_or_identity.py levels.png
"""

import sys

import numpy as np

from dynaip_jax import DynaIPPipeline, images
from dynaip_jax.shapeland import default, world

LEVELS = {"router": None, "low": (1, 0, 0), "middle": (0, 1, 0), "high": (0, 0, 1)}
star = world.drawing("star", 0)
pipe = DynaIPPipeline.load(*default.paths())

cells = [images.labelled(star, "reference", 160)]
for label, granularity in LEVELS.items():
    result = pipe("a star on the left on sand at noon", star, granularity=granularity, seed=1)
    cells.append(images.labelled(np.asarray(result.images[0]), label, 160))
images.grid(cells, columns=len(cells)).save(sys.argv[1])
