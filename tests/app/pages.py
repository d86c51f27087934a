"""What tests of the page share: uploads as its widgets send them."""

import base64
import io
import json

import numpy as np
from PIL import Image


def png(picture):
    """The content of a PNG of a uint8 array."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def address(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def upload(picture, mask=None):
    """A reference as the widget sends it; `picture`, `mask`: contents of files."""
    return json.dumps(dict(picture=address(picture), mask="" if mask is None else address(mask)))


def half(side, size=64):
    """A mask that is white on one side."""
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    return png(mask if side == "left" else mask[:, ::-1])
