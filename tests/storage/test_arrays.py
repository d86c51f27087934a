"""NumPy's files, read strictly."""

import io
import os
import pickle
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest

from dynaip_jax.storage.arrays import Rows, crc32, read_array, read_arrays


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_that_are_read(dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for array in (x, np.asfortranarray(x), x[0, 0, 0], x[:0], x.astype(f">f{x.itemsize}")):
        found = read_array(npy(array), "f")
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def header(text, version=b"\x01\x00"):
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode("latin1")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array([Trap()], object)), "holds object"),
        (npy(np.array(["a"])), "holds <U1"),
        (npy(np.ones(3))[:-1], "151 bytes, its header asks for 152"),
        (npy(np.ones(3)) + b"x", "153 bytes"),
        (npy(np.ones(3, "i8")), "holds int64"),
        (npy(np.zeros(2, [("a", "f4")])), "no .npy file"),
        (b"", "no .npy file"),
        (b"PK\x03\x04", "no .npy file"),
        (pickle.dumps(Trap()), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "its header asks for"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}"), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}"), "no .npy file"),
        (header("{'descr': {}, 'fortran_order': 3, 'shape': 1, 4: 5}"), "no .npy file"),
        (header("{'descr': '4d', 'fortran_order': False, 'shape': (1if 1else 1,)}"), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (0)}"), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (00, 01)}"), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}\xa0"), "no .npy file"),
        (header("{'descr': '<f\n4', 'fortran_order': False, 'shape': (0,)}"), "no .npy file"),
        (header("(" * 3000), "no .npy file"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", b"\x09\x00"), "no .npy file"),
    ],
)
def test_arrays_that_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_array(data, "f")


def test_threads_that_read_leave_the_warnings_of_others_alone(recwarn):
    """Filters of warnings are those of the whole process: whoever turns them to errors does so to the threads beside him."""
    data, done, usual = npy(np.ones(3)), threading.Event(), sys.getswitchinterval()

    def read():
        while not done.is_set():
            read_array(data, "f")

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(2000):
            warnings.warn("of another thread", UserWarning, stacklevel=1)
    finally:
        sys.setswitchinterval(usual)
        done.set()
        for reader in readers:
            reader.join()


def test_archives(tmp_path):
    file = io.BytesIO()
    np.savez_compressed(file, a=np.arange(3), b=np.array("text"), c=np.array([Trap()], object))
    found = read_arrays(file.getvalue(), ("a", "b", "absent"), 1 << 20)
    assert found["a"].tolist() == [0, 1, 2] and str(found["b"]) == "text" and found.keys() == {"a", "b"}
    with pytest.raises(ValueError, match="holds object"):
        read_arrays(file.getvalue(), ("c",), 1 << 20)
    with pytest.raises(ValueError, match="no whole .npz file"):
        read_arrays(file.getvalue()[:-30], ("a",), 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(10**7))
    with pytest.raises(ValueError, match="a would be 10000000 bytes"):
        read_arrays((tmp_path / "bomb.npz").read_bytes(), ("a",), 1 << 20)


def test_rows_are_those_of_the_array_and_whole(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    checks = np.array([[crc32(row) for row in part] for part in x], np.uint32)
    for rows in (
        Rows(tmp_path / "x.npy"),
        Rows(tmp_path / "x.npy", checks),
        pickle.loads(pickle.dumps(Rows(tmp_path / "x.npy", checks))),
    ):
        np.testing.assert_array_equal(rows[1, 2], x[1, 2])
        assert rows.shape == (2, 3, 4)
        for index in ((2, 0), (0, 3), (-1, 0)):
            with pytest.raises(ValueError, match="no row"):
                rows[index]
    np.testing.assert_array_equal(Rows(tmp_path / "x.npy")[()], x)
    whole = (tmp_path / "x.npy").read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    (tmp_path / "x.npy").write_bytes(flipped)
    rows = Rows(tmp_path / "x.npy", checks)
    np.testing.assert_array_equal(rows[0, 0], x[0, 0])
    with pytest.raises(ValueError, match=r"row \(1, 2\) is damaged: its checksum is another"):
        rows[1, 2]
    os.truncate(tmp_path / "x.npy", len(whole) - 8)  # of a memory map this would be the end of the process
    with pytest.raises(ValueError, match="was cut short while it was read"):
        rows[1, 2]
    with pytest.raises(ValueError, match="its header asks for"):
        Rows(tmp_path / "x.npy")
