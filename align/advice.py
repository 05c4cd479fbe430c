"""Choices that are allowed but do not do what they seem to: sentences for `paretune check` and the start of a run."""

from align.build import PromptSets
from align.config import Config, shares


def advise(config: Config) -> list[str]:
    """Warnings about combinations of keys."""
    warnings = []
    weighting, estimator, combination = config.weighting, config.estimator, config.combination
    if weighting.type == "schedule" and not weighting.milestones:
        warnings.append("weighting.milestones is empty, so the schedule is the same as fixed weights")
    if weighting.type == "schedule" and any(m.step > config.steps for m in weighting.milestones):
        warnings.append(f"a weighting milestone lies beyond the last step, {config.steps}, and is never reached")
    if combination.type == "normalize_then_sum" and estimator.type == "grpo" and estimator.scale != "group":
        warnings.append(
            f"combination normalize_then_sum standardises every objective itself, so estimator.scale={estimator.scale} "
            "has no effect"
        )
    if combination.type == "normalize_then_sum" and estimator.type == "rloo":
        warnings.append(
            "combination normalize_then_sum divides the group's factor G/(G-1) of rloo out again: the advantages are "
            "those of grpo"
        )
    if combination.type == "normalize_then_sum" and estimator.type == "reinforce" and not estimator.whiten:
        warnings.append("combination normalize_then_sum whitens in any case, so estimator.whiten=false has no effect")
    for name, share in shares(config).items():
        if not share and weighting.type != "schedule":
            warnings.append(f"objective {name!r} has weight 0: it is watched, not trained on")
    if config.evaluation.every > config.steps:
        warnings.append(f"evaluation.every={config.evaluation.every} is more than steps={config.steps}: only the first "
                        "and the last policy are evaluated")  # fmt: skip
    if not config.evaluation.every:
        warnings.append("evaluation.every is 0: there will be no Pareto archive, and no front in the report")
    return warnings


def advise_on_prompts(config: Config, prompts: PromptSets) -> list[str]:
    """Warnings about the data."""
    warnings = []
    if len(prompts.train) < config.rollout.prompts_per_batch:
        warnings.append(
            f"there are fewer training prompts ({len(prompts.train)}) than rollout.prompts_per_batch "
            f"({config.rollout.prompts_per_batch}): a batch repeats prompts"
        )
    trained_on = {prompt.text for prompt in prompts.train}
    shared = sum(prompt.text in trained_on for prompt in prompts.evaluation)
    if shared:
        warnings.append(f"{shared} of {len(prompts.evaluation)} held-out prompts are also trained on")
    return warnings
