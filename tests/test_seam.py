"""The contract with TRL: the methods that the seam overrides or calls still look and behave as it needs."""

import inspect
import json
from pathlib import Path

import pytest
from trl import GRPOTrainer

from tests.conftest import ROOT, overrides, read_lines

SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "log": ["self", "logs", "start_time"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_overridden_methods_have_the_signatures_we_override(method):
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == SIGNATURES[method]


def test_trl_still_offers_the_places_we_hold_on_to():
    assert "rollout_func" in inspect.signature(GRPOTrainer.__init__).parameters
    source = inspect.getsource(GRPOTrainer)
    for place in ("self._step", "self._buffered_inputs", "self._dist", "self.eos_token_ids", 'self._metrics = {"train"'):
        assert place in source, f"{place} is gone from GRPOTrainer"


def test_no_method_body_of_trl_is_repeated():
    ours, theirs = map(windows, ((ROOT / "align" / "learner.py").read_text(), inspect.getsource(GRPOTrainer)))
    assert len(ours) > 200
    assert not ours & theirs


def windows(source: str) -> set[tuple[str, ...]]:
    """All runs of three lines of code."""
    lines = [line.strip() for line in source.splitlines() if len(line.strip()) > 5]
    return set(zip(lines, lines[1:], lines[2:], strict=False))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}</think>{% endif %}{% endif %}"
)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tiny random chat model with the shipped tokenizer: what a hub model is, without the hub."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from align.build import locate_model

    tokenizer = AutoTokenizer.from_pretrained(locate_model("builtin:arithmetic"))
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_the_gpu_configuration_runs_with_a_tiny_chat_model(launch, chat_model, tmp_path):
    problems = [
        {
            "question": f"Tom has {n} eggs and buys {n}. How many?",
            "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
        }
        for n in range(2, 10)
    ]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("\n".join(map(json.dumps, problems)))
    source = f"{{type: file, path: {data}, prompt: question}}"
    changes = (
        f"--policy.model={chat_model}", f"--prompts.train={source}", f"--prompts.evaluation={source}", "--steps=2",
        "--rollout.prompts_per_batch=2", "--rollout.samples_per_prompt=4", "--rollout.max_tokens=24",
        "--objectives.brevity.args.max_tokens=24", "--evaluation.every=2", f"--output={tmp_path / 'run'}",
    )  # fmt: skip
    config = str(ROOT / "configs" / "gsm8k_qwen.yaml")
    checked = launch("align.cli", "check", config, *changes)
    assert checked.returncode == 0, checked.stderr
    assert "<|system|>Solve the problem step by step" in checked.stdout
    assert "<|assistant|></think>" in checked.stdout
    result = launch("align.train", "--config", config, *changes)
    assert result.returncode == 0, result.stderr
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert [point["step"] for point in read_lines(tmp_path / "run" / "archive.jsonl")] == [0, 2]


def test_real_expressions_of_gsm8k_are_trained_on(launch, tmp_path):
    lines = [
        {"question": "?", "answer": f"so <<{a}+{b}={a + b}>>{a + b} and <<{a}*2={2 * a}>>{2 * a}\n#### 1"}
        for a in range(1, 9)
        for b in range(1, 9)
    ]
    for name, part in (("train", lines[::2]), ("test", lines)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    arguments = [a for a in overrides(tmp_path / "run") if "count" not in a and "weighting" not in a]
    arguments[1] = str(ROOT / "configs" / "gsm8k_expressions.yaml")
    paths = (
        f"--prompts.train.args.path={tmp_path / 'train.jsonl'}", f"--prompts.evaluation.args.path={tmp_path / 'test.jsonl'}",
        f"--prompts.evaluation.args.exclude={tmp_path / 'train.jsonl'}",
    )  # fmt: skip
    result = launch("align.train", *arguments, *paths)
    assert result.returncode == 0, result.stderr
    assert "also trained on" not in result.stdout
    assert len(read_lines(tmp_path / "run" / "archive.jsonl")) == 3
