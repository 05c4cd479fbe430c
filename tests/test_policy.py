"""The tiny policy that ships with the project: its files, its tokenizer, how it is made, and what it can do."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewards.arithmetic import arithmetic_accuracy, arithmetic_clarity, evaluate
from rollout.arithmetic import expressions, held_out
from rollout.types import FinishReason, Sample
from scripts import make_policy
from scripts.make_policy import EOS, PAD, Recipe
from tests.conftest import ROOT

POLICY = ROOT / "align" / "policies" / "arithmetic"
TINY = Recipe(steps=3, batch=8)
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)


# --- files --------------------------------------------------------------------------------------------------------------


def test_weights_are_small_and_float32():
    weights = safetensors.torch.load_file(POLICY / "model.safetensors")
    assert (POLICY / "model.safetensors").stat().st_size <= 4 * 2**20
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_architecture_is_one_that_every_engine_loads():
    config = json.loads((POLICY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 32
    assert config["hidden_size"] == config["num_attention_heads"] * 32
    assert config["max_position_embeddings"] >= 128
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, EOS, PAD)


def test_generation_stops_and_pads_with_the_tokenizer_s_tokens():
    config = GenerationConfig.from_pretrained(POLICY)
    assert (config.eos_token_id, config.pad_token_id) == (EOS, PAD)
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.bos_token_id) == (EOS, PAD, None)
    assert (config.do_sample, config.temperature, config.top_k) == (True, 1.0, 0)


def test_no_path_of_the_machine_that_made_it_is_left():
    for file in POLICY.glob("*.json"):
        assert "name_or_path" not in file.read_text(encoding="utf-8"), file.name


def test_files_are_what_the_script_writes(tmp_path):
    make_policy.save(make_policy.make_model(seed=0), make_policy.make_tokenizer(), tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((POLICY / name).read_text()), name
    assert shapes(tmp_path) == shapes(POLICY)


def shapes(folder: Path) -> dict[str, torch.Size]:
    return {name: weights.shape for name, weights in safetensors.torch.load_file(folder / "model.safetensors").items()}


# --- tokenizer ----------------------------------------------------------------------------------------------------------


@given(st.text())
@example("7+5-3=?")
@example(" a  b , c . d 's n't ")  # what clean-ups of spaces would change
@example("\x00\r\n\t\u2028\ufeff")
@example("e\u0301 \u00e9 \u1100\u1161 \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea")
@example("<eos><pad></s><|endoftext|>")
def test_every_text_is_its_bytes_and_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, EOS, PAD], skip_special_tokens=True) == text
    assert TOKENIZER.decode([*ids, EOS]) == text + "<eos>"


def test_tokenizer_loads_by_its_older_class_name_too():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(POLICY)
    assert tokenizer("é<eos>")["input_ids"] == list("é<eos>".encode())


def test_prompts_are_padded_on_the_left():
    batch = TOKENIZER(["1+2=?", "10+2=?"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [PAD, *b"1+2=?"]
    assert batch["attention_mask"][0].tolist() == [0, 1, 1, 1, 1, 1]


# --- how it is made -----------------------------------------------------------------------------------------------------


def first_pairs(recipe: Recipe, count: int) -> list[tuple[str, str]]:
    """(expression, answer) of the first training examples."""
    batches = itertools.islice(make_policy.batches(recipe), -(-count // recipe.batch))
    pairs = [pair for batch in batches for pair in batch]
    assert all(completion[-1] == EOS for _, completion in pairs)
    return [(bytes(p).decode().removesuffix("=?"), bytes(c[:-1]).decode()) for p, c in pairs]


def test_training_answers_are_right_and_held_out_expressions_are_not_among_them():
    for expression, text in first_pairs(Recipe(), 5000):
        assert not held_out(expression), expression
        assert arithmetic_accuracy(text, evaluate(expression)) == 1, (expression, text)
        assert arithmetic_clarity(text, expression) == text.count(";") / sum(map(expression.count, "+-*/"))


def test_styles_come_in_the_shares_of_the_recipe():
    texts = [text for _, text in first_pairs(replace(Recipe(), built_in=1.0, terse=0.5, partial=0.2), 4000)]
    full = first_pairs(replace(Recipe(), built_in=1.0, terse=0.0, partial=0.0), 100)
    assert sum(text.startswith("#") for text in texts) / len(texts) == pytest.approx(0.5, abs=0.04)
    assert all(text.count(";") == sum(map(expression.count, "+-")) for expression, text in full)


def test_same_recipe_gives_the_same_weights_to_the_bit():
    first, second, other = (make_policy.train(recipe).state_dict() for recipe in (TINY, TINY, replace(TINY, seed=1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_batch_in_quarters_has_the_gradient_of_the_whole():
    batch = next(make_policy.batches(TINY))
    model = make_policy.make_model(seed=0)
    loss = make_policy.backward(model, batch)
    nll, tokens = torch.zeros(()), 0
    whole = make_policy.make_model(seed=0)
    for prompt, completion in batch:
        log_probs = whole(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll -= log_probs[range(len(completion)), completion].sum()
        tokens += len(completion)
    (nll / tokens).backward()
    assert loss == pytest.approx(nll.item() / tokens, rel=1e-5)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


# --- what it can do -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(POLICY).eval()


@pytest.fixture(scope="module")
def answers(model):
    return make_policy.sample_answers(model, TOKENIZER, expressions("evaluation", 800))


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def test_there_is_room_to_improve_and_to_choose(answers):
    assert 0.3 < mean(a.accuracy for a in answers) < 0.7
    assert 0.2 < mean(a.steps == 0 for a in answers) < 0.8
    assert mean(a.well_formed for a in answers) > 0.97


def test_working_out_pays_in_accuracy_and_costs_tokens(answers):
    terse = [a for a in answers if a.steps == 0]
    worked = [a for a in answers if a.steps > 0]
    assert mean(a.accuracy for a in terse) < 0.4
    assert mean(a.accuracy for a in worked) > 0.65
    assert mean(a.brevity for a in terse) > mean(a.brevity for a in worked) + 0.3
    assert mean(a.clarity for a in terse) == 0 < 0.6 < mean(a.clarity for a in worked)


def test_wider_expressions_are_within_reach(model):
    rng = random.Random(99)
    wider = [make_policy.wider_expression(rng) for _ in range(800)]
    rows = [{"prompt": f"{e}=?", "expression": e, "answer": evaluate(e)} for e in wider]
    assert 0.25 < mean(a.accuracy for a in make_policy.sample_answers(model, TOKENIZER, rows)) < 0.75


def test_it_was_measured_with_the_rewards_of_the_task():
    sample = Sample((*b"7+5=12;#9", EOS), (), FinishReason.STOP, 0, "7+5=12;#9")
    answer = make_policy.score({"expression": "7+5-3", "answer": 9}, sample)
    assert answer == make_policy.Answer(1, 2, well_formed=True, accuracy=1.0, brevity=1 - 10 / 32, clarity=0.5)
    cut = make_policy.score({"expression": "7+5-3", "answer": 9}, replace(sample, finish_reason=FinishReason.LENGTH))
    assert not cut.well_formed


def test_table_has_shares_means_and_standard_errors():
    answers = [make_policy.Answer(0, 2, True, right, 0.875, 0.0) for right in (0.0, 1.0, 1.0, 1.0)]
    lines = make_policy.table(answers).splitlines()
    assert lines[1].split()[:5] == ["all", "1.000", "0.750", "+-", "0.250"]
    assert lines[3].split() == ["worked", "out", "0.000", "-", "-", "-", "-"]
