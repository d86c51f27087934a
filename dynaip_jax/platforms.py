"""Which kinds of device JAX looks for."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "JAX_PLATFORMS"
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus
OTHERS = ("0x01", "0x02")  # classes of Google's disks and network cards there
NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")


def leave_absent_tpus(root: Path = Path("/")) -> None:
    """Has JAX not look for a TPU where libtpu is installed (it compiles for TPUs on any machine) but there is none: libtpu would
    print an alarm of several lines. Nothing changes if `JAX_PLATFORMS` says what to look for, or if another kind of accelerator than
    NVIDIA's may be there. `root`: of the system's files."""
    if os.environ.get(VARIABLE) or "JAX_FORCE_TPU_INIT" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if _may_have_tpu(root):
        return
    plugins = _plugins()
    if not all(name.startswith("xla_cuda") for name in plugins):
        return
    gpu = plugins and any((root / device).exists() for device in NVIDIA)
    os.environ[VARIABLE] = "cuda,cpu" if gpu else "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(VARIABLE.lower(), os.environ[VARIABLE])


def _may_have_tpu(root: Path) -> bool:
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            if vendor.read_text().strip() == GOOGLE and not vendor.with_name("class").read_text().startswith(OTHERS):
                return True
        except OSError:  # cannot be told
            return True
    return any(root.glob("dev/accel*"))


def _plugins() -> set[str]:
    """Names of JAX's other kinds of device, as they are installed."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return {
        path.name for folder in folders for path in Path(folder).iterdir() if path.is_dir() and path.name[0] not in "._"
    }
