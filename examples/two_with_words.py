"""Two subjects, each where the picture attends to its words of the prompt.

python examples/two_with_words.py two.png
"""

import sys

from dynaip_jax import DynaIPPipeline
from dynaip_jax.shapeland import default, world

references = [world.drawing("star", 0), world.drawing("heart", 1)]
pipe = DynaIPPipeline.load(*default.paths())

prompt = "a star on the left and a heart on the right on grass at noon"
result = pipe(prompt, references, words=["star", "heart"], seed=1)
result.images[0].save(sys.argv[1])
