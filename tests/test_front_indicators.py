"""Indicators of fronts: by hand, against brute force, and against moocore."""

import itertools

import moocore
import numpy as np
import pytest

from align.fronts.indicators import (
    additive_epsilon,
    attainment,
    expected_utility,
    hypervolumes,
    igd_plus,
    nondominated_rows,
    sets_that_cover,
    weight_vectors,
)

NONE = np.zeros((1, 0, 2))


def point_sets(objectives: int, sets: int = 5, points: int = 7, levels: int = 6) -> np.ndarray:
    """On a coarse grid, so that there are ties and equal points."""
    return np.random.default_rng(objectives).integers(0, levels, (sets, points, objectives)) / (levels - 1)


def at_itself(indicator, points_MK, targets_ZK) -> float:
    """An indicator whose vectors are measured with those that it chose by."""
    return float(indicator(points_MK, targets_ZK).of(points_MK[None], targets_ZK[None])[0])


def test_hypervolumes_by_hand():
    # (.5, .6) and (.4, .9) over (0, 0): .5 * .6 + .4 * (.9 - .6) = .42; over (.2, .6), of .8 * .4: .2 * .3 / .32
    points = np.array([[[0.5, 0.6], [0.4, 0.9]]])
    assert hypervolumes(points, np.zeros(2)) == pytest.approx([0.42])
    assert hypervolumes(points, np.array([0.2, 0.6])) == pytest.approx([0.2 * 0.3 / 0.32])
    assert hypervolumes(np.zeros((3, 0, 2)), np.zeros(2)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("points", [1, 7, 9])
@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_hypervolumes_count_grid_cells_and_agree_with_moocore(objectives, points):
    points = point_sets(objectives, points=points, levels=5 if objectives < 5 else 4)
    cells = 4 if objectives < 5 else 3
    reference = np.full(objectives, 1 / cells)
    found = hypervolumes(points, reference)
    for points_MK, share in zip(points, found, strict=True):
        corners = np.array(list(itertools.product(range(1, cells), repeat=objectives))) / cells + 1 / cells
        inside = (points_MK[:, None] >= corners - 1e-9).all(axis=-1).any(axis=0)
        assert share == pytest.approx(inside.mean())
        whole = (1 - 1 / cells) ** objectives
        assert share == pytest.approx(moocore.hypervolume(points_MK, ref=reference, maximise=True) / whole)


def test_igd_plus_and_epsilon_by_hand():
    # target (.5, .5) is (.3, 0) beyond (.2, .6): distance .3; (.1, .9) is (0, .3) beyond it and equal to (.1, .9): 0
    targets = np.array([[0.5, 0.5], [0.1, 0.9]])
    assert at_itself(igd_plus, np.array([[0.2, 0.6], [0.1, 0.9]]), targets) == pytest.approx(0.15)
    # (.2, .6) alone is .3 short of both
    assert at_itself(additive_epsilon, np.array([[0.2, 0.6]]), targets) == pytest.approx(0.3)
    assert at_itself(additive_epsilon, np.array([[0.6, 0.95]]), targets) == pytest.approx(-0.05)


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_igd_plus_and_epsilon_agree_with_moocore(objectives):
    for points, targets in itertools.pairwise(point_sets(objectives, sets=20)):
        ours = at_itself(igd_plus, points, targets)
        assert ours == pytest.approx(moocore.igd_plus(points, ref=targets, maximise=True))
        ours = at_itself(additive_epsilon, points, targets)
        assert ours == pytest.approx(moocore.epsilon_additive(points, ref=targets, maximise=True))


def test_indicators_keep_what_others_chose():
    # chosen by: the target lies (.3, 0) beyond the point. Measured by vectors where it lies (.1, .5) beyond: .1 counts
    linear = igd_plus(np.array([[0.2, 0.6]]), np.array([[0.5, 0.5]]))
    assert linear.of(np.array([[[0.4, 0.1]]]), np.array([[[0.5, 0.6]]])) == pytest.approx([0.1])
    linear = additive_epsilon(np.array([[0.2, 0.6]]), np.array([[0.5, 0.5]]))
    assert linear.of(np.array([[[0.4, 0.1]]]), np.array([[[0.5, 0.6]]])) == pytest.approx([0.1])


def test_expected_utility_by_hand():
    # of (1, 0) and (0, 1) a user with weights (w, 1 - w) gets max(w, 1 - w), w uniform on [0, 1]: 3/4 in the mean
    corners = np.eye(2)
    weights = weight_vectors(2)
    assert expected_utility(corners, weights).of(corners[None], NONE) == pytest.approx([0.75], abs=1e-3)
    # who picks by the wrong vectors gets min(w, 1 - w): 1/4
    assert expected_utility(corners[::-1], weights).of(corners[None], NONE) == pytest.approx([0.25], abs=1e-3)


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_weight_vectors_are_uniform_on_the_simplex(objectives):
    weights = weight_vectors(objectives)
    assert np.allclose(weights.sum(axis=1), 1)
    # Dirichlet(1, ..., 1): mean 1 / K, P(w_1 > 1/2) = (1/2)^(K - 1)
    assert weights.mean(axis=0) == pytest.approx(np.full(objectives, 1 / objectives), abs=2e-3)
    assert (weights > 0.5).mean(axis=0) == pytest.approx(np.full(objectives, 0.5 ** (objectives - 1)), abs=1e-2)


def test_expected_utility_agrees_with_brute_force():
    points = point_sets(3)[0]
    drawn = np.random.default_rng(0).dirichlet(np.ones(3), 200_000)
    ours = expected_utility(points, weight_vectors(3)).of(points[None], np.zeros((1, 0, 3)))
    assert ours == pytest.approx([(drawn @ points.T).max(axis=1).mean()], abs=2e-3)


def test_covering_by_definition():
    points = point_sets(2, sets=4, points=9, levels=4)
    sets = np.array([2, 0, 1, 0, 2, 1, 3, 3, 3])
    covers = sets_that_cover(points, sets)
    for b, s, t in itertools.product(range(4), range(4), range(4)):
        expected = all(any((p >= q).all() for p in points[b][sets == s]) for q in points[b][sets == t])
        assert covers[b, s, t] == expected


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_attainment_counts_the_fronts_that_reach_a_vector(objectives):
    fronts = [front[nondominated_rows(front)] for front in point_sets(objectives, sets=4)]
    surfaces = attainment([*fronts, np.zeros((0, objectives))])
    assert {share for _, share in surfaces} <= {0.25, 0.5, 0.75, 1.0}
    for vector, share in surfaces:
        reached = sum((front >= vector - 1e-9).all(axis=1).any() for front in fronts) / 4
        assert reached >= share - 1e-9 if objectives < 4 else reached == share
    for vector in np.random.default_rng(1).random((200, objectives)) if objectives < 4 else ():
        reached = sum((front >= vector).all(axis=1).any() for front in fronts) / 4
        best = max((share for corner, share in surfaces if (corner >= vector).all()), default=0.0)
        assert best == pytest.approx(reached)


def test_no_front_is_attained_by_none():
    assert attainment([]) == []
    assert nondominated_rows(np.zeros((0, 2))).tolist() == []
