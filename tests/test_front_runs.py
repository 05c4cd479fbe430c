"""Which policies a front is made of, and plain words about those that cannot be."""

import json
import shutil
from pathlib import Path

import pytest

from align.fronts.logs import Notes
from align.fronts.methods import check_objectives, name_methods, note_differences
from align.fronts.runs import find_candidates
from align.load import load_config
from tests.fronts import SHIPPED, WEIGHTS, make_policy, make_run


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two runs that differ in their seed, one of other weights, and two policies from elsewhere."""
    folder = tmp_path_factory.mktemp("home")
    make_run(folder / "a", {2: 1.0, 4: 0.9})
    make_run(folder / "b", {4: 0.8}, seed=1)
    make_run(folder / "c", {4: 0.7}, "--weighting.weights={accuracy: 1, brevity: 1, clarity: 0}")
    make_policy(folder / "soup" / "0.5_0.5", 0.95)
    make_policy(folder / "soup" / "1_0", 1.05)
    return folder


def find(*targets: object, checkpoints: str = "last", notes: Notes | None = None):
    return find_candidates([str(target) for target in targets], checkpoints, Notes() if notes is None else notes)


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


def test_checkpoints_of_a_run_know_what_was_spent_on_them(home):
    start, second, fourth = find(home / "a", checkpoints="all")
    assert [c.id for c in (start, second, fourth)] == [f"{home / 'a'}@{step}" for step in (0, 2, 4)]
    assert start.path == str(SHIPPED)
    assert second.path == str(home / "a" / "checkpoints" / "checkpoint-2")
    assert [(c.samples, c.tokens, c.seconds) for c in (start, second, fourth)] == [(0, 0, 0), (256, 200, 1), (512, 400, 2)]
    assert fourth.weights == pytest.approx(WEIGHTS)
    assert [c.step for c in find(home / "a")] == [4]
    assert [c.step for c in find(home / "a", checkpoints="0,2")] == [0, 2]


def test_all_kinds_of_arguments_and_none_twice(home):
    checkpoint = home / "a" / "checkpoints" / "checkpoint-4"
    found = find(home / "a", checkpoint, home / "soup", f"mine={home / 'soup' / '1_0'}", "builtin:arithmetic")
    assert [(c.method, c.group, c.step) for c in found] == [
        ("", str(home / "a"), 4),
        ("soup", str(home / "soup"), None),
        ("soup", str(home / "soup"), None),
        ("mine", str(home / "soup" / "1_0"), None),
        ("builtin:arithmetic", "builtin:arithmetic", None),
    ]


def test_runs_that_differ_in_their_seed_are_of_one_method(home, tmp_path):
    faster = make_run(tmp_path / "fast", {4: 1.0}, "--trl.learning_rate=1e-3")
    methods = [c.method for c in name_methods(find(home / "a", home / "b", home / "c"))]
    assert methods == ["fixed 0.5/0.3/0.2", "fixed 0.5/0.3/0.2", "fixed 0.5/0.5/0"]
    methods = [c.method for c in name_methods(find(home / "a", faster, home / "b"))]
    assert methods[0] == methods[2] == "fixed 0.5/0.3/0.2, trl.learning_rate=0.0003"
    assert methods[1] == "fixed 0.5/0.3/0.2, trl.learning_rate=0.001"


def test_many_differences_make_no_two_methods_one(home, tmp_path):
    several = ["--trl.beta=0.1", "--trl.epsilon=0.3", "--trl.max_grad_norm=0.5"]
    first = make_run(tmp_path / "first", {4: 1.0}, *several, "--trl.warmup_steps=1")
    second = make_run(tmp_path / "second", {4: 1.0}, *several, "--trl.warmup_steps=2")
    plain, *others = [c.method for c in name_methods(find(home / "a", first, second))]
    assert plain == "fixed 0.5/0.3/0.2"  # what only others have is not named
    assert others == [
        f"fixed 0.5/0.3/0.2, trl.beta=0.1, trl.epsilon=0.3, trl.max_grad_norm=0.5, trl.warmup_steps={n}" for n in (1.0, 2.0)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--objectives.brevity.bounds=[0, 2]",
            r"objectives.brevity.bounds is \[0.0, 1.0\] in .*a and \[0.0, 2.0\] in .*other",
        ),
        (
            "--objectives.clarity.direction=minimize",
            "objectives.clarity.direction is maximize in .*a and minimize in .*other",
        ),
        ("--objectives.brevity.args.max_tokens=64", "objectives.brevity.args is .*32.* in .*a and .*64.* in .*other"),
    ],
)
def test_runs_of_other_objectives_are_refused_by_name(home, tmp_path, change, message):
    other = make_run(tmp_path / "other", {4: 1.0}, change)
    with pytest.raises(ValueError, match=message):
        check_objectives(find(home / "a", other))


def test_runs_of_more_objectives_are_refused_by_name(home, tmp_path):
    weights = json.dumps({"type": "fixed", "weights": WEIGHTS | {"terse": 0}})
    more = ("--objectives.terse={reward: brevity, args: {max_tokens: 8}}", f"--weighting={weights}")
    other = make_run(tmp_path / "other", {4: 1.0}, *more)
    with pytest.raises(
        ValueError, match=r"a has the objectives accuracy, brevity, clarity, and .*other has .*, terse; compare"
    ):
        check_objectives(find(home / "a", other))


def test_a_half_written_run_and_checkpoint(home, tmp_path):
    run = copy(home / "a", tmp_path / "run")
    (run / "checkpoints" / "checkpoint-4" / "paretune.json").unlink()
    notes = Notes()
    assert [c.step for c in find(run, notes=notes)] == [2]
    assert notes == [f"{run / 'checkpoints' / 'checkpoint-4'} is half-written and was passed over"]
    with pytest.raises(ValueError, match=r"checkpoint-4 is a half-written checkpoint: it has no paretune.json"):
        find(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="run is a half-written run: it has no complete checkpoint"):
        find(run)
    assert [c.step for c in find(run, checkpoints="0")] == [0]
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"run is a half-written run: it has no config.json"):
        find(run)


def test_an_unfinished_run_is_said(home, tmp_path):
    run, notes = copy(home / "a", tmp_path / "run"), Notes()
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().partition('{"step": 4')[0])
    find(run, notes=notes)
    assert notes == [f"{run} stands at step 3 of 4"]


@pytest.mark.parametrize("line", ['{"step": 3, "num_tok', "[1, 2]", '{"num_tokens": 5}', "\x00\ufffd"])
def test_a_corrupt_line_of_a_log_is_skipped_by_number(home, tmp_path, line):
    run, notes = copy(home / "a", tmp_path / "run"), Notes()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], line, lines[3]]) + "\n")
    assert find(run, notes=notes)[0].tokens == 400
    assert notes == [f"skipped line 3 of {run / 'metrics.jsonl'}: it is not a row of a log"]


def test_a_model_folder_without_tokenizer_weights_or_base(tmp_path):
    model = Path(make_policy(tmp_path / "model", 1.0))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(ValueError, match=r"model has no tokenizer \(tokenizer.json, .*copy these files"):
        find(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model has no weights"):
        find(model)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"model holds LoRA weights of .*gone, which is not there"):
        find(model)


def test_what_is_nothing_at_all(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing is not in the local cache, and HF_HUB_OFFLINE forbids"):
        find("nobody/nothing")
    with pytest.raises(ValueError, match=r"there is no \./absent: it is neither a run folder"):
        find("./absent")
    with pytest.raises(ValueError, match="neither a run folder, nor a model folder"):
        find(tmp_path)


def test_steps_that_are_not_there(home):
    with pytest.raises(ValueError, match=r"--checkpoints: .*a has none of step '3'; it has 0, 2, 4"):
        find(home / "a", checkpoints="2,3")


def test_what_is_evaluated_otherwise_or_on_prompts_seen_before_is_said(home, tmp_path):
    notes, candidates = Notes(), find(home / "a", home / "b")
    fresh = "--prompts.evaluation.args.seed=7"
    config = load_config(str(home / "a" / "config.json"), [fresh, "--rollout.max_tokens=16"])
    note_differences(candidates, config, notes)
    assert notes == [f"{home / run} has rollout.max_tokens=32; it is evaluated with 16" for run in "ab"]
    notes = Notes()
    note_differences(candidates, load_config(str(home / "a" / "config.json")), notes)
    assert len(notes) == 1
    assert "on these very prompts" in notes[0]
