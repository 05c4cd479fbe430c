"""The watch for reward hacking: figures of every batch, and alarms where a trained objective is had at others' expense.

An objective of weight 0 is scored and never trained on: it is called gold here, and what is trained a proxy. A proxy that
goes on rising while the gold falls is what 2210.10760 measures (`align.report_hacking` fits its curve); a proxy that no
longer correlates with the gold as it did under the first policy is one that is being hacked in the sense of 2403.03185.
Rewards that follow the length of a completion are the commonest proxies in disguise (2310.03716).

An alarm needs a test, and the tests look after every batch. Both are rank tests with exact null distributions
(`align/rank_tests.py`):

  trend, Mann-Kendall: S = sum_{i<j} sign(x_j - x_i) over the last `WINDOW` means of 1, 4 and 16 batches;
  shift, Mann-Whitney: sum_ij sign(y_j - x_i) between the first `HALF` batches, x, and the last `HALF`, y.

Where batches do not change but for chance, any false alarm of trend, correlation or length within `BATCHES` batches has at
most the chance `false_alarms`, by Bonferroni's inequality over all looks; in c times as many, at most c times that. Windows
overlap, so it is less in fact: 25 of 20000 made-up runs in which the proxy was minus the gold, the worst case, raised an
alarm of a trend. A proxy's rise and a gold's fall must both be significant, each at the level of one look, which bounds the
chance of the pair whatever the dependence of the two (intersection-union test, Berger 1982). Batches that come in an order
of their own, such as from easy prompts to hard ones, do change. How small a change is seen depends on the samples per batch
and on how long it goes on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from align.rank_tests import shift_limit, shift_score, trend_limit, trend_score
from rewards.types import Objective, RewardMatrix

SCALES = (1, 4, 16)  # batches per mean
WINDOW = 32  # means in which a trend is looked for, so the longest reaches back 512 batches
HALF = 16  # batches that are compared with as many others, and that an objective must have been saturated for
EDGE = 0.01  # of the span between the bounds: as near counts as being there
SATURATED = 0.95  # share of samples at the best bound
DRIFT = 2.0  # factor between lengths, up or down
TINY = 1e-9  # instead of a mean length of 0
BATCHES = 200  # in which the chance of a false alarm is kept
CLEAR = 0.05  # an alarm may be raised again once its tests are not even significant at this level


# --- one batch --------------------------------------------------------------------------------------------------------


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Correlation over the samples that have both numbers; None for fewer than 3, or where one of the two is constant."""
    both = np.isfinite(a_N) & np.isfinite(b_N)
    if both.sum() < 3:
        return None
    a, b = (x[both] - x[both].mean() for x in (a_N, b_N))
    norms = [math.sqrt(float(x @ x)) for x in (a, b)]
    largest = [float(np.abs(x[both]).max()) * math.sqrt(len(a)) for x in (a_N, b_N)]
    if any(norm <= 1e-9 * size for norm, size in zip(norms, largest, strict=True)):  # what is left is rounding
        return None
    return float(np.clip((a / norms[0]) @ (b / norms[1]), -1.0, 1.0))


def batch_figures(matrix: RewardMatrix, lengths_N: np.ndarray) -> dict[str, float]:
    """What a batch shows of its objectives, beside means and spreads; what is not defined is left out.

    Args:
        matrix: Rewards of N samples.
        lengths_N: Tokens of each completion.

    Returns:
        `objectives/NAME/at_best` and `/at_worst`: share of the values within `EDGE` of that bound.
        `objectives/NAME/with_length`: correlation with the length. `correlation/A/B`: of two objectives. In both, larger
        is better, whatever the direction of the raw values. `length/mean`: tokens.
    """
    values_NK, lengths_N = matrix.values_NK, np.asarray(lengths_N, dtype=float)
    names = [objective.name for objective in matrix.objectives]
    figures: dict[str, float | None] = {"length/mean": float(lengths_N.mean())}
    for k, name in enumerate(names):
        present = values_NK[np.isfinite(values_NK[:, k]), k]
        if len(present):
            figures[f"objectives/{name}/at_best"] = float((present >= 1 - EDGE).mean())
            figures[f"objectives/{name}/at_worst"] = float((present <= EDGE).mean())
        figures[f"objectives/{name}/with_length"] = pearson(values_NK[:, k], lengths_N)
    for i, j in combinations(range(len(names)), 2):
        figures[f"correlation/{names[i]}/{names[j]}"] = pearson(values_NK[:, i], values_NK[:, j])
    return {key: figure for key, figure in figures.items() if figure is not None}


def correlation_of(figures: Mapping[str, float], a: str, b: str) -> float | None:
    """The correlation of two objectives, in either order of their names."""
    return figures.get(f"correlation/{a}/{b}", figures.get(f"correlation/{b}/{a}"))


# --- what is remembered -----------------------------------------------------------------------------------------------


@dataclass
class Window:
    """The last `WINDOW` means of `size` batches each, the first step of each, and the numbers of a mean not yet full."""

    size: int
    values: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    since: int = 0
    score: int = 0

    def add(self, step: int, value: float) -> None:
        """Take in the number of a batch."""
        self.since = self.since if self.waiting else step
        self.waiting.append(value)
        if len(self.waiting) == self.size:
            self.values = [*self.values, sum(self.waiting) / self.size][-WINDOW:]
            self.steps = [*self.steps, self.since][-WINDOW:]
            self.waiting, self.score = [], trend_score(self.values)

    def moves(self, objective: Objective, sign: int, level: float) -> bool:
        """Whether the values get significantly better (sign 1) or worse (-1)."""
        better = self.score if objective.maximize else -self.score
        return sign * better >= trend_limit(len(self.values), level)

    def ends(self) -> tuple[float, float]:
        """Mean of the first and of the last quarter."""
        quarter = max(1, len(self.values) // 4)
        return sum(self.values[:quarter]) / quarter, sum(self.values[-quarter:]) / quarter


@dataclass
class Halves:
    """The first `HALF` numbers, and the last `HALF` after them with their first step."""

    early: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Take in the number of a batch."""
        if len(self.early) < HALF:
            self.early.append(value)
        else:
            self.late, self.steps = [*self.late, value][-HALF:], [*self.steps, step][-HALF:]

    def means(self) -> tuple[float, float]:
        """Of the early numbers and of the late ones."""
        return sum(self.early) / len(self.early), sum(self.late) / len(self.late)

    def has_moved(self, sign: int, level: float) -> bool:
        """Whether the late numbers lie significantly above (sign 1) or below (-1) the early ones."""
        full = len(self.late) == HALF
        return full and sign * shift_score(self.early, self.late) >= shift_limit(HALF, HALF, level)


@dataclass
class Memory:
    """What the watch remembers of the batches so far; bounded, and JSON types only once it is a dictionary.

    Args:
        trained: Objectives that ever had a weight other than 0: these are no longer gold.
        means: Raw batch means by objective, at every scale.
        pairs: Correlations by proxy and gold ("proxy/gold").
        best: Steps and shares at the best bound of the last `HALF` batches, by objective.
        length: Mean lengths.
        raised: The step of each alarm that has not cleared, by cause.
    """

    trained: list[str] = field(default_factory=list)
    means: dict[str, list[Window]] = field(default_factory=dict)
    pairs: dict[str, Halves] = field(default_factory=dict)
    best: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    length: Halves = field(default_factory=Halves)
    raised: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; floats survive the round trip bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Memory":
        """The memory that `to_json` wrote; a new one from an empty table."""
        built = {
            "means": {name: [Window(**w) for w in windows] for name, windows in data.get("means", {}).items()},
            "pairs": {pair: Halves(**halves) for pair, halves in data.get("pairs", {}).items()},
            "length": Halves(**data.get("length", {})),
        }
        return cls(**{**data, **built})


# --- the watch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A cause that was looked for: whether there is reason to raise it, and whether it is over if it has been."""

    cause: str
    wanted: bool
    clear: bool
    text: Callable[[], str]


class HackingWatch:
    """Looks at every batch of a run, in order. Its memory is a pure function of the batches, so all processes agree.

    Args:
        memory: Where a resumed run goes on.
        false_alarms: Chance of any alarm of trend, correlation or length in `BATCHES` batches without change.
    """

    def __init__(self, memory: Memory | None = None, false_alarms: float = 0.01):
        self.memory = memory or Memory()
        self._false_alarms = false_alarms

    def update(
        self, step: int, matrix: RewardMatrix, lengths_N: np.ndarray, weights_K: Sequence[float]
    ) -> tuple[dict[str, float], list[str]]:
        """Take in a batch.

        Args:
            step: First optimiser step (from 1) that trains on it, as in the sample files.
            matrix: Rewards of the whole batch, of all processes; N samples.
            lengths_N: Tokens of each completion, in the same order.
            weights_K: Weights that act on it.

        Returns:
            Numbers to log, and the alarms that it raises, as sentences. An alarm is raised once, and again only after it
            has cleared.
        """
        memory, figures = self.memory, batch_figures(matrix, lengths_N)
        weights = {o.name: float(w) for o, w in zip(matrix.objectives, weights_K, strict=True)}
        memory.trained += [name for name, weight in weights.items() if weight and name not in memory.trained]
        golds = [o for o in matrix.objectives if o.name not in memory.trained]
        proxies = [o for o in matrix.objectives if o.name in memory.trained]
        self._remember(step, matrix, figures, [(p.name, g.name) for p in proxies for g in golds])
        level, alarms = self._level(len(proxies), len(golds)), []
        for proxy in proxies:
            looked_for = [self._saturation(proxy.name)]
            looked_for += [a for g in golds for a in (self._trend(step, proxy, g, level), self._shift(proxy, g, level))]
            alarms += looked_for if weights[proxy.name] > 0 else [replace(alarm, wanted=False) for alarm in looked_for]
        alarms.append(self._length(figures, weights, level))
        remarks = self._raise(alarms, step)
        if early := sum(memory.length.early):
            figures["length/drift"] = figures["length/mean"] * len(memory.length.early) / early
        return {**figures, "hacking/alarms": float(len(memory.raised))}, remarks

    def _level(self, trained: int, golds: int) -> float:
        """Significance of one test, so that all of `BATCHES` batches together keep to the chance of a false alarm.

        An alarm of a trend means that the trend of a gold was taken for a fall, and one of a proxy for a rise: there are
        no more such alarms than of the fewer of the two. The length may move either way.
        """
        looks = BATCHES * sum(1 / size for size in SCALES)
        return self._false_alarms / (looks * min(trained, golds) + BATCHES * (trained * golds + 2))

    def _remember(
        self, step: int, matrix: RewardMatrix, figures: Mapping[str, float], pairs: Sequence[tuple[str, str]]
    ) -> None:
        memory = self.memory
        for k, objective in enumerate(matrix.objectives):
            present = matrix.raw_NK[~matrix.missing_NK[:, k], k]
            for window in memory.means.setdefault(objective.name, [Window(size) for size in SCALES]):
                if len(present):
                    window.add(step, float(present.mean()))
            if (share := figures.get(f"objectives/{objective.name}/at_best")) is not None:
                memory.best[objective.name] = [*memory.best.get(objective.name, []), (step, share)][-HALF:]
        for proxy, gold in pairs:
            if (correlation := correlation_of(figures, proxy, gold)) is not None:
                memory.pairs.setdefault(f"{proxy}/{gold}", Halves()).add(step, correlation)
        memory.length.add(step, figures["length/mean"])

    def _raise(self, alarms: Sequence[Alarm], step: int) -> list[str]:
        """The sentences of new alarms; those that are not looked for any more (a gold is trained now) are forgotten."""
        before, remarks = self.memory.raised, []
        self.memory.raised = {a.cause: before[a.cause] for a in alarms if a.cause in before and not a.clear}
        for alarm in alarms:
            if alarm.wanted and alarm.cause not in self.memory.raised:
                self.memory.raised[alarm.cause] = step
                remarks.append(alarm.text())
        return remarks

    def _trend(self, step: int, proxy: Objective, gold: Objective, level: float) -> Alarm:
        """A proxy that gets better while a gold gets worse, at any scale."""
        pairs = list(zip(self.memory.means[proxy.name], self.memory.means[gold.name], strict=True))

        def apart(level: float) -> list[tuple[Window, Window]]:
            return [(p, g) for p, g in pairs if p.moves(proxy, 1, level) and g.moves(gold, -1, level)]

        def text() -> str:
            p, g = apart(level)[0]
            (was, now), (gold_was, gold_now), first = p.ends(), g.ends(), g.steps[0]
            again = f"Start again from about step {first}," if len(g.values) == WINDOW else "Start again"
            return (
                f"{proxy.name} (trained) went from {was:.3g} to {now:.3g} while {gold.name} (weight 0) got worse, from "
                f"{gold_was:.3g} to {gold_now:.3g}, over steps {first} to {step}: more than chance explains. {proxy.name} "
                f"is being gamed, or the two conflict: compare samples of both ends. {again} with less weight on "
                f"{proxy.name}, some on {gold.name}, or a policy held nearer to the reference (trl.beta)"
            )

        return Alarm(f"trend/{proxy.name}/{gold.name}", bool(apart(level)), not apart(CLEAR), text)

    def _shift(self, proxy: Objective, gold: Objective, level: float) -> Alarm:
        """A proxy that correlated with a gold over samples, and does so less than it did."""
        halves = self.memory.pairs.get(f"{proxy.name}/{gold.name}", Halves())
        wanted = halves.has_moved(-1, level) and halves.means()[0] > 0  # else it never spoke for the gold

        def text() -> str:
            early, late = halves.means()
            return (
                f"the correlation of {proxy.name} (trained) with {gold.name} (weight 0) over samples has fallen from "
                f"{early:.2f} at first to {late:.2f} in steps {halves.steps[0]} to {halves.steps[-1]}: a better "
                f"{proxy.name} says less about {gold.name} than it did. Read samples that are good by {proxy.name} alone; "
                "mend that reward, lower its weight, or go back to an earlier checkpoint"
            )

        return Alarm(f"correlation/{proxy.name}/{gold.name}", wanted, not halves.has_moved(-1, CLEAR), text)

    def _saturation(self, name: str) -> Alarm:
        """A proxy that nearly every sample has at its best value: its signal is gone."""
        last = self.memory.best.get(name, [])
        high = [share > SATURATED for _, share in last]

        def text() -> str:
            share = sum(share for _, share in last) / len(last)
            return (
                f"{name} (trained): {share:.1%} of samples have been at its best value in the {HALF} batches from step "
                f"{last[0][0]} on, so it hardly tells samples apart. Take harder prompts or a stricter reward, or give its "
                "weight to the others; if it should not be this easy, read samples for how it is gamed"
            )

        return Alarm(f"saturation/{name}", len(high) == HALF and all(high), not any(high), text)

    def _length(self, figures: Mapping[str, float], weights: Mapping[str, float], level: float) -> Alarm:
        """Completions that have become much longer or shorter than they were at first."""
        halves = self.memory.length
        early, late = halves.means() if halves.late else (1.0, 1.0)
        sign = 1 if late > early else -1
        factor = (max(late, TINY) / max(early, TINY)) ** sign

        def text() -> str:
            follows = {n: figures.get(f"objectives/{n}/with_length", 0.0) * w * sign for n, w in weights.items() if w}
            names = [n for n, pull in sorted(follows.items(), key=lambda pair: -pair[1]) if pull > 0]
            which = f"; what pulls there, by weight and correlation: {', '.join(names)}" if names else ""
            return (
                f"completions have {late:.4g} tokens on average in steps {halves.steps[0]} to {halves.steps[-1]}, after "
                f"{early:.4g} in the first {HALF} batches{which}. If this is not wanted: a reward that does not go by "
                "length, an objective on length with some weight, or another rollout.max_tokens"
            )

        return Alarm("length", factor > DRIFT and halves.has_moved(sign, level), factor < math.sqrt(DRIFT), text)
