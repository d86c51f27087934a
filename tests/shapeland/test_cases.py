"""Cases are those of their seed, whatever their number."""

import numpy as np
import pytest

from dynaip_jax.shapeland import cases as cases_module
from dynaip_jax.shapeland.cases import batches, make_cases


@pytest.mark.parametrize("subjects", (1, 3))
def test_cases_are_those_of_their_seed(subjects):
    few, more = (make_cases(subjects, seed=5, num=num) for num in (4, 6))
    np.testing.assert_array_equal(few.reposed, more.reposed[:4])
    np.testing.assert_array_equal(few.references, more.references[:4])
    assert (few.reposed != make_cases(subjects, seed=6, num=4).reposed).any()


def test_the_last_batch_is_filled_up(monkeypatch):
    monkeypatch.setattr(cases_module, "BATCH", 4)
    assert [(numbers.tolist(), new) for numbers, new in batches(6)] == [([0, 1, 2, 3], 4), ([4, 5, 5, 5], 2)]
    assert [(numbers.tolist(), new) for numbers, new in batches(3)] == [([0, 1, 2], 3)]
