"""Which samples of a round are trained on, and the rows that they become, by hand and by properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.selftrain.choose import Chosen, choose_pairs, choose_samples, mismatched
from align.selftrain.rows import Batches, dpo_rows, kto_rows, sft_rows
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

RIGHT = np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
ANSWERS = [
    ["7", "5", "7", "6"],  # 5 and 6 are equally common wrong answers: the first seen
    ["3", "3", "3", "3"],  # all right
    ["1", "2", "1", "1"],  # all wrong
    ["9", "9", None, "4"],  # the first one is right, and left out for something else
]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def group(index: int, *completions: tuple[int, ...]) -> SampleGroup:
    prompt = Prompt(str(index), "", (index, index), {})
    return SampleGroup(prompt, tuple(Sample(c, (), FinishReason.STOP, 0, "") for c in completions))


GROUPS = [group(0, (10,), (11, 12), (13,)), group(1, (20,), (21,), (22, 23))]


def test_right_samples_of_mixed_prompts():
    assert choose_samples(RIGHT, True, None, rng()) == Chosen((0, 0, 3), (0, 2, 1))


def test_right_samples_of_all_prompts():
    assert choose_samples(RIGHT, False, None, rng()) == Chosen((0, 0, 1, 1, 1, 1, 3), (0, 2, 0, 1, 2, 3, 1))


def test_one_right_sample_of_each_prompt_at_random():
    seen = {choose_samples(RIGHT, True, 1, np.random.default_rng(seed)).right for seed in range(30)}
    assert seen == {(0, 1), (2, 1)}


def test_pairs_by_hand():
    seen = {choose_pairs(RIGHT, ANSWERS, np.random.default_rng(seed)) for seed in range(30)}
    assert seen == {Chosen((0, 3), (0, 1), (1, 3)), Chosen((0, 3), (2, 1), (1, 3))}


def test_the_rejected_one_has_the_most_common_wrong_answer():
    right = np.array([[1, 0, 0, 0, 0]], bool)
    answers = [["1", "2", "3", "3", None]]
    assert {choose_pairs(right, answers, np.random.default_rng(seed)).wrong for seed in range(30)} == {(2,), (3,)}


def test_who_states_nothing_is_in_no_pair():
    assert not len(choose_pairs(np.array([[1, 0, 0]], bool), [["1", None, None]], rng()))


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.sampled_from(["1", "2", "3", None])), min_size=4, max_size=4), min_size=1)
)
def test_what_every_pair_keeps_to(drawn):
    right = np.array([[ok for ok, _ in row] for row in drawn])
    answers = [[answer for _, answer in row] for row in drawn]
    chosen = choose_pairs(right, answers, rng())
    assert len(set(chosen.prompts)) == len(chosen)
    for p, good, bad in zip(chosen.prompts, chosen.right, chosen.wrong, strict=True):
        assert right[p, good]
        assert not right[p, bad]
        known = {answer for ok, answer in zip(right[p], answers[p], strict=True) if ok}
        assert answers[p][bad] not in known | {None}
        others = [answer for answer in answers[p] if answer not in known | {None}]
        assert others.count(answers[p][bad]) == max(map(others.count, others))


def test_batches_are_full_and_every_row_is_in_as_often_as_wanted():
    batches = Batches(batch_size=4, micro_batch_size=2, epochs=2, seed=3)
    assert batches.steps(5) == 3  # 10 rows wanted, in batches of 4: 12
    counts = np.bincount(batches.order(5))
    assert sorted(counts) == [2, 2, 2, 3, 3]
    assert sorted(batches.order(5)[:5]) == list(range(5))  # pass after pass
    assert batches.steps(1) == 1
    assert batches.order(1) == [0] * 4


def test_rows_of_likelihood():
    rows = sft_rows(GROUPS, Chosen((0, 1), (1, 2)), np.array([0.5, 1.5]), Batches(2, 1, 1, 0))
    assert sorted(rows, key=str) == [
        {"input_ids": [0, 0, 11, 12], "labels": [-100, -100, 11, 12], "weight": 0.5},
        {"input_ids": [1, 1, 22, 23], "labels": [-100, -100, 22, 23], "weight": 1.5},
    ]


def log_probs(pairs) -> np.ndarray:
    """Stands for the policy: a number that tells the pair."""
    return -np.array([1000.0 * prompt[0] + sum(completion) for prompt, completion in pairs])


def test_rows_of_pairs():
    rows = dpo_rows(GROUPS, Chosen((0, 1), (0, 2), (1, 0)), np.array([0.5, 1.5]), Batches(2, 1, 1, 0), log_probs)
    assert sorted(rows, key=lambda row: row["weight"]) == [
        {"prompt_ids": [0, 0], "chosen_ids": [10], "rejected_ids": [11, 12], "ref_chosen_logps": -10.0,
         "ref_rejected_logps": -23.0, "weight": 0.5},
        {"prompt_ids": [1, 1], "chosen_ids": [22, 23], "rejected_ids": [20], "ref_chosen_logps": -1045.0,
         "ref_rejected_logps": -1020.0, "weight": 1.5},
    ]  # fmt: skip


def test_rows_one_by_one():
    rows = kto_rows(GROUPS, Chosen((0, 1), (0, 2), (1, 0)), np.array([0.5, 1.5]), Batches(4, 2, 1, 5), log_probs)
    by_completion = {tuple(row["completion_ids"]): (row["label"], row["weight"], row["ref_logps"]) for row in rows}
    assert by_completion == {
        (10,): (True, 0.5, -10.0),
        (22, 23): (True, 1.5, -1045.0),
        (11, 12): (False, 0.5, -23.0),
        (20,): (False, 1.5, -1020.0),
    }
    for first, second in (rows[:2], rows[2:]):  # micro-batches of two swap their completions
        assert first["KL_completion_ids"] == second["completion_ids"]
        assert second["KL_completion_ids"] == first["completion_ids"]
        assert first["ref_KL_logps"] == log_probs([(first["prompt_ids"], second["completion_ids"])])[0]


def test_mismatched_completions():
    assert mismatched([[1], [2], [3], [4], [5], [6]], 3) == [[3], [1], [2], [6], [4], [5]]
    with pytest.raises(AssertionError, match="full"):
        mismatched([[1], [2], [3]], 2)
