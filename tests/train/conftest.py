"""What runs of the trainer share."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest

from dynaip_jax.commandline import run_cli
from dynaip_jax.runtime.sharding import MeshConfig
from tests.conftest import made_once
from tests.train.runs import fixed, tiny_recipe, without_overview, words
from train.loop import train
from train.main import main
from train.photographs import prepare_photographs
from train.run import Run
from train.step import Features


def prepared(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return prepare_photographs()


@pytest.fixture(scope="session")
def home():
    """The environment of a run: a cache with the photographs, and one for compiled programs."""
    return dict(
        XDG_CACHE_HOME=str(made_once("cache", prepared)),
        JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_NUM_CPU_DEVICES="1",
    )


@pytest.fixture(scope="session")
def photographs(home):
    """The folder of the dataset."""
    return prepared(home["XDG_CACHE_HOME"])


@pytest.fixture(scope="package", autouse=True)
def compiled():
    """Programs compiled by one test, or by a child, are read by the next, however small."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


@pytest.fixture
def trainer(home, monkeypatch, capsys):
    """Runs the training command in this process -> (exit status, lines on stderr but those of the overview)."""
    monkeypatch.setenv("XDG_CACHE_HOME", home["XDG_CACHE_HOME"])

    def run(words, command=main):
        status = run_cli(command, [str(w) for w in words])
        return status, without_overview(capsys.readouterr().err.splitlines())

    return run


@pytest.fixture
def two_steps(trainer, tmp_path):
    """The folder of a run of two steps."""
    assert trainer(words(tmp_path / "run", "--steps", 2))[0] == 0
    return tmp_path / "run"


@pytest.fixture(scope="session")
def config(tiny, photographs):
    """The debug recipe on the tiny bundle, with the photographs."""
    recipe = tiny_recipe(tiny)
    data = dataclasses.replace(recipe.data, path=str(photographs), workers=0)
    return dataclasses.replace(recipe, data=data, log_every=1)


@pytest.fixture(scope="session")
def setup(config):
    """(constants, frozen weights, state, features of 8 samples) for the adapter."""
    run = Run(dataclasses.replace(config, mesh=MeshConfig()))
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    levels = tuple(normal(8, 1, 17, 32) for _ in range(3))
    times = jnp.linspace(0.05, 0.95, 8)
    latents, noise = normal(8, 16, 8, 8), normal(8, 16, 8, 8)
    features = Features(latents, noise, times, normal(8, 6, 32), normal(8, 32), levels, jnp.ones(8))
    return run.constants, run.frozen, run.fresh_state(), features


@pytest.fixture(scope="session")
def adapter_run(config, tmp_path_factory):
    """(folder, last state) of a run over one batch."""
    workdir = tmp_path_factory.mktemp("runs") / "adapter"
    state = train(fixed(config, steps=120, save_every=60), workdir)
    return workdir, state
