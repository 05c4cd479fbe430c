"""Keys of stand-alone rounds of self-training, and what they ask of the rest."""

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from align.config.base import Section


class RoundsConfig(Section):
    """Rounds of self-training: sample, filter, weight, fine-tune, evaluate; then the same with the policy that came out.

    `paretune rounds` runs them. A round is then what a step is elsewhere: `steps` is `count`, and `evaluation.every` and
    `checkpoint.every` are 1. What passes, and with which weights, is said in `selftrain`.
    """

    count: PositiveInt
    """Rounds."""
    method: Literal["sft", "dpo", "kto"] = "sft"
    """`sft`: maximise the likelihood of samples that pass. `dpo`: prefer one that passes to one with the most common wrong
    answer to the same prompt. `kto`: the two of each pair as wanted and unwanted, one by one."""
    prompts: PositiveInt = 256
    """Prompts sampled in each round, `rollout.samples_per_prompt` times each; the training prompts in turn."""
    per_prompt: PositiveInt | None = None
    """Most samples of a prompt that `sft` trains on, drawn at random; by default all that pass."""
    mixed_only: bool = True
    """Leave out prompts all of whose samples pass: the policy can do them. Those where none passes give nothing anyway."""
    epochs: PositiveInt = 1
    """Times that a round trains on each sample or pair; the last batch is filled up from one time more."""
    batch_size: PositiveInt = 32
    """Samples (`dpo`: pairs) per optimiser step, over all processes."""
    learning_rate: PositiveFloat = 1e-5
    """At the start of every round; `trl.lr_scheduler_type` says how it goes on."""
    beta: PositiveFloat = 0.1
    """How closely `dpo` and `kto` hold the policy to that at the start of the round, per nat."""


def rounds_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run that follow from its rounds, or that rounds do without; data that is not well formed as it is."""
    rounds = data.get("rounds")
    count = rounds.get("count") if isinstance(rounds, dict) else getattr(rounds, "count", None)
    if count is None:
        return data
    objectives = data.get("objectives")
    weights = dict.fromkeys(objectives, 1.0) if isinstance(objectives, dict) else {}
    filled = {"weighting": {"type": "fixed", "weights": weights}, "steps": count} | data
    for section in ("evaluation", "checkpoint"):
        if isinstance(given := filled.get(section, {}), dict):
            filled[section] = {"every": 1} | given
    return filled
