"""Data settings, and the buckets that come of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaip_jax.data.config import DataConfig, buckets
from dynaip_jax.errors import UserError


@given(st.integers(64, 2048), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6))
def test_bucket_sizes(resolution, ratios):
    names = [f"{w}:{h}" for w, h in ratios]
    try:
        shapes = buckets(resolution, names)
    except UserError as e:
        assert any(not 0.25 <= w / h <= 4 for w, h in ratios) or "as '" in str(e)
        return
    for bucket, (w, h) in zip(shapes, ratios, strict=True):
        assert bucket.height % 16 == bucket.width % 16 == 0
        for side, exact in ((bucket.height, (h / w) ** 0.5), (bucket.width, (w / h) ** 0.5)):
            assert abs(side - resolution * exact) <= 8 + 1e-9


def test_bucket_sizes_of_three_aspects():
    assert [tuple(b)[1:] for b in buckets(512, ("1:1", "3:2", "9:16"))] == [(512, 512), (416, 624), (688, 384)]


@pytest.mark.parametrize(
    ("resolution", "aspects", "message"),
    [
        (63, ("1:1",), "`data.resolution` 63"),
        (512, ("1:5",), "'1:5'"),
        (512, ("16/9",), "'16/9'"),
        (512, ("0:1",), "'0:1'"),
        (512, ("1:1", "100:99"), "512 x 512 pixels at resolution 512, as '1:1'"),
        (512, (), "none given"),
    ],
)
def test_bad_buckets(resolution, aspects, message):
    with pytest.raises(UserError, match="expected") as e:
        buckets(resolution, aspects)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(drop_image=-0.1), "`data.drop_image` -0.1"),
        (dict(drop_text=1.5), "`data.drop_text` 1.5"),
        (dict(drop_image=0.5, drop_text=0.6), "`data.drop_image` + `data.drop_text` + `data.drop_both` 1.15"),
        (dict(flip_reference=2), "`data.flip_reference` 2"),
        (dict(flip_target=float("nan")), "`data.flip_target` nan"),
        (dict(crop_reference=0), "`data.crop_reference` 0"),
        (dict(clip_size=0), "`data.clip_size` 0"),
        (dict(seed=-1), "`data.seed` -1"),
        (dict(workers=-1), "`data.workers` -1"),
        (dict(prefetch=0), "`data.prefetch` 0"),
        (dict(square="stretch"), "`data.square` 'stretch'"),
        (dict(resolution=10), "`data.resolution` 10"),
        (dict(aspects=("wide",)), "`data.aspects` 'wide'"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(UserError, match="expected") as e:
        DataConfig(**changes)
    assert message in str(e.value)
