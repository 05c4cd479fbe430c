"""Which policy of a front suits a wish best, and how sure that is. Numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.config.base import unknown_name
from align.fronts.compute import Measured
from align.fronts.statistics import LEVEL, Interval, resampled_means, seed_interval


@dataclass(frozen=True)
class Wish:
    """What a user wants: weights (`prefer`), or one objective (`best`) under bounds in raw units."""

    prefer: Mapping[str, float]
    at_least: Mapping[str, float]
    at_most: Mapping[str, float]
    best: str

    def text(self) -> str:
        """In words."""
        if self.prefer:
            return "preferring " + ", ".join(f"{name} {share:.3g}" for name, share in self.prefer.items())
        bounds = [f"{name} at least {x:g}" for name, x in self.at_least.items()]
        bounds += [f"{name} at most {x:g}" for name, x in self.at_most.items()]
        return f"the best {self.best}" + (" with " + " and ".join(bounds) if bounds else "")


@dataclass(frozen=True)
class Choice:
    """The policy that was chosen, by its place among all.

    Args:
        index: Its place.
        utility: What was wished for, scaled to [0, 1], on test.
        values: Raw means on test, by objective.
        best: Share of the resamples of the test prompts in which it suits best, of every policy (its place).
        satisfies: Share of the resamples in which it keeps the bounds; 1 without any.
    """

    index: int
    utility: Interval
    values: Mapping[str, Interval]
    best: Mapping[int, float]
    satisfies: float


def make_wish(prefer: str, at_least: str, at_most: str, maximize: str, minimize: str, data: Measured) -> Wish:
    """The options of `paretune pick` as a wish. Raises ValueError for what contradicts itself or the objectives."""
    tables = {"--prefer": _table("--prefer", prefer), "--at-least": _table("--at-least", at_least)}
    tables["--at-most"] = _table("--at-most", at_most)
    directions = {o.name: o.maximize for o in data.objectives}
    singles = {option: {name: 0.0} for option, name in (("--maximize", maximize), ("--minimize", minimize)) if name}
    for option, table in {**tables, **singles}.items():
        for name in table:
            if name not in directions:
                raise ValueError(f"{option}: {unknown_name('objective', name, directions)}")
    weights = tables["--prefer"]
    if bool(weights) == bool(maximize or minimize) or (maximize and minimize):
        raise ValueError("say what is wanted: --prefer accuracy=.7,brevity=.3, or --maximize brevity (with --at-least ...)")
    if weights and (at_least or at_most):
        raise ValueError("--prefer has no bounds: give --at-least and --at-most together with --maximize or --minimize")
    if weights and (min(weights.values()) < 0 or not sum(weights.values())):
        raise ValueError(f"--prefer {prefer}: weights must be 0 or more, and one of them more than 0")
    for option, name, wanted in (("--maximize", maximize, True), ("--minimize", minimize, False)):
        if name and directions[name] is not wanted:
            other = "--minimize" if wanted else "--maximize"
            raise ValueError(
                f"{option} {name}: of {name}, {'smaller' if wanted else 'larger'} is better; write {other} {name}"
            )
    total = sum(weights.values()) or 1.0
    shares = {name: share / total for name, share in weights.items()}
    return Wish(shares, tables["--at-least"], tables["--at-most"], maximize or minimize)


def _table(option: str, text: str) -> dict[str, float]:
    table = {}
    for part in filter(None, text.split(",")):
        name, equals, number = part.partition("=")
        try:
            table[name.strip()] = float(number) if equals else float("nan")
        except ValueError:
            table[name.strip()] = float("nan")
        if not np.isfinite(table[name.strip()]):
            raise ValueError(f"{option} {text}: write names with numbers, such as accuracy=0.8,brevity=0.2")
    return table


def choose(data: Measured, wish: Wish) -> Choice:
    """Choose on the validation prompts; say on the test prompts how good it is and how sure the choice.

    The probabilities are shares of resamples of the test prompts, which had no part in the choice: of those in which no
    other policy suits better, and of those in which the bounds are kept.

    Raises:
        ValueError: No policy keeps the bounds on validation; names the nearest.
    """
    usable_M = data.usable_M
    if not len(usable_M):
        raise ValueError("no policy has a value for every objective, so none can be chosen")
    validation_MK = resampled_means(data.validation_MPK[usable_M], 0)[0]
    test_BMK = resampled_means(data.test_MPK[usable_M])
    feasible_M = _excess(validation_MK, wish, data) <= 0
    if not feasible_M.any():
        raise ValueError(_nearest(validation_MK, wish, data))
    utility_M = _utility(validation_MK, wish, data)
    place = int(np.argmax(np.where(feasible_M, utility_M, -np.inf)))
    utility_BM, keeps_BM = _utility(test_BMK, wish, data), _excess(test_BMK, wish, data) <= 0
    suits_BM = np.where(keeps_BM, utility_BM, -np.inf)[1:]
    best_BM = (suits_BM >= suits_BM.max(axis=1, keepdims=True) - 1e-12) & np.isfinite(suits_BM)
    prompts, paths = data.test_MPK.shape[1], [data.candidates[m].path for m in usable_M]
    return Choice(
        index=int(usable_M[place]),
        utility=seed_interval(utility_BM[:, [place]], prompts),
        values={o.name: seed_interval(test_BMK[:, [place], k], prompts) for k, o in enumerate(data.objectives)},
        best={int(m): float(share) for m, share in zip(usable_M, _shares(best_BM, paths), strict=True)},
        satisfies=float(keeps_BM[1:, place].mean()),
    )


def _shares(best_BM: np.ndarray, paths: Sequence[str]) -> np.ndarray:
    """Share (M,) of the resamples in which each policy is the best.

    Policies that are equally good share a resample. Those of one path are one, as the first of all runs is.
    """
    same_MM = np.equal.outer(np.array(paths), np.array(paths))
    votes_BM = best_BM / same_MM.sum(axis=0)
    return (votes_BM / np.maximum(votes_BM.sum(axis=1, keepdims=True), 1e-12)).mean(axis=0) @ same_MM


def _utility(raw_XMK: np.ndarray, wish: Wish, data: Measured) -> np.ndarray:
    """What is wished for, scaled (..., M)."""
    weights = wish.prefer or {wish.best: 1.0}
    return sum(weights.get(o.name, 0.0) * o.scale(raw_XMK[..., k]) for k, o in enumerate(data.objectives))


def _excess(raw_XMK: np.ndarray, wish: Wish, data: Measured) -> np.ndarray:
    """By how much of its range the most violated bound is violated (..., M); 0 or less where all are kept."""
    excess_XM = np.zeros(raw_XMK.shape[:-1])
    for k, o in enumerate(data.objectives):
        span = o.bounds[1] - o.bounds[0]
        for table, sign in ((wish.at_least, 1.0), (wish.at_most, -1.0)):
            if o.name in table:
                excess_XM = np.maximum(excess_XM, sign * (table[o.name] - raw_XMK[..., k]) / span)
    return excess_XM


def _nearest(validation_MK: np.ndarray, wish: Wish, data: Measured) -> str:
    m = int(np.argmin(_excess(validation_MK, wish, data)))
    names = [*wish.at_least, *wish.at_most]
    has = ", ".join(f"{o.name} {validation_MK[m, k]:.3f}" for k, o in enumerate(data.objectives) if o.name in names)
    nearest = data.candidates[data.usable_M[m]].id
    return (
        f"no policy has {wish.text().partition(' with ')[2]} on the validation prompts; the nearest is {nearest}, with {has}"
    )


def sentences(choice: Choice, wish: Wish, data: Measured) -> Sequence[str]:
    """What is printed about a choice."""
    chosen, prompts = data.candidates[choice.index], data.test_MPK.shape[1]
    width = max(len(o.name) for o in data.objectives)
    lines = [
        f"{chosen.id}  ({chosen.method})  {wish.text()}",
        f"chosen on {data.validation_MPK.shape[1]} validation prompts; on {prompts} for test, with {LEVEL:.0%} intervals:",
        *(f"  {name:<{width}}  {i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" for name, i in choice.values.items()),
    ]
    shares = {data.candidates[m].path: (share, data.candidates[m].id) for m, share in choice.best.items()}
    others = sorted((pair for path, pair in shares.items() if path != chosen.path and pair[0] > 0), reverse=True)
    rest = "; then " + ", ".join(f"{name} ({share:.0%})" for share, name in others[:3]) if others else ""
    sure = f"{choice.best[choice.index]:.0%} of the resamples of the test prompts"
    lines.append(f"it is the best of {len(shares)} policies in {sure}{rest}")
    if wish.at_least or wish.at_most:
        lines.append(f"it keeps the bounds in {choice.satisfies:.0%} of them")
    return lines
