"""Rules of distributional control: what its target and its estimates ask of the other keys."""

from align.config.base import unknown_name
from align.config.sections import Keys

EVEN_LOSSES = ("dapo", "dr_grpo")  # the gradient of a batch is that of the sum over all of its tokens; dapo is TRL's own
CHANGES = {  # option of TRL -> the value that leaves a sample's gradient A grad log pi
    "beta": (0.0, "is a second pull towards the first policy"),
    "entropy_coef": (0.0, "adds another aim"),
    "use_adaptive_entropy": (False, "adds another aim"),
    "top_entropy_quantile": (1.0, "leaves out tokens"),
    "mask_truncated_completions": (False, "leaves out samples that the target has"),
    "importance_sampling_level": ("token", "divides by the length of a sample"),
}


def dpg_problems(config: Keys) -> list[str]:
    """What about `estimator: dpg` cannot be run as it stands; nothing under other estimators."""
    if config.estimator.type != "dpg":
        return []
    return [*_target(config), *_samples(config), *_updates(config)]


def _target(config: Keys) -> list[str]:
    estimator, problems = config.estimator, []
    if not estimator.moments and not estimator.always:
        problems.append(
            "estimator.type=dpg has no target: give estimator.moments, for example {brevity: 0.5}, or estimator.always"
        )
    for key, names in (("moments", estimator.moments), ("always", estimator.always)):
        known = list(config.objectives)
        problems += [f"estimator.{key}: {unknown_name('objective', n, known)}" for n in names if n not in known]
    problems += [
        f"estimator: {name!r} is in moments and in always: leave it in one of them"
        for name in estimator.moments
        if name in estimator.always
    ]
    problems += [
        f"objectives.{name}.missing=neutral: estimator.type=dpg would count the mean of a group as a value of the sample; "
        "take fail, drop_sample or drop_group"
        for name in [*estimator.moments, *estimator.always]
        if name in config.objectives and config.objectives[name].missing == "neutral"
    ]
    for name, moment in estimator.moments.items():
        low, high = config.objectives[name].bounds if name in config.objectives else (-float("inf"), float("inf"))
        if not low <= moment <= high:
            problems.append(f"estimator.moments.{name}: {moment} is outside the bounds [{low}, {high}] of the objective")
        elif moment in (low, high):
            problems.append(
                f"estimator.moments.{name}: {moment} is a bound, which no finite tilt reaches: choose a value between "
                f"{low} and {high}, or put {name!r} into estimator.always"
            )
    if config.weighting.type != "fixed":
        problems.append(
            f"estimator.type=dpg trains towards estimator.moments and always, and weights have no part in it: "
            f"weighting.type={config.weighting.type} would move them in vain; take fixed, with any weights"
        )
    return problems


def _samples(config: Keys) -> list[str]:
    rollout, problems = config.rollout, []
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for key, value in whole.items():
        if getattr(rollout, key) != value:
            problems.append(
                f"estimator.type=dpg weighs samples of the whole policy: rollout.{key}={getattr(rollout, key)} draws from "
                f"another distribution; set it to {value:g}"
            )
    if rollout.correction.type != "none":
        problems.append(
            f"rollout.correction={rollout.correction.type}: under estimator.type=dpg the sampler's probabilities are in the "
            "weights already, and would count twice; leave it out, or take none"
        )
    if config.estimator.proposal == "adaptive" and rollout.engine.type == "vllm":
        problems.append(
            "estimator.proposal=adaptive samples from an earlier policy, and vLLM servers are sent the newest: take "
            "estimator.proposal=newest, or rollout.engine=transformers"
        )
    return problems


def _updates(config: Keys) -> list[str]:
    learner, trl, problems = config.learner, config.trl, []
    for key in ("updates_per_batch", "iterations_per_batch"):
        if getattr(learner, key) != 1:
            problems.append(
                f"learner.{key}={getattr(learner, key)}: the weights of estimator.type=dpg hold for the policy before the "
                "update, so a batch serves for one: set it to 1"
            )
    if (loss := trl.get("loss_type", EVEN_LOSSES[0])) not in EVEN_LOSSES:
        problems.append(
            f"trl.loss_type={loss} does not treat all tokens of a batch alike, as the gradient of estimator.type=dpg does: "
            f"take {' or '.join(EVEN_LOSSES)}"
        )
    if config.selftrain is not None and config.rounds is None:
        problems.append(
            "selftrain pulls towards samples that pass a filter, and estimator.type=dpg would miss its target: remove one; "
            "what a filter asks for can be a target too (estimator.always)"
        )
    for key, (neutral, why) in CHANGES.items():
        if key in trl and trl[key] != neutral:
            problems.append(f"trl.{key}={trl[key]} {why}, and estimator.type=dpg would miss its target: leave it out")
    return problems
