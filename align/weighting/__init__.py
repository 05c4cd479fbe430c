"""Weighting schemes: how much each objective counts right now."""

from align.config import WeightingConfig
from align.weighting.base import Observation, Scheme, Signal, WeightState
from align.weighting.covariance import Covariance
from align.weighting.fixed import Fixed
from align.weighting.gradient import Gradient, Mgda
from align.weighting.hypervolume import Hypervolume
from align.weighting.hypervolume_gradient import HypervolumeGradient
from align.weighting.lagrangian import Lagrangian
from align.weighting.pama import Pama
from align.weighting.schedule import Scheduled
from align.weighting.spread import Saturation, Variation

SCHEMES = {
    "fixed": Fixed,
    "schedule": Scheduled,
    "hypervolume": Hypervolume,
    "hypervolume_gradient": HypervolumeGradient,
    "lagrangian": Lagrangian,
    "gradient": Gradient,
    "mgda": Mgda,
    "pama": Pama,
    "covariance": Covariance,
    "variation": Variation,
    "saturation": Saturation,
}


def build_scheme(config: WeightingConfig) -> Scheme:
    """The scheme that a configuration describes."""
    return SCHEMES[config.type](config)


__all__ = ["SCHEMES", "Observation", "Scheme", "Signal", "WeightState", "build_scheme"]
