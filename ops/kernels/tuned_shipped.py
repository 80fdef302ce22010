"""Choices that come with the package: measured by `moe-compile tune` where its rules (configs.py) fell short.

After tuning, tuned_file.entries_for(tuned.machine_of()) are the entries to put here.
"""

from __future__ import annotations

from .tuned import Entry, Machine

TABLE: dict[Machine, tuple[Entry, ...]] = {}
