"""Random access to the records of many array_record files, of which few are open at a time.

Ten million rows lie in some five thousand files, and most systems allow a process a thousand.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

OPEN_AT_ONCE = 64  # files of one dataset in one process


class Shards:
    """`shards[n]` -> the bytes of record n; threads may share one. `lengths`: how many records each of `files` is said to hold."""

    def __init__(self, files: Sequence[str], lengths: Sequence[int]):
        self._files, self._ends = tuple(files), list(itertools.accumulate(lengths))
        self._open: OrderedDict[int, Any] = OrderedDict()  # the one used last is the last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, record: int) -> bytes:
        number = bisect.bisect_right(self._ends, record)
        start = self._ends[number - 1] if number else 0
        return self._reader(number).read([record - start])[0]

    def _reader(self, number: int) -> Any:
        """The reader of a file. One that is closed by another thread's need stays whole for whoever reads it: the last to let go of
        it ends it."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            reader = self._open.pop(number, None)
            if reader is None:
                reader = ArrayRecordReader(
                    self._files[number], options="readahead_buffer_size:0", file_reader_buffer_size=32768
                )
                expected = self._ends[number] - (self._ends[number - 1] if number else 0)
                if reader.num_records() != expected:
                    raise ValueError(f"{self._files[number]} holds {reader.num_records()} records, expected {expected}")
            self._open[number] = reader
            if len(self._open) > OPEN_AT_ONCE:
                self._open.popitem(last=False)
        return reader
