"""Losses of single samples and pairs, before any weight and any average."""

import torch
import torch.nn.functional as F


def preference_losses(margins_n: torch.Tensor, beta: float) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al., 2305.18290), one loss per pair.

    loss = -ln sigmoid(beta * margin), with margin = ln pi(chosen) / ref(chosen) - ln pi(rejected) / ref(rejected).

    Args:
        margins_n: Nats, summed over completion tokens.
        beta: Per nat; how closely the policy is held to the reference.
    """
    return -F.logsigmoid(beta * margins_n)


def kto_losses(log_ratios_n: torch.Tensor, divergence: float, desirable_n: torch.Tensor, beta: float) -> torch.Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306, eq. 7 with both desirabilities 1), one loss per sample.

    loss = 1 - sigmoid(beta * (r - z)) of a desirable sample and 1 - sigmoid(beta * (z - r)) of another, with r the
    log-ratio to the reference and z the divergence from it, which is not differentiated.

    Args:
        log_ratios_n: ln pi(y) / ref(y), nats, summed over completion tokens.
        divergence: z, nats.
        desirable_n: Whether a sample is one of those wanted.
        beta: Per nat.
    """
    signs_n = torch.where(desirable_n.bool(), 1.0, -1.0)
    return 1 - torch.sigmoid(beta * signs_n * (log_ratios_n - divergence))
