"""The benchmarks as a whole: what is compared, and how."""

from importlib.util import find_spec

import pytest

from benchmarks import all as benchmarks


def test_every_benchmark_that_needs_no_accelerator_is_there():
    modules = {benchmark.words[0] for benchmark in benchmarks.BENCHMARKS.values()}
    assert all(find_spec(module) for module in modules)
    folder = benchmarks.BASELINE.parent
    tools = ("__init__", "all", "output", "accelerator")
    assert {f"benchmarks.{path.stem}" for path in folder.glob("*.py") if path.stem not in tools} <= modules


@pytest.mark.parametrize(
    ("name", "before", "now", "verdict"),
    [
        ("forward: / diffusers eager", 1.0, 1.29, "same"),
        ("forward: / diffusers eager", 1.0, 1.31, "worse"),
        ("forward: / diffusers eager", 1.0, 0.7, "better"),
        ("forward: / diffusers eager", None, 0.7, "new"),
        ("converting: speed / cp", 0.5, 0.2, "worse"),
        ("converting: speed / cp", 0.5, 0.9, "better"),
        ("converting: speed / cp", 0.5, 0.4, "same"),
        ("plan: denoise, bytes copied", 0, 0, "same"),
        ("plan: denoise, bytes copied", 0, 7, "worse"),
    ],
)
def test_verdicts(name, before, now, verdict):
    row = benchmarks.compare({name: now}, {} if before is None else {name: before})[name]
    assert row["verdict"] == verdict
    assert (row["baseline"], row["now"]) == (before, now)


def test_what_a_benchmark_prints_is_read_and_its_failure_told(tmp_path, monkeypatch):
    (tmp_path / "said.py").write_text("import sys\nprint(*sys.argv[1:], sep='\\n')")
    (tmp_path / "broken.py").write_text("raise ValueError('no file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert benchmarks.run(("said", '{"a": 1}')) == {"a": 1}
    assert benchmarks.run(("said", '{"a": 1}', '{"b": 2}')) == [{"a": 1}, {"b": 2}]
    with pytest.raises(benchmarks.Failed, match="exit status 1: ValueError: no file"):
        benchmarks.run(("broken",))
