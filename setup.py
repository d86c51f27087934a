"""Packaging of dynaip_jax. Only the library is installed; `train`, `tools`, `configs` and `benchmarks` run from a checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', (Path(__file__).parent / "dynaip_jax" / "version.py").read_text())[1]

setup(
    name="dynaip_jax",
    version=VERSION,
    description="DynaIP in JAX/Flax: zero-shot subject personalisation for multimodal diffusion transformers",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dynaip_jax", "dynaip_jax.*"]),
    package_data={"dynaip_jax": ["py.typed", "assets/**/*"]},
    entry_points={"console_scripts": ["dynaip = dynaip_jax.app.main:main"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array_record",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it
        "etils[epath]",
        "tensorstore",
        "fsspec",
        "transformers>=4.57,<6",
        "jinja2",  # transformers writes chat templates by it
        "sentencepiece",  # with protobuf: transformers reads T5's tokenizer by them
        "protobuf",
        "safetensors>=0.6",
        "huggingface_hub",
        "msgpack",
        "ml_dtypes",
        "numpy",
        "scipy>=1.15",
        "pillow>=11",
        "pyyaml",
        "tyro>=1.0",
        "pyarrow",
        "absl-py",
        "tokenizers",
        "jaxtyping",
        "tqdm",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "train": [],  # what training needs is always installed; older instructions name it
        "gcs": ["gcsfs", "google-cloud-storage"],
        "quantized": ["qwix>=0.1.8"],
        "plot": ["matplotlib>=3.9"],
        "serve": ["gradio>=6.31,<7", "matplotlib>=3.9"],  # gradio takes Pillow 12, everything else 13 as well
        "convert": ["gguf>=0.17", "torch"],  # the converter reads GGUF files, and pickles, by them
        "test": [
            "pytest",
            "pytest-xdist",
            "jax[tpu]>=0.10,<0.12",  # compiles for TPUs on any machine
            "hypothesis",
            "beartype",
            "qwix>=0.1.8",
            "matplotlib>=3.9",
            "gradio>=6.31,<7",
            "playwright",  # drives a browser that the machine has
            "gguf>=0.17",
            "torch==2.13.0",
            "diffusers==0.42.1",
            "accelerate",  # diffusers loads folders by it
            "peft",  # and LoRAs
            "bitsandbytes>=0.50",  # its own reading of 4 and 8 bits is compared with the converter's
            "torchao>=0.16",  # writes one of the forms of weights that the converter refuses by name
            "scikit-image",
            "ruff",
            "mypy",
            "pooch",  # scikit-image finds its pictures by it
        ],
    },
)
