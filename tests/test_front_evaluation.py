"""Policies of a front are evaluated once, whatever stops the command, and again when anything that counts has changed."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import align.evaluator
from align.cli import main
from align.fronts import evaluation
from align.fronts.evaluation import Wanted, evaluate_all, split_prompts
from align.load import load_config
from rollout.types import Prompt
from tests.conftest import QUICKSTART
from tests.fronts import make_policy, make_run


def wanted(*overrides: str, seeds=(0,), validation=0, test=0) -> Wanted:
    return Wanted(load_config(QUICKSTART, ["--prompts.evaluation.args.count=12", *overrides]), seeds, validation, test)


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("policies")
    return [make_policy(folder / str(scale), scale) for scale in (1, 0.8, 0.6)]


@pytest.fixture(scope="module")
def first_two(policies, tmp_path_factory):
    """A cache with two policies, and what was found of them."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, evaluate_all(policies[:2], wanted(), cache)


def copied(first_two, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_two[0], tmp_path / "cache"))


def test_what_is_found_is_per_prompt_and_per_objective(first_two, policies):
    found = first_two[1]
    assert (found.made, found.prompts, found.notes) == (2, {"validation": 6, "test": 6}, [])
    a, b = (found.by_path[path] for path in policies[:2])
    assert a.validation_PK.shape == a.test_PK.shape == (6, 3)
    assert not np.array_equal(a.test_PK, b.test_PK)
    assert a.missing == {"validation": [0, 0, 0], "test": [0, 0, 0]}
    assert [set(example) for example in a.examples] == [{"prompt", "text", "values"}] * 3
    assert list(a.examples[0]["values"].values()) == a.test_PK[0].tolist()


def test_adding_a_policy_costs_one_and_nothing_costs_nothing(first_two, policies, tmp_path, monkeypatch):
    cache = copied(first_two, tmp_path)
    more = evaluate_all([policies[0], policies[2], policies[1]], wanted(), cache)
    assert more.made == 1
    assert list(more.by_path) == [policies[0], policies[2], policies[1]]
    for path in policies[:2]:
        assert np.array_equal(more.by_path[path].test_PK, first_two[1].by_path[path].test_PK)
    monkeypatch.setattr(align.evaluator, "open_evaluator", None)  # not even opened
    assert evaluate_all(policies, wanted(), cache).made == 0
    alone = evaluate_all(policies[2:], wanted(), cache)
    assert np.array_equal(alone.by_path[policies[2]].test_PK, more.by_path[policies[2]].test_PK)


def test_a_seed_more_costs_one_evaluation_and_is_averaged(first_two, policies, tmp_path):
    cache = copied(first_two, tmp_path)
    both = evaluate_all(policies[:1], wanted(seeds=(0, 1)), cache)
    assert both.made == 1
    other = evaluate_all(policies[:1], wanted(seeds=(1,)), cache)
    assert other.made == 0
    values = [found.by_path[policies[0]].test_PK for found in (first_two[1], other, both)]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    assert not np.array_equal(values[0], values[1])


def test_a_killed_command_goes_on_where_it_was(policies, tmp_path, monkeypatch):
    taken = []

    class Killed(align.evaluator.Evaluator):
        def take(self, path, version):
            if len(taken) == 1:
                raise KeyboardInterrupt
            taken.append(path)
            super().take(path, version)

    with monkeypatch.context() as patch:
        patch.setattr(align.evaluator, "Evaluator", Killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_all(policies[:2], wanted(), tmp_path)
    assert taken == policies[:1]
    assert evaluate_all(policies[:2], wanted(), tmp_path).made == 1


def test_a_killed_evaluation_goes_on_at_its_next_part(policies, tmp_path, monkeypatch):
    """Of 12 prompts in parts of 5; the samples are those of a command that nobody stopped."""
    drawn = []

    class Killed(align.evaluator.Evaluator):
        stops_after: ClassVar[int] = 2

        def evaluate(self, prompts, params, step):
            if len(drawn) == self.stops_after:
                raise KeyboardInterrupt
            drawn.append([prompt.text for prompt in prompts])
            return super().evaluate(prompts, params, step)

    how = wanted("--evaluation.samples_per_prompt=2", "--evaluation.temperature=1", seeds=(0, 1))
    monkeypatch.setattr(evaluation, "PART", 10)
    monkeypatch.setattr(align.evaluator, "Evaluator", Killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_all(policies[:1], how, tmp_path / "stopped")
    assert [len(part) for part in drawn] == [5, 5]
    Killed.stops_after = 100
    stopped = evaluate_all(policies[:1], how, tmp_path / "stopped")
    assert [len(part) for part in drawn] == [5, 5, 2, 5, 5, 2]  # the last one of the first seed, all of the second
    assert (drawn[:3], stopped.made) == (drawn[3:], 2)
    whole = evaluate_all(policies[:1], how, tmp_path / "whole")
    assert len(drawn) == 12
    for part in ("validation_PK", "test_PK"):
        a, b = (getattr(found.by_path[policies[0]], part) for found in (stopped, whole))
        assert np.array_equal(a, b)


def test_policies_of_two_chat_templates_are_chosen_and_measured_on_the_same_prompts(policies, tmp_path):
    paths = []
    for name, start in (("plain", ""), ("asked", "Q: ")):
        paths.append(str(shutil.copytree(policies[0], tmp_path / name)))
        template = f"{{% for m in messages %}}{start}{{{{ m.content }}}}{{% endfor %}}"
        tokenizer = Path(paths[-1]) / "tokenizer_config.json"
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": template}))
    found = evaluate_all(paths, wanted("--prompts.chat=true"), tmp_path / "cache").by_path
    plain, asked = ([example["prompt"] for example in found[path].examples] for path in paths)
    assert asked == [f"Q: {text}" for text in plain]


def test_every_policy_ends_with_its_own_tokens(policies, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", {2: 1.0, 4: 1.0}, "--prompts.evaluation.args.count=4")
    generation = run / "checkpoints" / "checkpoint-4" / "generation_config.json"
    own = json.loads(generation.read_text())
    generation.write_text(json.dumps(own | {"eos_token_id": [own["eos_token_id"], 10]}))
    stops, evaluate = [], align.evaluator.Evaluator.evaluate
    monkeypatch.setattr(
        align.evaluator.Evaluator,
        "evaluate",
        lambda self, *a, **b: (stops.append(self.sampler._stop), evaluate(self, *a, **b))[1],
    )
    assert main(["eval", str(run), "--checkpoints=2,4"]) == 0
    assert stops == [[own["eos_token_id"]], sorted([own["eos_token_id"], 10])]


def owed(cache: Path, paths: list[str], how: Wanted, monkeypatch) -> int:
    """How many evaluations would be made."""

    class Opened(Exception):
        pass

    def refuse(*_):
        raise Opened

    with monkeypatch.context() as patch:
        patch.setattr(align.evaluator, "open_evaluator", refuse)
        try:
            return evaluate_all(paths, how, cache).made
        except Opened:
            return len(paths)


def test_an_evaluation_is_named_by_all_that_makes_it(first_two, policies, tmp_path, monkeypatch):
    cache = first_two[0]
    same = shutil.copytree(policies[0], tmp_path / "elsewhere")
    (same / "optimizer.pt").write_text("no part of a policy")
    assert owed(cache, [str(same)], wanted(), monkeypatch) == 0
    assert owed(cache, policies[:1], wanted("--steps=7", "--seed=5", "--weighting.type=gradient"), monkeypatch) == 0
    for change in (
        "--evaluation.temperature=0.5",
        "--rollout.max_tokens=31",
        "--objectives.brevity.args.max_tokens=64",
        "--objectives.clarity.bounds=[0, 2]",
        "--prompts.evaluation.args.count=13",
        "--policy.dtype=bfloat16",
    ):
        assert owed(cache, policies[:1], wanted(change), monkeypatch) == 1, change
    assert owed(cache, policies[:1], wanted(validation=4), monkeypatch) == 0  # 4 and 8 instead of 6 and 6, of the same 12
    generation = json.loads((same / "generation_config.json").read_text())
    (same / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [256, 10]}))
    assert owed(cache, [str(same)], wanted(), monkeypatch) == 1


def test_a_cut_off_file_is_made_again(first_two, policies, tmp_path):
    cache = copied(first_two, tmp_path)
    for path in cache.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    assert evaluate_all(policies[:1], wanted(), cache).made == 1


def test_what_a_failing_reward_left_is_said_and_not_kept(policies, tmp_path, monkeypatch):
    (tmp_path / "frail.py").write_text("def frail(text): raise OSError('down')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    change = '--objectives.brevity={reward: "frail:frail"}'
    found = evaluate_all(policies[:1], wanted(change), tmp_path / "cache")
    assert np.isnan(found.by_path[policies[0]].test_PK[:, 1]).all()
    assert found.by_path[policies[0]].missing["test"] == [0, 1, 0]
    why = "a reward failed (brevity on 100% of the samples); this evaluation is not kept and will be made again"
    assert found.notes == [f"{policies[0]}, seed 0: {why}"]
    (tmp_path / "frail.py").write_text("def frail(text): return 1.0\n")
    assert owed(tmp_path / "cache", policies[:1], wanted(change), monkeypatch) == 1


def test_a_reward_of_the_user_is_part_of_the_name(policies, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def mine(text): return 0.25\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    change = wanted('--objectives.brevity={reward: "mine:mine"}')
    evaluate_all(policies[:1], change, tmp_path / "cache")
    assert owed(tmp_path / "cache", policies[:1], change, monkeypatch) == 0
    (tmp_path / "mine.py").write_text("def mine(text): return 0.75\n")
    assert owed(tmp_path / "cache", policies[:1], change, monkeypatch) == 1


# --- validation and test ----------------------------------------------------------------------------------------------


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(str(n), text, (1,), {}) for n, text in enumerate(texts)]


def test_the_split_does_not_depend_on_the_order_of_the_source():
    texts = [f"{n}+1=?" for n in range(20)]
    there, back = prompts(*texts), prompts(*reversed(texts))
    parts = [[[some[i].text for i in part] for part in split_prompts(some, 8, 6)] for some in (there, back)]
    assert parts[0] == parts[1]
    assert [len(part) for part in parts[0]] == [8, 6]
    assert not set(parts[0][0]) & set(parts[0][1])
    assert parts[0][0] != texts[:8]
    assert [len(part) for part in split_prompts(there, 0, 0)] == [10, 10]
    assert [len(part) for part in split_prompts(there, 0, 5)] == [15, 5]
    assert [len(part) for part in split_prompts(there, 3, 0)] == [3, 17]


def test_a_prompt_for_validation_is_in_no_way_one_for_test():
    some = prompts(*["1+1=?"] * 6, *["2+2=?"] * 6)
    validation, test = split_prompts(some, 4, 0)
    assert len({some[i].text for i in validation}) == 1
    assert len(test) == 6
    with pytest.raises(ValueError, match=r"--validation 6 --test 8: prompts.evaluation has 12 prompts \(2 different ones\)"):
        split_prompts(some, 6, 8)


@pytest.mark.parametrize(("validation", "test"), [(20, 0), (15, 6), (0, 20)])
def test_more_prompts_than_there_are(validation, test):
    with pytest.raises(ValueError, match="give smaller numbers"):
        split_prompts(prompts(*map(str, range(20))), validation, test)


def test_held_out_prompts_are_needed(policies, tmp_path):
    config = load_config(QUICKSTART, ["--evaluation.every=0", "--prompts.evaluation=null"])
    with pytest.raises(ValueError, match=r"prompts.evaluation is missing"):
        evaluate_all(policies, Wanted(config, (0,), 0, 0), tmp_path)
