"""What passes the filter of self-training, and what it weighs, by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from align.config.selftrain import FilterConfig, SelftrainConfig
from align.load import ConfigError, load_config
from align.selftrain.filters import best_of_group, in_majority, passing
from align.selftrain.sources import load_sources, load_trusted, reader_of
from align.selftrain.tilt import TiltError
from align.selftrain.weigh import Material, weigh, weigh_prompts
from align.selftrain.weights import WeightsError
from rewards.types import Missing, Objective
from tests.conftest import ROOT

ROUNDS = str(ROOT / "configs" / "rounds.yaml")
SELFTRAIN = str(ROOT / "configs" / "selftrain.yaml")
NAN = np.nan
OBJECTIVES = [Objective("right", True, (0, 1), Missing.FAIL), Objective("length", False, (0, 20), Missing.FAIL)]
RAW = np.array([[[1, 5], [1, 12], [0, 3], [NAN, 1]], [[0, 9], [0, 9], [1, 9], [1, NAN]]])  # (P, G, K) = (2, 4, 2)
ANSWERS = [["7", "7", "5", None], ["1", "2", "2", "1"]]
TOKENS = np.ones((2, 4), int)
NONE_OUT = np.zeros((2, 4), bool)


def filtered(**rules) -> tuple[list, dict]:
    passed = passing(FilterConfig(**rules), OBJECTIVES, RAW, NONE_OUT, ANSWERS, TOKENS)
    assert passed.failed.pop("has tokens") == passed.failed.pop("has all values") == 0
    return passed.right_PG.astype(int).tolist(), passed.failed


def test_thresholds_in_the_units_of_the_objectives():
    both = filtered(at_least={"right": 1}, at_most={"length": 10})
    assert both == ([[1, 0, 0, 0], [0, 0, 1, 0]], {"right at_least 1": 4, "length at_most 10": 2})


def test_nothing_asked_lets_all_pass():
    assert filtered() == ([[1] * 4] * 2, {})


def test_a_sample_without_tokens_never_passes():
    passed = passing(FilterConfig(), OBJECTIVES, RAW, NONE_OUT, ANSWERS, np.array([[0, 3, 1, 1], [2, 0, 0, 9]]))
    assert passed.right_PG.astype(int).tolist() == [[0, 1, 1, 1], [1, 0, 0, 1]]
    assert passed.failed == {"has tokens": 3, "has all values": 0}


def test_a_sample_that_is_left_out_never_passes_and_beats_no_other():
    out = NONE_OUT.copy()
    out[0, 0] = out[1, 2] = True
    passed = passing(FilterConfig(), OBJECTIVES, RAW, out, ANSWERS, TOKENS)
    assert passed.right_PG.astype(int).tolist() == [[0, 1, 1, 1], [1, 1, 0, 1]]
    assert passed.failed == {"has tokens": 0, "has all values": 2}
    # Without (1, 5) and (1, 9) nothing beats (1, 12), and the two (0, 9) are alike; one without a value is out as before.
    passed = passing(FilterConfig(nondominated=True), OBJECTIVES, RAW, out, ANSWERS, TOKENS)
    assert passed.right_PG.astype(int).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_the_majority():
    assert filtered(majority=True) == ([[1, 1, 0, 0], [1, 0, 0, 1]], {"majority": 4})
    assert not in_majority([None, None]).any()


def test_what_no_other_sample_of_its_prompt_beats():
    # First prompt: (1, 5) beats (1, 12); (0, 3) is shorter; one without a value is out. Second: (1, 9) beats (0, 9).
    assert filtered(nondominated=True) == ([[1, 0, 1, 0], [0, 0, 1, 0]], {"nondominated": 5})
    assert not best_of_group(np.full((3, 2), NAN)).any()


def material(**more) -> Material:
    given = {
        "objectives": OBJECTIVES,
        "raw_MK": np.array([[1.0, 5], [1, 10], [0, 15], [0, 20]]),
        "places_n": np.arange(4),
        "duals_n": np.ones(4),
        "entropies_n": np.array([0.0, 1, 1, 2]),
        "measure": lambda pairs: np.array([pair[1][0] for pair in pairs], float),
        "pairs": [((0,), (loss,)) for loss in (1, 2, 3, 4)],
        "trusted": {"file": [((0,), (2,)), ((0,), (4,))]},
    } | more
    return Material(**given)


def weights(*entries, number: int = 1, **section) -> np.ndarray:
    return weigh(SelftrainConfig(weights=list(entries), **section), material(), number, seed=5).weights.values_n


def test_weights_by_hand():
    assert weights() == pytest.approx([1] * 4)
    assert weights("uniform") == pytest.approx([1] * 4)
    assert weights({"type": "entropy", "power": 0}) == pytest.approx([1] * 4)
    assert weights("entropy") == pytest.approx([0, 1, 1, 2])
    assert weights("entropy", {"type": "entropy", "power": 1}) == pytest.approx(
        [0, 4 / 6, 4 / 6, 16 / 6]
    )  # 0 1 1 4 over 1.5
    assert weights("entropy", cap=1.5) == pytest.approx([0, 1.25, 1.25, 1.5])
    # Trusted losses have mean 3: extents 3, 1.5, 1, 4/3; half of the four are kept.
    assert weights({"type": "importance", "trusted": "file", "share": 0.5}) == pytest.approx([0, 0, 2, 2])
    # Ratios 3, 1.5, 1, 0.75, the first capped at 2: their mean is 5.25 / 4.
    ratio = {"type": "importance", "trusted": "file", "form": "weight"}
    assert weights(ratio) == pytest.approx(np.array([2, 1.5, 1, 0.75]) / (5.25 / 4))
    # 1 + (loss - 2): 0, 1, 2, 3.
    assert weights({"type": "feasible", "threshold": 2}) == pytest.approx(np.array([0, 1, 2, 3]) / 1.5)
    loss = {"type": "loss", "shape": "extremes", "temperature": 0.5, "warm_up": 2}
    assert weights(loss, number=2) == pytest.approx([1] * 4)
    assert weights(loss, number=3)[0] > 1
    best = weights({"type": "trajectory", "returns": {"length": 1}})  # shorter is better
    assert (np.diff(best) < 0).all()


def test_a_tilt_reaches_its_means():
    tilted = weights({"type": "tilt", "means": {"right": 0.75, "length": 10}})
    assert np.mean(tilted * [1, 1, 0, 0]) == pytest.approx(0.75)
    assert np.mean(tilted * [5, 10, 15, 20]) == pytest.approx(10)
    with pytest.raises(TiltError):
        weights({"type": "tilt", "means": {"length": 2}})


def test_shuffled_weights_are_the_same_ones_elsewhere():
    seen = {
        tuple(weigh(SelftrainConfig(weights=["entropy", "shuffled"]), material(), 1, seed).weights.values_n)
        for seed in range(9)
    }
    assert len(seen) > 2
    assert {tuple(sorted(values)) for values in seen} == {(0.0, 1.0, 1.0, 2.0)}


def test_too_few_that_count_make_all_count():
    composed = weigh(SelftrainConfig(weights=[{"type": "entropy", "power": 20}], least_ess=0.5), material(), 1, 0).weights
    assert composed.collapsed
    assert composed.values_n.tolist() == [1] * 4


def test_what_others_take_of_a_tilt_is_told():
    # Half of four are right, and 3/4 are wanted: weights 1.5, 1.5, 0.5, 0.5.
    tilt = {"type": "tilt", "means": {"right": 0.75}}

    def weighed(*entries, **section):
        return weigh(SelftrainConfig(weights=[tilt, *entries], **section), material(), 1, seed=5)

    assert weighed().reached == {"right": pytest.approx(0.75)}
    assert not weighed().missed
    # Times entropies 0, 1, 1, 2: 0, 1.5, 0.5, 1, of which the right ones have a half.
    found = weighed("entropy")
    assert found.reached == {"right": pytest.approx(0.5, abs=1e-6)}
    assert found.missed["right"].startswith("tilt: the mean of 'right' is 0.5, where 0.75 is wanted: other weights, ")
    assert weighed(cap=1.2).reached == {"right": pytest.approx(0.6)}  # 1.2, 1.2, 0.8, 0.8
    assert weighed(cap=1.2).missed.keys() == {"right"}
    assert weighed(least_ess=0.9).reached == {"right": pytest.approx(0.5)}  # of 4 / 5, given up
    assert not weighed("shuffled").missed  # which is there for that


def test_only_what_cannot_be_had_is_an_error_of_weights():
    """Not a loss that is no number: that is no matter of the pool."""
    with pytest.raises(WeightsError):
        weights({"type": "tilt", "means": {"length": 2}})
    with pytest.raises(WeightsError):
        weights({"type": "entropy", "power": 5000})
    lost = material(measure=lambda pairs: np.full(len(pairs), NAN))
    with pytest.raises(ValueError, match="number 0 of 4 is nan") as error:
        weigh(SelftrainConfig(weights=[{"type": "loss"}]), lost, 1, 0)
    assert not isinstance(error.value, WeightsError)


def test_a_missing_value_is_not_guessed():
    hole = material(raw_MK=np.array([[1, 5], [1, NAN], [0, 15], [0, 20]]))
    section = SelftrainConfig(weights=[{"type": "tilt", "means": {"length": 10}}])
    with pytest.raises(ValueError, match="tilt needs every value of 'length', and 1 of 4 are missing"):
        weigh(section, hole, 1, 0)


def test_multipliers_go_on_from_where_they_were():
    # d + 0.5 (loss - 2): 1 - 0.5, 3, 0 + 0.5, 2 + 1, with mean 7 / 4.
    section = SelftrainConfig(weights=[{"type": "feasible", "threshold": 2, "rate": 0.5}])
    found = weigh(section, material(duals_n=np.array([1.0, 3, 0, 2])), 1, 0).weights.values_n
    assert found == pytest.approx(np.array([0.5, 3, 0.5, 3]) / 1.75)


def test_a_tilt_is_fitted_to_all_and_some_are_weighed():
    # A quarter is 1 and shall be a half: weights 2 and 2/3 of all eight; the two that are weighed keep their ratio of 3.
    pool = material(raw_MK=np.array([[1.0, 0], *[[0, 0]] * 3] * 2), places_n=np.array([4, 5]), duals_n=np.ones(2))
    section = SelftrainConfig(weights=[{"type": "tilt", "means": {"right": 0.5}}])
    assert weigh(section, pool, 1, 0).weights.values_n == pytest.approx([1.5, 0.5], rel=1e-5)


def test_weights_of_prompts_by_hand():
    entropies = np.array([0.0, 1, 1, 2])
    section = SelftrainConfig(prompts=["entropy"], cap=1.5)
    assert weigh_prompts(section, entropies, 0).values_n == pytest.approx([0, 1.25, 1.25, 1.5])
    assert weigh_prompts(SelftrainConfig(prompts=["uniform"]), entropies, 0).values_n == pytest.approx([1] * 4)
    dealt = [tuple(weigh_prompts(SelftrainConfig(prompts=["entropy", "shuffled"]), entropies, s).values_n) for s in range(9)]
    assert len(set(dealt)) > 3
    assert {tuple(sorted(values)) for values in dealt} == {(0, 1, 1, 2)}


# --- what cannot be run -------------------------------------------------------------------------------------------------


class Letters:
    """Stands for a tokenizer: one token a letter."""

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [list(map(ord, each)) for each in text]}


def trusted(tmp_path: Path, *rows: dict, context: int = 99):
    file = tmp_path / "trusted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = json.dumps([{"type": "importance", "trusted": str(file)}])
    config = load_config(ROUNDS, [f"--selftrain.weights={weights}"])
    return load_trusted(config, Letters(), 0, context)[str(file)]


def test_trusted_samples(tmp_path):
    assert trusted(tmp_path, {"prompt": "a", "completion": "bc"}) == [((97,), (98, 99, 0))]
    with pytest.raises(ValueError, match=r"trusted.jsonl': the source holds no rows"):
        trusted(tmp_path)
    with pytest.raises(ValueError, match="row 2 has no text in its field 'completion'"):
        trusted(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""})
    with pytest.raises(ValueError, match="row 1 has 4 tokens, and the context of the policy 3: leave it out"):
        trusted(tmp_path, {"prompt": "a", "completion": "bc"}, {"prompt": "a", "completion": "b"}, context=3)


def test_answers_need_a_reward_that_reads_them():
    assert reader_of(load_config(ROUNDS, []))("1+1=2;#2") == "2"
    with pytest.raises(ValueError, match="the reward of 'brevity' reads no answers"):
        reader_of(load_config(ROUNDS, ["--selftrain.answers=brevity"]))
    brief = ["--objectives={brevity: {reward: brevity, args: {max_tokens: 9}}}", "--selftrain.filter={}"]
    with pytest.raises(ValueError, match=r"entropy looks at answers, and no objective's reward reads them"):
        reader_of(load_config(ROUNDS, brief))
    assert reader_of(load_config(ROUNDS, [*brief, "--selftrain.weights=uniform"])) is None


@pytest.mark.parametrize(
    ("section", "reads"),
    [
        ("weights: []", False),
        ("weights: [{type: loss}], prompts: [uniform]", False),
        ("weights: [entropy, shuffled]", True),
        ("prompts: [entropy]", True),
        ("filter: {majority: true}", True),
        ("answers: accuracy", True),
    ],
)
def test_training_reads_answers_where_something_looks_at_them(section, reads):
    config = load_config(SELFTRAIN, [f"--selftrain={{term: {{}}, {section}}}"])
    assert (load_sources(config, Letters(), 0, 99).reader is not None) == reads


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--selftrain.filter.at_least={acuracy: 1}", "selftrain.filter.at_least: unknown objective 'acuracy'; did you mean"),
        ("--selftrain.filter.at_lest={accuracy: 1}", "unknown key 'at_lest'"),
        ("--selftrain.weights={type: entropi}", "does not exist"),
        ("--selftrain.weights=shuffled", "there are no other weights to shuffle"),
        ("--selftrain.weights=[shuffled, entropy]", "selftrain.weights[0]: shuffled deals out the weights of the others"),
        ("--selftrain.weights={type: feasible, threshold: 1, rate: 2, leak: 1}", "rate=2.0 times leak=1.0 is not below 2"),
        (
            "--selftrain.weights={type: importance, trusted: t, share: 0.05}",
            "kept needs weights of 20, above selftrain.cap=10",
        ),
        ("--selftrain.weights={type: tilt, means: {short: 1}}", "selftrain.weights[0].means: unknown objective 'short'"),
        (
            "--selftrain={least_ess: 0.9, weights: {type: importance, trusted: t}}",
            "share=0.8 that is kept is below selftrain",
        ),
        ("--selftrain.filter.at_least.accuracy=1.5", "selftrain.filter.at_least.accuracy: 1.5 is outside the bounds [0, 1]"),
        ("--selftrain.filter={at_most: {brevity: -1}}", "selftrain.filter.at_most.brevity: -1 is outside the bounds [0, 1]"),
        ("--selftrain.weights={type: tilt, means: {clarity: 2}}", "selftrain.weights[0].means.clarity: 2 is outside the"),
        ("--rounds=null", "selftrain: nothing here trains on the policy's samples"),
        ("--selftrain=null", "selftrain is missing"),
        ("--selftrain.term={samples: 8}", "selftrain.term: rounds have no updates by advantages that it could act on"),
        ("--selftrain.prompts=entropy", "selftrain.prompts: rounds have no updates by advantages"),
    ],
)
def test_what_contradicts_itself(override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(ROUNDS, [override, *(["--steps=1", "--weighting=mgda"] if "rounds" in override else [])])
    assert sentence in str(error.value)
