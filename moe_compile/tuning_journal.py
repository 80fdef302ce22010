"""Trials of points that are not finished, a line of JSON each, beside the file of choices: what a stopped search goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_compile.ops.kernels import tuned_file
from moe_compile.ops.kernels.tuned import Machine
from moe_compile.tuning import Trial
from moe_compile.tuning_layer import Choice, Point, choice_from, choice_json


class Journal:
    """Of one machine. Lines of others, and of other versions of the kernels, stay."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def known(self, point: Point) -> dict[Choice, Trial]:
        """The last trial of each choice."""
        mine = self._of(point)
        found: dict[Choice, Trial] = {}
        for line in _lines():
            if all(line.get(name) == value for name, value in mine.items()):
                try:
                    found[choice_from(line["choice"])] = Trial(**line["trial"])
                except (KeyError, TypeError, ValueError):
                    continue  # a line of another version: tried again
        return found

    def add(self, point: Point, trials: dict[Choice, Trial]) -> None:
        mine = self._of(point)
        text = "".join(json.dumps({**mine, "choice": choice_json(c), "trial": asdict(t)}) + "\n" for c, t in trials.items())
        with tuned_file.locked(), file().open("a") as out:
            out.write("\n" + text)  # a line that was cut off stays alone

    def finish(self, point: Point) -> None:
        """Forgets a point's trials."""
        mine = self._of(point)
        self._keep(lambda line: any(line.get(name) != value for name, value in mine.items()))

    def forget(self) -> None:
        """Forgets the device's."""
        self._keep(lambda line: line.get("device") != self.machine.device)

    def _keep(self, wanted: Any) -> None:
        with tuned_file.locked():
            kept = [line for line in _lines() if wanted(line)]
            if kept:
                tuned_file.replace(file(), "".join(json.dumps(line) + "\n" for line in kept))
            else:
                file().unlink(missing_ok=True)

    def _of(self, point: Point) -> dict[str, Any]:
        own = {**self.machine._asdict(), "kernels": tuned_file.kernels_hash()}
        return {**own, "layer": asdict(point.work), "tokens": point.tokens}


def file() -> Path:
    return tuned_file.path().with_name("tiles_under_way.jsonl")


def _lines() -> list[dict[str, Any]]:
    """Those that can be read: the last may have been cut off."""
    try:
        text = file().read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue
        found += [data] if isinstance(data, dict) else []
    return found
