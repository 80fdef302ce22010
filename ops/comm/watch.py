"""A thread that says at once when an exchange's kernels gave up waiting: a replayed CUDA graph runs no host code that could."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

log = logging.getLogger("moe_compile")
PERIOD = 0.5  # seconds
_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_thread: threading.Thread | None = None
_stop = threading.Event()


def watch(engine: Any) -> None:
    """Logs what engine.failure() says, once, as an error. It is also raised by the next call; results until then are NaN."""
    global _thread
    _watched.add(engine)
    if _thread is None or not _thread.is_alive():
        _stop.clear()
        _thread = threading.Thread(target=_run, name="moe_compile exchanges", daemon=True)
        _thread.start()


def stop() -> None:
    """Ends the thread; watch starts it again."""
    _watched.clear()
    _stop.set()


def _run() -> None:
    while not _stop.wait(PERIOD):
        for engine in list(_watched):
            failure = engine.failure() if engine.alive else None
            if failure is not None:
                log.error("%s", failure)
                _watched.discard(engine)
