"""Schemes in real runs: what was logged, put through the scheme once more, gives the weights that were logged."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.archive import read_points
from align.step import StepRules, take_step
from align.weighting import Signal
from rewards.types import RewardMatrix
from tests.conftest import WEIGHTS, read_lines

LOGGED = (
    {"type": "hypervolume", "reference": {}},
    {"type": "hypervolume_gradient", "against": "archive"},
    {"type": "hypervolume_gradient", "vector": "batches", "smoothing": 0.5},
    {"type": "pama", "smoothing": 0.5},
    {"type": "covariance", "rate": 5.0},
    {"type": "variation", "floor": 0.1},
    {"type": "saturation", "warm_up": 1, "every": 2},
    {"type": "gradient", "probe": {"features": "norms"}},
    {"type": "mgda", "floor": 0.1, "smoothing": 0.5},
    {"type": "lagrangian", "constraints": {"accuracy": {"at_least": "initial"}}, "optimize": "brevity"},
)


def logged_rewards(folder: Path, step: int, rules: StepRules) -> RewardMatrix:
    """The reward matrix of the batch that a step trained on, from the sample files."""
    rows = [row for file in sorted((folder / "samples").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    raw = [[row[f"value/{o.name}"] for o in rules.objectives] for row in rows if row["step"] == step]
    return RewardMatrix(rules.objectives, np.array(raw, dtype=float), {})


def logged_gram(line: dict) -> dict:
    """The Gram matrix that the step before read off its backward, from the lengths and cosines that it logged."""
    if f"probe/norm/{next(iter(WEIGHTS))}" not in line:
        return {}
    length_K = np.array([line[f"probe/norm/{name}"] for name in WEIGHTS])
    cosine_KK = np.eye(len(WEIGHTS))
    for i, a in enumerate(WEIGHTS):
        for j, b in enumerate(WEIGHTS):
            if i < j:
                cosine_KK[i, j] = cosine_KK[j, i] = line.get(f"probe/cosine/{a}/{b}", 0.0)
    return {Signal.GRAM: cosine_KK * np.outer(length_K, length_K)}


@pytest.mark.parametrize("options", LOGGED, ids=lambda o: o["type"])
def test_logged_observations_give_the_logged_weights(make_learner, tmp_path, options):
    chosen = json.dumps({"weights": WEIGHTS} | options)
    learner = make_learner(f"--weighting={chosen}", "--evaluation.every=1", "--trl.learning_rate=1e-3")
    learner.evaluate()  # as at the start of `align.train`
    learner.args.eval_on_start = False
    learner.train()
    rules = learner.parts.rules
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    points = read_points(tmp_path / "run" / "archive.jsonl")
    state, before = rules.scheme.init(rules.objectives), {}
    for line in lines:
        step = line["step"] - 1  # steps taken when the batch was weighted
        vectors = np.array([point.vector_K(rules.objectives) for point in points if point.step <= step])
        rewards = logged_rewards(tmp_path / "run", line["step"], rules)
        signals = {Signal.VALIDATION: vectors, **logged_gram(before)}
        state, before = take_step(rules, state, rewards, step, signals).state, line
        for name, weight in zip(WEIGHTS, state.weights_K, strict=True):
            assert line[f"weights/{name}"] == pytest.approx(weight, abs=1e-9)
        assert line["step_scale"] == pytest.approx(state.step_scale, abs=1e-12)
    assert len(lines) == 4
    moved = [line["weights/accuracy"] for line in lines] + [line["step_scale"] for line in lines]
    assert len(set(moved)) > 2  # something has moved
    assert [key for key in lines[-1] if key.startswith("weighting/")]  # diagnostics are logged by name
