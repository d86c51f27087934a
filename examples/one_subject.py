"""One subject: a drawing of a star, in a scene of your words.

python examples/one_subject.py star.png
"""

import sys

from dynaip_jax import DynaIPPipeline
from dynaip_jax.shapeland import default, world

star = world.drawing("star", 0)  # with a model of your own, the path of a photograph
pipe = DynaIPPipeline.load(*default.paths())  # DynaIPPipeline.load("bundles/flux-dev", adapter="adapters/mine")

result = pipe("a star on the left on sand at noon", references=[star], seed=1)
result.images[0].save(sys.argv[1])
low, mid, high = result.routing[0]
print(f"{sys.argv[1]}: the router gave CLIP's levels {low:.2f}, {mid:.2f} and {high:.2f}")
