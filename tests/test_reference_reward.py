"""Closeness to a reference: against a loop over tokens, and nothing between a policy and itself."""

import math
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.types import Missing, Objective
from rollout.arithmetic import expressions
from rollout.local import LocalSampler
from rollout.sampler import SamplingParams
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.conftest import ROOT, overrides, read_lines

POLICY = str(ROOT / "align" / "policies" / "arithmetic")
OBJECTIVE = Objective("kl", False, (-50.0, 50.0), Missing.FAIL)


@pytest.fixture(scope="module")
def groups():
    """Samples of the shipped policy, with their log-probabilities."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    prompts = [
        Prompt(row["id"], row["prompt"], tuple(tokenizer(row["prompt"])["input_ids"]), {}) for row in expressions("train", 4)
    ]
    sampler = LocalSampler(lambda: nullcontext(model), tokenizer, [tokenizer.eos_token_id], 16)
    return sampler.sample(prompts, SamplingParams(samples_per_prompt=3, max_tokens=24, log_probs=True, seed=1))


@pytest.fixture
def changed(tmp_path):
    """A reference that is not the policy."""
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(tmp_path)
    return tmp_path


def kl(model, groups, **args):
    bus = RewardBus({"kl": load_component("kl_to_reference", {"model": str(model), **args}, [], {})}, [OBJECTIVE])
    return bus.score(groups)


def test_a_policy_is_no_way_from_itself(groups):
    assert kl(POLICY, groups).raw_NK[:, 0] == pytest.approx(0.0, abs=1e-4)


def test_of_another_it_is_what_a_loop_over_tokens_finds(groups, changed):
    reference, expected = AutoModelForCausalLM.from_pretrained(changed), []
    for group in groups:
        for sample in group.samples:
            ids, value = list(group.prompt.token_ids), 0.0
            for token, log_prob in zip(sample.token_ids, sample.log_probs, strict=True):
                with torch.no_grad():
                    value += log_prob - float(reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids.append(token)
            expected.append(value)
    assert kl(changed, groups, batch_size=5).raw_NK[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert sum(expected) / len(expected) > 0.1  # an estimate of a divergence


def test_what_cannot_be_compared_is_missing():
    prompt = Prompt("p", "1", (49,), {})
    good = Sample((50,), (-1.0,), FinishReason.STOP, 0, "2")
    bad = Sample((50, 51), (), FinishReason.STOP, 0, "23")
    foreign = Sample((100_000,), (-1.0,), FinishReason.STOP, 0, "?")
    matrix = kl(POLICY, [SampleGroup(prompt, (good, bad, foreign))])
    assert math.isfinite(matrix.raw_NK[0, 0])
    assert "set rollout.correction to truncate or mask" in matrix.errors[1, 0]
    assert "none of the reference's" in matrix.errors[2, 0]


def test_a_run_is_held_near_its_start(launch, tmp_path):
    """At the first step policy and reference are one; brevity drives them apart."""
    objective = f"{{reward: kl_to_reference, args: {{model: {POLICY}}}, direction: minimize, bounds: [-60, 60]}}"
    settings = ("--rollout.correction=truncate", "--trl.learning_rate=1e-3", f"--objectives.closeness={objective}")
    weights = "--weighting={type: fixed, weights: {accuracy: 0, brevity: 1, clarity: 0, closeness: 0}}"
    result = launch("align.train", *overrides(tmp_path / "run", *settings, weights))
    assert result.returncode == 0, result.stderr
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["objectives/closeness/mean"] == pytest.approx(0.0, abs=1e-3)
    assert rows[-1]["objectives/closeness/mean"] > 0.01
    assert read_lines(tmp_path / "run" / "archive.jsonl")[0]["values"]["closeness"] == pytest.approx(0.0, abs=1e-3)
