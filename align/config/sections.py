"""Every key of a run, section by section, with its default and meaning."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from align.config.advantages import CombinationConfig, EstimatorConfig, GrpoEstimator, SumThenNormalize
from align.config.base import Name, Section
from align.config.domains import DomainsConfig
from align.config.rollout import RolloutConfig
from align.config.rounds import RoundsConfig
from align.config.selftrain import SelftrainConfig
from align.config.weighting import FromGradients, ProbeConfig, WeightingConfig
from align.trl_options import check_trl_options

# --- the policy -------------------------------------------------------------------------------------------------------


class LoraConfig(Section):
    """Train low-rank adapters (through peft) instead of all weights."""

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveInt = 32
    """Scaling numerator: updates are multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    """Module names to adapt, or `all-linear`."""


class PolicyConfig(Section):
    """The language model that is trained."""

    model: str
    """A folder, a hub name, or `builtin:arithmetic`, the tiny policy that ships with the project."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the weights are kept in. Mixed precision is a matter of `trl.bf16`."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    lora: LoraConfig | None = None


# --- prompts ----------------------------------------------------------------------------------------------------------


class Source(Section):
    """Rows of data; one field of each is the prompt, the others are open to rewards."""

    prompt: str = "prompt"
    """Field that holds the prompt: a string, or a list of chat messages."""
    limit: PositiveInt | None = None
    """Use only the first so many rows."""


class HubSource(Source):
    """A data set of the Hugging Face hub."""

    type: Literal["hub"]
    name: str
    subset: str | None = None
    split: str = "train"


class FileSource(Source):
    """A .jsonl, .jsonl.gz or .parquet file."""

    type: Literal["file"]
    path: str


class FunctionSource(Source):
    """A Python function, `module:function`, that returns an iterable of rows (dictionaries)."""

    type: Literal["function"]
    function: str
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""


PlainSource = Annotated[HubSource | FileSource | FunctionSource, Field(discriminator="type")]


class MixtureSource(Section):
    """Several sources, the domains, each with its share of the prompts; rewards see the fields that all of them have."""

    type: Literal["mixture"]
    sources: dict[Name, PlainSource] = Field(min_length=1)
    """The domains by name."""
    shares: dict[Name, Annotated[PositiveFloat, Field(allow_inf_nan=False)]] = {}
    """How often each is sampled, in proportion, however many prompts it has; equally often when left out."""

    @property
    def all_shares(self) -> dict[str, float]:
        """A share of every domain, in the order of `sources`; their sum is 1."""
        shares = self.shares or dict.fromkeys(self.sources, 1.0)
        return {name: shares[name] / sum(shares.values()) for name in self.sources}


AnySource = Annotated[HubSource | FileSource | FunctionSource | MixtureSource, Field(discriminator="type")]


class PromptsConfig(Section):
    """Where prompts come from, and how they become text."""

    train: AnySource
    evaluation: AnySource | None = None
    """Held-out prompts; needed unless `evaluation.every` is 0. All prompts of a mixture are taken, so `shares` have no place
    here; means are of all of them, and of each domain besides."""
    chat: bool = False
    """Put string prompts into the tokenizer's chat template as a user message (lists of messages always are)."""
    system: str = ""
    """System message in front of string prompts; needs `chat: true`."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example `{enable_thinking: false}`."""


# --- objectives, weights, advantages ----------------------------------------------------------------------------------


class CallsConfig(Section):
    """How a reward is called; what is left out is as the reward needs it."""

    isolation: Literal["inline", "thread", "process"] | None = None
    """`inline`: in the learner, one call after another, and nothing can interrupt it. `thread`: beside the other rewards.
    `process`: in processes of its own, killed when they overrun. A reward that is a coroutine function has no choice."""
    concurrency: PositiveInt | None = None
    """Calls at once; processes, with `isolation: process`. By default 2 processes, 8 threads, 64 of a coroutine."""
    batch_size: PositiveInt | None = None
    """Samples per call of a reward with `completions`; by default all."""
    timeout: PositiveFloat | None = None
    """Seconds for a call, after which its values are missing. By default 30 in a process, else 60."""
    retries: NonNegativeInt | None = None
    """Times that a failed call is made again, each time after a longer wait. By default 2 of a coroutine, else 0."""


class ObjectiveConfig(Section):
    """One named objective: what scores it, and how its values are to be read."""

    elsewhere: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("weight", "weights"), "an objective has no weight of its own: give all of them in weighting.weights"
    )

    reward: str
    """A built-in reward by name, or `module:function` of your own."""
    args: dict[str, Any] = {}
    """Keyword arguments bound to the reward (or passed to the class)."""
    direction: Literal["maximize", "minimize"] = "maximize"
    calls: CallsConfig = CallsConfig()
    bounds: tuple[FiniteFloat, FiniteFloat] = (0.0, 1.0)
    """Smallest and largest possible value. Values are scaled to [0, 1] by them; one outside is an error, not clipped."""
    missing: Literal["fail", "drop_sample", "drop_group", "neutral"] = "fail"
    """What a value that could not be had does: stop the run, leave the sample or its whole group out of the update,
    or count as the mean of its group. Held-out means leave it out, and the share is reported."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "ObjectiveConfig":
        if self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"bounds {list(self.bounds)} are not in order: give [smallest, largest]")
        return self


class Served(Section):
    """What a server of rewards, and a trial of them by hand, need of a file."""

    objectives: dict[Name, ObjectiveConfig] = Field(min_length=1)
    policy: PolicyConfig | None = None
    """Whose tokens count, in a trial."""


class ScoringConfig(Section):
    """When a reward fails too often to go on: training pauses with a checkpoint, tries again, and stops in the end."""

    max_failed: float = Field(0.5, ge=0, le=1)
    """Largest share of a batch's values that may fail; none where `missing` is `fail`."""
    pauses: NonNegativeInt = 20
    """Times to wait for a reward whose calls are made again (`calls.retries`); the others are not waited for."""
    pause: PositiveFloat = 30.0
    """Seconds of each wait."""


# --- learner, evaluation, checkpoints ---------------------------------------------------------------------------------


class LearnerConfig(Section):
    """How a batch of samples becomes optimiser steps."""

    micro_batch_size: PositiveInt | None = None
    """Samples per forward and backward pass and process; by default all that an update needs at once."""
    updates_per_batch: PositiveInt = 1
    """Optimiser steps that one batch of samples is split into; 1 is exactly on-policy."""
    iterations_per_batch: PositiveInt = 1
    """Passes over one batch of samples."""


class EvaluationConfig(Section):
    """Held-out evaluation; each one is a point of the Pareto archive."""

    every: int = Field(50, ge=0)
    """Steps between evaluations, besides the first and the last step; 0 turns evaluation off."""
    samples_per_prompt: PositiveInt = 1
    temperature: float = Field(1.0, ge=0)
    """1 is the policy itself, 0 is greedy. The other settings of `rollout` (top_p, ...) do not apply to evaluation."""
    reference: dict[Name, FiniteFloat] = {}
    """Reference point of the hypervolume, in the units of the objectives; by default the worst bound of each."""


class CheckpointConfig(Section):
    """What is kept to resume from and to choose from."""

    every: PositiveInt = 100
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_front: bool = True
    """Keep also those whose evaluation lies on the Pareto front of the run."""


class Keys(Section):
    """All keys of a run; `align.config.run.Config` is the model that also checks how they go together."""

    output: str
    """Run folder; must not hold another run."""
    seed: int = Field(0, ge=0, lt=2**31)
    steps: PositiveInt
    """Optimiser steps; with `rounds` it is their number, and need not be given."""
    policy: PolicyConfig
    prompts: PromptsConfig
    domains: DomainsConfig | None = None
    """Weights of the domains of a mixture on the advantages of their prompts; equal ones when left out."""
    rollout: RolloutConfig = RolloutConfig()
    objectives: dict[Name, ObjectiveConfig] = Field(min_length=1)
    weighting: WeightingConfig
    estimator: EstimatorConfig = GrpoEstimator(type="grpo")
    combination: CombinationConfig = SumThenNormalize(type="sum_then_normalize")
    """Where the weights meet the rewards. Left out, it is the one that the weights of the scheme are made for:
    estimate_then_sum under `lagrangian`, `gradient` and `mgda`, normalize_then_sum under `saturation`, else
    sum_then_normalize."""
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    selftrain: SelftrainConfig | None = None
    rounds: RoundsConfig | None = None
    trl: Annotated[dict[str, Any], BeforeValidator(check_trl_options)] = {}
    """Any other option of TRL's GRPOConfig, by TRL's name, for example `{learning_rate: 1.0e-6, beta: 0.04}`."""

    @property
    def user_weights(self) -> dict[str, float]:
        """The user's share of each objective: `weighting.weights`, or equal ones where the scheme lets them be left out."""
        return dict(self.weighting.weights) or dict.fromkeys(self.objectives, 1.0)

    @property
    def train_domains(self) -> dict[str, float]:
        """Share of every domain among the training prompts; none where there is one source."""
        return self.prompts.train.all_shares if self.prompts.train.type == "mixture" else {}

    @property
    def probe(self) -> ProbeConfig:
        """How gradients are measured, for the scheme, for the domains, or for both at once."""
        return self.weighting.probe if isinstance(self.weighting, FromGradients) else self.domains.probe
