"""Starts a kernel with smaller tiles where those that were chosen do not fit in a device's shared memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)
_fitted: dict[Any, Any] = {}  # what fitted where the tiles that were chosen did not


def start(tiles: T, key: Hashable, smaller: Callable[[T], T | None], launch: Callable[[T], None], what: str) -> None:
    """launch(tiles), or with the first smaller ones that fit; for this key from then on. Raises RuntimeError where none do."""
    from triton.runtime.errors import OutOfResources

    key = key, tiles
    chosen: T | None = _fitted.get(key, tiles)
    while chosen is not None:
        try:
            launch(chosen)
            return
        except OutOfResources as error:  # found when it is compiled: nothing ran
            chosen, reason = smaller(chosen), error
            if chosen is not None:
                _fitted[key] = chosen
    raise RuntimeError(f"no tiles fit the device's shared memory for {what}: {reason}")
