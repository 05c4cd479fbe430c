"""Choices that are allowed but do not do what they seem to: sentences for `paretune check` and the start of a run."""

from align.build import PromptSets
from align.config import Config, Signal
from align.config.lagrangian_rules import posed
from align.config.weighting import Adaptive

SMALL_GROUP = 8  # samples of a prompt below which the fit of `estimator: dpg` is a rough one


def advise(config: Config) -> list[str]:
    """Warnings about combinations of keys."""
    if config.rounds is not None:
        return _on_samples_of_their_own(config, config.rounds.count)  # the rest belongs to training by advantages
    return [
        *_on_weights(config),
        *_on_moves(config),
        *_on_gradients(config),
        *_on_constraints(config),
        *_on_estimator(config),
        *_on_control(config),
        *_on_sizes_of_weights(config),
        *_on_factor_on_rewards(config),
        *_on_evaluation(config),
        *_on_rollout(config),
        *_on_selftraining(config),
        *_on_domains(config),
    ]


def _on_weights(config: Config) -> list[str]:
    weighting, warnings = config.weighting, []
    if weighting.type == "schedule" and not weighting.milestones:
        warnings.append("weighting.milestones is empty, so the schedule is the same as fixed weights")
    if weighting.type == "schedule" and any(m.step > config.steps for m in weighting.milestones):
        warnings.append(f"a weighting milestone lies beyond the last step, {config.steps}, and is never reached")
    for name, share in config.user_weights.items():
        if not share and weighting.type not in ("schedule", "lagrangian") and config.estimator.type != "dpg":
            warnings.append(f"objective {name!r} has weight 0: it is watched, not trained on")
    return warnings


def _on_moves(config: Config) -> list[str]:
    """Options of adaptive schemes that keep the weights where they are."""
    weighting, warnings = config.weighting, []
    if isinstance(weighting, Adaptive):
        if weighting.warm_up >= config.steps:
            warnings.append(f"weighting.warm_up={weighting.warm_up} leaves no step of {config.steps} in which weights move")
        if weighting.every > config.steps:
            warnings.append(f"weighting.every={weighting.every} is more than the {config.steps} steps: weights move once")
        weights = config.user_weights.values()
        given = [weight / sum(weights) for weight in weights if weight > 0]
        if min(given) < weighting.floor - 1e-9 or max(given) > weighting.ceiling + 1e-9:
            warnings.append("weighting.weights lie beyond floor or ceiling: the run starts at the nearest ones within them")
        if 1 in (weighting.floor * len(given), weighting.ceiling * len(given)):
            warnings.append("weighting.floor or weighting.ceiling leaves equal weights as the only ones")
        if weighting.pull == 1:
            warnings.append("weighting.pull=1 holds the weights where they start")
    if weighting.type == "saturation" and not weighting.gamma:
        warnings.append("weighting.gamma=0 gives the same weights as weighting.type=fixed")
    if weighting.type == "saturation" and config.combination.type != weighting.combination:
        warnings.append(
            f"weighting.type=saturation is made for standardised objectives, but combination is {config.combination.type}: "
            f"take {weighting.combination}"
        )
    return [*warnings, *_on_vectors(config)]


def _on_vectors(config: Config) -> list[str]:
    """Held-out vectors that come too seldom, or are not comparable to batches."""
    weighting, evaluation, warnings = config.weighting, config.evaluation, []
    if Signal.VALIDATION not in weighting.needs:
        return []
    vectors = (config.steps - 1) // evaluation.every if evaluation.every else 0  # the last step's comes too late
    looks_once = weighting.type == "lagrangian" and weighting.search is None
    if vectors < 5 and not looks_once:
        warnings.append(
            f"evaluation.every={config.evaluation.every} brings {vectors} new vectors in {config.steps} steps before "
            "the last one: "
            f"weighting.type={weighting.type} can hardly follow"
        )
    compared = weighting.type == "hypervolume_gradient" and weighting.vector == "batches"
    if weighting.type == "lagrangian":
        compared = any(c.threshold == "initial" for c in posed(config).constraints.values())
    if compared and evaluation.temperature != config.rollout.temperature:
        warnings.append(
            f"weighting.type={weighting.type} compares held-out vectors (evaluation.temperature={evaluation.temperature}) "
            f"with batches (rollout.temperature={config.rollout.temperature}): give both the same"
        )
    if weighting.type == "lagrangian" and weighting.search is not None:
        constraints = len(posed(config).constraints)
        if (constraints + 1) * evaluation.every > config.steps:
            warnings.append(
                f"weighting.search tries {constraints + 1} points before it makes its first choice, each for at least "
                f"evaluation.every={evaluation.every} steps: {config.steps} steps are too few"
            )
    return warnings


def _on_gradients(config: Config) -> list[str]:
    """Weights made for a sum of gradients, and a combination that makes another step of them."""
    weighting, combination = config.weighting, config.combination
    if Signal.GRAM not in weighting.needs or combination.adds:
        return []
    return [
        f"combination {combination.type} does not add up the objectives' gradients, for which "
        f"weighting.type={weighting.type} chooses its weights: take {weighting.combination}"
    ]


def _on_constraints(config: Config) -> list[str]:
    """Constrained problems that are not quite the one that seems to be posed."""
    weighting, warnings = config.weighting, []
    if weighting.type != "lagrangian":
        return []
    problem, shared = posed(config), config.user_weights
    largest = [name for name, share in shared.items() if share == max(shared.values())]
    if weighting.optimized_by_default is None and len(largest) > 1:
        warnings.append(
            f"{' and '.join(largest)} have the same share, and so the first is optimised: say which by weighting.optimize"
        )
    for name, share in shared.items():
        trained_on = name in problem.constraints or name == problem.optimize or (problem.optimize == "all" and share)
        if not trained_on:
            why = "has a share, but is neither optimised nor constrained" if share else "has weight 0"
            warnings.append(f"objective {name!r} {why}: it is watched, not trained on")
    if problem.optimize == "kl" and config.trl.get("beta"):
        warnings.append(
            f"weighting.optimize=kl and trl.beta={config.trl['beta']} both keep the policy near the reference: that counts "
            "twice; leave trl.beta out"
        )
    if weighting.delay >= config.steps:
        warnings.append(f"weighting.delay={weighting.delay} leaves no step of {config.steps} in which multipliers move")
    return warnings


def _on_estimator(config: Config) -> list[str]:
    """Options of the estimator that a combination which standardises by itself does not look at."""
    estimator, combination = config.estimator, config.combination
    if not combination.standardises or estimator.type == "dpg":
        return []
    standardises = f"combination {combination.type} divides by standard deviations itself"
    if estimator.type == "grpo" and estimator.scale != "group":
        return [f"{standardises}, of groups, so estimator.scale={estimator.scale} has no effect"]
    if estimator.type == "rloo":
        return [f"{standardises}, which takes the factor G/(G-1) of rloo out again: the advantages are those of grpo"]
    if estimator.type == "reinforce" and not estimator.whiten:
        return [f"{standardises}, of the batch, so estimator.whiten=false has no effect"]
    return []


def _on_control(config: Config) -> list[str]:
    """What has no part in a target distribution."""
    estimator = config.estimator
    if estimator.type != "dpg":
        return []
    warnings = [
        f"objective {name!r} is neither in estimator.moments nor in estimator.always: it is watched, not trained on"
        for name in config.objectives
        if name not in estimator.moments and name not in estimator.always
    ]
    if estimator.moments and estimator.fit.samples_per_prompt < SMALL_GROUP:
        warnings.append(
            f"estimator.fit.samples_per_prompt={estimator.fit.samples_per_prompt}: in groups so small the target that is "
            f"fitted has moments some hundredths off; take {SMALL_GROUP} or more"
        )
    if config.combination.type != "sum_then_normalize":
        warnings.append(
            f"estimator.type=dpg does not add objectives up: combination {config.combination.type} has no effect"
        )
    return warnings


def _on_sizes_of_weights(config: Config) -> list[str]:
    """Weights whose sizes the combination does not look at."""
    if config.combination.type != "pareto_rank" or config.estimator.type == "dpg":
        return []
    alike = "combination pareto_rank treats all objectives with a weight above 0 alike"
    if config.weighting.type not in ("fixed", "hypervolume"):
        return [f"{alike}: weighting.type={config.weighting.type} has no effect but where a weight reaches or leaves 0"]
    if len({share for share in config.user_weights.values() if share > 0}) > 1:
        return [f"{alike}: the sizes in weighting.weights have no effect"]
    return []


def _on_factor_on_rewards(config: Config) -> list[str]:
    """A common factor on the rewards that the combination or the estimator takes out again."""
    weighting, estimator, combination = config.weighting, config.estimator, config.combination
    if weighting.type != "hypervolume" or weighting.placement != "rewards":
        return []
    divides = estimator.scale != "none" if estimator.type == "grpo" else estimator.type == "reinforce" and estimator.whiten
    if combination.scale_free or (combination.type in ("sum_then_normalize", "chebyshev") and divides):
        return [
            f"weighting.placement=rewards: combination {combination.type} with estimator {estimator.type} takes a factor on "
            "all rewards out again, so the scheme has no effect; take weighting.placement=advantages"
        ]
    return []


def _on_evaluation(config: Config) -> list[str]:
    warnings = []
    if config.evaluation.every > config.steps:
        warnings.append(f"evaluation.every={config.evaluation.every} is more than steps={config.steps}: only the first "
                        "and the last policy are evaluated")  # fmt: skip
    if not config.evaluation.every:
        warnings.append("evaluation.every is 0: there will be no Pareto archive, and no front in the report")
    return warnings


def _on_rollout(config: Config) -> list[str]:
    """Samples that are not quite the learner's own."""
    rollout, warnings = config.rollout, []
    narrowed = {"top_p": rollout.top_p < 1, "top_k": rollout.top_k > 0, "min_p": rollout.min_p > 0}
    narrowed["repetition_penalty"] = rollout.repetition_penalty != 1
    if rollout.correction.type != "none" and any(narrowed.values()):
        names = ", ".join(f"rollout.{name}" for name, used in narrowed.items() if used)
        warnings.append(
            f"{names} with rollout.correction: samples are drawn from fewer tokens than the learner counts with, so ratios "
            "lie below 1, at level sequence the more the longer a sample is"
        )
    if config.estimator.type == "dpg":
        return warnings  # the sampler's own probabilities are in the weights
    if rollout.correction.type == "none" and rollout.lookahead:
        return ["rollout.lookahead=1 with correction none: samples of an older policy count as this one's, which is biased"]
    if rollout.correction.type == "none" and rollout.engine.type == "vllm":
        return [
            "rollout.correction none with vLLM: what the two engines compute otherwise is not corrected, and not measured "
            "beyond the check of every push"
        ]
    return warnings


def _on_selftraining(config: Config) -> list[str]:
    """Samples of the policy's own that are learned from unasked, or not as it seems."""
    section, warnings = config.selftrain, []
    if section is None:
        return []
    if section.prompts and Signal.GRAM in config.weighting.needs:
        warnings.append(
            f"selftrain.prompts: weighting.type={config.weighting.type} measures gradients without these weights of prompts"
        )
    if section.term is None:
        return warnings
    warnings += _on_samples_of_their_own(config, config.steps)
    if section.pool.size < section.term.samples:
        warnings.append(
            f"selftrain.pool.size={section.pool.size} is less than selftrain.term.samples={section.term.samples}: an update "
            "learns from the whole pool"
        )
    return warnings


def _on_domains(config: Config) -> list[str]:
    """Weights of domains that others do not know of, or that say little."""
    section, warnings = config.domains, []
    if section is None:
        return []
    if Signal.GRAM in config.weighting.needs:
        warnings.append(
            f"domains: weighting.type={config.weighting.type} measures gradients of objectives without these weights"
        )
    rare = [name for name, share in config.train_domains.items() if share * config.rollout.prompts_per_batch < 1]
    if rare and section.type != "fixed":
        warnings.append(
            f"domains: some batches of {config.rollout.prompts_per_batch} prompts have none of {', '.join(rare)}: it then "
            "keeps its last score"
        )
    return warnings


def _on_samples_of_their_own(config: Config, count: int) -> list[str]:
    """Filter and weights of training, or of rounds; `count` of steps, or of rounds."""
    section, unit = config.selftrain, "step" if config.rounds is None else "round"
    warnings = [] if section.filter.asks else ["selftrain.filter asks for nothing, so every sample passes, right or wrong"]
    return warnings + [
        f"selftrain.weights[{i}].warm_up={weights.warm_up} leaves no {unit} of {count} with weights"
        for i, weights in enumerate(section.weights)
        if weights.type == "loss" and weights.warm_up >= count
    ]


def advise_on_prompts(config: Config, prompts: PromptSets) -> list[str]:
    """Warnings about the data."""
    warnings, key, size = [], "rollout.prompts_per_batch", config.rollout.prompts_per_batch
    if config.rounds is not None:
        key, size = "rounds.prompts", config.rounds.prompts
    if len(prompts.train) < size:
        warnings.append(
            f"there are fewer training prompts ({len(prompts.train)}) than {key} ({size}): a "
            f"{'batch' if config.rounds is None else 'round'} repeats prompts"
        )
    trained_on = {prompt.text for prompt in prompts.train}
    shared = sum(prompt.text in trained_on for prompt in prompts.evaluation)
    if shared:
        warnings.append(f"{shared} of {len(prompts.evaluation)} held-out prompts are also trained on")
    return warnings
