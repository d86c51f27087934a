"""Buckets and the order of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaip_jax.data.order import Plan, buckets
from dynaip_jax.errors import UserError

SHAPES = buckets(512, ("1:1", "3:2", "2:3", "16:9"))


def sizes_of(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(64, 2000, (rows, 2))


@given(st.integers(64, 2048), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6))
def test_bucket_sizes(resolution, ratios):
    names = [f"{w}:{h}" for w, h in ratios]
    try:
        found = buckets(resolution, names)
    except UserError as e:
        assert any(not 0.25 <= w / h <= 4 for w, h in ratios) or "as '" in str(e)
        return
    for bucket, (w, h) in zip(found, ratios, strict=True):
        assert bucket.height % 16 == bucket.width % 16 == 0
        for side, exact in ((bucket.height, (h / w) ** 0.5), (bucket.width, (w / h) ** 0.5)):
            assert abs(side - resolution * exact) <= 8 + 1e-9


def test_known_buckets():
    assert [tuple(b)[1:] for b in buckets(512, ("1:1", "3:2", "9:16"))] == [(512, 512), (416, 624), (688, 384)]


@pytest.mark.parametrize(
    ("resolution", "aspects", "found"),
    [
        (63, ("1:1",), "resolution 63"),
        (512, ("1:5",), "'1:5'"),
        (512, ("16/9",), "'16/9'"),
        (512, ("0:1",), "'0:1'"),
        (512, ("1:1", "100:99"), "512 x 512 pixels at resolution 512, as '1:1'"),
        (512, (), "none given"),
    ],
)
def test_bad_buckets(resolution, aspects, found):
    with pytest.raises(UserError, match="expected") as e:
        buckets(resolution, aspects)
    assert found in str(e.value)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 300), st.integers(1, 24), st.integers(0, 5))
def test_an_epoch_is_a_partition(seed, rows, batch, epoch):
    sizes = sizes_of(seed, rows)
    if rows < batch:
        with pytest.raises(UserError, match=f"{rows} rows for a global batch of {batch}"):
            Plan(sizes, SHAPES, batch, seed)
        return
    plan = Plan(sizes, SHAPES, batch, seed)
    steps = [plan.step(epoch * plan.steps_per_epoch + n) for n in range(plan.steps_per_epoch)]
    used = np.concatenate([s.rows for s in steps])
    assert len(used) == len(set(used)) and used.min() >= 0 and used.max() < rows
    for step in steps:
        assert step.epoch == epoch and len(step.rows) == batch
        assert {plan.buckets[b] for b in plan.bucket_of[step.rows]} == {step.bucket}
    # only what does not fill a batch in its bucket is left out
    assert rows - len(used) == sum(n % batch for n in np.bincount(plan.bucket_of))
    again = Plan(sizes, SHAPES, batch, seed)
    assert again.fingerprint == plan.fingerprint
    np.testing.assert_array_equal(again.shuffled(epoch)[0], [s.rows for s in steps])


def test_a_row_goes_to_the_nearest_shape():
    sizes = np.array([(100, 100), (100, 120), (100, 130), (100, 170), (200, 100)] * 9)
    plan = Plan(sizes, SHAPES, 9, 0)
    assert [plan.buckets[b].name for b in plan.bucket_of[:5]] == ["1:1", "1:1", "3:2", "16:9", "2:3"]


def test_epochs_and_seeds_differ_and_leave_out_other_rows():
    plan = Plan(np.full((50, 2), 512), SHAPES, 8, 0)
    orders = [plan.shuffled(e)[0] for e in range(20)] + [Plan(np.full((50, 2), 512), SHAPES, 8, 1).shuffled(0)[0]]
    assert len({o.tobytes() for o in orders}) == 21
    left_out = [set(range(50)) - set(o.ravel()) for o in orders]
    assert len(set.union(*left_out)) > 20


def test_batches_of_the_buckets_are_mixed():
    sizes = np.array([(512, 512)] * 400 + [(400, 600)] * 400)
    bucket = Plan(sizes, SHAPES, 4, 0).shuffled(0)[1]
    assert 60 < np.count_nonzero(np.diff(bucket)) < 140  # 200 batches: 100 changes expected


def test_a_bucket_that_never_fills_is_given_up_aloud():
    sizes = np.array([(512, 512)] * 20 + [(400, 600)] * 3 + [(300, 533)] * 2)
    plan = Plan(sizes, SHAPES, 4, 0)
    assert plan.warnings == [
        "bucket 16:9: 2 rows do not fill a batch of 4; they are cropped to the next nearest shape",
    ]
    assert [b.name for b in plan.buckets] == ["1:1", "3:2"]
    assert np.bincount(plan.bucket_of).tolist() == [20, 5]


@pytest.mark.parametrize("other", [dict(sizes=np.full((50, 2), 513)), dict(global_batch=4), dict(seed=1)])
def test_the_fingerprint_tells_plans_apart(other):
    given_ = dict(sizes=np.full((50, 2), 512), shapes=SHAPES, global_batch=8, seed=0)
    assert Plan(**given_).fingerprint != Plan(**given_ | other).fingerprint
    assert Plan(**given_).fingerprint != Plan(**given_ | dict(shapes=buckets(256, ("1:1",)))).fingerprint


def test_batch_of_none():
    with pytest.raises(UserError, match="batch size 0"):
        Plan(np.full((5, 2), 512), SHAPES, 0, 0)
