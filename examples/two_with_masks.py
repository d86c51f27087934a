"""Two subjects, each where its mask is white in the output: here the left and the right half.

python examples/two_with_masks.py two.png
"""

import sys

import numpy as np

from dynaip_jax import DynaIPPipeline
from dynaip_jax.shapeland import default, world

references = [world.drawing("star", 0), world.drawing("heart", 1)]
left = np.zeros((64, 64), np.float32)  # of any size: it is fitted to the picture
left[:, :32] = 1
pipe = DynaIPPipeline.load(*default.paths())

prompt = "a star on the left and a heart on the right on grass at noon"
result = pipe(prompt, references, masks=[left, 1 - left], seed=1)
result.images[0].save(sys.argv[1])
