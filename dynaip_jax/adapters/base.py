"""The adapters that a pipeline can be loaded with, by their configs."""

from __future__ import annotations

from typing import TypeAlias

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.adapters.instantx import InstantXConfig
from dynaip_jax.adapters.ip_adapter import IPAdapterConfig

PublicConfig: TypeAlias = IPAdapterConfig | InstantXConfig  # of adapters that others published
AdapterConfig: TypeAlias = DynaIPConfig | PublicConfig
