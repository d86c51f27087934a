"""Records in many files, of which few are open."""

import os
import threading

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dynaip_jax.data import shards
from dynaip_jax.data.shards import Shards

LENGTHS = [3, 0, 2, 4] * 10


@pytest.fixture
def files(tmp_path):
    numbers = iter(range(1000))
    for n, length in enumerate(LENGTHS):
        writer = ArrayRecordWriter(str(tmp_path / f"{n:03}"), "group_size:1")
        for _ in range(length):
            writer.write(b"record %d" % next(numbers))
        writer.close()
    return [str(tmp_path / f"{n:03}") for n in range(len(LENGTHS))]


def opened(folder):
    """How many files in `folder` this process has open."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.readlink(link).startswith(folder) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_every_record_with_few_files_open(files, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_AT_ONCE", 4)
    records = Shards(files, LENGTHS)
    assert len(records) == 90
    for n in [*range(90), 5, 89, 0, 44]:
        assert records[n] == b"record %d" % n
        assert opened(os.path.dirname(files[0])) <= 4
    with pytest.raises(IndexError):
        records[90]


def test_threads_that_take_each_others_files(files, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_AT_ONCE", 1)
    records, wrong = Shards(files, LENGTHS), []

    def read(step):
        wrong.extend(n for k in range(300) if records[n := (k * step) % 90] != b"record %d" % n)

    threads = [threading.Thread(target=read, args=(step,)) for step in (1, 7, 11, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_with_another_number_of_records(files):
    records = Shards([*files[:2], files[3]], [3, 0, 2])
    assert records[0] == b"record 0"
    with pytest.raises(ValueError, match="003 holds 4 records, expected 2"):
        records[3]
