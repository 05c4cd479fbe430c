"""A policy's mean on every objective, with standard errors over prompts. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewards.types import Objective


@dataclass(frozen=True)
class Summary:
    """Means in raw units, their standard errors, and shares of missing values, by objective name.

    `domains` has the means of each domain alone, where the prompts are a mixture.
    """

    values: Mapping[str, float]
    standard_errors: Mapping[str, float]
    missing: Mapping[str, float]
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def summarize(raw_PGK: np.ndarray, objectives: Sequence[Objective], domains: Sequence[str] = ()) -> Summary:
    """Mean over prompts of the mean over samples; missing values are left out.

    The standard error is that of a mean of P independent prompts, s / sqrt(P) with s the standard deviation (n - 1) of
    the prompt means: samples of one prompt are not independent. It is NaN with fewer than two prompts, and the mean is
    NaN without any value. With the `domains` of the P prompts, means are also taken of each one.
    """
    present = np.ma.masked_invalid(raw_PGK)
    prompt_means_PK = present.mean(axis=1)
    counts_K = np.ma.count(prompt_means_PK, axis=0)
    means_K = np.ma.filled(prompt_means_PK.mean(axis=0), np.nan)
    errors_K = np.ma.filled(prompt_means_PK.std(axis=0, ddof=1), np.nan) / np.sqrt(np.maximum(counts_K, 1))
    missing_K = np.isnan(raw_PGK).mean(axis=(0, 1))
    by_name = [{o.name: float(x) for o, x in zip(objectives, row, strict=True)} for row in (means_K, errors_K, missing_K)]
    names = sorted(filter(None, set(domains)))
    of_domains = {name: summarize(raw_PGK[np.array(domains) == name], objectives).values for name in names}
    return Summary(*by_name, of_domains)
