"""The policy's weights as a checkpoint has them: against what transformers and peft save, from one process and from two."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from align.weights import Piece, describe_weights, grouped, named_weights
from tests import forks, weights_run
from tests.conftest import ROOT, environment


def gathered(model, **options) -> dict[str, torch.Tensor]:
    """All of them, in one process."""
    found = [(name, tensor.clone()) for name, tensor in named_weights(model, Accelerator(cpu=True), **options)]
    assert len(dict(found)) == len(found)  # no name twice
    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found]
    assert describe_weights(model, options.get("dtype")) == described
    return dict(found)


def saved(model, folder) -> dict[str, torch.Tensor]:
    """What transformers writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Same names, shapes and types, and values within the tolerance."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def moe():
    """A model that keeps the experts of a layer in one tensor; its checkpoint has one for each."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8))


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: weights_run.policy(False), lambda: weights_run.policy(False, tied=True), moe])
def test_plain_weights_are_those_of_the_checkpoint(tmp_path, make):
    model = make()
    assert_equal(gathered(model), saved(model, tmp_path))


def test_a_loaded_policy_has_the_names_it_was_loaded_from():
    folder = ROOT / "align" / "policies" / "arithmetic"
    assert_equal(gathered(AutoModelForCausalLM.from_pretrained(folder)), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
def test_lora_is_merged_and_the_model_is_left_alone(tied):
    model = weights_run.policy(lora=True, tied=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = gathered(model)
    assert_equal(model.state_dict(), before)
    expected = model.merge_and_unload().state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert_equal(found, expected, 1e-6)
    plain = gathered(weights_run.policy(lora=False, tied=tied))
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert changed == {f"model.layers.{i}.{own}.weight" for i in range(3) for own in ("self_attn.q_proj", "mlp.down_proj")}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_lora_on_bfloat16_is_merged_as_peft_does(dtype):
    model = weights_run.policy(lora=True).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # peft's own choice for a base in half precision
    found = gathered(model, dtype=dtype)
    expected = model.merge_and_unload().state_dict()
    assert_equal(found, {name: tensor.to(dtype or torch.bfloat16) for name, tensor in expected.items()})


def test_lora_on_untied_embeddings(tmp_path):
    options = {"target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    model = get_peft_model(weights_run.policy(False), LoraConfig(**options))
    found = gathered(model)
    assert_equal(found, model.merge_and_unload().state_dict(), 1e-6)


def test_inactive_and_merged_adapters_add_nothing():
    model = weights_run.policy(lora=True)
    model.add_adapter("other", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    found = gathered(model)
    assert_equal(found, gathered(weights_run.policy(lora=True)))
    model.merge_adapter()
    assert_equal(gathered(model), found, 1e-6)


def test_the_type_is_that_asked_for_and_buffers_of_whole_numbers_keep_theirs():
    model = weights_run.policy(False)
    model.model.register_buffer("table", torch.arange(5))
    model.model.register_buffer("passing", torch.ones(5), persistent=False)
    found = gathered(model, dtype=torch.bfloat16)
    assert found.pop("model.table").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert "model.passing" not in found
    assert {tensor.dtype for tensor in gathered(model).values()} == {torch.float32, torch.int64}


def test_tensors_are_detached_contiguous_and_not_copied():
    model = weights_run.policy(False)
    own = dict(model.named_parameters())
    own["lm_head.weight"].data = own["lm_head.weight"].data.T.contiguous().T  # as if transposed
    for name, tensor in named_weights(model, Accelerator(cpu=True)):
        assert torch.is_grad_enabled()  # the caller's mode is his own
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() == own[name].data_ptr()) == (name != "lm_head.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj .*only plain LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head .*only plain LoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj .*only plain LoRA"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "embed_tokens .*only plain LoRA"),
        ({"target_modules": ["embed_tokens"]}, "tied weights .*policy.lora.target_modules"),
    ],
)
def test_what_is_no_plain_lora_is_refused(options, message):
    model = get_peft_model(weights_run.policy(False, tied="embed" in message or "tied" in message), LoraConfig(**options))
    with pytest.raises(ValueError, match=message):
        next(named_weights(model, Accelerator(cpu=True)))


def test_a_checkpoint_that_fuses_weights_is_refused(monkeypatch):
    def fusing(base, tensors):
        part = {name: tensor for name, tensor in tensors.items() if "q_proj.weight" not in name}
        return part if len(tensors) > 1 else tensors

    monkeypatch.setattr("align.weights.revert_weight_conversion", fusing)
    with pytest.raises(ValueError, match="fuses weights"):
        next(named_weights(weights_run.policy(False), Accelerator(cpu=True)))


def test_neighbours_are_gathered_together_up_to_the_limit():
    sizes = [3, 3, 4, 9, 1, 1, 10, 2]  # bytes
    pieces = [Piece(str(i), {}, (torch.empty(n, dtype=torch.int8),), lambda: None) for i, n in enumerate(sizes)]
    groups = [[int(piece.name) for piece in group] for group in grouped(pieces, limit=8)]
    assert groups == [[0, 1], [2], [3], [4, 5], [6], [7]]  # 3+3+4 > 8; 9 and 10 are alone
    assert [len(group) for group in grouped(pieces, limit=33)] == [8]


# --- two processes ----------------------------------------------------------------------------------------------------


def of_one_process(lora: bool) -> dict[str, torch.Tensor]:
    """The weights after the two steps that `weights_run` takes."""
    model = weights_run.policy(lora)
    optimizer = weights_run.sgd(model)
    for _ in range(2):
        weights_run.step(model, optimizer, torch.Tensor.backward, weights_run.tokens(4))
    return gathered(model)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("ddp", False), ("zero2", False), ("zero3", False), ("zero3", True), ("fsdp2", False), ("fsdp2", True)],
)
def test_two_processes_gather_the_weights_that_one_would_have(tmp_path, kind, lora):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    out, env = str(tmp_path / "weights"), environment(2)
    del env["ACCELERATE_USE_CPU"]  # it leaves no room for DeepSpeed
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{kind}.yaml"]
    arguments = ["--num_processes", "2", "--mixed_precision", "no", "-m", "tests.weights_run", out, kind] + ["lora"] * lora
    result = forks.run([*launcher, *arguments], cwd=ROOT, env=env, timeout=200)
    assert result.stdout.count("weights written") == 2, result.stderr
    expected = of_one_process(lora)
    assert_equal(load_file(f"{out}.safetensors"), expected, 1e-6)
    first, second = (json.loads((tmp_path / f"weights.{rank}.json").read_text()) for rank in (0, 1))
    assert first["shapes"] == {name: list(tensor.shape) for name, tensor in expected.items()}
    assert second["shapes"] == {name: [0] for name in first["shapes"]}
    assert first["described"] == second["described"] == first["shapes"]
    assert bool(first["sharded"]) == (kind in ("zero3", "fsdp2"))
    if kind == "zero3":
        weights = weights_run.policy(lora).named_parameters()
        largest = max(tensor.numel() * 4 for name, tensor in weights)
        assert max(first["gathers"]) <= weights_run.LIMIT + largest
        assert max(first["gathers"]) < sum(tensor.numel() * 4 for tensor in expected.values()) / 4
        assert len(first["gathers"]) > 4
