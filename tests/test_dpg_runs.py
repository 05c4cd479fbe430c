"""`estimator: dpg` in training: the learner's step, resuming, several processes, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.advice import advise
from align.build import locate_model
from align.config.rules import contradictions
from align.control import ControlError
from align.load import ConfigError, load_config
from tests.conftest import QUICKSTART, overrides, read_lines
from tests.test_resume import assert_equal, kill_at, resume, start

ONE_STEP = '{one_step: {reward: regex_match, args: {pattern: "[^;]*;[^;]*"}}, accuracy: {reward: arithmetic_accuracy}}'
TARGET = (
    f"--objectives={ONE_STEP}",
    "--weighting={type: fixed, weights: {one_step: 1, accuracy: 1}}",
    "--estimator={type: dpg, moments: {one_step: 0.5}, fit: {prompts: 16, samples_per_prompt: 16}}",
)
ADAPTIVE = (*TARGET, "--estimator.proposal=adaptive", "--estimator.every=1")
SHORT = ("--evaluation.every=0", "--trl.learning_rate=1e-3")


def gradients_of(learner, batch, weights) -> list[torch.Tensor]:
    """Of -sum_n weight_n log pi(x_n) / tokens, by plain autograd."""
    parameters = list(learner.model.parameters())
    learner.model.eval()
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = learner.model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]
    completion = batch["completion_mask"]
    loss = -(torch.tensor(weights)[:, None] * log_probs * completion).sum() / completion.sum()
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("more", [TARGET, (*ADAPTIVE, "--policy.lora.r=4")], ids=["newest", "adaptive, lora"])
def test_the_learner_steps_by_p_over_q(make_learner, monkeypatch, more):
    """Advantages and gradients against the reference model's and the policy's own probabilities."""
    learner = make_learner(*more, *SHORT, "--steps=3")
    reference = AutoModelForCausalLM.from_pretrained(locate_model("builtin:arithmetic")).eval()
    seen, score = [], type(learner)._generate_and_score_completions

    def spy(self, inputs):
        output = score(self, inputs)
        seen.append((output, self._groups, dict(self.weight_state.control), self._gathered.raw_NK.copy()))
        if len(seen) == 1 and self.parts.config.policy.lora is None:
            theirs = gradients_of(self, output, output["advantages"].tolist())
            with self.compute_loss_context_manager():
                self.current_gradient_accumulation_steps = 1
                loss = super(type(self), self)._compute_loss(self.model, output)
            ours = torch.autograd.grad(loss, list(self.model.parameters()))
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
        return output

    monkeypatch.setattr(type(learner), "_generate_and_score_completions", spy)
    learner.train()
    for output, groups, memory, raw_NK in seen:
        log_q = np.array([sum(sample.log_probs) for group in groups for sample in group.samples])
        log_a = log_probs(reference, output)
        if "proposal" in memory and output is seen[0][0]:
            assert log_q == pytest.approx(log_a, abs=1e-3)  # the first batch comes from a
        weights = np.exp(log_a + memory["coefficients"][0] * raw_NK[:, 0] - log_q).reshape(4, 4)
        w = weights / weights.mean(axis=1, keepdims=True)
        if more is TARGET:
            assert output["advantages"].reshape(4, 4).numpy() == pytest.approx(np.minimum(w, 10) - 1, abs=2e-3)
    figures = read_lines(learner.parts.files.metrics.path) if hasattr(learner.parts.files.metrics, "path") else []
    assert all(np.isfinite(row["dpg/kl_target_policy"]) for row in figures)


def log_probs(model, batch) -> np.ndarray:
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, :-1]
    found = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]
    return (found * batch["completion_mask"]).sum(1).double().numpy()
