"""Pairs of choices where one takes the other's effect away, each beside a pair where it does not."""

import numpy as np
import pytest

from align.advice import advise
from align.combine import combine
from align.load import load_config
from tests.conftest import QUICKSTART

STANDARDISING = ("normalize_then_sum", "mo_grpo", "dvao", "soft_min")
OTHERS = ("sum_then_normalize", "estimate_then_sum", "chebyshev", "product", "pareto_rank")
EVEN = "--weighting={type: fixed, weights: {accuracy: 1, brevity: 1, clarity: 1}}"
PLACED = "--weighting={type: hypervolume, placement: rewards}"
OPTIONS = {  # estimator -> what is said where a combination standardises by itself
    "grpo": "",
    "{type: grpo, scale: none}": "of groups, so estimator.scale=none has no effect",
    "{type: grpo, scale: batch}": "of groups, so estimator.scale=batch has no effect",
    "rloo": "the advantages are those of grpo",
    "reinforce": "",
    "{type: reinforce, whiten: false}": "of the batch, so estimator.whiten=false has no effect",
}


def advice(combination: str, estimator: str, *more: str) -> list[str]:
    return advise(load_config(QUICKSTART, [EVEN, f"--combination={combination}", f"--estimator={estimator}", *more]))


@pytest.mark.parametrize("estimator", OPTIONS)
@pytest.mark.parametrize("combination", [*STANDARDISING, *OTHERS])
def test_options_of_the_estimator(combination, estimator):
    said = OPTIONS[estimator] if combination in STANDARDISING else ""
    lines = advice(combination, estimator)
    assert len(lines) == bool(said)
    assert all(line.startswith(f"combination {combination} divides") and line.endswith(said) for line in lines)


@pytest.mark.parametrize("combination", [*STANDARDISING, *OTHERS])
@pytest.mark.parametrize(
    ("weighting", "warning"),
    [
        ("{type: fixed, weights: {accuracy: 1, brevity: 2, clarity: 1}}", "the sizes in weighting.weights have no effect"),
        ("{type: hypervolume, weights: {accuracy: 1, brevity: 2, clarity: 1}}", "the sizes in weighting.weights have no"),
        ("{type: hypervolume}", ""),
        ("{type: variation}", "weighting.type=variation has no effect but where a weight reaches or leaves 0"),
        ("{type: pama}", "weighting.type=pama has no effect but"),
        (
            "{type: schedule, weights: {accuracy: 1, brevity: 1, clarity: 1}, "
            "milestones: [{step: 2, weights: {accuracy: 1, brevity: 0, clarity: 1}}]}",
            "weighting.type=schedule has no effect but where a weight reaches or leaves 0",
        ),
    ],
)
def test_ranks_do_not_see_the_size_of_weights(combination, weighting, warning):
    lines = advice(combination, "grpo", f"--weighting={weighting}")
    if combination == "pareto_rank" and warning:
        assert len(lines) == 1
        assert lines[0].startswith("combination pareto_rank treats all objectives with a weight above 0 alike")
        assert warning in lines[0]
    else:
        assert lines == []


def test_a_weight_of_zero_is_no_size():
    watched = "--weighting={type: fixed, weights: {accuracy: 1, brevity: 1, clarity: 0}}"
    assert advice("pareto_rank", "grpo", watched) == ["objective 'clarity' has weight 0: it is watched, not trained on"]


@pytest.mark.parametrize("estimator", OPTIONS)
@pytest.mark.parametrize("combination", [*STANDARDISING, *OTHERS])
def test_a_factor_on_all_rewards_that_is_divided_out_again(combination, estimator):
    """The warning is there exactly where doubled weights leave the advantages as they were."""
    config = load_config(QUICKSTART, [f"--combination={combination}", f"--estimator={estimator}"])
    rewards, weights = np.random.default_rng(0).random((3, 4, 3)), np.array([0.5, 0.3, 0.2])
    one, two = (combine(rewards, w, config.estimator, config.combination) for w in (weights, 2 * weights))
    cancels = np.allclose(one, two, rtol=0.01)  # but for EPSILON beside a standard deviation
    lines = [line for line in advice(combination, estimator, PLACED) if line.startswith("weighting.placement=rewards")]
    assert len(lines) == cancels
    assert all(f"combination {combination} with estimator" in line for line in lines)
    kept = PLACED.replace("rewards", "advantages")
    assert not any("placement" in line for line in advice(combination, estimator, kept))
