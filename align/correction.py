"""How far the sampler's probabilities lie from the learner's: figures of the importance ratios that TRL applies."""

from collections.abc import Mapping

import torch

from align.config.rollout import CorrectionConfig


def correction_sums(ratios: torch.Tensor, mask: torch.Tensor, options: CorrectionConfig) -> torch.Tensor:
    """What a process adds to `correction_metrics`: count, sum, sum of squares, and how many the correction has changed.

    Args:
        ratios: After truncation or masking; (B, T), or (B, 1) at sequence level.
        mask: Of completion tokens (B, T).
        options: Which correction that was.
    """
    chosen = (ratios[:, 0] if ratios.shape[1] == 1 else ratios[mask.bool()]).double()
    changed = chosen == 0 if options.type == "mask" else (chosen >= options.max) | (chosen <= options.min)
    return torch.stack(
        [torch.tensor(float(len(chosen)), device=chosen.device), chosen.sum(), (chosen**2).sum(), changed.sum()]
    )


def correction_metrics(sums: torch.Tensor) -> Mapping[str, float]:
    """From the sums of all processes. The effective sample size is Kish's, (sum r)^2 / (n sum r^2), a share of n."""
    count, total, squares, changed = sums.tolist()
    return {
        "sampling/effective_sample_size": total**2 / (count * squares) if squares else 0.0,
        "sampling/beyond_bounds": changed / count if count else 0.0,
    }
