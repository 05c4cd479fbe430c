"""The configuration: every model, its defaults, and the rules that tie keys together. Imports no torch."""

from align.config.advantages import CombinationConfig, EstimatorConfig
from align.config.base import Section
from align.config.rollout_rules import describe_sampling
from align.config.rules import describe, describe_domains
from align.config.run import Config
from align.config.sections import ObjectiveConfig, PlainSource, ScoringConfig, Served
from align.config.selftrain_rules import describe_selftrain
from align.config.weighting import Signal, WeightingConfig

__all__ = [
    "CombinationConfig",
    "Config",
    "EstimatorConfig",
    "ObjectiveConfig",
    "PlainSource",
    "ScoringConfig",
    "Section",
    "Served",
    "Signal",
    "WeightingConfig",
    "describe",
    "describe_domains",
    "describe_sampling",
    "describe_selftrain",
]
