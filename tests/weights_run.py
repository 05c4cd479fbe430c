"""Weights gathered from several processes, for `tests/test_weights.py`: python -m tests.weights_run OUT KIND [lora].

Puts a small policy where KIND (ddp, zero2, zero3, fsdp2) puts it, takes a step, gathers its weights twice, takes another
step on the same rows, gathers again and writes OUT.safetensors; OUT.RANK.json says what this process saw on the way.
"""

import json
import sys
from pathlib import Path

import torch

LIMIT = 10_000  # bytes: several small weights fit, the embedding does not


def policy(lora: bool, tied: bool = False):
    """A Llama of four kilobytes and more, the same in every process; with LoRA on some layers, B not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if lora:
        targets = ["q_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(count: int) -> torch.Tensor:
    """Something to train on, (count, 12)."""
    return torch.randint(0, 97, (count, 12), generator=torch.Generator().manual_seed(1))


def step(model, optimizer, backward, batch) -> None:
    """One step on the policy's own loss of a batch."""
    backward(model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    optimizer.zero_grad()


def sgd(model) -> torch.optim.Optimizer:
    """Plain gradient descent: what differs in the gradient differs in the weights, in proportion."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def prepared(kind: str, lora: bool):
    """The accelerator, the policy without its wrapper, and a function that takes a step on this process's rows."""
    from accelerate import Accelerator, PartialState

    from tests.fsdp_run import shard_on_cpu

    shard_on_cpu()
    PartialState(cpu=True)  # as transformers does; Accelerator(cpu=True) would have no room for DeepSpeed
    accelerator, model = Accelerator(), policy(lora)
    if kind.startswith("zero"):
        options = accelerator.state.deepspeed_plugin.deepspeed_config
        options |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights would stay whole
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    model, backward = accelerator.unwrap_model(wrapped), accelerator.backward
    rows = tokens(4)[2 * accelerator.process_index :][:2]
    return accelerator, model, lambda: step(wrapped, optimizer, backward, rows)


def note_gathers(seen: list[int]) -> None:
    """Notes the bytes of every gather of ZeRO-3."""
    import deepspeed

    enter = deepspeed.zero.GatheredParameters.__enter__

    def noting(self):
        result = enter(self)
        seen.append(sum(p.ds_numel * p.element_size() for p in self.params))
        return result

    deepspeed.zero.GatheredParameters.__enter__ = noting


def main(out: str, kind: str, lora: bool) -> None:
    """See the module."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    from align.weights import describe_weights, named_weights

    accelerator, model, train = prepared(kind, lora)
    gathers: list[int] = []
    if kind == "zero3":
        note_gathers(gathers)

    def gather() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in named_weights(model, accelerator, gather_bytes=LIMIT)}

    train()
    first, second = gather(), gather()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    train()
    gathers.clear()
    weights = gather()
    parameters = list(model.parameters())
    zero3 = [p for p in parameters if getattr(p, "ds_numel", p.numel()) != p.numel()]
    sharded = zero3 or [p for p in parameters if isinstance(p, DTensor)]
    if accelerator.is_main_process:
        save_file(weights, f"{out}.safetensors")
    told = {
        "shapes": {name: list(tensor.shape) for name, tensor in weights.items()},
        "described": {name: list(shape) for name, _, shape in describe_weights(model)},
        "gathers": gathers,
        "kind": accelerator.distributed_type,
        "sharded": len(sharded),
    }
    Path(f"{out}.{accelerator.process_index}.json").write_text(json.dumps(told))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    from align.launch import relaunch_on_cpu

    relaunch_on_cpu("tests.weights_run", sys.argv[1:])
    main(sys.argv[1], sys.argv[2], "lora" in sys.argv[3:])
    print("weights written", flush=True)
