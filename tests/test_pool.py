"""The pool of samples that passed: bounds, repetitions, what is drawn, its file, and what the keys may not say."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.advice import advise
from align.check import check
from align.config.selftrain import PoolConfig
from align.load import ConfigError, load_config
from align.runlog import JsonLines
from align.sampling import Place, evaluation_params, training_params
from align.selftrain.pool import Entry, Pool, PoolFile, refuse_other_pool, seed_entry
from align.selftrain.sources import Trusted
from tests.conftest import QUICKSTART

NAN = math.nan


def entry(prompt: str, token: int, step: int = 1) -> Entry:
    values = (1.0, NAN, 0.25)
    return Entry(
        prompt, (ord(prompt), 6), (token, 256), f"text {token}", step, step - 1, values, NAN, "7", 0.1 + 0.2, (0.5, NAN, 0.5)
    )


def names(pool: Pool) -> list[str]:
    return [f"{e.prompt}{e.completion_ids[0]}" for e in pool.entries]


def test_bounds_by_hand():
    pool = Pool(PoolConfig(size=4, per_prompt=2), [])
    pool.add([entry("a", 1), entry("a", 2), entry("b", 1)])
    pool.add([entry("a", 1, step=2)])  # again: the newest now
    assert names(pool) == ["a2", "b1", "a1"]
    assert pool.entries[-1].step == 2
    pool.add([entry("a", 3)])  # a third of a: its oldest, a2, goes
    assert names(pool) == ["b1", "a1", "a3"]
    pool.add([entry("c", 1), entry("d", 1)])  # a fifth: the oldest, b1, goes
    assert names(pool) == ["a1", "a3", "c1", "d1"]


def test_seeds_stay_and_do_not_count():
    seed = seed_entry(Trusted("seed x", "s", ([5], [9, 256])), 3)
    pool = Pool(PoolConfig(size=1, per_prompt=1), [seed])
    pool.add([entry("a", 1), entry("b", 1)])
    assert (names(pool), len(pool)) == (["seed x9", "b1"], 2)
    assert all(math.isnan(value) for value in (*seed.values_K, seed.entropy, seed.log_prob))


def test_what_makes_two_samples_one_are_their_tokens():
    again = replace(entry("a", 1, step=2), prompt="a in another row of the data")
    seed = seed_entry(Trusted("seed 1", "s", ([ord("b"), 6], [7, 256])), 3)
    pool = Pool(PoolConfig(per_prompt=2), [seed, replace(seed, prompt="seed 2")])
    pool.add([entry("a", 1), again, entry("b", 7), entry("b", 8)])
    assert names(pool) == ["seed 27", "a in another row of the data1", "b8"]  # b7 is there, as a seed
    pool.add([entry("a", 2), entry("a", 3)])  # three of one prompt, whatever it is called
    assert names(pool)[2:] == ["a2", "a3"]


def test_multipliers_go_with_their_samples():
    pool = Pool(PoolConfig(size=2), [])
    pool.add([entry("a", 1), entry("b", 1)])
    assert pool.all_duals() == []
    pool.set_duals(pool.entries[:1], [3.0])
    assert pool.all_duals() == [3.0, 1.0]
    pool.add([entry("a", 1)])
    assert (names(pool), pool.all_duals()) == (["b1", "a1"], [1.0, 3.0])
    pool.add([entry("c", 1), entry("d", 1)])  # a1 is pushed out
    pool.add([entry("a", 1)])
    assert (names(pool), pool.all_duals()) == (["d1", "a1"], [])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), max_size=30), st.integers(1, 6), st.integers(1, 3))
def test_against_a_plain_list(added, size, per_prompt):
    """One sample after the other, in one go or in several."""
    pool, listed = Pool(PoolConfig(size=size, per_prompt=per_prompt), []), []
    pool.add([entry(*sample) for sample in added[:5]])
    pool.add([entry(*sample) for sample in added[5:]])
    for sample in added:
        listed = [other for other in listed if other != sample] + [sample]
        of_prompt = [other for other in listed if other[0] == sample[0]]
        if len(of_prompt) > per_prompt:
            listed.remove(of_prompt[0])
        listed = listed[-size:]
    assert names(pool) == [f"{prompt}{token}" for prompt, token in listed]


def test_what_is_drawn():
    pool = Pool(PoolConfig(), [])
    assert len(pool.draw(4, 0)) == 0
    pool.add([entry("abcdefgh"[i], i) for i in range(8)])
    draws = np.array([pool.draw(4, seed) for seed in range(2000)])
    assert all(len(set(draw)) == 4 for draw in draws)
    np.testing.assert_array_equal(draws[7], pool.draw(4, 7))
    # Each of 8 is in half of the draws: 1000, with a standard deviation of sqrt(2000 / 4) = 22.
    assert abs(np.bincount(draws.flatten()) - 1000).max() < 100
    assert sorted(pool.draw(99, 0)) == list(range(8))


# --- the file ---------------------------------------------------------------------------------------------------------


def as_text(entries) -> list[str]:
    return [repr(e) for e in entries]  # NaN is not itself


def test_the_file_gives_the_pool_again_and_is_cut_back(tmp_path):
    config = load_config(QUICKSTART, [])
    lines = JsonLines(tmp_path / "pool.jsonl")
    file = PoolFile(lines, config)
    assert list(file.read()) == []
    batches = [[entry("a", 1), entry("b", 2)], [], [replace(entry("c", 3, step=3), answer=None, log_prob=-1 / 3)]]
    for batch in batches:
        file.append(batch)
    assert as_text(file.read()) == as_text([e for batch in batches for e in batch])
    with (tmp_path / "pool.jsonl").open("a") as cut_off:
        cut_off.write('{"step": 3, "prom')
    lines.truncate(2)
    assert as_text(file.read()) == as_text(batches[0])
    refuse_other_pool(tmp_path, config, 2, 2)
    lines.truncate(-1)
    assert list(file.read()) == []
    file.append(batches[0])
    assert as_text(file.read()) == as_text(batches[0])  # with one head
    assert (tmp_path / "pool.jsonl").read_text().count("objectives") == 1


QUICK = load_config(QUICKSTART, [])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=30, max_size=60), st.integers(0, 12))
def test_a_file_that_is_cut_down_gives_the_same_pool(tmp_path_factory, added, cut_at):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    config, rules = QUICK, PoolConfig(size=5, per_prompt=2)
    seeds = [replace(entry("a", 1), prompt="seed 1")]
    entries = [entry(*sample, step=1 + i // 5) for i, sample in enumerate(added)]
    lines = JsonLines(path)
    file, last = PoolFile(lines, config), entries[-1].step

    def pool_at(step: int) -> list[str]:
        pool = Pool(rules, seeds)
        pool.add(e for e in file.read() if e.step <= step)
        return as_text(pool.entries)

    file.append(entries)
    before = [pool_at(step) for step in range(last + 1)]
    file.cut_down(Pool(rules, seeds), cut_at)
    assert [pool_at(step) for step in range(cut_at, last + 1)] == before[cut_at:]
    earlier = sum(e.step <= cut_at for e in entries)
    assert lines.count() <= 1 + min(5, earlier) + len(entries) - earlier
    if cut_at <= last:
        refuse_other_pool(path.parent, config, last, len(entries))  # it accounts for what it has no more
        text = path.read_text()
        file.cut_down(Pool(rules, seeds), cut_at)
        assert path.read_text() == text
    if cut_at:
        with pytest.raises(ValueError, match=f"cut down to what goes on from step {cut_at} or later, and the checkpoint is"):
            refuse_other_pool(path.parent, config, cut_at - 1, 0)
    refuse_other_pool(path.parent, config, -1, 0)
    lines.truncate(-1)
    file.append(entries[:1])
    refuse_other_pool(path.parent, config, 1, 1)  # begun anew, it has all


def test_a_small_file_stays_whole(tmp_path):
    file = PoolFile(lines := JsonLines(tmp_path / "pool.jsonl"), QUICK)
    for count, kept in ((20, 20), (1, 1)):  # 4 x 5 lines, and one more: of all of them the last is left
        file.append([entry("a", 1)] * count)
        file.cut_down(Pool(PoolConfig(size=5), []), 1)
        assert lines.count() == 1 + kept


def test_a_pool_of_another_run_is_refused(tmp_path):
    config = load_config(QUICKSTART, [])
    refuse_other_pool(tmp_path, config, 0, 0)
    path = tmp_path / "pool.jsonl"
    PoolFile(JsonLines(path), config).append([entry("a", 1)])
    with pytest.raises(ValueError, match=r"pool.jsonl: this pool was written by another configuration than that of"):
        refuse_other_pool(tmp_path, load_config(QUICKSTART, ["--seed=9"]), 2, 1)
    one = ["--objectives={accuracy: {reward: arithmetic_accuracy}}", "--weighting={type: fixed, weights: {accuracy: 1}}"]
    with pytest.raises(ValueError, match="has values of accuracy, brevity, clarity, and the objectives are accuracy:"):
        refuse_other_pool(tmp_path, load_config(QUICKSTART, one), 2, 1)
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="the first line does not say what made this pool"):
        refuse_other_pool(tmp_path, config, 0, 0)


def test_a_pool_that_is_not_whole_is_refused(tmp_path):
    config, path = load_config(QUICKSTART, []), tmp_path / "pool.jsonl"
    PoolFile(JsonLines(path), config).append([entry("a", 1), entry("b", 2), entry("c", 3, step=3)])
    refuse_other_pool(tmp_path, config, 2, 2)  # the third is of a later step
    whole = path.read_text()
    lost = r"pool.jsonl: of 2 samples that had passed at step 2 it accounts for {}: restore the file, or begin a new run"
    lines = whole.splitlines(keepends=True)
    for text, held in (("".join(lines[:2]), 1), ("".join([*lines[:2], lines[2][:9]]), 1), (lines[0], 0), ("", 0)):
        path.write_text(text)
        with pytest.raises(ValueError, match=lost.format(held)):
            refuse_other_pool(tmp_path, config, 2, 2)
    path.unlink()
    with pytest.raises(ValueError, match=lost.format(0)):
        refuse_other_pool(tmp_path, config, 2, 2)
    path.write_text(whole.replace('"step": 1', '"stop": 1'))
    with pytest.raises(ValueError, match="there is a line that is no sample"):
        refuse_other_pool(tmp_path, config, 2, 2)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("{weights: [entropy]}", "selftrain: nothing here trains on the policy's samples: add selftrain.term"),
        ("{prompts: [entropy], filter: {majority: true}}", "selftrain.filter: it is about what selftrain.term draws from"),
        ("{prompts: [entropy], pool: {size: 9}}", "selftrain.pool: it is about what selftrain.term draws from"),
        ("{prompts: [shuffled]}", "selftrain.prompts[0]: there are no other weights to shuffle"),
        ("{prompts: [{type: loss}]}", "does not exist"),
        ("{term: {}, pool: {seeds: s.jsonl}, weights: [entropy]}", "entropy weights look at what samples of"),
        ("{term: {coefficient: 0}}", "selftrain.term.coefficient"),
        ("{term: {samples: 0}}", "selftrain.term.samples"),
        ("{term: {normaliser: words}}", "selftrain.term.normaliser"),
        ("{term: {}, pool: {sise: 9}}", "unknown key 'sise'; did you mean 'size'"),
        ("{term: {}, weights: [{type: feasible, threshold: 1}, {type: feasible, threshold: 2}]}", "feasible is here twice"),
        ("{term: {}, filter: {at_least: {acc: 1}}}", "selftrain.filter.at_least: unknown objective 'acc'"),
    ],
)
def test_keys_that_contradict_each_other(section, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [f"--selftrain={section}"])
    assert sentence in str(error.value)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_samples_of_a_pool_come_with_log_probabilities(engine):
    asked = [f"--rollout={{engine: {engine}, correction: none}}"]
    for section, wanted in (("null", False), ("{prompts: [entropy]}", False), ("{term: {}}", True)):
        config = load_config(QUICKSTART, [*asked, f"--selftrain={section}"])
        assert training_params(config, 0, Place()).log_probs == wanted
        assert not evaluation_params(config, Place()).log_probs


def test_choices_that_do_not_do_what_they_seem_to():
    section = "{term: {}, prompts: [entropy], pool: {size: 9}, weights: [{type: loss, warm_up: 160}]}"
    advice = "\n".join(advise(load_config(QUICKSTART, [f"--selftrain={section}", "--weighting=gradient"])))
    assert "selftrain.prompts: weighting.type=gradient measures gradients without these weights" in advice
    assert "selftrain.filter asks for nothing, so every sample passes" in advice
    assert "selftrain.pool.size=9 is less than selftrain.term.samples=32" in advice
    assert "selftrain.weights[0].warm_up=160 leaves no step of 160 with weights" in advice


def test_weights_of_values_that_may_be_missing_want_a_threshold():
    neutral = "--objectives.clarity.missing=neutral"
    for weights in ("{type: tilt, means: {clarity: 0.5}}", "{type: trajectory}"):
        section = "--selftrain={term: {}, weights: [WEIGHTS], filter: FILTER}".replace("WEIGHTS", weights)
        load_config(QUICKSTART, [section.replace("FILTER", "{}")])
        load_config(QUICKSTART, [section.replace("FILTER", "{at_least: {clarity: 0}}"), neutral])
        with pytest.raises(ConfigError, match=r"needs every value of 'clarity', and objectives\.clarity\.missing=neutral"):
            load_config(QUICKSTART, [section.replace("FILTER", "{}"), neutral])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the source holds no rows"),
        ([{"prompt": "1+2=?", "completion": ""}], "row 1 has no text in its field 'completion'"),
        ([{"prompt": "1+2=?", "completion": "1" * 500}], "row 1 has 506 tokens, and the context of the policy"),
        (None, "no file"),
    ],
)
def test_trusted_samples_and_seeds_are_checked_before_a_model_loads(tmp_path, rows, sentence):
    file = tmp_path / "samples.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = json.dumps([{"type": "importance", "trusted": str(file)}])
    for key, more in (("selftrain.weights", f"weights: {weights}"), ("selftrain.pool.seeds", f"pool: {{seeds: {file}}}")):
        with pytest.raises(ValueError, match=re.escape(f"{key}: trusted samples of '{file}': ") + f".*{sentence}"):
            check(QUICKSTART, 1, [f"--selftrain={{term: {{}}, {more}}}"])
