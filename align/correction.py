"""How far the sampler's probabilities lie from the learner's: figures of the importance ratios that TRL applies."""

from collections.abc import Mapping

import torch


def correction_metrics(ratios: torch.Tensor, mask: torch.Tensor, cap: float) -> Mapping[str, float]:
    """Of importance ratios after truncation or masking, (B, T) or (B, 1); 1 everywhere when the engines agree.

    The effective sample size is Kish's, (sum r)^2 / (n sum r^2), as a share of n.
    """
    chosen = ratios[:, 0] if ratios.shape[1] == 1 else ratios[mask.bool()]
    squares = (chosen**2).sum()
    effective = (chosen.sum() ** 2 / (len(chosen) * squares)).item() if squares > 0 else 0.0
    return {
        "sampling/effective_sample_size": effective,
        "sampling/beyond_bounds": ((chosen >= cap) | (chosen == 0)).double().mean().item(),
    }
