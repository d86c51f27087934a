"""One figure that shows what the options do, made with the embedded default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax import default
from dynaip_jax.data import images
from dynaip_jax.pipeline import DynaIPPipeline

PHOTOGRAPH = Path(__file__).parent / "assets" / "astronaut.jpg"  # NASA's portrait of Eileen Collins, public domain
PROMPT = "a photo of an astronaut"
PANELS: dict[str, dict[str, Any]] = {
    "DDS on (default)": dict(),
    "DDS off": dict(text_gain=1.0),
    "image scale 0": dict(image_scale=0.0),
    "granularity low": dict(granularity=(1, 0, 0)),
    "granularity mid": dict(granularity=(0, 1, 0)),
    "granularity high": dict(granularity=(0, 0, 1)),
}


def draw(reference: Path | None, output: Path, *, overwrite: bool) -> None:
    """Writes the figure: the reference, text only, then a panel for each setting, all from one seed."""
    bundle, adapter = default.paths()
    photograph = images.load_image(reference or PHOTOGRAPH)
    panels = {"reference": images.square(photograph)}
    panels["text only"] = np.asarray(DynaIPPipeline.load(bundle)(PROMPT, seed=0).images[0])
    pipe = DynaIPPipeline.load(bundle, adapter)
    for label, options in PANELS.items():
        panels[label] = np.asarray(pipe(PROMPT, [photograph], seed=0, **options).images[0])
    cells = [images.labelled(image, label, default.SIZE) for label, image in panels.items()]
    images.save_png(
        images.grid(cells, columns=4), output, dict(prompt=PROMPT, panels=list(panels)), overwrite=overwrite
    )
