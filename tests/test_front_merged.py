"""Merged models on a front: what they are made of, what they cost, and which of them are runs of one method."""

import json
import shutil
from pathlib import Path

import pytest

from align.cli import main
from align.fronts.logs import Notes
from align.fronts.methods import name_methods, note_differences
from align.fronts.runs import find_candidates
from align.load import load_config
from tests.fronts import make_policy, make_run

BRIEF = "--weighting.weights={accuracy: 0, brevity: 1, clarity: 0}"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Runs of two methods with two seeds each, and the soups of each seed."""
    folder = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        make_run(folder / f"a{seed}", {2: 1.0, 4: 0.9 - 0.05 * seed}, seed=seed)
        make_run(folder / f"b{seed}", {4: 0.6 + 0.05 * seed}, BRIEF, seed=seed)
        merge(folder / f"a{seed}", folder / f"b{seed}", "--grid=2", f"--output={folder / 'soups' / f'seed{seed}'}")
    return folder


def merge(*arguments: object) -> None:
    assert main(["merge", *map(str, arguments)]) == 0


def find(*targets: object, notes: Notes | None = None):
    return name_methods(find_candidates([str(target) for target in targets], "last", Notes() if notes is None else notes))


def test_merged_models_know_their_parents_and_what_these_have_cost(home):
    middle, second, first = find(home / "soups" / "seed0")
    a, b = (f"{home / run}@4" for run in ("a0", "b0"))
    assert [c.weights for c in (first, middle, second)] == [{a: 1, b: 0}, {a: 0.5, b: 0.5}, {a: 0, b: 1}]
    assert {(c.method, c.seed, c.step, c.run) for c in (first, middle, second)} == {("soup", 0, None, "")}
    # each parent: 4 steps of 16 * 8 samples, 400 tokens, 4 * .5 seconds
    assert [(c.samples, c.tokens, c.seconds) for c in (first, middle)] == [(512, 400, 2), (1024, 800, 4)]


def test_soups_of_several_seeds_are_runs_of_one_method_and_labels_win(home):
    found = find(*(home / name for name in ("a0", "a1", "b0", "b1", "soups/seed0", "soups/seed1")))
    assert [c.method for c in found[:4]] == ["fixed 0.5/0.3/0.2"] * 2 + ["fixed 0/1/0"] * 2
    soups = found[4:]
    assert {c.method for c in soups} == {"soup"}
    assert [c.seed for c in soups] == [0, 0, 0, 1, 1, 1]
    assert len({c.group for c in soups}) == 2
    single = find(*(home / "soups" / "seed0" / name for name in ("0.5_0.5", "1_0")), f"mine={home / 'soups' / 'seed1'}")
    assert len({c.group for c in single}) == 2  # those of one merge belong together, however they are named
    assert [c.method for c in single] == ["soup"] * 2 + ["mine"] * 3


def test_soups_of_other_parents_are_another_method(home, tmp_path):
    merge(home / "a0", home / "a1", f"--output={tmp_path / 'seeds'}")
    merge(home / "a0/checkpoints/checkpoint-2", home / "b0", f"--output={tmp_path / 'early'}")
    merge(home / "a0", home / "b0", "--method=tsv", f"--output={tmp_path / 'tsv'}")
    soup, seeds, early, tsv = find(home / "soups/seed0/0.5_0.5", tmp_path / "seeds", tmp_path / "early", tmp_path / "tsv")
    assert [c.method for c in (soup, seeds, early, tsv)] == [
        "soup of fixed 0.5/0.3/0.2@4 + fixed 0/1/0",
        "soup of fixed 0.5/0.3/0.2@4 + fixed 0.5/0.3/0.2@4",
        "soup of fixed 0.5/0.3/0.2@2 + fixed 0/1/0",
        "tsv",
    ]
    assert (seeds.seed, seeds.samples) == (None, 1024)
    merge(home / "a0/checkpoints/checkpoint-2", home / "a0", f"--output={tmp_path / 'one'}")
    assert find(tmp_path / "one")[0].samples == 512  # of one run, which was paid for once


def test_parents_that_are_no_runs_or_gone(home, tmp_path):
    for name, scale in (("x", 0.9), ("y", 0.8)):
        make_policy(tmp_path / name, scale)
    shutil.copytree(home / "b0", tmp_path / "b0")
    merge(tmp_path / "x", tmp_path / "y", f"--output={tmp_path / 'xy'}")
    merge(home / "a0", tmp_path / "b0", f"--output={tmp_path / 'gone'}")
    shutil.rmtree(tmp_path / "b0")
    foreign, gone, _ = find(tmp_path / "xy", tmp_path / "gone", home / "a0")
    assert foreign.weights == {str(tmp_path / "x"): 0.5, str(tmp_path / "y"): 0.5}
    assert (foreign.method, foreign.seed, foreign.samples) == (f"soup of {tmp_path / 'x'} + {tmp_path / 'y'}", None, None)
    assert (gone.seed, gone.samples, gone.tokens, gone.seconds) == (0, 1024, None, None)  # merge.json knows samples


def test_what_a_killed_merge_left_and_a_record_that_cannot_be_read(home, tmp_path):
    made = Path(shutil.copytree(home / "soups" / "seed0", tmp_path / "soups"))
    shutil.copytree(made / "1_0", made / ".0.1_0.9.partial")
    (made / ".0.1_0.9.partial" / "model.safetensors").unlink()
    (made / "0_1" / "merge.json").write_text("{")
    methods = {Path(c.path).name: c.method for c in find(made)}
    assert methods == {"0.5_0.5": "soup", "1_0": "soup", "0_1": "soups"}  # the folder's name, as of any model


def test_parents_that_have_seen_the_prompts_are_said(home, monkeypatch):
    monkeypatch.chdir(home)
    config = load_config("a0/config.json")
    for targets, said in ((["soups/seed0"], str(home / "a0")), (["a0", "soups/seed0"], "a0")):  # and none twice
        notes, candidates = Notes(), find(*targets)
        note_differences(candidates, config, notes)
        assert len(notes) == 1
        assert notes[0].startswith(f"{said}, {home / 'b0'}: ")


def test_runs_and_soups_on_one_front_without_labels(home, tmp_path, capsys):
    targets = [str(home / name) for name in ("a0", "a1", "soups/seed0", "soups/seed1")]
    cache = ["--checkpoints", "all", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "front")]
    assert main(["front", *targets, *cache]) == 0
    front = json.loads((tmp_path / "front" / "front.json").read_text())
    assert {m["method"]: m["runs"] for m in front["methods"]} == {"fixed 0.5/0.3/0.2": 2, "soup": 2}
    points = {p["id"]: p for p in front["points"]}
    middle, run = points[f"{home}/soups/seed1/0.5_0.5"], points[f"{home / 'a1'}@4"]
    assert middle["weights"] == {f"{home / 'a1'}@4": 0.5, f"{home / 'b1'}@4": 0.5}
    assert (middle["parents"], run["parents"]) == (list(middle["weights"]), [])
    curve = next(m["curve"] for m in front["methods"] if m["method"] == "soup")
    assert [(row["step"], row["samples"], row["tokens"], row["seconds"]) for row in curve] == [(None, 1024, 800, 4)]
    line = f"* {home}/soups/seed1/0.5_0.5 = 0.5 × {home / 'a1'}@4 + 0.5 × {home / 'b1'}@4"
    assert line in capsys.readouterr().out
    pick = ["--prefer", "brevity=1", "--export", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")]
    assert main(["pick", str(tmp_path / "front"), *pick]) == 0
    chosen = points[json.loads((tmp_path / "figures.json").read_text())["id"]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("* merged by: soup\n* from: " in card) == bool(chosen["parents"])


def test_runs_that_differ_in_their_length_are_told_apart(home, tmp_path):
    longer = make_run(tmp_path / "long", {4: 1.0, 6: 0.9})
    methods = [c.method for c in find(home / "a0", longer, home / "a1", home / "b0")]
    same = "fixed 0.5/0.3/0.2"
    assert methods == [f"{same}, steps=4", f"{same}, steps=6", f"{same}, steps=4", "fixed 0/1/0"]
