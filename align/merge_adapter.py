"""LoRA weights of a folder as changes of the weights that they belong to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {  # ending of a name -> which factor it is, and of an embedding or not
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
_PLAIN = {  # what adapter_config.json says of plain LoRA, and what is said where it says something else
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "rank_pattern": "ranks of single layers",
    "alpha_pattern": "scales of single layers",
    "lora_bias": "biases",
    "trainable_token_indices": "single tokens",
}


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: scale * B @ A, or its transpose.

    Args:
        a: (r, in).
        b: (out, r).
        scale: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
        transposed: Whether the layer keeps its weight as (in, out), as embeddings do.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    def delta(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As peft computes it, in the type of the factors or another one."""
        product = self.b.to(dtype) @ self.a.to(dtype)
        return (product.T if self.transposed else product) * self.scale


def read_adapter(folder: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    """Changes by the name of their weight in a checkpoint of the base model.

    Raises:
        ValueError: There are no such weights, or they are more than plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {config.get('peft_type')} adapter; only LoRA is merged")
    more = [words for key, words in _PLAIN.items() if config.get(key)]
    if more or config.get("bias", "none") != "none":
        raise ValueError(f"{folder} trains {', '.join(more or ['biases'])} besides plain LoRA, which are not merged")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has an adapter_config.json but no {WEIGHTS}")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    embeddings = set()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not iterable
            if name.endswith(".base_layer.weight"):  # peft saves a copy of the embeddings below their LoRA
                continue
            ending = next((end for end in _FACTORS if name.endswith(end)), None)
            if ending is None:
                raise ValueError(f"{folder} trains {name} besides plain LoRA, which is not merged")
            letter, embedding = _FACTORS[ending]
            module = name.removeprefix(_PREFIX).removesuffix(ending)
            factors.setdefault(module, {})[letter] = file.get_tensor(name)
            embeddings |= {module} if embedding else set()
    changes = {}
    for module, both in factors.items():
        rank = both["a"].shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        transposed = bool(config.get("fan_in_fan_out")) or module in embeddings
        changes[f"{module}.weight"] = LowRank(both["a"], both["b"], scale, transposed)
    return changes
