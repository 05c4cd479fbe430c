"""Options of the `lagrangian` scheme, and the problem that they pose: what is optimised under which constraints."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from align.config.base import Name, Section, Signal, Weighting, Weights, as_section


def _number_or_word(value: Any) -> Any:
    """Says in one sentence what a union of types would say in two."""
    if isinstance(value, str) and value != "initial":
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is neither a number nor the word initial") from None
    return value


Threshold = Annotated[
    FiniteFloat | Literal["initial"],
    BeforeValidator(_number_or_word, json_schema_input_type=float | Literal["initial"]),
]
KINDS = ("at_least", "at_most", "equal")


class Constraint(Section):
    """Where the mean of one objective must stay: one of `at_least`, `at_most`, `equal`.

    A threshold is a number in the units of the objective, or `initial`: where the initial policy stands.
    """

    at_least: Threshold | None = None
    at_most: Threshold | None = None
    equal: Threshold | None = None
    multiplier: float | None = Field(None, ge=-1, le=1)
    """Multiplier to start from, in the place of `weighting.multiplier`."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Constraint":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            have = f"there are {', '.join(given)}" if given else "there is none"
            raise ValueError(f"a constraint is exactly one of at_least, at_most, equal; {have}")
        return self

    @property
    def kind(self) -> str:
        """`at_least`, `at_most` or `equal`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def threshold(self) -> float | Literal["initial"]:
        """In the units of the objective, or `initial`."""
        return getattr(self, self.kind)


class SgdDual(Section):
    """Multipliers by gradient descent through their squashing function, as published."""

    type: Literal["sgd"]
    rate: PositiveFloat = 1.0
    """Learning rate. The paper's 0.1 is taken some 200 times between two samplings, this one once; a large one swings."""
    momentum: float = Field(0.1, ge=0, lt=1)
    """Part of the last step that the next one repeats; much of it makes multipliers slow to turn round."""


class PidDual(Section):
    """Multipliers by a controller on the violation (Stooke and others, 2007.03964), before the squashing."""

    type: Literal["pid"]
    proportional: NonNegativeFloat = 10.0
    """Per unit of violation, of an objective scaled to [0, 1]."""
    integral: NonNegativeFloat = 0.5
    """Per unit of violation and step."""
    derivative: NonNegativeFloat = 0.0
    """Per unit that the violation has just grown."""

    @model_validator(mode="after")
    def _does_something(self) -> "PidDual":
        if not self.proportional + self.integral:
            raise ValueError("proportional and integral are both 0, so the multipliers would stay; give one of them")
        return self


_Duals = SgdDual | PidDual
DualConfig = Annotated[
    _Duals,
    Field(discriminator="type"),
    BeforeValidator(as_section, json_schema_input_type=Literal["sgd", "pid"] | _Duals),
]


class SearchConfig(Section):
    """Search, within one run, of the thresholds at which a gold objective is best (Nelder-Mead).

    It starts at the thresholds of `constraints`, best `initial`. A point is tried by training towards it, and counts what
    the gold objective then is on held-out prompts.
    """

    gold: Name
    """Objective to make best; one that is only watched."""
    tolerance: float = Field(0.05, gt=0, lt=1)
    """A point is reached when no held-out mean misses its threshold by more, as a share of the bounds."""
    steps: PositiveInt = 50
    """A point not reached after so many steps is judged as it stands."""
    spread: float = Field(0.1, gt=0, lt=1)
    """How much better than the start each threshold is in the first simplex, as a share of the bounds."""
    stop: NonNegativeFloat = 0.01
    """The best thresholds are kept for the rest of the run once the gold values (scaled to [0, 1]) of the simplex have
    a standard deviation below this."""


class LagrangianWeighting(Weighting):
    """Optimise one thing under constraints on others: multipliers are the weights (constrained RLHF, 2310.04373)."""

    combination: ClassVar[str] = "estimate_then_sum"

    type: Literal["lagrangian"]
    weights: Weights = {}
    """Shares, equal ones when left out. They say what `optimize: all` sums up and, where `optimize` or `constraints` is
    left out, what is optimised (the largest) and what may not become worse (every other one above 0)."""
    constraints: dict[Name, Constraint] = {}
    """By objective. Left out, every objective with a share that is not optimised must stay as good as `initial`."""
    optimize: Name | None = None
    """`kl` (stay near the reference policy), an objective, or `all` (the sum of the objectives by `weights`). Left out:
    `kl` where there are constraints, else the objective with the largest share."""
    dual: DualConfig = PidDual(type="pid")
    """How the multipliers move. The controller holds a threshold; descent, as published, swings around it."""
    multiplier: float | None = Field(None, ge=-1, le=1)
    """Multiplier that constraints start with: 0.5 for at_least and at_most and 0 for equal when left out. Start high where
    an objective that is lost at first cannot be brought back."""
    cap: float = Field(0.95, gt=0, lt=1)
    """Largest multiplier: what is optimised keeps a weight even when the constraints cannot be met."""
    floor: float = Field(0.05, ge=0, lt=1)
    """Smallest multiplier of at_least and at_most: what a constraint keeps that holds by itself."""
    average: float = Field(0.0, ge=0, lt=1)
    """Part of the moving average of the batch means that every batch keeps."""
    delay: NonNegativeInt = 0
    """First steps, in which the multipliers stay."""
    search: SearchConfig | None = None

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        initial = not self.constraints or any(c.threshold == "initial" for c in self.constraints.values())
        held_out = {Signal.VALIDATION} if initial or self.search else set()
        return frozenset(held_out | ({Signal.KL} if self.optimized_by_default == "kl" else set()))

    @property
    def optimized_by_default(self) -> str | None:
        """`optimize`, or what stands for it; None is the objective with the largest share."""
        return self.optimize or ("kl" if self.constraints else None)

    def start(self, constraint: Constraint) -> float:
        """The multiplier that a constraint starts with."""
        given = (
            constraint.multiplier,
            self.multiplier,
            0.0 if constraint.kind == "equal" else min(max(0.5, self.floor), self.cap),
        )
        return next(value for value in given if value is not None)


class Posed(Section):
    """A constrained problem, nothing left out: what is optimised, and under which constraints."""

    optimize: str
    constraints: dict[str, Constraint]


def pose(config: LagrangianWeighting, shares: Mapping[str, float], maximize: Mapping[str, bool]) -> Posed:
    """What the options mean.

    Args:
        config: The options.
        shares: Share of every objective.
        maximize: Whether larger raw values are better, by objective.
    """
    optimize = config.optimized_by_default or max(shares, key=lambda name: shares[name])
    if config.constraints:
        return Posed(optimize=optimize, constraints=config.constraints)
    others = [name for name, share in shares.items() if share > 0 and name != optimize and optimize in shares]
    kept = {name: Constraint(**{"at_least" if maximize[name] else "at_most": "initial"}) for name in others}
    return Posed(optimize=optimize, constraints=kept)
