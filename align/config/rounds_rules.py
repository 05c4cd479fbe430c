"""What stand-alone rounds of self-training ask of the other keys."""

from align.config.sections import Keys, LearnerConfig
from align.trl_options import shared_options

DECIDED = {"learning_rate": "rounds.learning_rate", "beta": "rounds.beta", "train_sampling_strategy": "seed"}
REFUSED = {  # option of TRL -> why rounds do not take it
    "average_tokens_across_devices": "samples are averaged, not tokens",
    "label_smoothing_factor": "the weights are of the plain loss",
    "report_to": "a round is one line of metrics.jsonl",
}


def rounds_problems(config: Keys) -> list[str]:
    """Everything about rounds that cannot be run as it stands, or would be passed over without a word."""
    rounds, problems = config.rounds, []
    if rounds is None:
        return problems
    if config.selftrain is None:
        problems.append("selftrain is missing: say by selftrain.filter which samples are right ({at_least: ...})")
    if config.steps != rounds.count:
        problems.append(f"steps={config.steps}: rounds.count={rounds.count} says how long rounds go on: remove steps")
    batch = config.rollout.prompts_per_batch
    if batch != type(config.rollout).model_fields["prompts_per_batch"].default:
        problems.append(f"rollout.prompts_per_batch={batch}: rounds sample rounds.prompts={rounds.prompts}: remove it")
    default = {name: field.default for name, field in type(config).model_fields.items()}
    if config.weighting.type != "fixed" or len(set(config.weighting.weights.values())) > 1:
        problems.append("weighting: rounds weight samples and not objectives: remove it, and say by selftrain what passes")
    for name in ("estimator", "combination"):
        if getattr(config, name) != default[name]:
            problems.append(f"{name}: rounds fine-tune without advantages: remove it")
    if config.learner != LearnerConfig(micro_batch_size=config.learner.micro_batch_size):
        problems.append("learner: rounds take its micro_batch_size alone; rounds.batch_size and rounds.epochs say the rest")
    if rounds.method == "kto" and config.learner.micro_batch_size == 1:
        problems.append("learner.micro_batch_size=1: rounds.method=kto compares samples within one, so it needs 2 at least")
    if rounds.per_prompt is not None and rounds.method != "sft":
        problems.append(f"rounds.per_prompt: rounds.method={rounds.method} takes one pair per prompt: remove it")
    if config.rollout.lookahead:
        problems.append("rollout.lookahead: a round is sampled before it is trained on: set it to 0")
    if config.evaluation.every > 1 or config.checkpoint.every > 1:
        problems.append("evaluation.every and checkpoint.every: every round is evaluated and saved: remove them")
    problems += [
        f"objectives.{name}.missing=neutral: a filter cannot judge a value that is filled in: take fail, drop_sample or "
        "drop_group"
        for name, objective in config.objectives.items()
        if objective.missing == "neutral"
    ]
    for name in config.trl:
        if name in DECIDED:
            problems.append(f"trl.{name} is decided by `{DECIDED[name]}`: set that instead")
        elif name in REFUSED:
            problems.append(f"trl.{name} cannot be set for rounds: {REFUSED[name]}")
        elif name not in shared_options():
            problems.append(f"trl.{name} is an option of GRPO, and not of all trainers of TRL: remove it")
    return problems
