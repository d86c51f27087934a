"""Imports run one way, heavy ones wait, and torch stays in tests/parity: read from the source, not by hand."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {  # package or module: what it may not import, by prefix
    "dynaip_jax": ("train", "configs", "tools", "tests", "benchmarks"),
    "dynaip_jax.types": ("dynaip_jax.",),
    "dynaip_jax.layers.attention": ("dynaip_jax.models", "dynaip_jax.adapters", "dynaip_jax.sampling.pipeline"),
    "dynaip_jax.flow": ("dynaip_jax.",),
    "dynaip_jax.models": ("dynaip_jax.adapters", "dynaip_jax.sampling.pipeline", "dynaip_jax.storage.bundle", "dynaip_jax.data", "dynaip_jax.eval"),
    "dynaip_jax.adapters": ("dynaip_jax.sampling.pipeline", "dynaip_jax.storage.bundle", "dynaip_jax.data", "dynaip_jax.models.flux", "dynaip_jax.models.clip"),
    "dynaip_jax.storage.bundle": ("dynaip_jax.models", "dynaip_jax.adapters", "dynaip_jax.sampling.pipeline"),
    "dynaip_jax.data": ("dynaip_jax.models", "dynaip_jax.adapters", "dynaip_jax.sampling.pipeline", "jax"),
    "dynaip_jax.sampling.pipeline": ("dynaip_jax.app.main", "dynaip_jax.eval"),
    "train": ("configs", "tools", "tests"),
    "tools": ("train", "configs", "tests"),
}  # fmt: skip
GRAIN = "dynaip_jax.data.loader"  # subclasses a class of grain, so it is itself imported late
LAZY = (GRAIN, "transformers", "grain", "tensorflow_datasets", "matplotlib", "tqdm", "tensorboardX", "qwix")


def modules():
    for top in ("dynaip_jax", "train", "configs", "tools", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts(name, prefix):
    prefix = prefix.rstrip(".")
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize("owner", FORBIDDEN)
def test_imports_run_one_way(owner):
    checked = [(n, p) for n, p in modules() if starts(n, owner)]
    assert checked
    for name, path in checked:
        for found in imports(path):
            assert not any(starts(found, f) for f in FORBIDDEN[owner]), f"{name} imports {found}"


def test_no_torch_outside_the_oracle():
    for name, path in modules():
        if starts(name, "benchmarks"):
            continue
        assert not any(starts(found, "torch") or starts(found, "diffusers") for found in imports(path)), name


def test_heavy_libraries_wait_until_they_are_needed():
    for name, path in modules():
        if starts(name, "dynaip_jax"):
            found = [i for i in imports(path, top_level_only=True) if any(starts(i, lazy) for lazy in LAZY)]
            if name == GRAIN:
                assert found == ["grain"]
            else:
                assert not found, f"{name} imports {found} at the top"


def test_adapter_and_models_do_not_know_each_other():
    for name, path in modules():
        if starts(name, "dynaip_jax.adapters"):
            allowed = ("dynaip_jax.layers.basic",)
            found = [
                i for i in imports(path) if starts(i, "dynaip_jax.models") and not any(starts(i, a) for a in allowed)
            ]
            assert not found, f"{name} imports {found}"
