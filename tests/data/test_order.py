"""The order of training."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaip_jax.data.config import buckets
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.errors import UserError

SHAPES = buckets(512, ("1:1", "3:2", "2:3", "16:9"))


def sizes_of(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(64, 2000, (rows, 2))


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 300), st.integers(1, 24), st.integers(0, 5))
def test_an_epoch_is_a_partition(seed, rows, batch, epoch):
    sizes = sizes_of(seed, rows)
    if rows < batch:
        with pytest.raises(UserError, match=f"{rows} rows for a global batch of {batch}"):
            BatchOrder(sizes, SHAPES, batch, seed)
        return
    order = BatchOrder(sizes, SHAPES, batch, seed)
    steps = [order.step(epoch * order.steps_per_epoch + n) for n in range(order.steps_per_epoch)]
    used = np.concatenate([s.rows for s in steps])
    assert len(used) == len(set(used)) and used.min() >= 0 and used.max() < rows
    for step in steps:
        assert step.epoch == epoch and len(step.rows) == batch
        assert {order.buckets[b] for b in order.bucket_of[step.rows]} == {step.bucket}
    # only what does not fill a batch in its bucket is left out
    assert rows - len(used) == sum(n % batch for n in np.bincount(order.bucket_of))
    again = BatchOrder(sizes, SHAPES, batch, seed)
    assert again.fingerprint == order.fingerprint
    np.testing.assert_array_equal(again.shuffled(epoch)[0], [s.rows for s in steps])


def test_a_row_goes_to_the_nearest_shape():
    sizes = np.array([(100, 100), (100, 120), (100, 130), (100, 170), (200, 100)] * 9)
    order = BatchOrder(sizes, SHAPES, 9, 0)
    assert [order.buckets[b].name for b in order.bucket_of[:5]] == ["1:1", "1:1", "3:2", "16:9", "2:3"]


def test_epochs_and_seeds_differ_and_leave_out_other_rows():
    order = BatchOrder(np.full((50, 2), 512), SHAPES, 8, 0)
    orders = [order.shuffled(e)[0] for e in range(20)] + [
        BatchOrder(np.full((50, 2), 512), SHAPES, 8, 1).shuffled(0)[0]
    ]
    assert len({o.tobytes() for o in orders}) == 21
    left_out = [set(range(50)) - set(o.ravel()) for o in orders]
    assert len(set.union(*left_out)) > 20


def test_batches_of_the_buckets_are_mixed():
    sizes = np.array([(512, 512)] * 400 + [(400, 600)] * 400)
    bucket = BatchOrder(sizes, SHAPES, 4, 0).shuffled(0)[1]
    assert 60 < np.count_nonzero(np.diff(bucket)) < 140  # 200 batches: 100 changes expected


def test_a_bucket_that_never_fills_is_factsup_aloud():
    sizes = np.array([(512, 512)] * 20 + [(400, 600)] * 3 + [(300, 533)] * 2)
    order = BatchOrder(sizes, SHAPES, 4, 0)
    assert order.warnings == [
        "bucket 16:9: 2 rows do not fill a batch of 4; they are cropped to the next nearest shape",
    ]
    assert [b.name for b in order.buckets] == ["1:1", "3:2"]
    assert np.bincount(order.bucket_of).tolist() == [20, 5]


@pytest.mark.parametrize("other", [dict(sizes=np.full((50, 2), 513)), dict(global_batch=4), dict(seed=1)])
def test_the_fingerprint_tells_orders_apart(other):
    facts = dict(sizes=np.full((50, 2), 512), shapes=SHAPES, global_batch=8, seed=0)
    assert BatchOrder(**facts).fingerprint != BatchOrder(**facts | other).fingerprint
    assert BatchOrder(**facts).fingerprint != BatchOrder(**facts | dict(shapes=buckets(256, ("1:1",)))).fingerprint


def test_an_order_is_what_it_always_was():
    """Runs go on over updates of this program: numbers of before rows were kept in 32 bits and looked at in parts."""
    sizes = sizes_of(3, 5000)
    order = BatchOrder(sizes, SHAPES, 7, 11)
    assert order.fingerprint == "735657c8156915d7"
    digest = hashlib.sha256(b"".join(order.step(n).rows.astype(np.int64).tobytes() for n in (0, 5, 1000, 2345)))
    assert digest.hexdigest()[:16] == "1e23cd1a6f97d4ca"


def test_an_order_needs_little_memory():
    """Of 2 million rows: one byte for the bucket of each, and four for each of two lists."""
    sizes = np.random.default_rng(0).integers(64, 2000, (2_000_000, 2), dtype=np.int32)
    tracemalloc.start()
    order = BatchOrder(sizes, SHAPES, 64, 0)
    order.step(0)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * len(sizes) and peak < 70 * len(sizes)


def test_batch_of_none():
    with pytest.raises(UserError, match="batch size 0"):
        BatchOrder(np.full((5, 2), 512), SHAPES, 0, 0)
