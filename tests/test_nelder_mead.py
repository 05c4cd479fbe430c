"""Nelder-Mead: the points of scipy's, one by one; by hand; saved and resumed at every point."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.weighting import nelder_mead

FUNCTIONS = {
    "bowl": lambda x: float(np.sum((x - 0.3) ** 2)),
    "tilted": lambda x: float((x[0] - 0.7) ** 2 + 3 * (x[-1] - x[0] ** 2) ** 2),
    "corner": lambda x: float(-x.sum()),
    "wavy": lambda x: float(np.sum((x - 0.55) ** 2) + 0.05 * np.cos(9 * x).sum()),
}


def walk(function, search, points: int) -> list[np.ndarray]:
    """The points asked for, one after the other."""
    asked = []
    for _ in range(points):
        asked.append(nelder_mead.ask(search))
        search = nelder_mead.tell(search, function(asked[-1]))
    return asked


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("start", [[0.1], [0.2, 0.5], [0.9, 0.95], [0.4, 0.1, 0.8]])
def test_asks_for_the_points_of_scipy(name, start):
    optimize = pytest.importorskip("scipy.optimize")
    search, theirs = nelder_mead.first(np.array(start), 0.1), []

    def function(x):
        theirs.append(np.array(x))
        return FUNCTIONS[name](x)

    options = {"initial_simplex": search["points"], "maxfev": 60, "xatol": 0, "fatol": 0}
    optimize.minimize(function, start, method="Nelder-Mead", bounds=[(0, 1)] * len(start), options=options)
    for ours, expected in zip(walk(FUNCTIONS[name], search, len(theirs)), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_one_round_by_hand():
    # f = x + y from (.5, .5), spread .1: the simplex is (.5, .5), (.6, .5), (.5, .6) with values 1, 1.1, 1.1.
    search = nelder_mead.first(np.array([0.5, 0.5]), 0.1)
    asked = walk(lambda x: x[0] + x[1], search, 6)
    np.testing.assert_allclose(asked[:3], [[0.5, 0.5], [0.6, 0.5], [0.5, 0.6]])
    # worst (.5, .6), c = (.55, .5): r = (.6, .4), value 1: not below the best, but below the second worst, so it stays.
    # worst (.6, .5), c = (.55, .45): r = (.5, .4), value .9, the best so far: expansion to c + 2 (-.05, -.05) = (.45, .35).
    np.testing.assert_allclose(asked[3:], [[0.6, 0.4], [0.5, 0.4], [0.45, 0.35]])


def test_a_round_that_shrinks_by_hand():
    # In one dimension, values 0 at .5, 1 at .6, else 2: r = .4 is worse than all, so is the inside contraction
    # .5 + .05 = .55; the worst point shrinks to .5 + .05 = .55.
    values = {0.5: 0.0, 0.6: 1.0}
    search = nelder_mead.first(np.array([0.5]), 0.1)
    for expected in (0.5, 0.6, 0.4, 0.55, 0.55):
        x = nelder_mead.ask(search)
        assert x == pytest.approx([expected])
        search = nelder_mead.tell(search, values.get(round(x[0], 9), 2.0))
    assert nelder_mead.best(search) == pytest.approx([0.5])
    assert nelder_mead.deviation(search) == 1.0  # of 0 and 2


def test_a_contraction_worse_than_the_reflection_shrinks():
    # 0 at .5, 1 at .6; r = .4 has .5, so contraction outside, .45, which has .7: worse than r, though better than .6.
    search = nelder_mead.first(np.array([0.5]), 0.1)
    for expected, value in ((0.5, 0.0), (0.6, 1.0), (0.4, 0.5), (0.45, 0.7)):
        assert nelder_mead.ask(search) == pytest.approx([expected])
        search = nelder_mead.tell(search, value)
    assert search["phase"] == "fill"
    np.testing.assert_allclose(search["points"], [[0.5], [0.55]])


@pytest.mark.parametrize("name", ["bowl", "tilted"])
def test_finds_the_minimum(name):
    search = nelder_mead.first(np.array([0.2, 0.5]), 0.1)
    while nelder_mead.deviation(search) > 1e-12:
        search = nelder_mead.tell(search, FUNCTIONS[name](nelder_mead.ask(search)))
    expected = {"bowl": [0.3, 0.3], "tilted": [0.7, 0.49]}[name]
    np.testing.assert_allclose(nelder_mead.best(search), expected, atol=1e-4)


@given(
    start=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    spread=st.floats(0.01, 0.9),
    values=st.lists(st.floats(-1, 1), min_size=30, max_size=30),
)
def test_stays_in_the_box_and_survives_saving(start, spread, values):
    search = resumed = nelder_mead.first(np.array(start), spread)
    for value in values:
        assert ((nelder_mead.ask(search) >= 0) & (nelder_mead.ask(search) <= 1)).all()
        search = nelder_mead.tell(search, value)
        resumed = nelder_mead.tell(json.loads(json.dumps(resumed)), value)
        assert resumed == search
    assert min(search["values"] + search["tried"][1:]) == min(values)  # the best is never given away
