"""Several datasets as one, each with its weight."""

import pickle

import numpy as np
import pytest

from dynaip_jax.data.config import DataConfig, buckets
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.mixture import open_data
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.data.records import open_dataset, write_dataset
from dynaip_jax.errors import UserError
from tests.data.photos import WordIds, config, same, take

SHAPES = buckets(512, ("1:1", "3:2"))


@pytest.fixture
def second(folder, tmp_path):
    """10 rows of another dataset."""
    dataset = open_dataset(folder)
    write_dataset(tmp_path, [dataset[n]._replace(number=100 + n, caption=f"row {n}") for n in range(10)])
    return tmp_path


def test_rows_of_the_first_then_of_the_second(folder, second):
    mixture = open_data(config(folder, also=(str(second),)))
    first = open_dataset(folder)
    assert len(mixture) == 54 and mixture.numbers.tolist()[43:46] == [44, 100, 101]
    assert mixture[43].caption == first[43].caption and [mixture[n].caption for n in (44, 53)] == ["row 0", "row 9"]
    np.testing.assert_array_equal(mixture.sizes[44:], open_dataset(second).sizes)
    assert len({mixture.content, first.content, open_dataset(second).content}) == 3
    assert pickle.loads(pickle.dumps(mixture))[53].caption == "row 9"
    assert open_data(config(folder)).content == first.content


@pytest.mark.parametrize("weights", [(2.0, 0.5), (0.25, 3.0), (1.0, 1.0), ()])
def test_an_epoch_takes_rows_as_often_as_their_weights_say(weights):
    sizes = np.random.default_rng(0).integers(300, 600, (1000, 2))
    shares = [(800, weights[0]), (200, weights[1])] if weights else []
    order = BatchOrder(sizes, SHAPES, 4, 0, shares)
    for epoch in (0, 1):
        taken = np.bincount(order.shuffled(epoch)[0].ravel(), minlength=1000)
        for rows, weight in ((taken[:800], (weights or (1, 1))[0]), (taken[800:], (weights or (1, 1))[1])):
            assert rows.sum() == pytest.approx(weight * len(rows), abs=8)
            assert set(rows) <= {int(weight), int(weight) + 1, int(weight) - (weight == int(weight))}
    assert len(order.shuffled(0)[1]) == order.steps_per_epoch == len(order.shuffled(1)[1])
    others = [order.shuffled(epoch)[0].tobytes() for epoch in range(3)]
    assert len(set(others)) == 3
    plain = BatchOrder(sizes, SHAPES, 4, 0)
    assert (order.fingerprint == plain.fingerprint) == (weights == ())


def test_weights_reach_the_batches_and_the_state(folder, second):
    also = dict(also=(str(second),), weights=(0.5, 2.0))
    loader = make_loader(config(folder, **also), WordIds(), global_batch=2)
    batches = take(loader, loader.order.steps_per_epoch)
    rows = np.concatenate([batch.row for batch in batches])
    assert np.count_nonzero(rows >= 44) == pytest.approx(20, abs=2) and np.count_nonzero(rows < 44) == pytest.approx(
        22, abs=2
    )
    assert same(take(make_loader(config(folder, **also, workers=1), WordIds(), global_batch=2), 3), batches[:3])
    state = loader.get_state()
    for other in (also | dict(weights=(1.0, 1.0)), also | dict(also=(str(folder),)), {}):
        with pytest.raises(UserError, match="data: the checkpoint was made with other"):
            make_loader(config(folder, **other), WordIds(), global_batch=2).set_state(state)


def test_bad_weights():
    for weights, found in (((1.0,), "1 for 2 datasets"), ((0.0, 1.0), "0.0: expected a number above 0")):
        with pytest.raises(UserError, match=f"`data.weights` .*{found}"):
            DataConfig(path="a", also=("b",), weights=weights)
    with pytest.raises(UserError, match="`data.weights`: an epoch fills no batch of 40"):
        BatchOrder(np.full((50, 2), 512), SHAPES, 40, 0, [(50, 0.5)])
