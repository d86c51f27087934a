"""Memory that is used again."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dynaip_jax.storage import arena
from dynaip_jax.storage.arena import empty, reused


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(arena, "_HELD", arena._Held())


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def test_a_scope_gives_the_memory_of_the_one_before_and_none_twice():
    with reused():
        first, second = empty((4, 8), np.float32), empty((128,), np.uint8)
        first[...], second[...] = 1, 2
        assert (first == 1).all()
        kept = {address(first), address(second)}
    with reused():
        again, other = empty((64,), np.uint16), empty((3,), np.uint8)
        assert {address(again), address(other)} == kept
    assert address(again) != address(other)


def test_a_larger_array_takes_the_place_of_the_largest_buffer():
    with reused():
        empty((8,), np.uint8)
    with reused():
        large = empty((1 << 20,), np.uint8)
        assert large.shape == (1 << 20,)
        kept = address(large)
    with reused():
        assert address(empty((), np.float64)) == kept  # the small one is gone


def test_outside_a_scope_and_in_another_thread_memory_is_its_own():
    with reused():
        lent = address(empty((1 << 16,), np.uint8))
    plain = empty((1 << 16,), np.uint8)
    assert address(plain) != lent
    found = []

    def work():
        with reused():
            found.append(address(empty((1 << 16,), np.uint8)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found and found[0] != lent


def test_scopes_do_not_nest():
    with reused(), pytest.raises(AssertionError, match="a scope within a scope"), reused():
        pass
    with reused():  # the failure left none open
        empty((1,), np.uint8)
