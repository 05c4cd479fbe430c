"""The policy of a round as a plain model in every process: what samples, and what scores samples. Imports no TRL.

A fine-tuning may shard the policy; between two of them each process loads the weights that the last one wrote, whole and
without gradients or optimiser states, as much as a sharded learner gathers in order to sample.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config import Config
from align.loaded import end_tokens, load_model
from align.policy import sampler_dtype
from align.weights import describe_weights, named_weights

TOKENS = 128  # whose logits are worked on at once
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PolicyCopy:
    """Holds the weights of one round, and answers what a sampler asks of a learner.

    Args:
        config: Says which type the weights have.
        tokenizer: The policy's.
        micro_batch_size: Samples scored at once.
        mixed_precision: Type to compute in where the fine-tuning does so: `bf16`, `fp16`, or `no`.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, micro_batch_size: int, mixed_precision: str = "no"
    ):
        state = PartialState()
        self.accelerator = SimpleNamespace(
            process_index=state.process_index,
            num_processes=state.num_processes,
            is_main_process=state.is_main_process,
            device=state.device,
            distributed_type=DistributedType.NO,
            is_fsdp2=False,
            mixed_precision=mixed_precision,
            state=SimpleNamespace(deepspeed_plugin=None),
        )
        self._config = config
        self._tokenizer = tokenizer
        self._micro_batch_size = micro_batch_size
        self.model: PreTrainedModel
        self.eos_token_ids: list[int] = []

    def load(self, path: str) -> None:
        """Take over the weights of a folder or hub name; all of them, whatever launcher shares out models."""
        unset_hf_deepspeed_config()  # else ZeRO-3 would put a part of each weight into each process
        self.model = load_model(path, self._config).to(self.accelerator.device)
        self.eos_token_ids = end_tokens(self.model, self._tokenizer.eos_token_id)

    def release(self) -> None:
        """Give the memory back."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The model ready to generate."""
        yield self.model

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, under the names of a checkpoint, in the type that the sampler computes in."""
        return named_weights(self.model, self.accelerator, sampler_dtype(self._config))

    def describe_weights(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of all that `named_weights` gives."""
        return describe_weights(self.model, sampler_dtype(self._config))

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities (S, T - 1), nats, of the tokens of S sequences of one length but for the first of each."""
        return np.array([self._log_probs([sequence])[0] for sequence in sequences])

    def completion_log_probs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Log-probability (S,), nats, of each completion after its prompt, summed over its tokens, at temperature 1."""
        sums: list[float] = []
        for start in range(0, len(pairs), self._micro_batch_size):
            chunk = pairs[start : start + self._micro_batch_size]
            rows = self._log_probs([[*prompt, *completion] for prompt, completion in chunk])
            sums += [sum(row[len(prompt) - 1 :]) for row, (prompt, _) in zip(rows, chunk, strict=True)]
        return np.array(sums)

    @torch.no_grad()
    def _log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        width = max(map(len, sequences))
        tokens = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=self.accelerator.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=self.accelerator.device)
        kind = _AUTOCAST.get(self.accelerator.mixed_precision)
        with torch.autocast(self.accelerator.device.type, dtype=kind) if kind else nullcontext():
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return [
            _of_tokens(rows[: len(s) - 1], tokens[i, 1 : len(s)])
            for i, (rows, s) in enumerate(zip(logits, sequences, strict=True))
        ]


def _of_tokens(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> list[float]:
    """Their log-probabilities, nats, worked out in float32 for a few tokens at a time: a vocabulary may be large."""
    found: list[float] = []
    for start in range(0, len(tokens_T), TOKENS):
        part = slice(start, start + TOKENS)
        losses = torch.nn.functional.cross_entropy(logits_TV[part].float(), tokens_T[part], reduction="none")
        found += (-losses).double().tolist()
    return found
