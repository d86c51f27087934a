"""The table of parameters that a run begins with."""

import dataclasses

import jax
import numpy as np

from train.overview import LINES, Part, in_detail, overview
from train.run import Run


def test_every_parameter_is_counted_and_trained_ones_are_shown(config):
    run = Run(config)
    state = run.fresh_state()
    head, *lines = overview(run, state).splitlines()
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, run.frozen))
    assert head == f"parameters: {trained:,} trained, {frozen:,} frozen"
    shown = [line.split() for line in lines]
    assert sum(int(row[-2].replace(",", "")) for row in shown) == trained + frozen
    assert [row[0] for row in shown if row[-1] == "frozen"] == ["vae", "t5", "clip_text", "clip_vision", "transformer"]
    key = state.params["adapter"]["double"]["key"]
    (row,) = [row for row in shown if row[0] == "adapter.double.key"]
    assert row[1:-2] == [*" x ".join(map(str, key.shape)).split(), "float32"] and row[-2] == f"{key.size:,}"
    assert len(shown) == 5 + len(jax.tree.leaves(state.params))


def test_what_is_decayed_is_marked(config):
    run = Run(config)
    state = run.fresh_state()
    marks = {line.split()[0]: line.split()[-1] for line in overview(run, state).splitlines()[1:]}
    assert (marks["adapter.double.key"], marks["adapter.double.key_norm"]) == ("trained+decayed", "trained")
    assert marks["transformer"] == "frozen"
    part = Part("adapter.double", {"key": np.zeros(1), "key_norm": np.zeros(1)}, True, run.constants.decayed)
    assert part.state == "trained+partly-decayed"
    without = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.0))
    assert {line.split()[-1] for line in overview(Run(without), state).splitlines()[1:]} == {"trained", "frozen"}


def test_many_parameters_are_summed_up_by_module():
    """The largest are taken apart, as long as there is room."""
    leaves = {f"blocks.part{n}.kernel": np.zeros((1, n + 1)) for n in range(200)}
    whole = Part("base", leaves | {"last.kernel": np.zeros((2, 2)), "last.bias": np.zeros(2)}, True)
    parts = in_detail([whole, Part("vae", {"a": np.zeros(3), "b": np.zeros(3)}, False)], LINES)
    assert [(part.name, part.size) for part in parts] == [
        ("base.blocks", 20100), ("base.last.kernel", 4), ("base.last.bias", 2), ("vae", 6),
    ]  # fmt: skip
