"""Derivatives of the hypervolume, and the way to the front, against finite differences, moocore and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.pareto import hypervolume, hypervolume_gradient, to_the_front

NOBODY = np.empty((0, 2))


def volume_with(point: np.ndarray, others: np.ndarray, reference: np.ndarray) -> float:
    return hypervolume(np.vstack([others, point]), reference)


def test_gradient_from_the_reference_alone_by_hand():
    # the box (v1 - r1)(v2 - r2)(v3 - r3) with sides .5, .4, .2: each face is the product of the other two sides
    gradient = hypervolume_gradient(np.array([0.6, 0.5, 0.3]), np.empty((0, 3)), np.array([0.1, 0.1, 0.1]))
    assert gradient == pytest.approx([0.4 * 0.2, 0.5 * 0.2, 0.5 * 0.4])


def test_gradient_between_two_neighbours_by_hand():
    # staircase (.2, .9), v = (.5, .6), (.8, .3): moving right uncovers .6 - .3 in height, moving up .5 - .2 in width
    others = np.array([[0.2, 0.9], [0.8, 0.3]])
    assert hypervolume_gradient(np.array([0.5, 0.6]), others, np.zeros(2)) == pytest.approx([0.3, 0.3])


def test_at_the_reference_an_objective_pulls_upwards():
    assert hypervolume_gradient(np.array([0.5, 0.0]), NOBODY, np.zeros(2)) == pytest.approx([0.0, 0.5])


def test_no_gradient_where_nothing_can_be_won():
    assert not hypervolume_gradient(np.array([0.2, 0.2]), np.array([[0.5, 0.5]]), np.zeros(2)).any()  # dominated
    assert not hypervolume_gradient(np.array([0.5, -0.1]), NOBODY, np.zeros(2)).any()  # below the reference
    assert hypervolume_gradient(np.array([0.4]), np.empty((0, 1)), np.zeros(1)) == pytest.approx([1.0])
    assert not hypervolume_gradient(np.array([0.4]), np.array([[0.6]]), np.zeros(1)).any()


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5])
def test_gradient_agrees_with_finite_differences_of_moocore(dimensions):
    generator = np.random.default_rng(dimensions)
    step, alive = 1e-6, 0
    for _ in range(60):
        others = generator.random((generator.integers(0, 15), dimensions))
        point, reference = 0.3 + 0.7 * generator.random(dimensions), 0.2 * generator.random(dimensions)
        moves = step * np.eye(dimensions)
        expected = [
            (volume_with(point + move, others, reference) - volume_with(point - move, others, reference)) / (2 * step)
            for move in moves
        ]
        gradient = hypervolume_gradient(point, others, reference)
        assert gradient == pytest.approx(expected, abs=1e-8)
        alive += gradient.any()
    assert alive > 10  # the comparison was not of zeros only


@given(seed=st.integers(0, 2**32 - 1), dimensions=st.integers(2, 4))
def test_gradient_follows_a_permutation_of_the_axes(seed, dimensions):
    generator = np.random.default_rng(seed)
    others, point, order = generator.random((5, dimensions)), generator.random(dimensions), generator.permutation(dimensions)
    straight = hypervolume_gradient(point, others, np.zeros(dimensions))
    turned = hypervolume_gradient(point[order], others[:, order], np.zeros(dimensions))
    assert turned == pytest.approx(straight[order])


def test_the_way_to_the_front_by_hand():
    # behind the corner of the staircase (.4, .9), (.8, .5): v = (.3, .3) is nearest to the inner corner (.4, .5)
    others = np.array([[0.4, 0.9], [0.8, 0.5]])
    assert to_the_front(np.array([0.3, 0.3]), others, np.zeros(2)) == pytest.approx([0.1, 0.2])
    # below the reference in one axis only: straight up to it
    assert to_the_front(np.array([0.5, -0.2]), NOBODY, np.zeros(2)) == pytest.approx([0.0, 0.2])
    # two ways of the same length, right by .2 or up by .2: their mean
    assert to_the_front(np.array([0.3, 0.3]), np.array([[0.5, 0.5]]), np.zeros(2)) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_the_way_to_the_front_is_the_shortest_by_brute_force(dimensions):
    """A point is out of reach of every other one when it beats each of them in some axis: try all choices of axes."""
    generator = np.random.default_rng(dimensions)
    moved = 0
    for _ in range(40):
        others = 0.2 + 0.8 * generator.random((4, dimensions))
        point = 0.6 * generator.random(dimensions)
        lengths = []
        for axes in itertools.product(range(dimensions), repeat=len(others)):
            target = point.copy()
            for axis, other in zip(axes, others, strict=True):
                target[axis] = max(target[axis], other[axis])
            lengths.append(np.linalg.norm(target - point))
        move = to_the_front(point, others, np.zeros(dimensions))
        assert np.linalg.norm(move) == pytest.approx(min(lengths), abs=1e-12)
        moved += move.any()
    assert moved > 10
