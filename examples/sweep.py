"""A sweep: one prompt over a grid of two options, as `dynaip sweep` draws it.

python examples/sweep.py sweep.png
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from dynaip_jax.app.sweep import main
from dynaip_jax.shapeland import world

with tempfile.TemporaryDirectory() as folder:
    reference = Path(folder) / "star.png"
    Image.fromarray(world.drawing("star", 0)).save(reference)
    axes = ["--x", "image_scale=0.2,0.6,1", "--y", "text_gain=0,1"]
    asked = ["--prompt", "a star on the left on sand at noon", "--reference", str(reference), "--output", sys.argv[1]]
    sys.exit(main([*axes, *asked]))
