"""Keys of self-training: which of the policy's own samples are learned from, and how much each counts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from align.config.base import Name, Section, as_section


class FilterConfig(Section):
    """What a sample must do to pass: all that is named here. A value that is missing meets no threshold."""

    at_least: dict[Name, FiniteFloat] = {}
    """Smallest value of an objective, in its own units."""
    at_most: dict[Name, FiniteFloat] = {}
    """Largest value."""
    majority: bool = False
    """State the most common answer among the samples of its prompt (of equally common ones the first)."""
    nondominated: bool = False
    """Be one that no sample of its prompt beats in one objective without losing in another."""

    @property
    def thresholds(self) -> list[tuple[str, float, str]]:
        """Objective, value, and which side of it."""
        sides = {"at least": self.at_least, "at most": self.at_most}
        return [(name, value, side) for side, table in sides.items() for name, value in table.items()]

    @property
    def asks(self) -> bool:
        """Whether there is anything to meet."""
        return bool(self.at_least or self.at_most or self.majority or self.nondominated)


class UniformWeights(Section):
    """Equal weights: the control without any."""

    type: Literal["uniform"]


class ShuffledWeights(Section):
    """The weights of all other entries dealt out at random: the control that tells a method from its spread of weights."""

    type: Literal["shuffled"]


class EntropyWeights(Section):
    """By the entropy of the answers to the sample's prompt (EAST)."""

    type: Literal["entropy"]
    power: FiniteFloat = 1.0
    """Above 0 for prompts that the policy is of several minds about, below 0 for those that it is sure of, 0 for neither."""


class ImportanceWeights(Section):
    """By the distance of the sample's loss from that of trusted samples (IWSI)."""

    type: Literal["importance"]
    trusted: str
    """A .jsonl(.gz) or .parquet file of trusted samples, with the fields `prompt` and `completion`."""
    form: Literal["rank", "weight"] = "rank"
    """`rank` keeps the nearest, which the paper finds better; `weight` multiplies by the ratio of losses."""
    share: float = Field(0.8, gt=0, le=1)
    """Share that `rank` keeps."""
    cap: PositiveFloat = 2.0
    """Largest ratio of `weight`."""


class LossWeights(Section):
    """By the sample's loss among the others (dynamic loss-based reweighting)."""

    type: Literal["loss"]
    shape: Literal["lin_upper", "quadratic", "extremes"] = "lin_upper"
    """`lin_upper`: the easy half counts less. `quadratic`: the middle counts most. `extremes`: both ends do."""
    temperature: PositiveFloat = 1.0
    """The larger, the more equal."""
    warm_up: NonNegativeInt = 0
    """First steps (or rounds) in which these weights are equal."""


class FeasibleWeights(Section):
    """By the multiplier of a constraint, loss below a threshold (feasible learning).

    It starts at 1, and a step of it is taken whenever the sample is drawn; a round takes one from 1."""

    type: Literal["feasible"]
    threshold: FiniteFloat
    """Nats per completion token."""
    rate: PositiveFloat = 1.0
    leak: NonNegativeFloat = 0.0
    """Of the resilient form; rate times leak must be below 2."""


class TrajectoryWeights(Section):
    """By the sample's return (return-weighted replay)."""

    type: Literal["trajectory"]
    returns: dict[Name, FiniteFloat] = {}
    """Factors of the objectives, scaled to [0, 1], that make up the return; by default 1 of each."""
    temperature: PositiveFloat = 0.2


class TiltWeights(Section):
    """So that objectives have given means over what is learned from, with the least change otherwise (a tilt)."""

    type: Literal["tilt"]
    means: dict[Name, FiniteFloat] = Field(min_length=1)
    """In the units of the objectives."""


AnyWeights = Annotated[
    UniformWeights
    | ShuffledWeights
    | EntropyWeights
    | ImportanceWeights
    | LossWeights
    | FeasibleWeights
    | TrajectoryWeights
    | TiltWeights,
    Field(discriminator="type"),
]


def _as_list(value: Any) -> Any:
    """Lets one entry stand for a list of one, and `entropy` for `{type: entropy}`."""
    entries = [value] if isinstance(value, dict | str) else value
    return [as_section(entry) for entry in entries] if isinstance(entries, list) else entries


AnyPromptWeights = Annotated[UniformWeights | ShuffledWeights | EntropyWeights, Field(discriminator="type")]


class PoolConfig(Section):
    """The samples that passed, over all batches so far: what the term draws from."""

    size: PositiveInt = 4096
    """Most of them; the oldest goes. One that is sampled again counts as new."""
    per_prompt: PositiveInt = 4
    """Most samples of one prompt; its oldest goes."""
    seeds: str = ""
    """A .jsonl(.gz) or .parquet file of trusted samples, with fields `prompt` and `completion`, that are in the pool from
    the start and for good, besides `size`."""


class TermConfig(Section):
    """Weighted negative log-likelihood of samples of the pool, added to the loss of every update."""

    coefficient: PositiveFloat = 0.1
    samples: PositiveInt = 32
    """Drawn for each update, over all processes; all of a smaller pool."""
    normaliser: Literal["tokens", "sequences"] = "tokens"
    """`tokens`: the sum over all completion tokens of the draw is divided by their number. `sequences`: the mean of each
    sample over its tokens is averaged over the samples, so that a long one counts no more than a short one."""


class SelftrainConfig(Section):
    """Self-training on the policy's own samples. Losses are mean nats per completion token under the policy.

    In training, `term` and `prompts` say where weights act, one of them at least; `rounds` weigh the samples of a round.
    """

    filter: FilterConfig = FilterConfig()
    answers: Name | None = None
    """Objective whose reward reads the answers of `filter.majority`, entropies and pairs; by default the first that does.
    In training they are read where one of these looks at them, or this names one."""
    weights: Annotated[list[AnyWeights], BeforeValidator(_as_list)] = []
    """Of samples, multiplied with one another; none are equal ones."""
    cap: float = Field(10.0, ge=1)
    """Largest weight, the mean being 1."""
    least_ess: float = Field(0.1, ge=0, le=1)
    """Effective sample size, as a share, below which weights are given up for equal ones."""
    pool: PoolConfig = PoolConfig()
    term: TermConfig | None = None
    prompts: Annotated[list[AnyPromptWeights], BeforeValidator(_as_list)] = []
    """Of the prompts of a batch, multiplied with one another and with the advantages of their samples; mean one."""

    @property
    def reads_answers(self) -> bool:
        """Whether training reads answers, which is slow for some rewards: something looks at them, or `answers` says so."""
        entropies = any(weights.type == "entropy" for weights in (*self.weights, *self.prompts))
        return self.answers is not None or self.filter.majority or entropies
