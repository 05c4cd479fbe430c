"""The whole method on one page, in plain torch: sample, score, weigh, estimate advantages, update.

A map for readers and the oracle of the tests: no padding, no batching, no TRL. Every sequence goes through the model on
its own and every formula is a loop. Run it: `python -m tests.reference_loop`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Completion:
    """One sampled sequence: its prompt and its own tokens, and one reward per objective."""

    prompt_ids: list[int]
    token_ids: list[int]
    rewards: list[float]


# 1. Sample ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: nn.Module, prompt_ids: list[int], stop_id: int, max_tokens: int, rng: torch.Generator) -> list[int]:
    """Draw one completion, token by token, from softmax(logits)."""
    ids: list[int] = []
    while len(ids) < max_tokens and (not ids or ids[-1] != stop_id):
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, -1]
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=rng)))
    return ids


# 2. Weigh: one number per completion out of K ---------------------------------------------------------------------------


def weighted_sums(groups: Sequence[Sequence[Completion]], weights: Sequence[float]) -> list[list[float]]:
    """sum_k w_k r_k of every completion, with the weights as shares of 1."""
    total = sum(weights)
    return [[sum(w / total * r for w, r in zip(weights, c.rewards, strict=True)) for c in group] for group in groups]


# 3. Advantages ----------------------------------------------------------------------------------------------------------


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def standard_deviation(numbers: Sequence[float]) -> float:
    centre = mean(numbers)
    return math.sqrt(sum((x - centre) ** 2 for x in numbers) / (len(numbers) - 1))


def grpo(rewards: list[list[float]]) -> list[list[float]]:
    """Against the mean of the group, in units of its standard deviation."""
    return [[(r - mean(group)) / (standard_deviation(group) + 1e-4) for r in group] for group in rewards]


def dr_grpo(rewards: list[list[float]]) -> list[list[float]]:
    """Against the mean of the group."""
    return [[r - mean(group) for r in group] for group in rewards]


def rloo(rewards: list[list[float]]) -> list[list[float]]:
    """Against the mean of the others in the group."""
    return [[r - mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)] for group in rewards]


def reinforce(rewards: list[list[float]]) -> list[list[float]]:
    """Against the mean of the batch."""
    batch = [r for group in rewards for r in group]
    return [[r - mean(batch) for r in group] for group in rewards]


def reinforce_whitened(rewards: list[list[float]]) -> list[list[float]]:
    """Against the mean of the batch, in units of its standard deviation."""
    spread = standard_deviation([r for group in rewards for r in group]) + 1e-4
    return [[a / spread for a in group] for group in reinforce(rewards)]


# 4. Loss ----------------------------------------------------------------------------------------------------------------


def log_probs(model: nn.Module, completion: Completion) -> torch.Tensor:
    """log pi(token | what came before) of the completion's own tokens."""
    ids = torch.tensor(completion.prompt_ids + completion.token_ids)
    logits = model(ids[None]).logits[0].log_softmax(-1)
    before = torch.arange(len(completion.prompt_ids) - 1, len(ids) - 1)  # the logits at t - 1 predict token t
    return logits[before, ids[before + 1]]


def policy_loss(
    model: nn.Module, groups: Sequence[Sequence[Completion]], advantages: Sequence[Sequence[float]]
) -> torch.Tensor:
    """-sum_i A_i sum_t ratio_it / (number of tokens), with ratio = pi / pi_old = 1 in value but not in gradient."""
    total, tokens = torch.zeros(()), 0
    for group, group_advantages in zip(groups, advantages, strict=True):
        for completion, advantage in zip(group, group_advantages, strict=True):
            new = log_probs(model, completion)
            total = total - advantage * (new - new.detach()).exp().sum()
            tokens += len(completion.token_ids)
    return total / tokens


# 5. Update ----------------------------------------------------------------------------------------------------------------


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, max_grad_norm: float = 1.0) -> None:
    """One optimiser step with the gradient clipped to a norm."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()


# The loop -----------------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    prompts: Sequence[tuple[list[int], dict[str, object]]],
    score: Callable[[list[int], dict[str, object]], list[float]],
    weights: Sequence[float],
    steps: int,
    prompts_per_batch: int = 4,
    samples_per_prompt: int = 8,
    stop_id: int = 256,
    max_tokens: int = 32,
    learning_rate: float = 3e-4,
) -> None:
    """Train with GRPO on fixed weights, printing the mean of every objective."""
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        groups = []
        for i in range(prompts_per_batch):
            prompt_ids, row = prompts[(step * prompts_per_batch + i) % len(prompts)]
            completions = [sample(model, prompt_ids, stop_id, max_tokens, rng) for _ in range(samples_per_prompt)]
            groups.append([Completion(prompt_ids, ids, score(ids, row)) for ids in completions])
        advantages = grpo(weighted_sums(groups, weights))
        update(model, optimizer, policy_loss(model, groups, advantages))
        rewards = [c.rewards for group in groups for c in group]
        print(step + 1, [round(mean(column), 3) for column in zip(*rewards, strict=True)])


def main() -> None:
    """Three steps on the built-in task with the shipped policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.build import locate_model
    from rewards.arithmetic import arithmetic_accuracy, arithmetic_clarity
    from rewards.text import brevity
    from rollout.arithmetic import expressions

    folder = locate_model("builtin:arithmetic")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = list(expressions(split="train", count=64))

    def score(ids: list[int], row: dict[str, object]) -> list[float]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return [
            arithmetic_accuracy(text, row["answer"]),
            brevity(ids, max_tokens=32),
            arithmetic_clarity(text, row["expression"]),
        ]

    prompts = [(tokenizer(row["prompt"])["input_ids"], row) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(folder)
    train(model, prompts, score, weights=[0.5, 0.3, 0.2], steps=3, stop_id=tokenizer.eos_token_id)


if __name__ == "__main__":
    main()
