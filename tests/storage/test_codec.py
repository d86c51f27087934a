"""One codec for every config on disk: what is written comes back, and files of other versions are met as they should be."""

import dataclasses
import json

import pytest

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.storage.codec import from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    maybe: Inner | None = None
    pairs: tuple[tuple[float, float], ...] = ()
    name: str = "x"
    scratch: int = dataclasses.field(default=0, metadata=dict(stored=False))


def test_nested_configs_and_tuples_come_back_through_json():
    config = Outer(Inner((3,)), Inner((4, 5)), ((0.5, 1.0), (2.0, 3.0)), "y", scratch=7)
    stored = json.loads(json.dumps(to_dict(config)))
    assert "scratch" not in stored
    assert from_dict(Outer, stored) == dataclasses.replace(config, scratch=0)


def test_missing_fields_take_their_defaults_and_unknown_ones_are_refused():
    assert from_dict(Outer, {}) == Outer()
    with pytest.raises(TypeError, match="unknown field 'nmae'; expected some of inner, maybe, name, pairs"):
        from_dict(Outer, dict(nmae="y"))
    with pytest.raises(TypeError, match="unknown field 'scratch'"):
        from_dict(Outer, dict(scratch=1))
    with pytest.raises(TypeError, match="Inner: found int, expected an object"):
        from_dict(Outer, dict(inner=3))


def test_every_config_of_every_family_and_the_adapters_comes_back():
    configs = [c.config.tiny() for family in FAMILIES.values() for c in family.components.values()]
    for config in (*configs, DynaIPConfig()):
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_an_adapter_of_before_sites_and_merges_is_read():
    old = {k: v for k, v in to_dict(DynaIPConfig()).items() if k not in ("site", "merge", "query")}
    assert from_dict(DynaIPConfig, old) == DynaIPConfig()
