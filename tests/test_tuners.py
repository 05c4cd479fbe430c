"""Weighted losses of TRL's trainers against an explicit loop over samples, and against TRL's own where weights are equal."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from align.launch import quiet
from align.learner_args import tuner_arguments
from align.load import load_config
from align.plan import make_plan
from align.selftrain import policy_copy
from align.selftrain.choose import mismatched
from align.selftrain.policy_copy import PolicyCopy
from align.selftrain.tuners import WeightedDPO, WeightedKTO, WeightedSFT, fine_tune, tuner_config
from tests.conftest import ROOT

POLICY = str(ROOT / "align" / "policies" / "arithmetic")
ROUNDS = str(ROOT / "configs" / "rounds.yaml")
KINDS = {"sft": WeightedSFT, "dpo": WeightedDPO, "kto": WeightedKTO}
BETA, N = 0.05, 6
SEEDS = np.random.default_rng(7)
PROMPTS = [SEEDS.integers(5, 16, size=3 + i % 3).tolist() for i in range(N)]
RIGHT = [SEEDS.integers(5, 16, size=2 + i % 4).tolist() for i in range(N)]
WRONG = [SEEDS.integers(5, 16, size=5 - i % 4).tolist() for i in range(N)]
EQUAL_LENGTH = [SEEDS.integers(5, 16, size=4).tolist() for _ in range(N)]
WEIGHTS = [0.0, 0.2, 3.0, 1.0, 1.3, 0.5]
REFERENCE = -SEEDS.uniform([[25.0], [80.0]], [[60.0], [120.0]], size=(2, N))  # log-probabilities under another policy


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY, padding_side="left")


def arguments(method: str, folder, micro: int = N, *more: str):
    quiet()
    given = (f"--rounds.method={method}", f"--rounds.beta={BETA}", f"--rounds.batch_size={N}", *more)
    config = load_config(ROUNDS, [*given, f"--learner.micro_batch_size={micro}"])
    return tuner_config(method, tuner_arguments(config, make_plan(config, 1), folder))


def rows_of(method: str, weights, right=RIGHT) -> list[dict]:
    if method == "sft":
        return [
            {"input_ids": p + c, "labels": [-100] * len(p) + c, "weight": w}
            for p, c, w in zip(PROMPTS, right, weights, strict=True)
        ]
    if method == "dpo":
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "weight")
        return [dict(zip(names, row, strict=True)) for row in zip(PROMPTS, RIGHT, WRONG, *REFERENCE, weights, strict=True)]
    completions = [RIGHT[i] if i % 3 else WRONG[i] for i in range(N)]
    names = ("prompt_ids", "completion_ids", "KL_completion_ids", "label", "ref_logps", "ref_KL_logps", "weight")
    columns = (PROMPTS, completions, mismatched(completions, N), [i % 3 > 0 for i in range(N)], *REFERENCE, weights)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def trainer_of(method: str, folder, weights=WEIGHTS, **more):
    from datasets import Dataset

    rows = Dataset.from_list(rows_of(method, weights, **more))
    trainer = KINDS[method](model=POLICY, args=arguments(method, folder), train_dataset=rows, processing_class=tokenizer())
    trainer.model.double().train()
    return trainer, next(iter(trainer.get_train_dataloader()))


def loss_of(trainer, batch) -> torch.Tensor:
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    return trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Length of the difference of two gradients, as a share of that of the second; TRL's head computes in float32."""
    first, second = (torch.cat([each.double().flatten() for each in gradient]) for gradient in (a, b))
    return float((first - second).norm() / second.norm())


def log_prob(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """ln pi(completion | prompt), one sequence at a time and without padding."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(dim=-1)
    return sum(logits[len(prompt) + t - 1, token] for t, token in enumerate(completion))


def losses_by_hand(model, method: str) -> list[torch.Tensor]:
    rows = rows_of(method, WEIGHTS)
    if method == "sft":
        return [-log_prob(model, p, c) / len(c) for p, c in zip(PROMPTS, RIGHT, strict=True)]
    if method == "dpo":
        good = [log_prob(model, r["prompt_ids"], r["chosen_ids"]) - r["ref_chosen_logps"] for r in rows]
        bad = [log_prob(model, r["prompt_ids"], r["rejected_ids"]) - r["ref_rejected_logps"] for r in rows]
        return [-torch.log(1 / (1 + torch.exp(-BETA * (g - b)))) for g, b in zip(good, bad, strict=True)]
    with torch.no_grad():
        crossed = [log_prob(model, r["prompt_ids"], r["KL_completion_ids"]) - r["ref_KL_logps"] for r in rows]
        z = float(sum(crossed)) / N
    assert z > 0  # else TRL takes 0
    ratios = [log_prob(model, r["prompt_ids"], r["completion_ids"]) - r["ref_logps"] for r in rows]
    return [
        1 - torch.sigmoid(BETA * (ratio - z) if row["label"] else BETA * (z - ratio))
        for ratio, row in zip(ratios, rows, strict=True)
    ]


@pytest.mark.parametrize("method", KINDS)
def test_gradients_are_those_of_a_loop_over_samples(method, tmp_path):
    trainer, batch = trainer_of(method, tmp_path)
    loss = loss_of(trainer, batch)
    found = gradients(trainer.model, loss)
    plain = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float64)
    losses = losses_by_hand(plain, method)
    by_hand = sum(w * each for w, each in zip(WEIGHTS, losses, strict=True)) / N
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert gap(found, gradients(plain, by_hand)) < 1e-5
    noted = trainer.losses()
    assert noted.weighted == pytest.approx(by_hand.item(), rel=1e-5)
    assert noted.unweighted == pytest.approx(sum(losses).item() / N, rel=1e-5)


@pytest.mark.parametrize("method", KINDS)
def test_equal_weights_give_the_loss_of_trl_itself(method, tmp_path):
    """Likelihood: where completions are equally long, for TRL takes the mean over tokens."""
    more = {"right": EQUAL_LENGTH} if method == "sft" else {}
    trainer, batch = trainer_of(method, tmp_path, [1.0] * N, **more)
    own = {key: value for key, value in batch.items() if key != "weight"}
    original = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer}[method].compute_loss
    if method == "sft":
        expected = original(trainer, trainer.model, own)
    else:
        expected = {"dpo": DPOTrainer, "kto": KTOTrainer}[method]._compute_loss(trainer, trainer.model, own, False)
    mine = loss_of(trainer, batch)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    theirs = [gradient.clone() for gradient in gradients(trainer.model, expected)]
    assert gap(gradients(trainer.model, mine), theirs) < 1e-5


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_micro_batches_make_no_difference(method, tmp_path):
    """Plain gradient descent, for Adam forgets the size of a gradient."""
    weights = {}
    for micro in (N, 2):
        folder = tmp_path / str(micro)
        options = arguments(method, folder, micro, "--trl.optim=sgd", "--rounds.learning_rate=0.5")
        tuned = fine_tune(method, options, POLICY, "", None, rows_of(method, WEIGHTS), tokenizer(), folder / "out")
        assert tuned.steps == 1
        weights[micro] = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    start = AutoModelForCausalLM.from_pretrained(POLICY).state_dict()
    moved = max((weights[N][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3
    for name, tensor in weights[N].items():
        torch.testing.assert_close(weights[2][name], tensor, rtol=0, atol=1e-5 * max(1, float(moved)))


@pytest.mark.parametrize("at_once", [policy_copy.TOKENS, 3, 1])
def test_the_policy_scores_as_a_loop_does(monkeypatch, at_once):
    """However many tokens have their logits worked on at once."""
    monkeypatch.setattr(policy_copy, "TOKENS", at_once)
    config = load_config(ROUNDS)
    policy = PolicyCopy(config, tokenizer(), 4)
    policy.load(POLICY)
    found = policy.completion_log_probs(list(zip(PROMPTS, WRONG, strict=True)))
    with torch.no_grad():
        expected = [log_prob(policy.model, p, c).item() for p, c in zip(PROMPTS, WRONG, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert policy.score(EQUAL_LENGTH).shape == (N, 3)
