"""From the evaluations of policies to everything that front.json says. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from align.archive import reference_vector
from align.build import objectives_of
from align.config import Config
from align.fronts.evaluation import Evaluated, Evaluations
from align.fronts.indicators import attainment, nondominated_rows
from align.fronts.logs import Notes
from align.fronts.runs import Candidate
from align.fronts.statistics import LEVEL, RESAMPLES, Interval, Yardstick, fronts_of, resampled_means
from align.summary import summarize
from rewards.types import Objective

FORMAT = 1  # of front.json
CURVE_RESAMPLES = 60
CURVE_STEPS = 30  # of a curve; of more steps, so many at equal distances are taken
XS = ("samples", "tokens", "seconds")
PARTS = ("validation", "test")


@dataclass(frozen=True)
class Measured:
    """Policies and their values.

    Args:
        candidates: The M policies.
        objectives: The K objectives.
        reference: Reference point in raw units; the worst bound of an objective not named.
        validation_MPK: Raw means per validation prompt; NaN where missing.
        test_MPK: Raw means per test prompt; NaN where missing.
    """

    candidates: Sequence[Candidate]
    objectives: Sequence[Objective]
    reference: Mapping[str, float]
    validation_MPK: np.ndarray
    test_MPK: np.ndarray

    @cached_property
    def usable_M(self) -> np.ndarray:
        """Indices of the policies with a finite value for every objective, on validation and on test."""
        present = [np.isfinite(part_MPK).any(axis=1).all(axis=1) for part_MPK in (self.validation_MPK, self.test_MPK)]
        return np.flatnonzero(present[0] & present[1])

    @property
    def reference_K(self) -> np.ndarray:
        """Scaled."""
        return reference_vector(self.reference, self.objectives)

    def scaled(self, raw_MPK: np.ndarray) -> np.ndarray:
        """Values of the usable policies in [0, 1], larger is better; what is not finite is missing."""
        some_MPK = np.where(np.isfinite(raw_MPK), raw_MPK, np.nan)[self.usable_M]
        return np.stack([o.scale(some_MPK[..., k]) for k, o in enumerate(self.objectives)], axis=-1)

    def yardstick(self, resamples: int = RESAMPLES) -> Yardstick:
        """Of the usable policies; its indices are places in `usable_M`."""
        validation_MK = resampled_means(self.scaled(self.validation_MPK), 0)[0]
        test_BMK = resampled_means(self.scaled(self.test_MPK), resamples)
        return Yardstick(validation_MK, test_BMK, self.test_MPK.shape[1], self.reference_K)

    def raw(self, vector_K: np.ndarray) -> dict[str, float]:
        """A scaled vector in raw units, by name."""
        return {o.name: _raw(o, x) for o, x in zip(self.objectives, vector_K, strict=True)}

    def methods(self) -> dict[str, list[np.ndarray]]:
        """Of each method its runs, each the places of its points among the usable policies."""
        runs: dict[tuple[str, str], list[int]] = {}
        for place, m in enumerate(self.usable_M):
            runs.setdefault((self.candidates[m].method, self.candidates[m].group), []).append(place)
        found: dict[str, list[np.ndarray]] = {}
        for (method, _), rows in runs.items():
            found.setdefault(method, []).append(np.array(rows))
        return found


def measured(candidates: Sequence[Candidate], found: Evaluations, config: Config) -> Measured:
    """Candidates with their evaluations."""
    per_policy = [found.by_path[c.path] for c in candidates]
    parts = [np.stack([getattr(e, name) for e in per_policy]) for name in ("validation_PK", "test_PK")]
    return Measured(candidates, objectives_of(config), config.evaluation.reference, *parts)


def front_of(data: Measured, found: Evaluations, config: Config, seeds: Sequence[int], notes: Notes) -> dict[str, Any]:
    """The content of front.json.

    Raises:
        ValueError: No policy has a value for every objective.
    """
    _note_unusable(data, notes)
    if not len(data.usable_M):
        raise ValueError("no policy has a value for every objective, so there is nothing to compare: " + "; ".join(notes))
    yardstick, rough, methods = data.yardstick(), data.yardstick(CURVE_RESAMPLES), data.methods()
    _note_odd(data, yardstick, methods, notes)
    on_front = set(data.usable_M[yardstick.front_M].tolist())
    on_test_front = set(data.usable_M[nondominated_rows(yardstick.test_BMK[0])].tolist())
    probability_AA = yardstick.dominance(list(methods.values()))
    names = list(methods)
    return without_nan(
        {
            "format": FORMAT,
            "objectives": [_objective(o, config) for o in data.objectives],
            "reference": data.raw(data.reference_K),
            "prompts": dict(found.prompts),
            "seeds": list(seeds),
            "level": LEVEL,
            "points": [
                _point(c, found.by_path[c.path], data.objectives)
                | {"on_front": m in on_front, "on_test_front": m in on_test_front}
                | {"examples": list(found.by_path[c.path].examples)}
                for m, c in enumerate(data.candidates)
            ],
            "methods": [
                {"method": name, "runs": len(runs)}
                | {key: asdict(_tidy(key, i)) for key, i in yardstick.indicators(runs).items()}
                | {"curve": _curve(data, rough, runs)}
                for name, runs in methods.items()
            ],
            "dominates": [
                {"a": names[a], "b": names[b], "probability": float(probability_AA[a, b])}
                for a in range(len(names))
                for b in range(len(names))
                if a != b
            ],
            "attainment": [row for name, runs in methods.items() for row in _attained(data, yardstick, name, runs)],
            "attainment_planes": [row for name, runs in methods.items() for row in _planes(data, yardstick, name, runs)],
            "selection_bias": yardstick.selection_bias(),
            "config": config.model_dump(mode="json"),
            "notes": list(notes),
        }
    )


def _objective(o: Objective, config: Config) -> dict[str, Any]:
    direction = "maximize" if o.maximize else "minimize"
    section = config.objectives[o.name]
    return {"name": o.name, "direction": direction, "bounds": list(o.bounds), "reward": section.reward, "args": section.args}


def _tidy(name: str, interval: Interval) -> Interval:
    """Within what the indicator can be: a hypervolume is a share, IGD+ a distance."""
    low, high = {"hypervolume": (0.0, 1.0), "igd_plus": (0.0, math.inf)}.get(name, (-math.inf, math.inf))
    return Interval(*(float(np.clip(x, low, high)) for x in vars(interval).values()))


def _point(c: Candidate, evaluated: Evaluated, objectives: Sequence[Objective]) -> dict[str, Any]:
    keys = ("id", "run", "path", "step", "method", "seed", *XS)
    parts = {}
    for part in PARTS:
        summary = summarize(getattr(evaluated, f"{part}_PK")[:, None], objectives)
        missing = {o.name: share for o, share in zip(objectives, evaluated.missing[part], strict=True)}
        parts[part] = {"values": summary.values, "standard_errors": summary.standard_errors, "missing": missing}
    parents = [p.name for p in c.merged.parents] if c.merged else []
    return {key: getattr(c, key) for key in keys} | {"weights": dict(c.weights or {}), "parents": parents} | parts


def _curve(data: Measured, yardstick: Yardstick, runs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Indicators of what the runs of a method had reached by a step, and the samples, tokens and seconds they had spent.

    A run counts with all its points up to the step; the curve begins where every run has one, and x is the mean over runs.
    Merged models have no step: their curve is one row, at what all parents have cost.
    """
    policies = [[data.candidates[data.usable_M[m]] for m in rows_M] for rows_M in runs]
    if all(c.merged and c.samples is not None for run in policies for c in run):
        return [_row(yardstick, runs, None, [max(run, key=lambda c: c.samples) for run in policies])]
    if any(c.step is None for run in policies for c in run):
        return []
    curve = []
    steps = np.array(sorted({c.step for run in policies for c in run}))
    kept = np.unique(np.linspace(0, len(steps) - 1, CURVE_STEPS).round().astype(int))
    for step in steps[kept].tolist():
        so_far = [
            [m for m, c in zip(rows, run, strict=True) if c.step <= step] for rows, run in zip(runs, policies, strict=True)
        ]
        if not all(so_far):
            continue
        latest = [max((c for c in run if c.step <= step), key=lambda c: c.step) for run in policies]
        curve.append(_row(yardstick, [np.array(rows) for rows in so_far], step, latest))
    return curve


def _row(yardstick: Yardstick, runs: Sequence[np.ndarray], step: int | None, latest: Sequence[Candidate]) -> dict[str, Any]:
    """A row of a curve; `latest` has the policy of each run that has cost the most."""
    found = yardstick.indicators(runs)
    volume = _tidy("hypervolume", found.pop("hypervolume"))
    return (
        {"step": step}
        | {x: _mean([getattr(c, x) for c in latest]) for x in XS}
        | {"hypervolume": volume.mean, "low": volume.low, "high": volume.high}
        | {name: asdict(_tidy(name, interval)) for name, interval in found.items()}
    )


def _mean(numbers: Sequence[float | None]) -> float | None:
    return None if None in numbers else math.fsum(numbers) / len(numbers)


def _raw(o: Objective, x: float) -> float:
    low, high = o.bounds
    return float(low + (high - low) * (x if o.maximize else 1 - x))


def _attained(data: Measured, yardstick: Yardstick, method: str, runs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What shares of the runs of a method attain: corners of the surfaces, in raw units."""
    fronts = [yardstick.test_BMK[0, front_M] for front_M in fronts_of(yardstick.validation_MK, runs)]
    return [{"method": method, "values": data.raw(v), "share": share} for v, share in attainment(fronts)]


def _planes(data: Measured, yardstick: Yardstick, method: str, runs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The same in every two objectives, whatever the others are: corners of every level, from the least x to the largest."""
    fronts = [yardstick.test_BMK[0, front_M] for front_M in fronts_of(yardstick.validation_MK, runs)]
    rows = []
    for i, j in combinations(range(len(data.objectives)), 2):
        x, y = data.objectives[i], data.objectives[j]
        levels: dict[float, list[tuple[float, float]]] = {}
        for (a, b), share in attainment([front_MK[:, [i, j]] for front_MK in fronts]):
            levels.setdefault(share, []).append((_raw(x, a), _raw(y, b)))
        for share, corners in sorted(levels.items()):
            xs, ys = (list(numbers) for numbers in zip(*sorted(corners), strict=True))
            rows.append({"method": method, "share": share, "x": x.name, "y": y.name, "xs": xs, "ys": ys})
    return rows


# --- what is to be said -----------------------------------------------------------------------------------------------


def _note_unusable(data: Measured, notes: Notes) -> None:
    for m, c in enumerate(data.candidates):
        lacking = {
            o.name: part
            for part, values_PK in zip(PARTS, (data.validation_MPK[m], data.test_MPK[m]), strict=True)
            for k, o in enumerate(data.objectives)
            if not np.isfinite(values_PK[:, k]).any()
        }
        if lacking:
            where = ", ".join(f"{name} on the {part} prompts" for name, part in lacking.items())
            notes.add(f"{c.id} has no value of {where}: it is in the table and on no front")


def _note_odd(data: Measured, yardstick: Yardstick, methods: Mapping[str, Sequence[np.ndarray]], notes: Notes) -> None:
    ids = [data.candidates[m].id for m in data.usable_M]
    test_MK = yardstick.test_BMK[0]
    below = [i for i, vector_K in zip(ids, test_MK, strict=True) if not (vector_K > data.reference_K).all()]
    if below:
        some = ", ".join(below[:3]) + (f" and {len(below) - 3} more" if len(below) > 3 else "")
        notes.add(
            f"the reference point is not below {some} in every objective: these add nothing to a hypervolume; "
            "evaluation.reference moves it"
        )
    if len(ids) == 1:
        notes.add("there is one policy only: it is the front, and nothing is compared")
    elif len(yardstick.front_M) == 1:
        notes.add(f"{ids[int(yardstick.front_M[0])]} dominates all others on the validation prompts: the front is one point")
    single = [name for name, runs in methods.items() if len(runs) == 1]
    if single and len(ids) > 1:
        some = "every method" if len(single) == len(methods) else ", ".join(single)
        notes.add(f"one run only of {some}: these intervals are about prompts, not about training seeds")


def without_nan(data: Any) -> Any:
    """JSON has no NaN: a number that nobody knows is null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    return [without_nan(value) for value in data] if isinstance(data, list | tuple) else data
