"""Options of the advantage estimators and of the combinations of objectives."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveInt

from align.config.base import Name, Section, as_section


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


class FitConfig(Section):
    """Samples of the first policy from which the tilt to the moments is fitted, before the first update."""

    prompts: PositiveInt = 128
    """Training prompts that are sampled; more of them where the moments differ much from prompt to prompt."""
    samples_per_prompt: int = Field(32, ge=2)
    """Of each; the tilt comes out too strong by a part of the order of one over this number."""
    tolerance: float = Field(0.01, gt=0, lt=1)
    """Largest gap between a wanted and a fitted moment, as a share of the range of the values."""


class DpgEstimator(Section):
    """Towards the distribution with given moments that is nearest to the first policy (distributional policy gradient)."""

    type: Literal["dpg"]
    moments: dict[Name, FiniteFloat] = {}
    """Wanted mean of an objective over the policy's samples, in its units; of any objective, its weight does not matter."""
    always: list[Name] = []
    """Objectives that must hold in every sample: of two values, of which the better one holds."""
    fit: FitConfig = FitConfig()
    normaliser: Literal["prompt", "batch"] = "prompt"
    """Z of each prompt from its own group, so that all prompts count alike; or one Z, from the last batches."""
    window: PositiveInt = 32
    """Batches of which the batch normaliser is made."""
    baseline: bool = True
    """Subtract pi/q, which changes the variance alone."""
    cap: FiniteFloat = Field(10.0, ge=1)
    """Largest weight P/(Zq) of a sample; smaller is steadier, and biased towards what is sampled already."""
    proposal: Literal["newest", "adaptive"] = "newest"
    """Sample from the policy as it is, or from an earlier one until the policy has come nearer to the target."""
    every: PositiveInt = 10
    """Updates between two looks whether it has (`proposal: adaptive`)."""


_Estimators = GrpoEstimator | RlooEstimator | ReinforceEstimator | DpgEstimator
EstimatorConfig = Annotated[
    _Estimators,
    Field(discriminator="type"),
    BeforeValidator(as_section, json_schema_input_type=Literal["grpo", "rloo", "reinforce", "dpg"] | _Estimators),
]


class Combination(Section):
    """Base of the combinations, with what the rest of the configuration must know of them."""

    standardises: ClassVar[bool] = False  # every objective by itself: options of the estimator have no effect
    adds: ClassVar[bool] = False  # the gradient is a weighted sum of the objectives' own
    scale_free: ClassVar[bool] = False  # a common factor on all weights has no effect


class SumThenNormalize(Combination):
    """Weighted sum of the objectives, then the estimator."""

    type: Literal["sum_then_normalize"]


class NormalizeThenSum(Combination):
    """Each objective standardised on its own, then the weighted sum, whitened over the batch (GDPO)."""

    standardises: ClassVar[bool] = True
    adds: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    type: Literal["normalize_then_sum"]


class EstimateThenSum(Combination):
    """The estimator on each objective alone, then the weighted sum: linear in the weights."""

    adds: ClassVar[bool] = True

    type: Literal["estimate_then_sum"]


class MoGrpo(Combination):
    """Each objective standardised on its own, then the weighted sum, as it is (MO-GRPO)."""

    standardises: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    type: Literal["mo_grpo"]


class Dvao(Combination):
    """Each objective standardised on its own, weighted by its spread too (DVAO)."""

    standardises: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    type: Literal["dvao"]


class SoftMin(Combination):
    """Each objective standardised on its own, then their soft minimum, whitened over the batch (RVPO)."""

    standardises: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    type: Literal["soft_min"]
    kappa: FiniteFloat = Field(1.0, gt=0)
    """How strict: towards 0 the weighted mean of the standardised objectives, the larger the nearer to their minimum."""


class Chebyshev(Combination):
    """The weighted distance of a sample to the best bounds, in its worst objective, then the estimator."""

    type: Literal["chebyshev"]
    augmentation: FiniteFloat = Field(0.05, ge=0)
    """Share of the weighted sum in it, which tells apart samples that are equal in the worst objective."""


class Product(Combination):
    """The product of what a sample has above the batch's worst in every objective, then the estimator (HVO)."""

    scale_free: ClassVar[bool] = True

    type: Literal["product"]
    margin: FiniteFloat = Field(0.1, gt=0)
    """Distance of the point that is measured from below the worst of the batch, with objectives scaled to [0, 1]."""


class ParetoRank(Combination):
    """How often a sample's group has to be peeled until nothing dominates it, then the estimator."""

    scale_free: ClassVar[bool] = True

    type: Literal["pareto_rank"]


_Combinations = (
    SumThenNormalize | NormalizeThenSum | EstimateThenSum | MoGrpo | Dvao | SoftMin | Chebyshev | Product | ParetoRank
)
_CombinationName = Literal[
    "sum_then_normalize",
    "normalize_then_sum",
    "estimate_then_sum",
    "mo_grpo",
    "dvao",
    "soft_min",
    "chebyshev",
    "product",
    "pareto_rank",
]
CombinationConfig = Annotated[
    _Combinations,
    Field(discriminator="type"),
    BeforeValidator(as_section, json_schema_input_type=_CombinationName | _Combinations),
]
