"""Options of the weighting schemes."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from align.config.base import Name, Section, Signal, Weighting, Weights, as_section
from align.config.lagrangian import LagrangianWeighting


class FixedWeighting(Weighting):
    """The same weights from the first step to the last."""

    type: Literal["fixed"]
    weights: Weights
    """Share of each objective; divided by their sum. 0 watches an objective without training on it."""


class Milestone(Section):
    """Weights that hold at a given step."""

    step: PositiveInt
    weights: Weights


class ScheduleWeighting(Weighting):
    """Weights that move on straight lines from milestone to milestone."""

    type: Literal["schedule"]
    weights: Weights
    """Weights at step 0."""
    milestones: tuple[Milestone, ...] = ()
    """Later weights, in order of step; the last ones hold to the end."""

    @model_validator(mode="after")
    def _milestones_in_order(self) -> "ScheduleWeighting":
        steps = [milestone.step for milestone in self.milestones]
        if steps != sorted(set(steps)):
            raise ValueError(f"milestones must come in order of step, each step once; got steps {steps}")
        return self


class Adaptive(Weighting):
    """What all schemes have in common that move the weights on the simplex."""

    weights: Weights = {}
    """Shares to start from, and to be pulled back to; equal ones when left out. 0 only watches an objective."""
    pull: float = Field(0.0, ge=0, le=1)
    """Part of the way back to `weights` that every update goes, after the scheme's own move."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Smallest weight of an objective that has a share."""
    ceiling: float = Field(1.0, gt=0, le=1)
    """Largest weight of an objective."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of the previous weights that every update keeps (exponential moving average)."""
    every: PositiveInt = 1
    """Steps from one update to the next."""
    warm_up: NonNegativeInt = 0
    """First steps, in which `weights` hold."""


Reference = Literal["initial"] | dict[Name, FiniteFloat]


class HypervolumeWeighting(Weighting):
    """Fixed weights, and steps scaled by how much the held-out hypervolume has just grown."""

    type: Literal["hypervolume"]
    reference: Reference = {}
    """Reference point: a table in the units of the objectives (worst bound where one is not named), or `initial`, where
    the first evaluated policy stands (as published)."""
    scale: PositiveFloat | Literal["adaptive"] = "adaptive"
    """Growth, as a share of the volume within the bounds, at which the tanh reaches .76; `adaptive` is the mean growth
    of the evaluations that brought any."""
    mean_one: bool = False
    """Divide the step scale by its own running mean, so that it only moves effort between steps."""
    placement: Literal["advantages", "rewards"] = "advantages"
    """Scale the advantages after normalisation, or the rewards before it, as published; a standard deviation then takes
    the factor out again."""

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        return frozenset({Signal.VALIDATION})


class HypervolumeGradientWeighting(Adaptive):
    """Weights follow the partial derivatives of the hypervolume at the policy's current vector."""

    type: Literal["hypervolume_gradient"]
    vector: Literal["evaluation", "batches"] = "evaluation"
    """Current vector: of the newest evaluation, or a moving average of training batches, at no extra sampling."""
    average: float = Field(0.8, ge=0, lt=1)
    """Part of the moving average of `vector: batches` that every batch keeps."""
    against: Literal["archive", "reference"] = "reference"
    """Count only volume that no policy of the archive dominates yet, or all volume above the reference."""
    reference: Reference = {}
    """Reference point: a table in the units of the objectives (worst bound where one is not named), or `initial`,
    where the first evaluated policy stands."""

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        looks = self.vector == "evaluation" or self.against == "archive" or self.reference == "initial"
        return frozenset({Signal.VALIDATION}) if looks else frozenset()


class ProbeConfig(Section):
    """How inner products between the objectives' policy gradients are had."""

    features: Literal["exact", "norms", "sketch"] = "sketch"
    """All gradients in full (one backward per objective); only those of the normalisation layers; or a random two-sided
    projection of every trained matrix."""
    size: PositiveInt = 8
    """Rows and columns of the projection of each matrix, for `sketch`."""
    backward: Literal["auto", "ordinary", "extra"] = "auto"
    """Read them off the training step's own backward (free, and the weights act from the next step on), or from an extra
    pass before the update. `auto` takes the first where it is exact."""
    samples: PositiveInt = 32
    """Samples of each process in an extra pass of `norms` and `sketch`; `exact` takes all."""


class FromGradients(Adaptive):
    """What schemes have in common that look at the objectives' policy gradients."""

    combination: ClassVar[str] = "estimate_then_sum"

    probe: ProbeConfig = ProbeConfig()

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        return frozenset({Signal.GRAM})


class GradientWeighting(FromGradients):
    """Objectives whose gradient agrees with the others' gain weight: mirror ascent on their influence."""

    type: Literal["gradient"]
    step_size: PositiveFloat = 0.1
    """Step of the mirror ascent: weights are multiplied by exp(step_size * influence)."""
    cosine: bool = False
    """Take cosines in the place of inner products, so that the length of a gradient does not count."""
    self_term: bool = True
    """Count the inner product of a gradient with itself, as published."""


class MgdaWeighting(FromGradients):
    """The weights whose mixed gradient is shortest: a step along it worsens no objective."""

    type: Literal["mgda"]
    unit: bool = False
    """Bring all gradients to length one first."""


class PamaWeighting(Adaptive):
    """The min-norm problem reduced to one number per objective: the weakest positive advantage gets the weight."""

    type: Literal["pama"]


class CovarianceWeighting(Adaptive):
    """Objectives gain weight while their covariance with the advantage stays below a target (CTWA)."""

    type: Literal["covariance"]
    rate: PositiveFloat = 0.05
    """Growth of a log-weight per unit of missing covariance and update."""
    target: FiniteFloat | dict[Name, FiniteFloat] = 0.1
    """Covariance to reach, of rewards scaled to [0, 1]: one for all, or a table of all objectives with a share."""
    cap: FiniteFloat | dict[Name, FiniteFloat] = 0.95
    """Mean reward, scaled to [0, 1], from which on an objective gains no more weight."""
    average: float = Field(0.9, ge=0, lt=1)
    """Part of the moving average of the covariance that every batch keeps."""

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        return frozenset({Signal.ADVANTAGES})


class VariationWeighting(Adaptive):
    """Weights in proportion to the coefficient of variation of each objective (SAW)."""

    type: Literal["variation"]
    epsilon: PositiveFloat = 1e-3
    """Added to the mean in the denominator."""


class SaturationWeighting(Adaptive):
    """The nearer an objective is to its best bound, the less it weighs (SA-MRPO)."""

    combination: ClassVar[str] = "normalize_then_sum"

    type: Literal["saturation"]
    gamma: float = Field(1.0, ge=0)
    """Power of the distance from the best bound; 0 gives fixed weights."""


AdaptiveWeighting = (
    HypervolumeGradientWeighting
    | GradientWeighting
    | MgdaWeighting
    | PamaWeighting
    | CovarianceWeighting
    | VariationWeighting
    | SaturationWeighting
)
_Schemes = FixedWeighting | ScheduleWeighting | HypervolumeWeighting | LagrangianWeighting | AdaptiveWeighting
WeightingConfig = Annotated[
    _Schemes, Field(discriminator="type"), BeforeValidator(as_section, json_schema_input_type=str | _Schemes)
]


def schemes() -> tuple[type[Weighting], ...]:
    """The options of every scheme."""
    return get_args(get_args(WeightingConfig)[0])
