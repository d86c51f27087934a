"""Single values of the arrays of an `.npz` file."""

import numpy as np
import pytest

from dynaip_jax.data.columns import Column


def test_values_are_those_of_the_array(tmp_path):
    arrays = dict(a=np.arange(5), b=np.random.default_rng(0).integers(0, 99, 7, np.uint32), content=np.array("x"))
    np.savez(tmp_path / "a.npz", **arrays)
    for name in ("a", "b"):
        column = Column(tmp_path / "a.npz", name)
        assert [column[n] for n in range(len(column))] == arrays[name].tolist()
        for row in (-1, len(column)):
            with pytest.raises(IndexError):
                column[row]
    np.savez(tmp_path / "b.npz", sizes=np.arange(12, dtype=np.int32).reshape(6, 2))
    assert Column(tmp_path / "b.npz", "sizes")[4].tolist() == [8, 9]
    with pytest.raises(ValueError, match="content is"):
        Column(tmp_path / "a.npz", "content")
    with pytest.raises(KeyError):
        Column(tmp_path / "a.npz", "c")


def test_other_files(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(5))
    with pytest.raises(ValueError, match="a is compressed"):
        Column(tmp_path / "a.npz", "a")
    np.savez(tmp_path / "b.npz", a=np.array([{}], object))
    with pytest.raises(ValueError):
        Column(tmp_path / "b.npz", "a")


def test_a_file_that_is_cut_meanwhile_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(5000))
    column = Column(tmp_path / "a.npz", "a")
    assert column[4999] == 4999
    with open(tmp_path / "a.npz", "r+b") as file:
        file.truncate(1000)
    with pytest.raises((ValueError, IndexError)):
        column[4999]
