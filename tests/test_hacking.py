"""The watch for reward hacking: its figures, how seldom its tests err, its alarms."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.hacking import BATCHES, HALF, SCALES, WINDOW, HackingWatch, Memory, batch_figures, pearson
from align.rank_tests import trend_limit
from rewards.types import Missing, Objective, RewardMatrix


def objective(name: str, maximize: bool = True, bounds: tuple[float, float] = (0.0, 1.0)) -> Objective:
    return Objective(name, maximize, bounds, Missing.NEUTRAL)


PROXY, GOLD = objective("proxy"), objective("gold")


def matrix_of(objectives, *columns) -> RewardMatrix:
    return RewardMatrix(objectives, np.array(columns, dtype=float).T, {})


# --- figures of a batch -----------------------------------------------------------------------------------------------


def test_figures_by_hand():
    """up is at its best in 2 of 4 (1 and .995 >= .99), at its worst in 1; down / 10 is 1 - (1, 1, .5, 0) = 0, 0, .5, 1."""
    columns = [1, 0.995, 0.5, 0], [10, 10, 5, 0], [math.nan, 0.5, math.nan, 0.2], [math.nan] * 4
    objectives = [objective("up"), objective("down", False, (0.0, 10.0)), objective("rare"), objective("never")]
    figures = batch_figures(matrix_of(objectives, *columns), np.array([1, 1, 2, 4]))
    assert figures.pop("length/mean") == 2
    assert figures.pop("objectives/up/at_best") == figures.pop("objectives/down/at_worst") == 0.5
    assert figures.pop("objectives/up/at_worst") == figures.pop("objectives/down/at_best") == 0.25
    assert figures.pop("objectives/rare/at_best") == figures.pop("objectives/rare/at_worst") == 0
    assert figures.pop("correlation/up/down") == pytest.approx(np.corrcoef(columns[0], [0, 0, 5, 10])[0, 1])
    assert figures.pop("objectives/up/with_length") == pytest.approx(np.corrcoef(columns[0], [1, 1, 2, 4])[0, 1])
    assert figures.pop("objectives/down/with_length") == pytest.approx(np.corrcoef([0, 0, 5, 10], [1, 1, 2, 4])[0, 1])
    assert not figures  # nothing is said of what is not defined


def test_pearson_by_hand():
    """Centred: (-1, 0, 1) and (-1, 1, 0); their product is 1, and each has the square norm 2."""
    assert pearson(np.array([0.0, 1, 2]), np.array([0.0, 2, 1])) == pytest.approx(0.5)
    assert pearson(np.array([0.0, 1, 2, math.nan]), np.array([0.0, 2, 1, 9])) == pytest.approx(0.5)
    assert pearson(np.array([0.0, 1, math.nan]), np.array([0.0, 2, 1])) is None  # two points lie on a line always
    assert pearson(np.array([0.0, 1, 2]), np.full(3, 0.1) * 3) is None


def test_rounding_is_no_correlation():
    """0.1 + 0.2 and 0.3 are one value."""
    assert pearson(np.array([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]), np.array([1.0, 0, 0, 1])) is None


number = st.integers(-1000, 1000)


@settings(deadline=None)
@given(st.lists(st.tuples(number, number), min_size=3, max_size=30), st.floats(0.1, 10), st.floats(-5, 5))
def test_pearson_is_numpys_and_keeps_to_its_range(pairs, factor, shift):
    a, b = np.array(pairs, dtype=float).T
    r = pearson(a, b)
    assert (r is None) == (min(np.ptp(a), np.ptp(b)) == 0)
    if r is not None:
        assert r == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        assert -1 <= r <= 1
        assert pearson(b, -a) == pytest.approx(-r)
        assert pearson(factor * a + shift, b) == pytest.approx(r, abs=1e-9)


# --- how seldom it errs, and what it finds ----------------------------------------------------------------------------


class Made:
    """A made-up run shown to a watch, batch by batch: values in [0, 1], larger is better, of a proxy and a gold."""

    def __init__(self, seed: int = 0, samples: int = 64, watch: HackingWatch | None = None, objectives=(PROXY, GOLD)):
        self.rng = np.random.default_rng(seed)
        self.samples, self.objectives = samples, objectives
        self.watch = watch or HackingWatch()
        self.step, self.metrics, self.alarms = 0, [], []

    def batch(self, proxy=0.5, gold=0.5, tie=0.0, length=20.0, weights=(1.0, 0.0)) -> None:
        """Shares of the two at 1, of which a share `tie` are the same samples; the means are raw, as the bounds are 0, 1."""
        u, v, w = self.rng.uniform(size=(3, self.samples))
        scaled = [u < proxy, np.where(w < tie, u, v) < gold]
        raw = [x if o.maximize else ~x for x, o in zip(scaled, self.objectives, strict=True)]
        self.step += 1
        lengths = self.rng.poisson(length, self.samples)
        metrics, remarks = self.watch.update(self.step, matrix_of(self.objectives, *raw), lengths, weights)
        self.metrics.append(metrics)
        self.alarms += [(self.step, remark) for remark in remarks]

    def go(self, batches: int, **ends) -> "Made":
        """Batches whose means go from one number to another, or stay."""
        for t in np.linspace(0, 1, batches):
            self.batch(
                **{k: e[0] + t * (e[1] - e[0]) if k != "weights" and isinstance(e, tuple) else e for k, e in ends.items()}
            )
        return self

    def of(self, kind: str) -> list[int]:
        """Steps of the alarms whose text has a word."""
        return [step for step, text in self.alarms if kind in text]


def rolling_scores(values: np.ndarray) -> np.ndarray:
    """S of the last WINDOW values (R, T) at every time, kept up to date as they come and go."""
    scores = np.zeros(values.shape, dtype=int)
    for t in range(values.shape[1]):
        first = max(0, t - WINDOW + 1)
        new = np.sign(values[:, t : t + 1] - values[:, first:t]).sum(axis=1)
        old = np.sign(values[:, first:t] - values[:, first - 1 : first]).sum(axis=1) if first else 0
        scores[:, t] = (scores[:, t - 1] if t else 0) + new - old
    return scores


@pytest.mark.parametrize("noise", ["normal", "cauchy", "few"])
def test_trends_are_seldom_seen_where_there_are_none(noise):
    """The worst case, in which a proxy is minus the gold, so that one rises whenever the other falls."""
    rng, runs = np.random.default_rng(7), 4000
    draw = {"normal": rng.standard_normal, "cauchy": rng.standard_cauchy, "few": lambda size: rng.binomial(8, 0.1, size)}
    values, alarmed = draw[noise]((runs, BATCHES)).astype(float), {}
    for chance in (0.01, 0.2):
        level, hit = HackingWatch(false_alarms=chance)._level(1, 1), np.zeros(runs, dtype=bool)
        for size in SCALES:
            means = values[:, : BATCHES // size * size].reshape(runs, -1, size).mean(axis=2)
            limits = [trend_limit(min(t + 1, WINDOW), level) for t in range(means.shape[1])]
            hit |= (rolling_scores(means) >= limits).any(axis=1)
        alarmed[chance] = hit.mean()
    assert alarmed[0.01] <= 0.01
    assert 0.002 < alarmed[0.2] <= 0.2  # and so it looks at all


def test_false_alarms_of_the_whole_watch():
    """50 runs of 200 batches, opposite and alike: were 1 % of runs alarmed, more than 3 would be in 1 of 600 tries."""
    alarmed = 0
    for seed in range(50):
        made = Made(seed, samples=16)
        for _ in range(BATCHES):
            made.batch(proxy=0.5, gold=0.5, tie=0.5 * (seed % 2))
        alarmed += bool(made.alarms)
    assert alarmed <= 3


@pytest.mark.parametrize(
    ("decline", "batches", "within"),
    [(0.25, 40, 60), (0.2, 400, 401)],
    ids=["fast", "slow"],  # while the shortest window lasts, the slow one falls by a quarter of the noise of a batch
)
def test_a_planted_decline_is_found(decline, batches, within):
    found = 0
    for seed in range(5):
        made = Made(seed).go(50, proxy=0.4, gold=0.6)
        assert not made.alarms
        made.go(batches, proxy=(0.4, 0.4 + decline), gold=(0.6, 0.6 - decline)).go(
            20, proxy=0.4 + decline, gold=0.6 - decline
        )
        steps = made.of("while gold")
        found += bool(steps) and 50 < steps[0] <= 50 + within
    assert found == 5


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [((0.3, 0.7), (0.3, 0.7)), ((0.7, 0.3), (0.7, 0.3)), ((0.3, 0.7), 0.5), (0.5, (0.7, 0.3)), ((0.7, 0.3), (0.3, 0.7))],
    ids=["both rise", "both fall", "the gold stays", "the proxy stays", "the other way round"],
)
def test_nothing_else_is_a_conflict(proxy, gold):
    for seed in range(3):
        assert not Made(seed).go(60, proxy=proxy, gold=gold).of("while gold")


def test_the_sentence_names_what_is_needed_in_raw_values():
    """Both are to be small: the proxy falls from about .9 to .4 of raw value while the gold rises."""
    objectives = (objective("cost", maximize=False), objective("harm", maximize=False))
    made = Made(1, samples=400, objectives=objectives).go(40, proxy=(0.1, 0.6), gold=(0.9, 0.4))
    ((step, text),) = made.alarms
    assert step < 20
    assert text.startswith(("cost (trained) went from 0.9", "cost (trained) went from 0.8"))
    assert "while harm (weight 0) got worse, from 0.1" in text
    assert f"over steps 1 to {step}: more than chance explains" in text
    assert "Start again with less weight on cost, some on harm, or a policy held nearer to the reference (trl.beta)" in text


def test_a_later_decline_says_where_to_start_again():
    made = Made(2, samples=200).go(60, proxy=0.4, gold=0.6).go(30, proxy=(0.4, 0.7), gold=(0.6, 0.3))
    step, text = made.alarms[0]
    assert f"Start again from about step {step - WINDOW + 1}, with less weight on proxy" in text


def test_an_alarm_is_raised_once_and_again_after_it_has_cleared():
    made = Made(3, samples=200).go(40, proxy=0.2, gold=0.8).go(30, proxy=(0.2, 0.4), gold=(0.8, 0.6))
    assert len(made.of("while gold")) == 1
    assert made.metrics[-1]["hacking/alarms"] == 1
    made.go(60, proxy=0.4, gold=0.6)
    assert len(made.of("while gold")) == 1
    made.go(700, proxy=0.4, gold=0.6)  # until the longest window has forgotten it
    assert made.metrics[-1]["hacking/alarms"] == 0
    made.go(30, proxy=(0.4, 0.6), gold=(0.6, 0.4))
    assert len(made.of("while gold")) == 2


def test_a_gold_that_is_trained_on_is_none_any_more():
    made = Made(4, samples=200).go(40, proxy=(0.2, 0.6), gold=(0.8, 0.4))
    assert made.metrics[-1]["hacking/alarms"] == 1
    made.go(1, weights=(0.9, 0.1))
    assert made.metrics[-1]["hacking/alarms"] == 0
    made.go(40, proxy=(0.2, 0.6), gold=(0.8, 0.4))  # its weight is 0 again, but it has been shaped
    assert len(made.alarms) == 1


def test_what_is_pushed_back_is_no_proxy():
    assert not Made(4, samples=200).go(40, proxy=(0.2, 0.6), gold=(0.8, 0.4), weights=(-0.5, 0.0)).alarms


def test_a_correlation_that_is_lost_is_told():
    made = Made(5, samples=200).go(HALF, tie=0.8).go(10, tie=0.8)
    assert not made.alarms
    made.go(40, tie=0.1)
    ((step, text),) = made.alarms
    assert 26 < step <= 26 + HALF
    assert text.startswith("the correlation of proxy (trained) with gold (weight 0) over samples has fallen from 0.8")
    assert f"in steps {step - HALF + 1} to {step}: a better proxy says less about gold" in text
    made.go(40, tie=0.8)
    assert made.metrics[-1]["hacking/alarms"] == 0
    assert len(made.go(40, tie=0.1).alarms) == 2


def test_what_never_correlated_cannot_lose_it():
    """From nothing to opposite: the gold is 1 where the proxy is 0."""
    rng, watch, told = np.random.default_rng(0), HackingWatch(), []
    for step in range(80):
        proxy, other = rng.integers(0, 2, size=(2, 100))
        gold = np.where(rng.uniform(size=100) < (0.2 if step < 40 else 0.8), 1 - proxy, other)
        told += watch.update(step, matrix_of((PROXY, GOLD), proxy, gold), np.full(100, 20), (1.0, 0.0))[1]
    assert not told


def test_saturation():
    made = Made(6, samples=400).go(HALF - 1, proxy=0.99)
    assert not made.alarms
    made.go(1, proxy=0.99)
    ((_, text),) = made.alarms
    assert text.startswith("proxy (trained): 9")
    assert "in the 16 batches from step 1 on, so it hardly tells samples apart" in text
    made.go(HALF - 1, proxy=0.9).go(1, proxy=0.99).go(30, proxy=0.99)
    assert len(made.alarms) == 1
    made.go(HALF, proxy=0.9).go(HALF, proxy=0.99)
    assert len(made.of("hardly")) == 2
    assert not Made(6, samples=400).go(40, gold=0.99).alarms  # a judge may well be content
    assert not Made(6, samples=400).go(40, proxy=0.01).alarms


@pytest.mark.parametrize(("length", "told"), [(45.0, 1), (9.0, 1), (30.0, 0), (13.0, 0)])
def test_length(length, told):
    made = Made(7).go(30, length=20.0).go(40, length=length)
    assert len(made.alarms) == told
    assert made.metrics[HALF]["length/drift"] == pytest.approx(1, abs=0.1)
    assert made.metrics[-1]["length/drift"] == pytest.approx(length / 20, rel=0.1)
    made.go(40, length=20.0)
    assert made.metrics[-1]["hacking/alarms"] == 0


def test_what_pulls_at_the_length_is_named():
    """Longer ones: what grows with length and is trained, and what falls with it and is pushed back. Not the gold."""
    names = ("long", "short", "pushed", "gold")
    rng, watch, told = np.random.default_rng(0), HackingWatch(), []
    for step in range(40):
        lengths = rng.integers(1, 20 if step < 20 else 60, 100)
        share = lengths / 60
        columns = share, 1 - share, 1 - share**2, share
        told += watch.update(step, matrix_of([objective(n) for n in names], *columns), lengths, (0.5, 0.3, -0.2, 0.0))[1]
    assert ["what pulls there, by weight and correlation: long, pushed." in text for text in told if "tokens" in text] == [
        True
    ]


def test_completions_of_no_length_are_no_error():
    watch = HackingWatch()
    for step in range(40):
        metrics, remarks = watch.update(step, matrix_of((PROXY, GOLD), [0.5] * 4, [0.2] * 4), np.zeros(4), (1.0, 0.0))
    assert "length/drift" not in metrics
    assert not remarks


def test_batches_without_values_leave_no_trace():
    made, other = Made(8), Made(8)
    for step in range(60):
        made.batch()
        other.batch()
        if step % 3 == 0:
            nothing = matrix_of((PROXY, GOLD), [math.nan] * 4, [math.nan] * 4)
            metrics, _ = other.watch.update(step, nothing, np.full(4, 20), (1.0, 0.0))
            assert {key for key in metrics if "proxy" in key or "gold" in key} == set()
    values = [[window.values for window in m.watch.memory.means["gold"]] for m in (made, other)]
    assert values[0] == values[1]


# --- what is remembered -----------------------------------------------------------------------------------------------


def plain(watch: HackingWatch) -> str:
    return json.dumps(watch.memory.to_json(), allow_nan=False, sort_keys=True)


def test_a_resumed_watch_goes_on_as_if_nothing_had_been():
    for stop in (0, 5, 37, 70):
        whole, first = Made(9, samples=200), Made(9, samples=200)
        part = {"proxy": (0.2, 0.7), "gold": (0.8, 0.3), "length": (10.0, 40.0)}
        whole.go(stop, **part).go(80, **part)
        first.go(stop, **part)
        first.watch = HackingWatch(Memory.from_json(json.loads(plain(first.watch)) if stop else {}))
        first.go(80, **part)
        assert first.metrics == whole.metrics
        assert first.alarms == whole.alarms
        assert plain(first.watch) == plain(whole.watch)


def test_what_is_remembered_stays_small():
    made = Made(10, samples=4).go(16 * WINDOW + 50)
    windows = made.watch.memory.means["gold"]
    assert [len(window.values) for window in windows] == [WINDOW] * 3
    assert windows[2].steps == list(range(49, 562 - 16, 16))  # 35 means of the batches 1 to 560, of which 3 are forgotten
    size = len(plain(made.watch))
    made.go(300)
    assert len(plain(made.watch)) == pytest.approx(size, rel=0.05)
    assert size < 10_000
