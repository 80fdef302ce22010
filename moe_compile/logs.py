"""What the compiler tells: one logger, each message once, and artifacts for tlparse.

`TORCH_LOGS="+moe_compile"` (debug), `"moe_compile"` (info) and `"-moe_compile"` (errors) set the level; torch resolves
the name to this package by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("moe_compile")

_told: set[str] = set()


def warn_once(message: str, *, about: str | None = None, details: BaseException | None = None) -> None:
    """Log `message` as a warning unless it was logged before. details: the exception whose traceback goes to debug.

    about: what is told of once, where the words differ.
    """
    if (about or message) in _told:
        return
    _told.add(about or message)
    log.warning(message)
    if details is not None:
        log.debug("the traceback of: %s", message, exc_info=details)


def forget() -> None:
    """Tell everything again: for tests, and after a change of the model."""
    _told.clear()


def tlparse_listens() -> bool:
    """Whether torch writes structured traces (TORCH_TRACE), so that artifacts are worth making."""
    from torch._logging import _internal

    return bool(getattr(getattr(_internal, "trace_log", None), "handlers", ()))


def artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text artifact to torch's structured trace; `text` is called only where one is written."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
