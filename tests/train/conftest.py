"""What runs of the trainer share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dynaip_jax.commandline import run_cli
from train.main import main
from train.photographs import prepare_photographs


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The environment of a run: a cache with the photographs, and one for compiled programs."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        prepare_photographs()
    return dict(
        XDG_CACHE_HOME=str(cache),
        JAX_COMPILATION_CACHE_DIR=str(cache / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_NUM_CPU_DEVICES="1",
    )


@pytest.fixture
def trainer(home, monkeypatch, capsys):
    """Runs the training command in this process -> (exit status, lines on stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", home["XDG_CACHE_HOME"])

    def run(words, command=main):
        status = run_cli(command, [str(w) for w in words])
        return status, capsys.readouterr().err.splitlines()

    settings = dict(
        jax_compilation_cache_dir=home["JAX_COMPILATION_CACHE_DIR"], jax_persistent_cache_min_compile_time_secs=0.0
    )
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield run
