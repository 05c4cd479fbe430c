"""Weighting schemes: how much each objective counts right now."""

from align.config import WeightingConfig
from align.weighting.base import Observation, Scheme, Signal, WeightState
from align.weighting.fixed import Fixed
from align.weighting.schedule import Scheduled

SCHEMES = {"fixed": Fixed, "schedule": Scheduled}


def build_scheme(config: WeightingConfig) -> Scheme:
    """The scheme that a configuration describes."""
    return SCHEMES[config.type](config)


__all__ = ["SCHEMES", "Observation", "Scheme", "Signal", "WeightState", "build_scheme"]
