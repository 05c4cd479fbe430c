"""Features of the gradient probe against per-sequence autograd, on tiny models of several kinds."""

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.config.weighting import ProbeConfig
from align.probe import Pass, find_layers
from align.probe_features import Matrix, Norm, Projection
from tests import conftest  # noqa: F401  (sets the environment)

SIZES = {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 12}
ADVANTAGES = torch.tensor([1.0, -0.5, 1e-5, 2.0])
PROMPT, TOKENS = 4, 10  # the first prompts are padded on the left, the last completion on the right
IDS = torch.randint(0, 41, (4, TOKENS), generator=torch.Generator().manual_seed(1))
IDS[2, 5] = 0  # padding of the first model, whose row its embedding never trains
MASK = torch.ones_like(IDS)
MASK[0, :2] = MASK[1, :1] = MASK[3, 8:] = 0


def llama():
    return LlamaForCausalLM(LlamaConfig(**GROUPED, pad_token_id=0, tie_word_embeddings=False, attention_bias=True))


def tied_llama():
    return LlamaForCausalLM(LlamaConfig(**GROUPED, pad_token_id=None, tie_word_embeddings=True))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, tie_word_embeddings=False))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=41, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def lora():
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # the zeros that it starts from would hide the gradient of A
    model.enable_input_require_grads()
    return model


def made(maker, checkpointing: bool = False):
    PartialState()
    torch.manual_seed(0)
    model = maker().train()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, mean=0.5)  # gains of both signs, and small ones
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model, coefficients: torch.Tensor) -> torch.Tensor:
    """Linear in the coefficients of the sequences; completion tokens alone have a loss."""
    log_probs = model(IDS, attention_mask=MASK, use_cache=False).logits[:, :-1].log_softmax(-1)
    own = log_probs.gather(2, IDS[:, 1:, None])[..., 0] * MASK[:, 1:]
    return (coefficients * own[:, PROMPT - 1 :].mean(1)).sum()


def truth(model, layers) -> torch.Tensor:
    """U^T G V and full gains (B, D), of the gradient of one sequence after the other."""
    rows = []
    for i in range(4):
        model.zero_grad()
        loss_of(model, torch.eye(4)[i]).backward()
        parts = []
        for layer in layers:
            gradient, bias = layer.module.weight.grad, getattr(layer.module, "bias", None)
            if isinstance(layer, Norm):
                parts += [gradient] + ([bias.grad] if bias is not None else [])
            else:
                transposed = isinstance(layer, Matrix) and isinstance(layer.module, torch.nn.Linear)
                gradient = gradient.T if transposed else gradient
                reader = layer.inputs.matrix
                if isinstance(layer, Matrix) and bias is not None:
                    gradient, reader = torch.cat([gradient, bias.grad[None]]), torch.cat([reader, layer.inputs._bias])
                parts.append((reader.T @ gradient @ layer.outputs.matrix).flatten())
        rows.append(torch.cat(parts))
    model.zero_grad()
    return torch.stack(rows)


def scores(model, layers, advantages: torch.Tensor, extra: bool) -> torch.Tensor:
    hooks = hooks_of(layers)
    this = Pass(layers, 4, TOKENS)
    this.advantages_B, this.advantages_BK = advantages, torch.eye(4)
    loss = this.forward(lambda: loss_of(model, advantages))
    if extra:
        torch.autograd.grad(loss, this.roots)
        assert all(parameter.grad is None for parameter in model.parameters())
    else:
        (loss * 1024).backward()  # as half precision scales it
    this.finish()
    assert hooks_of(layers) == hooks
    return this.projected_KD


def hooks_of(layers) -> int:
    return sum(len(layer.module._forward_hooks) + len(layer.module._forward_pre_hooks) for layer in layers)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("features", ["norms", "sketch"])
@pytest.mark.parametrize("maker", [llama, tied_llama, qwen2, qwen3, gpt2, lora])
def test_features_are_those_of_per_sequence_autograd(maker, features, checkpointing):
    if (maker, features) == (lora, "norms"):
        pytest.skip("frozen")
    model = made(maker, checkpointing)
    layers = find_layers(model, ProbeConfig(features=features, size=5), seed=3)
    expected = truth(model, layers)
    if maker is tied_llama and features == "sketch":  # a tied embedding is read on its input side alone
        layers_seen = slice(layers[0].width, None)
    elif maker is gpt2 and features == "sketch":  # learned positions are one row for the whole batch
        position = next(layer for layer in layers if layer.name.endswith("wpe"))
        start = sum(layer.width for layer in layers[: position.index])
        assert not scores(model, layers, torch.ones(4), extra=True)[:, start : start + position.width].any()
        layers_seen = slice(start + position.width, None)
    else:
        layers_seen = slice(None)
    for found in (scores(model, layers, torch.ones(4), extra=True), scores(model, layers, ADVANTAGES, extra=False)):
        error = (found - expected)[:, layers_seen].abs().amax(1) / expected[:, layers_seen].abs().amax(1)
        assert error.max() < 1e-5, error


@pytest.mark.parametrize("maker", [llama, qwen3, lora])
def test_a_wide_sketch_and_the_norms_lose_nothing(maker):
    model = made(maker)
    layers = find_layers(model, ProbeConfig(features="sketch", size=200), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n}
    assert {layer.name + ".weight" for layer in layers} == {name for name in trained if name.endswith("weight")}
    expected = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, torch.eye(4)[i]), list(trained.values()))])
            for i in range(4)
        ]
    )
    found = scores(model, layers, torch.ones(4), extra=True)
    assert torch.allclose(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-6)


def test_the_sketch_is_an_unbiased_estimate():
    torch.manual_seed(0)
    a, b = torch.randn(30, 20), torch.randn(30, 20)
    b += 0.5 * a
    found = torch.tensor(
        [
            float(((u.T @ a @ v) * (u.T @ b @ v)).sum())
            for seed in range(3000)
            for u, v in [(Projection(30, 4, 2 * seed).matrix, Projection(20, 4, 2 * seed + 1).matrix)]
        ]
    )
    error = found.std() / 3000**0.5
    assert abs(found.mean() - (a * b).sum()) < 3 * error
    assert error < 0.1 * (a * b).sum()


def test_what_cannot_be_read_is_left_out_and_counted():
    model = made(llama)
    layers = find_layers(model, ProbeConfig(features="norms"), seed=0)
    expected = scores(model, layers, torch.ones(4), extra=True)
    this = Pass(layers, 4, TOKENS)
    this.advantages_B = torch.tensor([0.0, -0.5, 1e-9, 0.0])
    this.advantages_BK = torch.tensor([[1.0, -1.0], [0.5, -1.0], [0.0, 2.0], [0.0, 0.0]])
    this.forward(lambda: loss_of(model, this.advantages_B)).backward()
    this.finish()
    assert float(this.lost) == 2  # the objectives of the first cancel, the third is next to nothing; the last has none
    assert torch.allclose(this.projected_KD, torch.stack([0.5 * expected[1], -expected[1]]), rtol=1e-3, atol=1e-7)


def test_frozen_layers_are_refused_with_the_way_out():
    model = made(llama)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    with pytest.raises(ValueError, match=r"weighting\.probe\.features=norms: this policy trains no norm.*=sketch or exact"):
        find_layers(model, ProbeConfig(features="norms"), seed=0)
    assert not any(isinstance(layer, Norm) for layer in find_layers(model, ProbeConfig(features="sketch"), seed=0))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weighting\.probe\.features=sketch.*frozen, quantised.*take .*=exact"):
        find_layers(model, ProbeConfig(features="sketch"), seed=0)
