"""The configuration: every model, its defaults, and the rules that tie keys together. Imports no torch."""

import hashlib
import json
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from align.trl_options import check_trl_options

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Weights = dict[Name, FiniteFloat]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            raise ValueError("\n".join(unknown_name("key", key, cls.model_fields) for key in unknown))
        return data


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Sentence about a name that does not exist, with the nearest one that does."""
    near = get_close_matches(str(name), list(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def _as_section(value: Any) -> Any:
    """Lets `estimator: grpo` stand for `estimator: {type: grpo}`."""
    return {"type": value} if isinstance(value, str) else value


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
    """A .jsonl or .parquet file."""

    type: Literal["file"]
    path: str


class FunctionSource(Source):
    """A Python function, `module:function`, that returns an iterable of rows (dictionaries)."""

    type: Literal["function"]
    function: str
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""


AnySource = Annotated[HubSource | FileSource | FunctionSource, Field(discriminator="type")]


class PromptsConfig(Section):
    """Where prompts come from, and how they become text."""

    train: AnySource
    evaluation: AnySource | None = None
    """Held-out prompts; needed unless `evaluation.every` is 0."""
    chat: bool = False
    """Put string prompts into the tokenizer's chat template as a user message (lists of messages always are)."""
    system: str = ""
    """System message in front of string prompts; needs `chat: true`."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example `{enable_thinking: false}`."""


# --- rollout ----------------------------------------------------------------------------------------------------------


class TransformersEngine(Section):
    """Sampling with transformers' own generation, in the learner's process."""

    type: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = 256
    """Samples generated at once and process."""


class RolloutConfig(Section):
    """How samples are made. One batch holds `prompts_per_batch * samples_per_prompt` samples over all processes."""

    engine: TransformersEngine = TransformersEngine()
    prompts_per_batch: PositiveInt = 16
    samples_per_prompt: int = Field(8, ge=2)
    """G, the size of a sample group."""
    max_tokens: PositiveInt = 256
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Keep only the k likeliest tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)


# --- objectives, weights, advantages ----------------------------------------------------------------------------------


class ObjectiveConfig(Section):
    """One named objective: what scores it, and how its values are to be read."""

    reward: str
    """A built-in reward by name, or `module:function` of your own."""
    args: dict[str, Any] = {}
    """Keyword arguments bound to the reward (or passed to the class)."""
    direction: Literal["maximize", "minimize"] = "maximize"
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


class FixedWeighting(Section):
    """The same weights from the first step to the last."""

    type: Literal["fixed"]
    weights: Weights
    """Share of each objective; divided by their sum. 0 watches an objective without training on it."""


class Milestone(Section):
    """Weights that hold at a given step."""

    step: PositiveInt
    weights: Weights


class ScheduleWeighting(Section):
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


WeightingConfig = Annotated[FixedWeighting | ScheduleWeighting, Field(discriminator="type")]


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
    BeforeValidator(_as_section, json_schema_input_type=Literal["grpo", "rloo", "reinforce"] | _Estimators),
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
    BeforeValidator(_as_section, json_schema_input_type=Literal["sum_then_normalize", "normalize_then_sum"] | _Combinations),
]


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


class Config(Section):
    """A run, complete."""

    output: str
    """Run folder; must not hold another run."""
    seed: int = Field(0, ge=0, lt=2**31)
    steps: PositiveInt
    """Optimiser steps."""
    policy: PolicyConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    objectives: dict[Name, ObjectiveConfig] = Field(min_length=1)
    weighting: WeightingConfig
    estimator: EstimatorConfig = GrpoEstimator(type="grpo")
    combination: CombinationConfig = SumThenNormalize(type="sum_then_normalize")
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trl: Annotated[dict[str, Any], BeforeValidator(check_trl_options)] = {}
    """Any other option of TRL's GRPOConfig, by TRL's name, for example `{learning_rate: 1.0e-6, beta: 0.04}`."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "Config":
        names = list(self.objectives)
        problems = [
            *_weight_problems(self.weighting, names),
            *_unknown("evaluation.reference", self.evaluation.reference, names),
        ]
        if self.evaluation.every and self.prompts.evaluation is None:
            problems.append("prompts.evaluation is missing: name held-out prompts, or set evaluation.every to 0")
        if self.prompts.system and not self.prompts.chat:
            problems.append("prompts.system needs a chat template: set prompts.chat to true, or remove it")
        for name, value in self.evaluation.reference.items():
            if name in self.objectives and not _leaves_room(value, self.objectives[name]):
                problems.append(
                    f"evaluation.reference.{name}: {value} leaves nothing above it within the bounds "
                    f"{list(self.objectives[name].bounds)}: choose a value at or near the worst one"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def fingerprint(self) -> str:
        """Hash of everything that a resumed run may not change: all but the run folder and what `settled` leaves out.

        Defaults do not count, so that an option of a later version leaves it as it is.
        """
        text = json.dumps(self.settled(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def settled(self, exclude_defaults: bool = False) -> dict[str, Any]:
        """What is settled when a run starts; its length and what missing values do may still be changed on resume."""
        data = self.model_dump(mode="json", exclude={"output", "steps"}, exclude_defaults=exclude_defaults)
        data["objectives"] = {name: o | {"missing": None} for name, o in data["objectives"].items()}
        return data


def _weight_problems(weighting: FixedWeighting | ScheduleWeighting, names: list[str]) -> list[str]:
    tables = {"weighting.weights": weighting.weights}
    if isinstance(weighting, ScheduleWeighting):
        tables |= {f"weighting.milestones[{i}].weights": m.weights for i, m in enumerate(weighting.milestones)}
    problems = []
    for key, weights in tables.items():
        problems += _unknown(key, weights, names)
        problems += [f"{key} gives no weight for {n!r}: add it (0 only watches it)" for n in names if n not in weights]
        problems += [f"{key}.{n}: {w} is negative; weights are shares, 0 or more" for n, w in weights.items() if w < 0]
        if weights and math.fsum(map(abs, weights.values())) == 0:
            problems.append(f"{key}: all weights are 0, so nothing would be trained; give at least one objective a share")
    return problems


def _unknown(key: str, table: dict[str, float], names: list[str]) -> list[str]:
    return [f"{key}: {unknown_name('objective', name, names)}" for name in table if name not in names]


def _leaves_room(reference: float, objective: ObjectiveConfig) -> bool:
    """Whether a reference value lies within the bounds and is not the best one."""
    low, high = objective.bounds
    return low <= reference < high if objective.direction == "maximize" else low < reference <= high
