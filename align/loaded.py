"""A policy out of a folder or the hub, in one process: what evaluation needs of a learner without training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.build import is_adapter
from align.config import Config
from align.policy import sampler_dtype
from align.weights import describe_weights, named_weights


def load_model(path: str, config: Config) -> PreTrainedModel:
    """The model of a folder or the hub, its LoRA weights where it is a folder of these, not for training."""
    loader = AutoPeftModelForCausalLM if is_adapter(path) else AutoModelForCausalLM
    options = {} if Path(path).is_dir() else {"revision": config.policy.revision}  # of a hub model
    options |= {"dtype": config.policy.dtype, "trust_remote_code": config.policy.trust_remote_code}
    return loader.from_pretrained(path, **options).eval()


def end_tokens(model: PreTrainedModel, eos_token_id: int) -> list[int]:
    """Ids that end a completion: the tokenizer's `eos_token_id`, and what the model itself names."""
    stop = model.generation_config.eos_token_id
    return sorted({*([stop] if isinstance(stop, int) else stop or []), eos_token_id})


class LoadedPolicy:
    """Takes the place of a learner before a sampler. One policy at a time: `load` puts another one in its place.

    Args:
        config: Says in which type it is kept, and which sampler gets it.
        path: Folder or hub name; a folder of LoRA weights names the model they belong to.
        eos_token_id: Of the tokenizer; it ends a completion, as those do that the model itself names.
    """

    def __init__(self, config: Config, path: str, eos_token_id: int):
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self._config = config
        self._eos_token_id = eos_token_id
        self.load(path)

    def load(self, path: str) -> None:
        """Put another policy in the place of this one."""
        self.model = load_model(path, self._config).to(self.accelerator.device)
        self.eos_token_ids = end_tokens(self.model, self._eos_token_id)

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The model, ready to generate."""
        yield self.model

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `align.push.Policy`."""
        return named_weights(self.model, self.accelerator, sampler_dtype(self._config))

    def describe_weights(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See `align.push.Policy`."""
        return describe_weights(self.model, sampler_dtype(self._config))

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """See `align.push.Policy`."""
        tokens = torch.tensor(sequences, device=self.accelerator.device)
        log_probs = self.model(tokens).logits[:, :-1].float().log_softmax(-1)
        return log_probs.gather(2, tokens[:, 1:, None])[..., 0].double().cpu().numpy()
