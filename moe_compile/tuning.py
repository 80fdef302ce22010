"""The search of `moe-compile tune`: what to try for a layer and a number of tokens, in which order, and what is kept of it.

It starts at the rules' tiles for each number of block rows and climbs: tiles that differ a little are measured with few repeats, the better
third with more, and so on (successive halving); the best of each layer are put together. All is measured beside the rules' choice, in
turns, and compared by the ratio to it. Measuring stands behind `Bench`, so this file runs without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from moe_compile.tuning_layer import Choice, Point, neighbours, rules, starts

ROUNDS = (5, 11, 25)  # repeats of each halving
KEPT = 3  # one of so many goes on to the next
LAST = 51  # repeats of what is chosen against the rules
GAIN = 0.99  # what is not faster by a hundredth is noise
CLIMBS = 4  # steps from a start, at most
STARTS = 2
NEAR = 1.10  # a second start is at most so much slower than the first
BATCH = 32  # compiled and measured at a time; what is stopped loses at most one
LIMITS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # relative error of a row against the rules' choice


class Sample(NamedTuple):
    """microseconds: median. off: the worst row's relative error against the rules' choice. reason: why it could not run."""

    microseconds: float
    off: float = 0.0
    reason: str = ""


class Bench(Protocol):
    """What measures."""

    def compile(self, point: Point, choices: Sequence[Choice], done: Callable[[], None]) -> dict[Choice, str]:
        """Compiles all; why some cannot be. `done` after each."""

    def measure(self, point: Point, choices: Sequence[Choice], repeats: int) -> list[Sample]:
        """Times of all, in turns; the first choice is the rules', which the others' results are held against."""


@dataclass(frozen=True)
class Trial:
    """What is known of a choice. ratio: its time over that of the rules' choice beside it."""

    ratio: float
    repeats: int
    microseconds: float = 0.0
    reason: str = ""
    wrong: bool = False


class Journal(Protocol):
    """Where trials go as they come, and come from after a stop."""

    def known(self, point: Point) -> dict[Choice, Trial]: ...
    def add(self, point: Point, trials: dict[Choice, Trial]) -> None: ...


class Progress(Protocol):
    def stage(self, text: str, total: int) -> None: ...
    def advance(self) -> None: ...


@dataclass
class Outcome:
    """The best of a point. microseconds: its time, and that of the rules' choice, in the last measurement."""

    point: Point
    choice: Choice
    microseconds: float
    rules: float
    tried: int
    finished: bool
    wrong: dict[Choice, str] = field(default_factory=dict)
    failed: int = 0


class TuneError(RuntimeError):
    """Why there is nothing to keep."""


class DeviceLost(TuneError):
    """A choice after which the device answers no more, in this process."""

    def __init__(self, choice: Choice, reason: str) -> None:
        super().__init__(
            f"the device does not answer after {choice}: {reason}. Give the same command again: it goes on without this choice"
        )
        self.choice, self.reason = choice, reason


class OutOfTime(Exception):
    pass


class Search:
    """One point."""

    def __init__(self, point: Point, bench: Bench, journal: Journal, progress: Progress, deadline: float | None = None) -> None:
        self.point, self.bench, self.journal, self.progress, self.deadline = point, bench, journal, progress, deadline
        self.trials = journal.known(point)
        self.rules = rules(point)
        self.rules_microseconds = 0.0
        self.stopped: BaseException | None = None

    def run(self) -> Outcome:
        """The outcome, also where time or the user stopped the search: then `stopped` tells which."""
        try:
            for start in self._starts():
                self._climb(start)
            best = self._confirmed()
        except (OutOfTime, KeyboardInterrupt) as reason:
            self.stopped = reason
            best = self._best_so_far()
        wrong = {choice: trial.reason for choice, trial in self.trials.items() if trial.wrong}
        failed = sum(bool(trial.reason) and not trial.wrong for trial in self.trials.values())
        took = self.trials[best].microseconds if best in self.trials else 0.0
        rules_took = self.rules_microseconds or (took / self.trials[best].ratio if took else 0.0)
        return Outcome(self.point, best, took, rules_took, len(self.trials), self.stopped is None, wrong, failed)

    # -------------------------------------------------- the climb
    def _starts(self) -> list[Choice]:
        """The rules' choices for the numbers of block rows that do best."""
        ranked = self._halved(starts(self.point), "block rows")
        if not ranked:
            raise TuneError(self._why_nothing())
        return [each for each in ranked[:STARTS] if self._ratio(each) <= NEAR * self._ratio(ranked[0])]

    def _why_nothing(self) -> str:
        first = self.trials.get(self.rules)
        return f"{self.point}: nothing that the rules choose ran; {first.reason if first else 'not tried'}"

    def _climb(self, at: Choice) -> None:
        for step in range(1, CLIMBS + 1):
            moves = neighbours(self.point, at)
            ranked = self._halved(moves, f"step {step} from {at.rows or 'single'} rows")
            together = self._together(at, ranked)
            self._measure([at, *ranked[:1], *together], LAST, f"step {step}: the best")
            best = self._first([at, *ranked[:1], *together])
            if best == at or self._ratio(best) > GAIN * self._ratio(at):
                return
            at = best

    def _together(self, at: Choice, ranked: Sequence[Choice]) -> list[Choice]:
        """The best change of each layer at once, where more than one layer gains."""
        layers = list(at.layers)
        for index, own in enumerate(at.layers):
            changed = [each for each in ranked if each.layers[index] != own and self._ratio(each) < self._ratio(at)]
            if changed:
                layers[index] = changed[0].layers[index]
        found = Choice(at.rows, tuple(layers))
        return [found] if sum(a != b for a, b in zip(layers, at.layers)) > 1 else []

    def _halved(self, choices: Sequence[Choice], text: str) -> list[Choice]:
        """The choices that ran to the last round, best first."""
        alive = list(choices)
        for repeats in ROUNDS:
            self._measure(alive, repeats, text)
            alive = self._ranked(alive)
            if repeats != ROUNDS[-1]:
                alive = alive[: max(KEPT, -(-len(alive) // KEPT))]
        return alive

    def _confirmed(self) -> Choice:
        """The best against the rules' choice once more; that one where nothing is faster by more than noise."""
        best = self._best_so_far()
        if best != self.rules:
            self._measure([best], LAST, "the best against the rules", again=True)
        return best if self._ratio(best) < GAIN else self._with_rules()

    def _with_rules(self) -> Choice:
        if self.rules not in self.trials or self.trials[self.rules].reason:
            return self._first(self.trials)
        return self.rules

    def _best_so_far(self) -> Choice:
        """Of what was measured often, so that one lucky time does not decide."""
        most = max((trial.repeats for trial in self.trials.values() if not trial.reason), default=0)
        often = [choice for choice, trial in self.trials.items() if trial.repeats >= min(most, ROUNDS[-1]) and not trial.reason]
        best = self._first(often) if often else self.rules
        return best if best in self.trials and self._ratio(best) < GAIN else self.rules

    # -------------------------------------------------- measuring
    def _measure(self, choices: Iterable[Choice], repeats: int, text: str, again: bool = False) -> None:
        """So that all were measured so often at least, or are known not to run."""
        wanted = [each for each in dict.fromkeys(choices) if again or self._wants(each, repeats)]
        self.progress.stage(f"{text}, {len(wanted)} to measure {repeats} times", 2 * len(wanted))
        for first in range(0, len(wanted), BATCH):
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise OutOfTime
            self._batch(wanted[first : first + BATCH], repeats)

    def _wants(self, choice: Choice, repeats: int) -> bool:
        trial = self.trials.get(choice)
        return trial is None or (not trial.reason and trial.repeats < repeats)

    def _batch(self, choices: list[Choice], repeats: int) -> None:
        new = [each for each in dict.fromkeys((self.rules, *choices)) if each not in self.trials]
        found = {each: Trial(0.0, 0, reason=reason) for each, reason in self._uncompiled(new).items()}
        ready = [each for each in choices if each not in found and each != self.rules]
        base, *samples = self._samples([self.rules, *ready], repeats)
        if base.reason:
            raise TuneError(f"{self.point}: the rules' choice {self.rules} does not run: {base.reason}")
        if not base.off <= LIMITS[self.point.work.dtype]:
            raise TuneError(f"{self.point}: the rules' choice {self.rules} does not repeat its own result: relative error {base.off:.1e}")
        self.rules_microseconds = base.microseconds
        found[self.rules] = Trial(1.0, repeats, base.microseconds)
        for choice, sample in zip(ready, samples, strict=True):
            found[choice] = self._judged(sample, base, repeats)
            self.progress.advance()
        self.trials.update(found)
        self.journal.add(self.point, found)

    def _uncompiled(self, choices: list[Choice]) -> dict[Choice, str]:
        return self.bench.compile(self.point, choices, self.progress.advance) if choices else {}

    def _samples(self, choices: list[Choice], repeats: int) -> list[Sample]:
        try:
            return self.bench.measure(self.point, choices, repeats)
        except DeviceLost as lost:
            self.journal.add(self.point, {lost.choice: Trial(0.0, 0, reason=lost.reason)})
            raise

    def _judged(self, sample: Sample, base: Sample, repeats: int) -> Trial:
        if sample.reason:
            return Trial(0.0, repeats, reason=sample.reason)
        limit = LIMITS[self.point.work.dtype]
        if not sample.off <= limit:  # NaN too
            return Trial(0.0, repeats, reason=f"wrong result: relative error {sample.off:.1e}, limit {limit:.0e}", wrong=True)
        return Trial(sample.microseconds / base.microseconds, repeats, sample.microseconds)

    def _ratio(self, choice: Choice) -> float:
        return self.trials[choice].ratio

    def _ranked(self, choices: Iterable[Choice]) -> list[Choice]:
        return sorted((each for each in choices if each in self.trials and not self.trials[each].reason), key=self._ratio)

    def _first(self, choices: Iterable[Choice]) -> Choice:
        return self._ranked(choices)[0]
