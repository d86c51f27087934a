"""One small picture, as tests of the pipeline ask for it."""

import numpy as np
import skimage.data

SIZE = dict(steps=3, height=32, width=48)


def draw(pipe, *references, **options):
    return np.asarray(pipe("a cat", references, **(SIZE | options)).images[0])


def photographs():
    return skimage.data.astronaut(), skimage.data.coffee()
