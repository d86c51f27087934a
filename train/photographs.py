"""A small dataset of real photographs, those that scikit-image ships: for the debug recipe and for tests."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import wait_for_writer
from dynaip_jax.version import __version__
from train.config import TrainConfig

PHOTOGRAPHS = "photographs"  # the value of data.path that means this dataset
SIDE = 256  # pixels of the longer side: enough for the embedded model, quick to decode
CAPTIONS = {  # name in skimage.data: (caption, the words in it that name the subject)
    "astronaut": ("a portrait of an astronaut in an orange suit", "an astronaut"),
    "chelsea": ("a close photo of a tabby cat", "a tabby cat"),
    "coffee": ("a cup of coffee on a wooden table", "a cup of coffee"),
    "rocket": ("a rocket on its launch pad at dusk", "a rocket"),
    "hubble_deep_field": ("galaxies in a dark sky", "galaxies"),
    "immunohistochemistry": ("stained tissue under a microscope", "stained tissue"),
    "retina": ("the retina of an eye on black", "the retina of an eye"),
    "colorwheel": ("a wheel of colours on white", "a wheel of colours"),
}


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with the folder of the photographs in place of `PHOTOGRAPHS`."""
    for name in ("data", "validation"):
        part = getattr(config, name)
        if part.path == PHOTOGRAPHS:
            path = str(prepare_photographs())
            config = dataclasses.replace(config, **{name: dataclasses.replace(part, path=path)})
    return config


def prepare_photographs() -> Path:
    """The dataset's folder in the user's cache; made by `train.prepare` at the first call.

    Raises `UserError` if scikit-image is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    out = cache / "dynaip_jax" / __version__ / PHOTOGRAPHS
    if out.exists():
        return out
    try:
        import skimage.data
    except ImportError as e:
        raise UserError(
            f"`data.path` {PHOTOGRAPHS}: needs the pictures of scikit-image; pip install scikit-image, or give another dataset"
        ) from e
    from PIL import Image

    from train.prepare import main

    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for name, (caption, subject) in CAPTIONS.items():
            try:
                picture = getattr(skimage.data, name)()
            except (ImportError, OSError, ValueError):
                continue  # not in the wheel: scikit-image would download it
            image = Image.fromarray(picture[..., :3])
            image.thumbnail((SIDE, SIDE))
            image.save(Path(folder) / f"{name}.jpg", quality=95)
            row = dict(reference=f"{name}.jpg", target=f"{name}.jpg", caption=caption, subject=subject)
            lines.append(json.dumps(row))
        manifest = Path(folder) / "metadata.jsonl"
        manifest.write_text("\n".join(lines) + "\n")
        try:
            main(["--source", str(manifest), "--out", str(out)])
        except UserError:  # another process makes it, or has just done so
            wait_for_writer(out)
            if not out.is_dir():
                raise
    return out
