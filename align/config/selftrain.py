"""INTERIM, to be replaced by the section that six_core writes."""

from typing import Annotated, Literal

from pydantic import Field

from align.config.base import Name, Section


class FilterConfig(Section):
    """Which samples pass."""

    at_least: dict[Name, float] = {}


class UniformWeights(Section):
    type: Literal["uniform"]


class EntropyWeights(Section):
    type: Literal["entropy"]
    power: float = 1.0


class LossWeights(Section):
    type: Literal["loss"]
    shape: Literal["lin_upper", "quadratic", "extremes"] = "lin_upper"
    temperature: float = 1.0


AnyWeights = Annotated[UniformWeights | EntropyWeights | LossWeights, Field(discriminator="type")]


class SelftrainConfig(Section):
    """Self-training."""

    filter: FilterConfig = FilterConfig()
    answers: Name | None = None
    weights: list[AnyWeights] = []
    cap: float = 10.0
    least_ess: float = 0.1
