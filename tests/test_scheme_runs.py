"""Schemes in real runs: what was logged, replayed through the scheme once more, gives the logged weights bit for bit."""

import json

import pytest

from align.replay import read_logged, replay
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
    {"type": "gradient", "probe": {"features": "norms", "backward": "extra"}, "every": 2},
    {"type": "mgda", "floor": 0.1, "smoothing": 0.5},
    {"type": "lagrangian", "constraints": {"accuracy": {"at_least": "initial"}}, "optimize": "brevity"},
)


@pytest.mark.parametrize("options", LOGGED, ids=lambda o: o["type"])
def test_logged_observations_give_the_logged_weights(make_learner, tmp_path, options):
    chosen = json.dumps({"weights": WEIGHTS} | options)
    learner = make_learner(f"--weighting={chosen}", "--evaluation.every=1", "--trl.learning_rate=1e-3")
    learner.evaluate()  # as at the start of `align.train`
    learner.args.eval_on_start = False
    learner.train()
    found = replay(read_logged(tmp_path / "run", learner.parts.config), learner.parts.config)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert found.steps == [line["step"] for line in lines] == [1, 2, 3, 4]
    assert found.largest_difference()[0] == 0
    own = {key for line in lines for key in line if key.startswith("weighting/")}
    assert own  # diagnostics are logged by name
    for key in own | {f"weights/{name}" for name in WEIGHTS} | {"step_scale"}:
        assert found.replayed[key] == [line.get(key) for line in lines]
    moved = [line["weights/accuracy"] for line in lines] + [line["step_scale"] for line in lines]
    assert len(set(moved)) > 2  # something has moved
