"""Worker processes ask the trainer for the rows of a step, so that none of them holds the order of all rows.

The trainer answers on a socket in a folder that only its user can enter. What is said are numbers, never pickles.
"""

from __future__ import annotations

import shutil
import socket
import socketserver
import struct
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.data.config import Bucket
from dynaip_jax.data.order import Step, Steps

QUESTION, ANSWER = (
    struct.Struct("<q"),
    struct.Struct("<qqq"),
)  # a step; its epoch, the index of its bucket, how many rows follow


class Alone:
    """The steps of `order` for threads of this process, which reads the samples at `positions`."""

    def __init__(self, order: Steps, positions: np.ndarray):
        self._order, self._positions = order, positions

    def step(self, step: int) -> Step:
        """The part of training step `step` that this process reads."""
        whole = self._order.step(step)
        return whole._replace(rows=whole.rows[self._positions])


class Answers:
    """Serves the steps of `order`, of which this process reads the samples at `positions`, until it is closed."""

    def __init__(self, order: Steps, positions: np.ndarray):
        self._folder = tempfile.mkdtemp(prefix="dynaip-")
        address, alone = str(Path(self._folder) / "order"), Alone(order, positions)

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                while question := _received(self.request, QUESTION.size):
                    step = alone.step(QUESTION.unpack(question)[0])
                    rows = np.ascontiguousarray(step.rows, "<i8")
                    head = ANSWER.pack(step.epoch, order.buckets.index(step.bucket), len(rows))
                    self.request.sendall(head + rows.tobytes())

        self._server = socketserver.ThreadingUnixStreamServer(address, Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.asked = Asked(address, order.buckets)

    def close(self) -> None:
        """Ends the server; workers that still ask get no answer."""
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Asked:
    """What a worker has in place of the order. May be sent to other processes."""

    def __init__(self, address: str, buckets: tuple[Bucket, ...]):
        self._address, self.buckets = address, buckets
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._address, self.buckets)

    def step(self, step: int) -> Step:
        """The part of training step `step` that this process reads. Raises `EOFError` if the trainer is gone."""
        with self._lock:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.connect(self._address)
            self._socket.sendall(QUESTION.pack(step))
            epoch, bucket, count = ANSWER.unpack(_whole(self._socket, ANSWER.size))
            rows = np.frombuffer(_whole(self._socket, 8 * count), "<i8")
        return Step(epoch, self.buckets[bucket], rows)


def _received(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or none if the other end has closed."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data


def _whole(connection: socket.socket, size: int) -> bytes:
    data = _received(connection, size)
    if len(data) < size:
        raise EOFError("the trainer no longer answers")
    return data
