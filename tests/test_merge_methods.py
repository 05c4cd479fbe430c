"""The mathematics of merging, on single tensors: by hand, by properties, and against brute force in numpy."""

import numpy as np
import pytest
import torch

from align.merge import coefficients_of, simplex_grid, sums_to_one
from align.merge_methods import averaged_change, orthogonalised, rewarded_soup, task_singular_vectors


def matrix(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(deltas, coefficients) -> torch.Tensor:
    (found,) = task_singular_vectors(deltas, [coefficients])
    return found


def test_a_soup_by_hand():
    # .25 * (1, 2) + .75 * (3, -2) = (2.5, -1)
    assert rewarded_soup([matrix([1, 2]), matrix([3, -2])], [0.25, 0.75]).tolist() == [[2.5, -1.0]]


def test_tasks_in_different_directions_keep_theirs():
    # D_1 = 3 e1 e1' + 2 e2 e2', D_2 = 5 e3 e3' + e4 e4': of each the largest 4 // 2 = 2, all at right angles already
    first, second = torch.diag(matrix(3, 2, 0, 0)), torch.diag(matrix(0, 0, 5, 1))
    assert torch.allclose(one([first, second], [1.0, 1.0]), torch.diag(matrix(3, 2, 5, 1)))
    assert torch.allclose(one([first, second], [0.5, 2.0]), torch.diag(matrix(1.5, 1, 10, 2)))


def test_two_tasks_by_hand():
    # D_1 = e1 e1', D_2 = 2 u e1' with u = (.6, .8). The nearest orthonormal matrix to (e1, u) turns both by the same angle:
    # half of what the angle a between them, cos a = .6, lacks to 90 degrees. The right vectors (e1, e1) are one direction,
    # and become e1 / sqrt 2 each. So D = (q_1 + 2 q_2) e1' / sqrt 2.
    first, second = matrix([1, 0], [0, 0]), matrix([1.2, 0], [1.6, 0])
    lacks = (np.pi / 2 - np.arccos(0.6)) / 2
    q_1, q_2 = (np.array([np.cos(t), np.sin(t)]) for t in (-lacks, np.pi / 2 - lacks))
    expected = np.outer(q_1 + 2 * q_2, [1, 0]) / np.sqrt(2)
    np.testing.assert_allclose(one([first, second], [1.0, 1.0]).numpy(), expected, atol=1e-12)


def brute_force(deltas: list[np.ndarray], coefficients: list[float]) -> np.ndarray:
    """Triplets from eigenvectors of D' D one by one, orthonormal by (X' X)^(-1/2), the product summed term by term."""
    keep = min(deltas[0].shape) // len(deltas)
    lefts, rights, values = [], [], []
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        squares, vectors = np.linalg.eigh(delta.T @ delta)
        for i in np.argsort(-squares)[:keep]:
            value = np.sqrt(squares[i])
            lefts.append(delta @ vectors[:, i] / value)
            rights.append(vectors[:, i])
            values.append(coefficient * value)

    def upright(columns: list[np.ndarray]) -> np.ndarray:
        stacked = np.stack(columns, axis=1)
        squares, vectors = np.linalg.eigh(stacked.T @ stacked)
        return stacked @ (vectors @ np.diag(squares**-0.5) @ vectors.T)

    left, right = upright(lefts), upright(rights)
    return sum(values[r] * np.outer(left[:, r], right[:, r]) for r in range(len(values)))


@pytest.mark.parametrize(("shape", "tasks"), [((9, 7), 2), ((6, 12), 3), ((8, 8), 1)])
def test_task_singular_vectors_are_those_of_brute_force(shape, tasks):
    deltas = [random(*shape, seed=seed) for seed in range(tasks)]
    coefficients = [[1.0] * tasks, [0.3 + i for i in range(tasks)], [-1.0] * tasks]
    for vector, found in zip(coefficients, task_singular_vectors(deltas, coefficients), strict=True):
        np.testing.assert_allclose(found.numpy(), brute_force([d.numpy() for d in deltas], vector), atol=1e-10)


def test_one_task_alone_is_itself():
    delta = random(7, 5)
    assert torch.allclose(one([delta], [1.0]), delta, atol=1e-13)
    assert torch.allclose(one([delta], [0.25]), delta / 4, atol=1e-13)


def test_equal_tasks_are_one_and_arbitrary_vectors_turn_nothing():
    """Of rank 2 in 8 dimensions: two equal tasks of 4 triplets each are that task again, whatever fills the other four."""
    delta = random(8, 2) @ random(2, 8, seed=1)
    assert torch.allclose(one([delta, delta.clone()], [0.5, 0.5]), delta / 2, atol=1e-12)
    assert torch.allclose(one([delta, delta.clone()], [1.0, 1.0]), delta, atol=1e-12)
    assert torch.allclose(one([delta, torch.zeros(8, 8, dtype=torch.float64)], [1.0, 1.0]), delta, atol=1e-12)
    assert not one([torch.zeros(3, 4), torch.zeros(3, 4)], [1.0, 1.0]).any()


def test_the_order_of_tasks_does_not_matter_and_a_transposed_task_is_merged_transposed():
    a, b = random(6, 9), random(6, 9, seed=1)
    assert torch.allclose(one([a, b], [1.0, 2.0]), one([b, a], [2.0, 1.0]), atol=1e-12)
    assert torch.allclose(one([a.T, b.T], [1.0, 2.0]), one([a, b], [1.0, 2.0]).T, atol=1e-12)


def test_orthogonalised_is_the_nearest_matrix_with_orthonormal_columns():
    columns = random(6, 3)
    found = orthogonalised(columns)
    assert torch.allclose(found.T @ found, torch.eye(3, dtype=torch.float64), atol=1e-12)
    for seed in range(20):
        other = torch.linalg.qr(random(6, 3, seed=seed + 1))[0]
        assert (found - columns).norm() <= (other - columns).norm()


def test_what_is_no_matrix_is_averaged():
    # (1 * 4 + .5 * 2) / 2
    assert averaged_change([matrix(4.0), matrix(2.0)], [1.0, 0.5]).item() == 2.5


def test_coefficients():
    assert simplex_grid(2, 2) == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    three = simplex_grid(3, 4)
    assert len(set(three)) == len(three) == 15  # (4 + 2 choose 2)
    assert all(sums_to_one(vector) for vector in three)
    assert coefficients_of([], 0, 4, "soup") == [(0.25,) * 4]
    assert coefficients_of([], 0, 2, "tsv") == [(1.0, 1.0)]
    assert coefficients_of(["1/0", "1.5/-.5"], 0, 2, "soup") == [(1.0, 0.0), (1.5, -0.5)]


@pytest.mark.parametrize(
    ("weights", "grid", "message"),
    [
        (["0.5"], 0, "--weights 0.5: give one number for each of 2 models, as in 0.5/0.5"),
        (["a/b"], 0, "--weights a/b: give one number for each of 2 models"),
        (["nan/1"], 0, "--weights nan/1: give one number"),
        (["0/0"], 0, "--weights 0/0: all coefficients are 0"),
        (["1/0"], 3, "--weights and --grid: give one of them"),
        ([], -1, "--grid -1: give the number of divisions"),
    ],
)
def test_coefficients_that_are_refused(weights, grid, message):
    with pytest.raises(ValueError, match=message):
        coefficients_of(weights, grid, 2, "soup")
