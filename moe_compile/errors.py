"""Errors of models that are spread over ranks."""

from __future__ import annotations


class ParallelError(RuntimeError):
    """A model over several ranks cannot be compiled as asked, and going on with what was written would be wrong or would hang."""
