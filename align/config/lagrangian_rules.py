"""Rules of the `lagrangian` scheme: problems that cannot be posed as they stand, as sentences for the user."""

from collections.abc import Mapping

from align.config.base import unknown_name
from align.config.lagrangian import Constraint, LagrangianWeighting, Posed, pose
from align.config.sections import Keys, ObjectiveConfig


def posed(config: Keys) -> Posed:
    """The problem of a run."""
    maximize = {name: objective.direction == "maximize" for name, objective in config.objectives.items()}
    return pose(config.weighting, config.user_weights, maximize)


def constraint_kinds(config: Keys) -> dict[str, str]:
    """The kind of every constrained objective; none under another scheme."""
    constraints = posed(config).constraints if config.weighting.type == "lagrangian" else {}
    return {name: constraint.kind for name, constraint in constraints.items()}


def lagrangian_problems(config: Keys) -> list[str]:
    """Everything about the scheme that cannot be run as it stands."""
    if set(config.user_weights) != set(config.objectives):
        return []  # said elsewhere
    problem = posed(config)
    return [
        *_optimized(config.weighting, problem, config.objectives),
        *_constraints(config, problem),
        *_multipliers(config.weighting, problem),
        *_search(config, problem),
        *_standardised(config),
    ]


def _optimized(weighting: LagrangianWeighting, problem: Posed, objectives: Mapping[str, ObjectiveConfig]) -> list[str]:
    words = {"kl", "all"}
    problems = [f"objectives.{name}: weighting.optimize has a meaning of its own for {name!r}; rename it"
                for name in objectives if name in words]  # fmt: skip
    if problem.optimize not in {*objectives, *words}:
        hint = unknown_name("objective", problem.optimize, [*objectives, *sorted(words)])
        return [*problems, f"weighting.optimize: {hint}"]
    if problem.optimize in problem.constraints:
        problems.append(
            f"weighting.constraints.{problem.optimize}: this objective is the one that is optimised; remove the "
            "constraint, or set weighting.optimize to kl, all or another objective"
        )
    if not problem.constraints:
        problems.append(
            f"weighting.constraints is empty and, with weighting.optimize={problem.optimize}, there is nothing to hold: "
            "give constraints, give a second objective a share in weighting.weights, or take weighting.type=fixed"
        )
    return problems


def _constraints(config: Keys, problem: Posed) -> list[str]:
    problems = []
    for name, constraint in config.weighting.constraints.items():
        key = f"weighting.constraints.{name}"
        if name not in config.objectives:
            problems.append(f"weighting.constraints: {unknown_name('objective', name, config.objectives)}")
        elif constraint.threshold != "initial":
            problems += _threshold(f"{key}.{constraint.kind}", constraint, config.objectives[name])
    if not config.evaluation.every:
        problems += [
            f"weighting.constraints.{name}.{c.kind}=initial is read off the first evaluation, but evaluation.every is 0: "
            "give a number of steps, or a threshold in numbers"
            for name, c in problem.constraints.items()
            if c.threshold == "initial"
        ]
    return problems


def _threshold(key: str, constraint: Constraint, objective: ObjectiveConfig) -> list[str]:
    """Whether a mean can lie on both sides of the threshold."""
    (low, high), value = objective.bounds, constraint.threshold
    if low < value < high:
        return []
    if value in (low, high) and constraint.kind != "equal":
        idle = (value == low) == (constraint.kind == "at_least")
        why = "it holds whatever the policy does" if idle else "no mean but the bound itself can meet it"
        return [f"{key}: {value} is a bound of the objective, so {why}: choose a value between {low} and {high}"]
    return [f"{key}: {value} does not lie between the bounds of the objective, {low} and {high}: choose a value there"]


def _multipliers(weighting: LagrangianWeighting, problem: Posed) -> list[str]:
    """Whether multipliers can start where they are told to."""
    problems = []
    if weighting.floor >= weighting.cap:
        problems.append(f"weighting.floor={weighting.floor} is not below weighting.cap={weighting.cap}: lower it")
    for name, constraint in problem.constraints.items():
        start = weighting.start(constraint)
        low = -weighting.cap if constraint.kind == "equal" else weighting.floor
        if weighting.floor < weighting.cap and not low <= start <= weighting.cap:
            own = constraint.multiplier is not None
            key = f"weighting.constraints.{name}.multiplier" if own else "weighting.multiplier"
            ends = "from minus weighting.cap" if constraint.kind == "equal" else "from weighting.floor"
            problems.append(
                f"{key}={start}: the multiplier of {name} ({constraint.kind}) lies between {low} and {weighting.cap}, "
                f"{ends} to weighting.cap; choose a value there"
            )
    return problems


def _search(config: Keys, problem: Posed) -> list[str]:
    search = config.weighting.search
    if search is None:
        return []
    gold, problems = search.gold, []
    if not config.evaluation.every:
        problems.append("weighting.search judges by held-out vectors, but evaluation.every is 0: give a number of steps")
    if gold not in config.objectives:
        problems.append(f"weighting.search.gold: {unknown_name('objective', gold, config.objectives)}")
    elif gold in problem.constraints:
        problems.append(f"weighting.search.gold={gold}: it is constrained, so it cannot judge; remove its constraint")
    elif gold == problem.optimize or (problem.optimize == "all" and config.user_weights[gold] > 0):
        problems.append(
            f"weighting.search.gold={gold}: it is trained on, so it cannot judge; optimise something else"
            + (" or set its share in weighting.weights to 0" if problem.optimize == "all" else "")
        )
    if config.evaluation.every and search.steps < config.evaluation.every:
        problems.append(
            f"weighting.search.steps={search.steps} is less than evaluation.every={config.evaluation.every}, so a point "
            "would be judged by nothing newer: raise the one or lower the other"
        )
    return problems


def _standardised(config: Keys) -> list[str]:
    """Whether streams are brought to one scale before multipliers mix them."""
    combination, estimator = config.combination.type, config.estimator
    if config.combination.adds and config.combination.standardises:
        return []
    if not config.combination.adds:
        return [
            f"combination={combination}: weighting.type=lagrangian mixes objectives that are standardised each on its own; "
            "take estimate_then_sum, normalize_then_sum or mo_grpo"
        ]
    plain = {
        "grpo": "estimator.scale=none" if estimator.type == "grpo" and estimator.scale == "none" else "",
        "rloo": "estimator.type=rloo",
        "reinforce": "estimator.whiten=false" if estimator.type == "reinforce" and not estimator.whiten else "",
    }[estimator.type]
    if not plain:
        return []
    return [
        f"{plain} does not divide by a standard deviation, which weighting.type=lagrangian needs of combination="
        "estimate_then_sum: take estimator grpo with scale group or batch, reinforce with whiten, or combination=mo_grpo"
    ]
