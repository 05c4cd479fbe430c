"""Held-out means and their standard errors."""

import numpy as np
import pytest

from align.summary import summarize
from rewards.types import Missing, Objective

OBJECTIVES = [Objective("a", True, (0.0, 1.0), Missing.FAIL), Objective("b", False, (0.0, 10.0), Missing.FAIL)]


def test_summary_by_hand():
    # two prompts, two samples; a: prompt means (.5, 1) -> mean .75, std .353553, standard error .353553 / sqrt 2 = .25
    # b: (2, 4) and (6, 8): means (3, 7) -> 5, std 2.828427, standard error 2
    raw = np.array([[[0, 2], [1, 4]], [[1, 6], [1, 8]]], dtype=float)
    summary = summarize(raw, OBJECTIVES)
    assert summary.values == {"a": 0.75, "b": 5.0}
    assert summary.standard_errors == pytest.approx({"a": 0.25, "b": 2.0})
    assert summary.missing == {"a": 0.0, "b": 0.0}


def test_missing_values_are_left_out_not_zero():
    raw = np.array([[[np.nan, 2], [1, 4]], [[np.nan, 6], [np.nan, 8]]])
    summary = summarize(raw, OBJECTIVES)
    assert summary.values["a"] == 1.0
    assert np.isnan(summary.standard_errors["a"])  # one prompt says nothing about spread
    assert summary.missing == {"a": 0.75, "b": 0.0}


def test_prompts_without_a_value_do_not_sharpen_the_standard_error():
    # prompt means 0, 1 and none: std .707107 over two, so .707107 / sqrt 2 = .5
    raw = np.array([[[0.0, 1]], [[1.0, 1]], [[np.nan, 1]]])
    assert summarize(raw, OBJECTIVES).standard_errors["a"] == pytest.approx(0.5)


def test_nothing_measured_is_nan():
    summary = summarize(np.full((2, 1, 2), np.nan), OBJECTIVES)
    assert np.isnan(summary.values["a"])
    assert summary.missing["a"] == 1.0


def test_standard_errors_cover_the_truth():
    """Over 2,000 simulated evaluations the mean lies within 1.96 standard errors of the truth about 95 % of the time."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        prompt_rates = rng.random(100)
        raw = (rng.random((100, 4)) < prompt_rates[:, None]).astype(float)[:, :, None]
        summary = summarize(raw, OBJECTIVES[:1])
        hits += abs(summary.values["a"] - 0.5) < 1.96 * summary.standard_errors["a"]
    assert 0.93 < hits / 2000 < 0.97
