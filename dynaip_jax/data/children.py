"""Processes that work for another live exactly as long as it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait


def follow_parent(pipe: Connection | None = None) -> None:
    """Has this process leave signals sent to the whole group to its parent (which still needs it while it saves), and end when that
    ends, however it ends, or when it closes the other end of `pipe`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            wait([parent.sentinel, *([] if pipe is None else [pipe])])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
