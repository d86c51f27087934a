"""Devices that are not here: TPU topologies, for which libtpu compiles on any machine."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import jax

from dynaip_jax.errors import UserError

# without these libtpu looks for the machine's TPUs, complains that there are none, and lets one process at a time compile
QUIET = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def devices(topology: str | None) -> list[Any]:
    """The devices of a TPU `topology` ("v5e:4x4", or "2xv5e:4x4" for two slices), or the ones that are here. Raises `UserError` for a
    topology that is not known and where libtpu, which compiles for it, is not installed."""
    if topology is None:
        return jax.devices()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    count = re.fullmatch(r"(\d+)x([a-z].+)", topology)
    slices, one = (int(count[1]), count[2]) if count else (1, topology)
    alone = set(one.partition(":")[2].split("x")) == {"1"}  # libtpu takes four chips a host for granted
    hosts = dict(chips_per_host_bounds=[1, 1, 1]) if alone else {}
    try:
        several = dict(num_slices=slices) if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=one, **hosts, **several).devices)
    except Exception as e:  # what libtpu raises has no class of its own
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"`topology` {topology}: compiling for TPUs needs libtpu, which is not here; pip install 'jax[tpu]'"
            ) from e
        raise UserError(
            f"`topology` {topology}: refused by libtpu ({' '.join(str(e).split())[:160]}); expected such as v5e:4x4, v5p:2x2x1, "
            "v6e:2x4, or 2xv5e:4x4 for two slices"
        ) from e
