"""What passes, and how much each sample counts, as the section `selftrain` says. INTERIM"""

from collections.abc import Callable

import numpy as np

from align.config import Config
from align.selftrain.weights import Weights, compose, entropy_weights, loss_weights
from rewards.answers import Reader, answer_reader


def reader_of(config: Config) -> Reader | None:
    """What finds the answer of a completion: of the first objective whose reward reads any."""
    for objective in config.objectives.values():
        reader = answer_reader(objective.reward, objective.args)
        if reader is not None:
            return reader
    return None


def passing(config: Config, raw_PGK: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Mask (P, G), and how many fail which threshold."""
    names = list(config.objectives)
    right, failed = np.ones(raw_PGK.shape[:2], bool), {}
    for name, threshold in config.selftrain.filter.at_least.items():
        ok = raw_PGK[:, :, names.index(name)] >= threshold
        failed[f"{name} at_least {threshold:g}"] = int((~ok).sum())
        right &= ok
    return right, failed


def weigh(config: Config, entropies_n: np.ndarray, losses: Callable[[], np.ndarray]) -> Weights:
    raws = [np.ones_like(entropies_n)]
    for w in config.selftrain.weights:
        if w.type == "entropy":
            raws.append(entropy_weights(entropies_n, w.power))
        if w.type == "loss":
            raws.append(loss_weights(losses(), w.shape, w.temperature))
    return compose(raws, config.selftrain.cap, config.selftrain.least_ess)
