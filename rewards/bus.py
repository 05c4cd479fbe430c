"""The reward bus: runs every component over the samples and collects one checked value per cell."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np

from rewards.execution import Component, Permanent, Scores
from rewards.types import NO_VALUE, OUTSIDE, Objective, RewardMatrix
from rollout.types import SampleGroup

LONGEST_MESSAGE = 500  # characters of an error's that are kept


class RewardBus:
    """Scores sample groups on K objectives.

    Components that wait (for an endpoint, a thread, a process) do so at the same time, while those that run inline take
    their turns in the thread that calls. No value depends on which of them is done first.

    Args:
        components: The component of every objective, by name and in the order of the columns.
        objectives: What the values mean, in the same order.
    """

    def __init__(self, components: Mapping[str, Component], objectives: Sequence[Objective]):
        assert list(components) == [objective.name for objective in objectives]
        self._components = components
        self._objectives = objectives
        self.latest: dict[str, Scores] = {}  # of the latest call, by objective
        self._ended = 0.0  # when that one did
        self._pauses: list[float] = []  # seconds before what failed was scored again

    def score(self, groups: Sequence[SampleGroup]) -> RewardMatrix:
        """Score all samples of the groups; rows are in the order of the groups.

        A component that raises, takes too long, returns no number, NaN, infinity, or a value outside its bounds leaves
        the cell missing and the reason recorded; nothing is replaced by 0 and nothing is clipped.
        """
        num_samples = sum(len(group.samples) for group in groups)
        empty = RewardMatrix(self._objectives, np.full((num_samples, len(self._objectives)), np.nan), {})
        return self._fill(empty, groups, {objective.name: range(num_samples) for objective in self._objectives})

    def score_again(self, groups: Sequence[SampleGroup], matrix: RewardMatrix, names: Sequence[str]) -> RewardMatrix:
        """A matrix of these groups, with those cells scored once more that failed on the objectives named."""
        self._pauses.append(time.perf_counter() - self._ended)
        failed = {
            objective.name: dict.fromkeys(sorted(n for n, column in matrix.errors if column == k))
            for k, objective in enumerate(self._objectives)
            if objective.name in names
        }
        return self._fill(matrix, groups, failed)

    def may_recover(self) -> set[str]:
        """Objectives whose latest failures may pass: their calls are made again anyway, and not all failed for good."""
        return {
            name
            for name, scores in self.latest.items()
            if self._components[name].retries
            and any(isinstance(value, Exception) and not isinstance(value, Permanent) for value in scores.values)
        }

    def _fill(
        self, matrix: RewardMatrix, groups: Sequence[SampleGroup], rows: Mapping[str, Collection[int]]
    ) -> RewardMatrix:
        raw_NK = matrix.raw_NK.copy()
        errors = {(n, k): why for (n, k), why in matrix.errors.items() if self._objectives[k].name not in rows}
        waits = {name: self._components[name].start(groups, some) for name, some in rows.items()}
        self.latest = {name: wait() for name, wait in waits.items()}
        self._ended = time.perf_counter()
        for k, objective in enumerate(self._objectives):
            if objective.name in rows:
                some = rows[objective.name]
                values, reasons = check(self.latest[objective.name].values, objective.bounds)
                raw_NK[list(some), k] = values
                errors |= {(n, k): reason for n, reason in zip(some, reasons, strict=True) if reason}
        return RewardMatrix(self._objectives, raw_NK, errors)

    def timings(self) -> dict[str, float]:
        """Seconds of the latest scoring by objective: in all, and the median and the 95th percentile of its calls.

        And how often and for how many seconds it was waited, since the last call, before what failed was scored again.
        """
        pauses, self._pauses = self._pauses, []
        found = {"time/pauses": float(len(pauses)), "time/paused": sum(pauses)} if pauses else {}
        for name, scores in self.latest.items():
            found[f"time/reward/{name}"] = scores.seconds
            for label, share in (("median", 0.5), ("p95", 0.95)):
                found[f"time/call/{name}/{label}"] = float(np.quantile(scores.latencies, share)) if scores.latencies else 0.0
        return found

    def close(self) -> None:
        """End the processes and connections of the components."""
        for component in self._components.values():
            component.close()


def check(values: Sequence[object], bounds: tuple[float, float]) -> tuple[np.ndarray, Sequence[str]]:
    """Usable values, NaN in the place of others, and reasons for these, empty for those."""
    with suppress(TypeError, ValueError, OverflowError):  # the usual case, quickly
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape == (len(values),) and ((numbers >= bounds[0]) & (numbers <= bounds[1])).all():
            return numbers, [""] * len(values)
    checked = [_check(value, bounds) for value in values]
    return np.array([number for number, _ in checked]), [reason for _, reason in checked]


def _check(value: object, bounds: tuple[float, float]) -> tuple[float, str]:
    """(number, "") for a usable value, else (NaN, reason)."""
    if value is None:
        return math.nan, NO_VALUE
    if isinstance(value, Exception):
        return math.nan, _reason(value)
    try:
        if isinstance(value, str | bytes):  # float would read it
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan, f"not a number: {value!r:.80}"
    if not math.isfinite(number):
        return math.nan, f"not finite: {number}"
    if not bounds[0] <= number <= bounds[1]:
        return math.nan, f"{number:g} {OUTSIDE} [{bounds[0]:g}, {bounds[1]:g}]"
    return number, ""


def _reason(error: Exception) -> str:
    """What an error says, and the last of its notes, which is where it was raised."""
    parts = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())[-1:]]
    short = [part if len(part) <= LONGEST_MESSAGE else part[: LONGEST_MESSAGE - 3] + "..." for part in parts]
    return " ".join(short).encode(errors="replace").decode()  # it goes to a file
