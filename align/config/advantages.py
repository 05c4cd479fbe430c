"""Options of the advantage estimators and of the combinations of objectives."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from align.config.base import Section, as_section


class GrpoEstimator(Section):
    """Advantage against the group's mean (GRPO)."""

    type: Literal["grpo"]
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group, of the batch, or not at all (Dr. GRPO)."""


class RlooEstimator(Section):
    """Advantage against the mean of the other samples of the group (RLOO)."""

    type: Literal["rloo"]


class ReinforceEstimator(Section):
    """Advantage against the mean of the batch (REINFORCE)."""

    type: Literal["reinforce"]
    whiten: bool = True
    """Divide by the standard deviation of the batch (REINFORCE++)."""


_Estimators = GrpoEstimator | RlooEstimator | ReinforceEstimator
EstimatorConfig = Annotated[
    _Estimators,
    Field(discriminator="type"),
    BeforeValidator(as_section, json_schema_input_type=Literal["grpo", "rloo", "reinforce"] | _Estimators),
]


class SumThenNormalize(Section):
    """Weighted sum of the objectives, then the estimator."""

    type: Literal["sum_then_normalize"]


class NormalizeThenSum(Section):
    """Each objective standardised on its own, then the weighted sum, whitened over the batch (GDPO)."""

    type: Literal["normalize_then_sum"]


_Combinations = SumThenNormalize | NormalizeThenSum
CombinationConfig = Annotated[
    _Combinations,
    Field(discriminator="type"),
    BeforeValidator(as_section, json_schema_input_type=Literal["sum_then_normalize", "normalize_then_sum"] | _Combinations),
]
