"""What configs may hold."""

import dataclasses
from typing import Literal

import pytest

from dynaip_jax import schema
from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.adapters.hmoe import HMoEConfig
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3, 3), (float, 3, 3.0), (float | None, None, None), (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[float, float], (1, 2), (1.0, 2.0)), (bool | int | float, True, True), (dict[str, int], dict(a=1), dict(a=1)),
        (Literal["a", "b"], "b", "b"),
    ],
)  # fmt: skip
def test_values_that_fit(kind, value, expected):
    found = schema.typed(kind, value, "x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "x True: expected a whole number"), (int, 2.0, "x 2.0: expected a whole number"),
        (int, 10**400, "x 1000.*: expected a whole number"),
        (float, float("nan"), "x nan: expected a finite number"), (float, 10**400, "expected a finite number"),
        (float, "1", "x '1': expected a finite number"), (bool, 1, "x 1: expected true or false"), (str, None, "x None: expected text"),
        (tuple[int, ...], 3, "x 3: expected a list"), (tuple[int, int], [1], r"x \[1\]: expected a list of 2"),
        (dict[str, int], dict(a="b"), "x.a 'b': expected a whole number"), (Literal[1], True, "expected one of 1"),
        (int | None, "a", "x 'a': expected a whole number"), (str, ["y" * 999], r"x \['yyy.*\.\.\.: expected text"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(kind, value, message):
    with pytest.raises(ValueError, match=message) as e:
        schema.typed(kind, value, "x")
    assert len(str(e.value)) < 120


@pytest.mark.parametrize(
    "config", [c.config for f in FAMILIES.values() for c in f.components.values()] + [DynaIPConfig, HMoEConfig]
)
def test_every_size_of_every_config_has_its_limits(config):
    """Whatever number a field is set to, the config is refused or small enough to be built."""
    tiny = config.tiny() if hasattr(config, "tiny") else config()
    for f in dataclasses.fields(config):
        kind = schema.hints(config)[f.name]
        for value in {int: (-1, 10**9, 2**70, True, 1.5, "4"), float: (float("nan"), float("inf"), "1")}.get(
            kind, (object(),)
        ):
            with pytest.raises((ValueError, TypeError)):
                dataclasses.replace(tiny, **{f.name: value})
                pytest.fail(f"{config.__name__}({f.name}={value!r})")


@pytest.mark.parametrize(
    "build",
    [
        lambda: T5Config(num_heads=0), lambda: T5Config(num_layers=10**9), lambda: FluxConfig(num_heads=0),
        lambda: FluxConfig(axes_dim=(-16, 72, 72)), lambda: CLIPTextConfig(hidden_size=2**20, num_hidden_layers=1024),
        lambda: CLIPVisionConfig(layer_norm_eps=0.0), lambda: VAEConfig(ch_mult=(1,) * 40), lambda: VAEConfig(num_res_blocks=10**6),
        lambda: T5Config(vocab_size=2**24, d_model=2**20), lambda: HMoEConfig(expert_width=2**20, width=2**20),
        lambda: ScheduleConfig(base_tokens=4096), lambda: ScheduleConfig(max_shift=1e30), lambda: ScheduleConfig(shift=0.0),
    ],
)  # fmt: skip
def test_sizes_that_would_never_end_or_fit(build):
    with pytest.raises(ValueError, match="expected|parameters|multiple"):
        build()


def test_numbers_too_long_to_be_written_out():
    with pytest.raises(ValueError, match="x a number of very many digits: expected a whole number"):
        schema.typed(int, 10**5000, "x")
