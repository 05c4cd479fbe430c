"""What others may ask of the policy under training: its weights, and log-probabilities. Imports no TRL."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather

from align.config import Config
from align.weights import describe_weights, named_weights


class PolicyAccess:
    """Mixed into a trainer of TRL's; all processes call each of these together, for weights may be shared among them."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, under the names of a checkpoint, in the type that the sampler computes in."""
        return named_weights(self.model, self.accelerator, sampler_dtype(self.parts.config))

    def describe_weights(self) -> Sequence[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of all that `named_weights` gives; nothing is gathered."""
        return describe_weights(self.model, sampler_dtype(self.parts.config))

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities (S, T - 1), nats, of the tokens of S sequences but for the first of each, at temperature 1."""
        tokens = torch.tensor(sequences, device=self.accelerator.device)
        with self.at_temperature_one():
            log_probs = self._log_probs(tokens, torch.ones_like(tokens), tokens.shape[1] - 1)
        return log_probs.double().cpu().numpy()

    def log_ratios(self, batch: Mapping[str, Any]) -> np.ndarray:
        """log pi(y) / pi_ref(y) of every sample of all processes (N,), summed over its tokens, nats."""
        ratios = ((self.batch_log_probs(batch) - batch["ref_per_token_logps"]) * batch["completion_mask"]).sum(dim=1)
        return gather(ratios).double().cpu().numpy()

    def batch_log_probs(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Log-probabilities (B, T) of the completion tokens of this process's batch, nats; meaningless where masked."""
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return self._log_probs(tokens, mask, batch["completion_ids"].size(1))

    def _log_probs(self, tokens: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """Of the last `keep` tokens of every row (B, keep), without dropout."""
        self.model.eval()
        with torch.no_grad():
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.model, tokens, mask, keep, batch_size=self.args.per_device_train_batch_size
            )
        self.model.train()
        return log_probs


def sampler_dtype(config: Config) -> torch.dtype | None:
    """Type of the weights that a sampler is sent; None where it has the learner's own."""
    engine = config.rollout.engine
    return getattr(torch, engine.dtype or config.policy.dtype) if engine.type == "vllm" else None
