"""`paretune front` and `paretune pick` from the command line, the choice by hand, and folders that are ready to load."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import align.evaluator
from align.cli import main
from align.fronts.choose import choose, make_wish, sentences
from align.fronts.compute import Measured
from align.fronts.runs import Candidate
from align.load import load_config
from rewards.types import Missing, Objective
from tests.conftest import QUICKSTART
from tests.fronts import make_policy, make_run

OBJECTIVES = [Objective("accuracy", True, (0.0, 1.0), Missing.FAIL), Objective("tokens", False, (0.0, 200.0), Missing.FAIL)]


def known(values: list[tuple[float, float]], noise: float = 0.0, prompts: int = 100) -> Measured:
    """Policies `0`, `1`, ... with these means."""
    rng, values_MK = np.random.default_rng(0), np.array(values)
    parts = values_MK[:, None] + noise * np.array([1.0, 200.0]) * rng.normal(size=(2, len(values), prompts, 2))
    return Measured([Candidate(str(m), f"path/{m}", str(m)) for m in range(len(values))], OBJECTIVES, {}, *parts)


def wish(data: Measured, prefer="", at_least="", at_most="", maximize="", minimize=""):
    return make_wish(prefer, at_least, at_most, maximize, minimize, data)


def test_preferences_by_hand():
    # scaled: (.9, .1), (.6, .5), (.2, .9); weights 3 : 1 -> .7, .575, .375; 1 : 3 -> .3, .525, .725
    data = known([(0.9, 180), (0.6, 100), (0.2, 20)])
    choice = choose(data, wish(data, prefer="accuracy=3,tokens=1"))
    assert (choice.index, choice.utility.mean, choice.best) == (0, pytest.approx(0.7), {0: 1, 1: 0, 2: 0})
    assert choose(data, wish(data, prefer="accuracy=.25,tokens=.75")).index == 2
    assert choose(data, wish(data, prefer="accuracy=1")).values["tokens"].mean == pytest.approx(180)


def test_policies_that_are_the_same_share_what_they_are_best_in():
    data = known([(0.9, 180), (0.9, 180), (0.2, 20)])
    assert choose(data, wish(data, prefer="accuracy=1")).best == {0: 0.5, 1: 0.5, 2: 0}
    # of three that are equally good two are one policy, under two names: a half for it, a half for the other
    data = known([(0.9, 180), (0.9, 180), (0.9, 180), (0.2, 20)])
    again = [replace(c, path="path/0") if c.id == "1" else c for c in data.candidates]
    choice = choose(replace(data, candidates=again), wish(data, prefer="accuracy=1"))
    assert choice.best == {0: 0.5, 1: 0.5, 2: 0.5, 3: 0}


def test_bounds_by_hand():
    data = known([(0.9, 180), (0.6, 100), (0.2, 20)])
    assert choose(data, wish(data, at_least="accuracy=.5", minimize="tokens")).index == 1
    assert choose(data, wish(data, at_most="tokens=150", maximize="accuracy")).index == 1
    assert choose(data, wish(data, maximize="accuracy")).index == 0
    with pytest.raises(
        ValueError, match=r"no policy has accuracy at least 0.95 on the .*; the nearest is 0, with accuracy 0.900"
    ):
        choose(data, wish(data, at_least="accuracy=.95", minimize="tokens"))


def test_how_sure_a_choice_is_comes_from_prompts_that_had_no_part_in_it():
    """Of policies that are equal but for noise none is surely the best; shares of a close pair are near the truth."""
    data = known([(0.5, 100)] * 8, noise=0.3)
    choice = choose(data, wish(data, prefer="accuracy=1"))
    assert sum(choice.best.values()) == pytest.approx(1)
    assert choice.best[choice.index] < 0.6
    # two policies differ by .06 with a standard error of .3 * sqrt(2 / 100) = .042: z = 1.41
    shares, chosen = [], 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        parts = np.array([[0.53, 100.0], [0.47, 100.0]])[:, None] + 0.3 * rng.normal(size=(2, 2, 100, 2))
        choice = choose(Measured(data.candidates[:2], OBJECTIVES, {}, *parts), wish(data, prefer="accuracy=1"))
        shares.append(choice.best[0])
        chosen += choice.index == 0
    assert np.mean(shares) == pytest.approx(0.84, abs=0.1)  # P(Z > -1.41 + noise of the same size) = Phi(1.41 / 2^(1/2))
    assert chosen >= 25


def test_bounds_that_hold_by_a_hair_are_not_sure():
    data = known([(0.8, 100), (0.9, 150)], noise=0.05)
    data.validation_MPK[0, :, 0] += 0.81 - data.validation_MPK[0, :, 0].mean()
    data.test_MPK[0, :, 0] += 0.80 - data.test_MPK[0, :, 0].mean()
    want = wish(data, at_least="accuracy=.8", minimize="tokens")
    choice = choose(data, want)
    assert choice.index == 0
    assert 0.3 < choice.satisfies < 0.7
    assert f"it keeps the bounds in {choice.satisfies:.0%} of them" in sentences(choice, want, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what is wanted: --prefer"),
        ({"prefer": "accuracy=1", "maximize": "accuracy"}, "say what is wanted: --prefer"),
        ({"prefer": "accuracy=1", "at_least": "tokens=5"}, "--prefer has no bounds"),
        ({"prefer": "acuracy=1"}, "--prefer: unknown objective 'acuracy'; did you mean 'accuracy'"),
        ({"prefer": "accuracy"}, "--prefer accuracy: write names with numbers"),
        ({"prefer": "accuracy=nan"}, "--prefer accuracy=nan: write names with numbers"),
        ({"prefer": "accuracy=-1,tokens=1"}, "weights must be 0 or more"),
        ({"prefer": "accuracy=0"}, "one of them more than 0"),
        ({"maximize": "tokens"}, "--maximize tokens: of tokens, smaller is better; write --minimize tokens"),
        ({"maximize": "speed"}, "--maximize: unknown objective 'speed'"),
    ],
)
def test_wishes_that_cannot_be_meant(options, message):
    data = known([(0.5, 100)])
    with pytest.raises(ValueError, match=message):
        wish(data, **options)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Runs `a` and `b` of one method, and their front."""
    folder = tmp_path_factory.mktemp("world")
    make_run(folder / "a", {2: 1.0, 4: 0.7})
    make_run(folder / "b", {4: 0.8}, seed=1)
    return folder


def front(world: Path, *targets: str, output: str = "front") -> int:
    paths = [str(world / target) for target in targets]
    return main(["front", *paths, "--output", str(world / output), "--cache", str(world / "cache")])


@pytest.fixture(scope="module")
def made(world) -> Path:
    assert front(world, "a", "b") == 0
    return world / "front"


def test_the_files_of_a_front(made):
    written = {"front.json", "front.csv", "front.md", "front.png", "front.html", "vectors.npz"}
    assert {path.name for path in made.iterdir()} == written
    data = json.loads((made / "front.json").read_text())
    assert data["prompts"] == {"validation": 8, "test": 8}
    (method,) = data["methods"]
    assert (method["method"], method["runs"]) == ("fixed 0.5/0.3/0.2", 2)
    assert [point["seed"] for point in data["points"]] == [0, 1]
    assert len(data["points"][0]["examples"]) == 3
    assert (made / "front.png").stat().st_size > 10_000


def test_another_run_costs_one_evaluation_and_the_same_ones_none(world, made, monkeypatch, capsys):
    make_run(world / "c", {4: 0.9}, "--weighting.weights={accuracy: 1, brevity: 0, clarity: 0}")
    taken, take = [], align.evaluator.Evaluator.take
    monkeypatch.setattr(align.evaluator.Evaluator, "take", lambda self, *a: (taken.append(a[0]), take(self, *a))[1])
    assert front(world, "a", "b", "c", output="more") == 0
    assert taken == [str(world / "c" / "checkpoints" / "checkpoint-4")]
    assert "fixed 1/0/0" in capsys.readouterr().out
    assert front(world, "c", "b", output="more") == 0
    assert len(taken) == 1
    old, new = (json.loads((world / name / "front.json").read_text())["points"][1]["test"] for name in ("front", "more"))
    assert old == new


def test_notes_go_to_the_file_and_to_the_terminal(world, capsys):
    run = make_run(world / "d", {4: 1.0})
    with (run / "timings.jsonl").open("a") as file:
        file.write('{"step": 4, "st')
    assert front(world, "d", output="noted") == 0
    note = f"skipped line 5 of {run / 'timings.jsonl'}: it is not a row of a log"
    assert note in json.loads((world / "noted" / "front.json").read_text())["notes"]
    assert f"note: {note}\n" in capsys.readouterr().err


def test_pick_from_a_front_and_export(world, made, tmp_path, capsys):
    target = tmp_path / "chosen"
    figures = tmp_path / "figures.json"
    options = ["--prefer", "accuracy=.7,brevity=.3", "--export", str(target), "--json", str(figures)]
    assert main(["pick", str(made), *options]) == 0
    printed = capsys.readouterr().out
    chosen = json.loads(figures.read_text())
    assert printed.startswith(chosen["id"])
    assert set(chosen["best"]) == {f"{world / run}@4" for run in "ab"}
    weights = (Path(chosen["path"]) / "model.safetensors").read_bytes()
    assert (target / "model.safetensors").read_bytes() == weights
    assert not (target / "paretune.json").exists()
    card = (target / "README.md").read_text()
    head, rest = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["tags"] == ["paretune", "multi-objective"]
    for part in (
        "| accuracy | arithmetic_accuracy | larger | 0 to 1 | 0.500 |",
        "fixed 0.5/0.3/0.2",
        "learning_rate: 0.0003",
    ):
        assert part in rest
    assert main(["eval", str(target), "--config", QUICKSTART, "--prompts.evaluation.args.count=8"]) == 0
    assert main(["pick", str(made), *options]) == 2
    assert "chosen exists and is not an empty folder" in capsys.readouterr().err


def test_pick_makes_the_front_where_there_is_none(world, made, capsys):
    bounds = ["--at-least", "brevity=0.1", "--maximize", "accuracy"]
    more = ["--output", str(world / "picked"), "--cache", str(world / "cache")]
    assert main(["pick", str(world / "a"), str(world / "b"), *bounds, *more]) == 0
    assert "the best accuracy with brevity at least 0.1" in capsys.readouterr().out
    assert (world / "picked" / "front.json").is_file()
    assert main(["pick", str(made), "--at-least", "brevity=1", "--maximize", "accuracy"]) == 2
    assert "no policy has brevity at least 1 on the validation prompts" in capsys.readouterr().err


def test_lora_weights_are_exported_as_a_whole_model(world, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from align.fronts.export import export_policy
    from align.fronts.logs import Notes
    from align.fronts.runs import find_candidates

    base = make_policy(tmp_path / "base", 1.0)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    (found,) = find_candidates([str(tmp_path / "adapter")], "last", Notes())  # its tokenizer is that of the base
    export_policy(found.path, tmp_path / "whole", "# card\n", load_config(QUICKSTART))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, model.eval()(tokens).logits, atol=1e-4)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["front", "./absent"], "there is no ./absent: it is neither a run folder"),
        (
            ["front", "builtin:arithmetic"],
            "builtin:arithmetic is no run folder, so the objectives and prompts must come from",
        ),
        (["front", "x", "--validation", "-1"], "--validation -1 must be 1 or more"),
        (["front", "x", "--seeds", "1", "1"], "--seeds 1 1: give different numbers"),
        (
            ["pick", "absent/front.json", "--prefer", "a=1"],
            "absent/front.json is not a front that paretune front has written",
        ),
    ],
)
def test_mistakes_are_one_plain_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_front_of_policies_of_other_trainers(world, tmp_path, capsys):
    make_policy(tmp_path / "ppo", 1.0)
    options = ["--config", QUICKSTART, "--prompts.evaluation.args.count=16", "--cache", str(world / "cache")]
    assert main(["front", f"PPO={tmp_path / 'ppo'}", "builtin:arithmetic", *options, "--output", str(tmp_path / "out")]) == 0
    points = json.loads((tmp_path / "out" / "front.json").read_text())["points"]
    assert [(p["method"], p["run"], p["step"], p["weights"]) for p in points] == [
        ("PPO", "", None, {}),
        ("builtin:arithmetic", "", None, {}),
    ]
    assert "| method | runs |" in capsys.readouterr().out
