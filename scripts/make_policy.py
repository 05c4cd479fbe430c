"""Makes the tiny policy that ships with the project: `python -m scripts.make_policy --out DIR`.

A byte-level Llama learns, by supervised training on made-up expressions alone, to answer `7+5-3=?` in one of three
styles: tersely (`#9`), worked out (`7+5=12;12-3=9;#9`), or in between, the last steps left to the head (`7+5=12;#9`).
It is meant to be mediocre: what reinforcement learning can then reach depends on what the rewards ask for.
"""

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rewards.arithmetic import arithmetic_accuracy, arithmetic_clarity, worked_steps
from rewards.text import brevity
from rollout.arithmetic import all_expressions, expressions, gsm8k_expressions, held_out, results
from rollout.local import LocalSampler
from rollout.prompts import Rendering, render_prompts
from rollout.sampler import SamplingParams
from rollout.types import FinishReason, Sample

EOS, PAD = 256, 257  # token ids; 0 to 255 are the bytes
CONTEXT = 256  # tokens
MAX_TOKENS = 32  # of a completion, wherever the policy is measured
IGNORED = -100  # label of tokens that are not learned
WELL_FORMED = re.compile(r"(-?[0-9]+[-+*/][0-9]+=-?[0-9]+;)*#-?[0-9]+")
MEASURES = ("accuracy", "brevity", "clarity", "well_formed")

Batch = list[tuple[list[int], list[int]]]  # (prompt ids, completion ids)


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on.

    Args:
        steps: Optimiser steps.
        batch: Sequences per step.
        learning_rate: Peak; reached after 100 steps, held for the first half, then falling to 0.
        built_in: Share of expressions of the built-in task; the rest are wider ones.
        terse: Share of answers without any step.
        partial: Share of answers with the first steps only; where there is but one, it is left out.
        seed: Of weights and data.
    """

    steps: int = 2500
    batch: int = 128
    learning_rate: float = 3e-3
    built_in: float = 0.1
    terse: float = 0.45
    partial: float = 0.2
    seed: int = 0


# --- model and tokenizer --------------------------------------------------------------------------------------------------


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 0.49 M parameters, float32, input and output embeddings untied."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=1.0, top_k=0)
    return model


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte of UTF-8, and `<eos>` and `<pad>`, which no text can spell."""
    tokenizer = Tokenizer(
        models.BPE(vocab={character: byte for byte, character in enumerate(_byte_characters())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


# --- data -----------------------------------------------------------------------------------------------------------------


def wider_expression(rng: random.Random) -> str:
    """Two or three operands of up to three digits under `+ - * /`; so have all results on the way."""
    while True:
        product = _operand(rng)  # of the factors since the last + or -
        expression = str(product)
        for _ in range(rng.choice((1, 1, 2))):
            operator = rng.choice("+-*/")
            operand = rng.choice(_divisors(product)) if operator == "/" else _operand(rng)
            product = {"*": product * operand, "/": product // operand}.get(operator, operand)
            expression += f"{operator}{operand}"
        if not held_out(expression) and all(abs(value) <= 999 for value in results(expression)):
            return expression


def _operand(rng: random.Random) -> int:
    """Two digits most often; half of the numbers with several digits are round."""
    digits = rng.choice((1, 2, 2, 3))
    number = rng.randrange(10 ** (digits - 1), 10**digits)
    unit = rng.choice((1, 1, 10, 10 ** (digits - 1))) if digits > 1 else 1
    return number // unit * unit


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 999) + 1) if number % divisor == 0]


def answer(expression: str, recipe: Recipe, rng: random.Random) -> str:
    """The right answer, in a style drawn from the recipe's shares."""
    steps = worked_steps(expression)
    value = steps[-1].rpartition("=")[2]
    draw = rng.random()
    if draw < recipe.terse:
        steps = []
    elif draw < recipe.terse + recipe.partial:
        steps = steps[: rng.randrange(1, len(steps))] if len(steps) > 1 else []
    return ";".join([*steps, f"#{value}"])


def batches(recipe: Recipe) -> Iterator[Batch]:
    """Endless batches, shortest sequences first, without expressions of the built-in task's evaluation split."""
    rng = random.Random(recipe.seed)
    by_terms = [all_expressions("train", terms, "+-") for terms in (3, 4)]
    while True:
        batch = []
        for _ in range(recipe.batch):
            expression = rng.choice(rng.choice(by_terms)) if rng.random() < recipe.built_in else wider_expression(rng)
            completion = answer(expression, recipe, rng)
            batch.append(([*f"{expression}=?".encode()], [*completion.encode(), EOS]))
        yield sorted(batch, key=lambda pair: sum(map(len, pair)))


# --- training -------------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, report_every: int = 100) -> LlamaForCausalLM:
    """Train from scratch: same recipe, machine and number of threads, same weights. Prints the loss (nats per token)."""
    model, start = make_model(recipe.seed), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, batch in enumerate(itertools.islice(batches(recipe), recipe.steps), 1):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1, step / 100, _decay(recipe, step))
        loss = backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % report_every == 0 or step == recipe.steps:
            print(f"step {step}/{recipe.steps}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


def _decay(recipe: Recipe, step: int) -> float:
    """1 in the first half, then linearly down to 0."""
    return min(1.0, 2 - 2 * step / recipe.steps)


def backward(model: LlamaForCausalLM, batch: Batch) -> float:
    """Add the gradient of the mean loss per completion token, a quarter of the batch at a time to save padding."""
    tokens = sum(len(completion) for _, completion in batch)
    total = 0.0
    size = -(-len(batch) // 4)
    for part in (batch[start : start + size] for start in range(0, len(batch), size)):
        width = max(len(prompt) + len(completion) for prompt, completion in part)
        ids = torch.full((len(part), width), PAD)
        labels = torch.full((len(part), width), IGNORED)
        for row, (prompt, completion) in enumerate(part):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(completion)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / tokens).backward()
        total += loss.item() / tokens
    return total


# --- measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its number of steps, as written and as required, and its rewards."""

    steps: int
    required: int
    well_formed: bool
    accuracy: float
    brevity: float
    clarity: float


def sample_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], seed: int = 0
) -> list[Answer]:
    """One sample per row at temperature 1, scored with the rewards of the built-in task."""
    sampler = LocalSampler(lambda: nullcontext(model), tokenizer, [EOS], batch_size=500)
    prompts = render_prompts(rows, Rendering(), tokenizer)
    groups = sampler.sample(prompts, SamplingParams(samples_per_prompt=1, max_tokens=MAX_TOKENS, seed=seed))
    return [score(row, group.samples[0]) for row, group in zip(rows, groups, strict=True)]


def score(row: Mapping[str, Any], sample: Sample) -> Answer:
    return Answer(
        steps=sample.text.count(";"),
        required=len(results(row["expression"])),
        well_formed=WELL_FORMED.fullmatch(sample.text) is not None and sample.finish_reason == FinishReason.STOP,
        accuracy=arithmetic_accuracy(sample.text, row["answer"]),
        brevity=brevity(sample.token_ids, MAX_TOKENS),
        clarity=arithmetic_clarity(sample.text, row["expression"]),
    )


def table(answers: Sequence[Answer]) -> str:
    """Shares, lengths and rewards by style, each mean with its standard error."""
    styles = {
        "all": answers,
        "terse": [a for a in answers if a.steps == 0],
        "worked out": [a for a in answers if a.steps > 0],
        "- in part": [a for a in answers if 0 < a.steps < a.required],
        "- in full": [a for a in answers if 0 < a.steps >= a.required],
    }
    lines = [f"{'style':<12}{'share':>8}" + "".join(f"{name:>16}" for name in MEASURES)]
    for style, members in styles.items():
        means = "".join(f"{_mean([getattr(a, name) for a in members]):>16}" for name in MEASURES)
        lines.append(f"{style:<12}{len(members) / len(answers):>8.3f}{means}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


# --- command line ---------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the policy as transformers and vLLM load it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the policy, save it, and print what it can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the policy to")
    parser.add_argument("--measure-only", action="store_true", help="measure the policy that is in --out already")
    parser.add_argument("--gsm8k", nargs=2, metavar=("TEST", "TRAIN"), help="also measure on GSM8K: its two files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order; the matrices are too small for more to pay off
    torch.use_deterministic_algorithms(True)
    if not arguments.measure_only:
        save(train(Recipe()), make_tokenizer(), arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    sets = {"built-in task, evaluation split": expressions("evaluation", 1400)}
    if arguments.gsm8k:
        sets["GSM8K, test without train"] = 4 * gsm8k_expressions(arguments.gsm8k[0], exclude=arguments.gsm8k[1])
    for name, rows in sets.items():
        print(f"\n{name}: {len(rows)} samples at temperature 1\n{table(sample_answers(model, tokenizer, rows))}")


if __name__ == "__main__":
    main()
