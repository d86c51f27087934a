"""What a run says of itself before its first step."""

import dataclasses
import re

import numpy as np
import pytest

from dynaip_jax.data.records import open_dataset, write_dataset
from train.cache import cache
from train.loop import train
from train.opening import opening
from train.run import Run


@pytest.fixture
def mixed(photographs, tmp_path):
    """23 rows: 8 photographs, over and over; the last one's caption goes on and on."""
    dataset = open_dataset(photographs)
    rows = [dataset[n % len(dataset)]._replace(number=n + 1) for n in range(23)]
    rows[-1] = rows[-1]._replace(caption="a cup on a table " * 99)
    write_dataset(tmp_path, rows)
    return tmp_path


def test_data_buckets_and_what_is_left_out_or_changed(config, mixed):
    data = dataclasses.replace(config.data, path=str(mixed), aspects=("1:1", "3:2"), resolution=256)
    run = Run(dataclasses.replace(config, data=data, batch=4, steps=50))
    order, dataset = run.data.order, run.dataset
    lines = opening(run, 10).splitlines()
    counts = np.bincount(order.bucket_of)
    each = sum(counts // 4) * 4
    head = f"data: 23 rows of {mixed} (content {dataset.content[:12]}); an epoch is {order.steps_per_epoch} steps of 4"
    assert lines[0] == head
    for line, bucket, number in zip(lines[1:3], order.buckets, range(2), strict=True):
        sizes = dataset.sizes[order.bucket_of == number]
        times = np.maximum(bucket.height / sizes[:, 0], bucket.width / sizes[:, 1])
        said = f"  bucket {bucket.name}, {bucket.width} x {bucket.height} pixels: {counts[number]} rows"
        if (times > 1).any():
            said += f", of which {(times > 1).sum()} are smaller and enlarged up to {times.max():.1f} times"
        assert line == said
    assert any("enlarged up to" in line for line in lines)
    assert lines[3].startswith(
        f"  left out of each epoch: {23 - each} rows ({(23 - each) / 23:.1%}), other ones every time"
    )
    assert re.fullmatch(
        r"  captions: of 23 looked at, 1 are longer than T5 takes, 1 are longer than CLIP takes; .* cut off", lines[4]
    )
    assert (
        lines[5]
        == f"run: steps 11 to 50, {40 / order.steps_per_epoch:.3g} epochs; a checkpoint every 50, 2 kept and the best"
    )
    count = sum(name.startswith("adapter.") for name in run.constants.decayed)
    assert lines[6] == f"  weight decay 0.01: {count} matrices, marked above; no scales, biases and tables"
    assert len(lines) == 7


def test_a_run_says_it_and_how_long_it_takes(config, tmp_path, capsys):
    """A dataset of whole batches has nothing left out; a cache says its variants."""
    small = dataclasses.replace(config, batch=2, steps=2, optim=dataclasses.replace(config.optim, weight_decay=0.0))
    cache(small, tmp_path / "cache", variants=2)
    train(
        dataclasses.replace(small, data=dataclasses.replace(small.data, features=str(tmp_path / "cache"))),
        tmp_path / "run",
    )
    said = capsys.readouterr().err
    assert f"  features: {tmp_path}/cache; 2 variants, taken in turn by epochs\n" in said
    assert "  weight decay 0\n" in said and "left out" not in said and "captions" not in said
    assert re.search(r"^step 1  loss .*  of 2 steps, about 0:\d\d:\d\d left$", said, re.M)
    assert re.search(r"^step 2  loss .*  of 2 steps, about 0:00:00 left$", said, re.M)
