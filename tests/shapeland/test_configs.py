"""The recipe makes networks and tokenizers like those that ship."""

import dataclasses

import pytest

from dynaip_jax.families.registry import open_bundle
from dynaip_jax.shapeland import default
from train.shapeland.configs import CONFIGS, FAMILY, TOKENS
from train.shapeland.tokenizers import write_tokenizers


@pytest.fixture(scope="module")
def shipped():
    return open_bundle(default.paths()[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_that_ship(shipped, name):
    stored = shipped.config(name, FAMILY.components[name].config)
    if name == "vae":  # its training measures these
        stored = dataclasses.replace(
            stored, shift_factor=CONFIGS[name].shift_factor, scale_factor=CONFIGS[name].scale_factor
        )
    assert stored == CONFIGS[name]
    assert (shipped.manifest["family"], shipped.manifest["text"]) == (FAMILY.name, TOKENS)


def test_tokenizers_are_those_that_ship(shipped, tmp_path):
    for name, folder in write_tokenizers(tmp_path).items():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / file).read_text() == (shipped.path / "tokenizers" / name / file).read_text(), (
                f"{name}/{file}"
            )
