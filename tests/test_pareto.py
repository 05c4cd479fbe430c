"""Pareto numerics against brute force, and the archive's file."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from align.archive import Archive, ParetoPoint, read_points
from align.pareto import hypervolume, nondominated
from rewards.types import Missing, Objective

POINTS = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(0, 5).map(float))
OBJECTIVES = [
    Objective("accuracy", True, (0.0, 1.0), Missing.FAIL),
    Objective("tokens", False, (0.0, 200.0), Missing.FAIL),
]


def boxes(points, reference):
    """Hypervolume on the integer grid: unit cells of which some point is above the upper corner."""
    axes = [range(int(r), 6) for r in reference]
    return sum(any(all(p[i] >= c + 1 for i, c in enumerate(cell)) for p in points) for cell in itertools.product(*axes))


@given(points=POINTS)
def test_hypervolume_counts_unit_cells(points):
    reference = np.zeros(points.shape[1])
    assert hypervolume(points, reference) == pytest.approx(boxes(points, reference))


@given(points=POINTS)
def test_points_not_above_the_reference_add_nothing(points):
    reference = np.full(points.shape[1], 2.0)
    assert hypervolume(points, reference) == pytest.approx(boxes(points, reference))


@given(points=POINTS)
def test_nondominated_by_definition(points):
    expected = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert nondominated(points).tolist() == expected


def test_hypervolume_by_hand():
    # (.5, .6) and (.4, .9) over (0, 0): .5 * .6 + .4 * (.9 - .6) = .42
    assert hypervolume(np.array([[0.5, 0.6], [0.4, 0.9]]), np.zeros(2)) == pytest.approx(0.42)


def test_unusable_points_are_refused():
    with pytest.raises(ValueError, match="row 1 is not"):
        hypervolume(np.array([[0.5, 0.6], [np.nan, 0.9]]), np.zeros(2))
    with pytest.raises(ValueError, match="at least one row"):
        nondominated(np.zeros((0, 2)))


def point(step, accuracy, tokens, checkpoint=""):
    values = {"accuracy": accuracy, "tokens": tokens}
    return ParetoPoint(
        step, values, {"accuracy": 0.1, "tokens": float("nan")}, {"accuracy": 0, "tokens": 0}, 8, 0, checkpoint
    )


def test_archive_scales_orients_and_remembers(tmp_path):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path, OBJECTIVES, {}, writes=True)
    archive.append(point(0, 0.5, 100))  # scaled (.5, .5)
    archive.append(point(10, 0.4, 150))  # scaled (.4, .25): dominated
    archive.append(point(20, 0.2, 20, "checkpoints/checkpoint-20"))  # scaled (.2, .9)
    assert [p.step for p in archive.front()] == [0, 20]
    assert archive.hypervolume(1) == pytest.approx(0.25)
    assert archive.hypervolume() == pytest.approx(0.25 + 0.2 * 0.4)
    again = Archive(path, OBJECTIVES, {})
    assert repr(again.points) == repr(archive.points)  # repr: NaN equals nothing


def test_hypervolume_is_a_share_of_what_lies_above_the_reference(tmp_path):
    archive = Archive(tmp_path / "a", OBJECTIVES, {"accuracy": 0.5, "tokens": 100})
    archive.append(point(0, 1.0, 0))
    assert archive.hypervolume() == pytest.approx(1.0)
    archive = Archive(tmp_path / "a", OBJECTIVES, {"accuracy": 0.5})
    archive.append(point(0, 0.75, 100))  # (.25 / .5) * .5
    assert archive.hypervolume() == pytest.approx(0.25)


def test_a_point_without_a_value_is_kept_but_not_on_the_front(tmp_path):
    archive = Archive(tmp_path / "a", OBJECTIVES, {}, writes=True)
    archive.append(point(0, float("nan"), 100))
    assert archive.front() == []
    assert archive.hypervolume() == 0
    assert "NaN" not in (tmp_path / "a").read_text()
    assert np.isnan(Archive(tmp_path / "a", OBJECTIVES, {}).points[0].values["accuracy"])


def test_truncate_forgets_later_points(tmp_path):
    archive = Archive(tmp_path / "a", OBJECTIVES, {}, writes=True)
    for step in (0, 10, 20):
        archive.append(point(step, 0.5, 100))
    archive.truncate(10)
    assert [p.step for p in read_points(tmp_path / "a")] == [0, 10]
    archive.truncate(-1)
    assert read_points(tmp_path / "a") == []


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "a").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_points(tmp_path / "a")


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path):
    archive = Archive(tmp_path / "a", OBJECTIVES, {}, writes=True)
    archive.append(point(0, 0.5, 100))
    with (tmp_path / "a").open("a") as file:
        file.write('{"step": 10, "val')
    again = Archive(tmp_path / "a", OBJECTIVES, {}, writes=True)
    assert [p.step for p in again.points] == [0]
    again.truncate(0)
    assert (tmp_path / "a").read_text().count("\n") == 1
