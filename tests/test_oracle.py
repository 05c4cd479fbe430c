"""One step through TRL equals the reference loop: advantages, loss and updated parameters."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import reference_loop
from tests.conftest import WEIGHTS, read_lines

CASES = {  # estimator -> the reference's
    "{type: grpo}": reference_loop.grpo,
    "{type: grpo, scale: none}": reference_loop.dr_grpo,
    "{type: rloo}": reference_loop.rloo,
    "{type: reinforce, whiten: false}": reference_loop.reinforce,
    "{type: reinforce}": reference_loop.reinforce_whitened,
}


def groups_of(learner) -> list[list[reference_loop.Completion]]:
    """The samples of the step, with their rewards, as the reference wants them."""
    rewards = iter(learner._gathered.values_NK.tolist())
    return [
        [reference_loop.Completion(list(g.prompt.token_ids), list(s.token_ids), next(rewards)) for s in g.samples]
        for g in learner._groups
    ]


@pytest.mark.parametrize(("estimator", "optimizer"), [*((case, "sgd") for case in CASES), ("{type: grpo}", "adamw_torch")])
def test_one_step_equals_the_reference_loop(make_learner, tmp_path, estimator, optimizer):
    rate = 0.1 if optimizer == "sgd" else 1e-4
    learner = make_learner(
        "--steps=1",
        f"--estimator={estimator}",
        "--evaluation.every=0",
        "--learner.micro_batch_size=8",  # two passes: gradient accumulation must not show
        f"--trl.optim={optimizer}",
        "--trl.adam_epsilon=1e-6",  # with 1e-8 a gradient that is 0 but for rounding still moves its weight
        f"--trl.learning_rate={rate}",
    )
    model = load(learner)  # fresh from disk: TRL patches the forward of its own
    seen = {}
    take = learner._generate_and_score_completions
    learner._generate_and_score_completions = lambda inputs: seen.setdefault("batch", take(inputs))
    learner.train()

    groups = groups_of(learner)
    advantages = CASES[estimator](reference_loop.weighted_sums(groups, list(WEIGHTS.values())))
    np.testing.assert_allclose(seen["batch"]["advantages"].numpy(), np.concatenate(advantages), atol=1e-5)

    torch.manual_seed(0)
    make = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optimizer]
    settings = {} if optimizer == "sgd" else {"weight_decay": 0.0, "eps": 1e-6}
    loss = reference_loop.policy_loss(model, groups, advantages)
    reference_loop.update(model, make(model.parameters(), lr=rate, **settings), loss)
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for (name, ours), theirs in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert any((a != b).any() for a, b in zip(model.parameters(), load(learner).parameters(), strict=True))  # it did move


def load(learner) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(learner.parts.model)


def test_the_reference_loop_learns(capsys):
    """It is a trainer of its own, so it must raise what it is asked to raise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, eos_token_id=7
    )
    model = LlamaForCausalLM(config)
    prompts = [([1, 2], {}), ([3], {})]
    reference_loop.train(
        model, prompts, lambda ids, row: [ids.count(5) / 8, 0.0], [1.0, 0.0], steps=30, prompts_per_batch=2,
        samples_per_prompt=8, stop_id=7, max_tokens=8, learning_rate=3e-3,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split("[")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last > first + 0.3
