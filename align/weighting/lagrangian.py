"""Constrained optimisation: the multipliers of the constraints are the weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from align.config.lagrangian import LagrangianWeighting, SgdDual, pose
from align.weighting import threshold_search
from align.weighting.base import Observation, Scheme, WeightState, finite_vectors, shares
from rewards.types import Objective

NEARLY = 0.95  # of the cap: at it, as far as the user is concerned
PATIENCE = 20  # dual steps at the cap, with the constraint still violated, after which the user is told


@dataclass(frozen=True)
class Held:
    """One constraint, and where its multiplier stands. Values are scaled to [0, 1], larger is better.

    Args:
        column: Of its objective.
        kind: `at_least`, `at_most` or `equal`, in raw units.
        worst, best: Raw values of 0 and 1.
        sign: 1 where the multiplier adds weight (a value that must not be worse, or equal), -1 where it takes it away.
        latent: l; the multiplier is its squashed value.
        threshold: theta; None while it is `initial` and no held-out vector is there.
        mean: Moving average of the batch means; None before the first.
        error: sign * (theta - mean) at the last dual step, > 0 where violated; None before the first.
        velocity: Of the descent with momentum.
        integral: Of the controller.
        stuck: Dual steps in a row with the multiplier at its cap and the constraint violated.
    """

    column: int
    kind: str
    worst: float
    best: float
    sign: int
    latent: float
    threshold: float | None
    mean: float | None = None
    error: float | None = None
    velocity: float = 0.0
    integral: float = 0.0
    stuck: int = 0

    @property
    def multiplier(self) -> float:
        """m = tanh(l) for `equal`, else 1 / (1 + exp(-l))."""
        return math.tanh(self.latent) if self.kind == "equal" else 1 / (1 + math.exp(-self.latent))

    @property
    def slope(self) -> float:
        """dm / dl."""
        m = self.multiplier
        return 1 - m * m if self.kind == "equal" else m * (1 - m)

    @property
    def wanted(self) -> str:
        """The kind in words."""
        return self.kind.replace("_", " ")

    @property
    def gap(self) -> float:
        """sign * (theta - mean)."""
        return self.sign * (self.threshold - self.mean)

    @property
    def violation(self) -> float:
        """By how much the constraint is missed, in raw units; < 0 is room."""
        scaled = abs(self.gap) if self.kind == "equal" else self.gap
        return abs(self.best - self.worst) * scaled

    def raw(self, scaled: float) -> float:
        """In the units of the objective."""
        return self.worst + scaled * (self.best - self.worst)


@dataclass(frozen=True)
class Lagrangian(Scheme):
    """Multipliers mix the advantages of what is optimised with those of the constrained objectives (2310.04373).

    With N constraints, m_i the squashed multipliers, theta_i the thresholds and R_i the batch means,

        A = (1 - sum_i m_i / N) A_opt + sum_i s_i m_i / N A_i,    minimise over l_i: sum_i s_i m(l_i) (R_i - theta_i)

    by gradient descent with momentum, or by a controller. s_i = 1, but -1 where a value must not be exceeded. m is a
    sigmoid, for `equal` a tanh: then it may become negative and push back an objective that has overshot.

    The methods of the paper: mu-PPO is optimize kl with at_least, xi-PPO optimize kl with equal, All-PPO optimize all with
    at_most. `kl` is minus the log-ratio to the reference policy, one more stream; A_opt of `all` is the sum of the
    objectives, each times its share over the mean share.

    Departures: weights are divided by N, so that the size of an update does not grow with the constraints; thresholds and
    means are scaled by the bounds, so that one rate serves all; one dual step per batch, before the update, not one per
    minibatch after it; R_i is a mean over samples, not over tokens; there is no value function, the combination
    standardises each stream; multipliers stay within cap and floor, latent numbers do not wind up beyond them, and so what
    is optimised never loses all its weight.
    """

    config: LagrangianWeighting

    def init(self, objectives: Sequence[Objective]) -> WeightState:
        """Every multiplier where it starts."""
        names = [o.name for o in objectives]
        prior_K = shares(self.config.weights, objectives)
        problem = pose(self.config, dict(zip(names, prior_K, strict=True)), {o.name: o.maximize for o in objectives})
        held = {name: self._hold(names.index(name), objectives, c) for name, c in problem.constraints.items()}
        memory = {"problem": {"optimize": problem.optimize, "names": names, "shares": list(prior_K)}, "told": []}
        return self._act(WeightState(prior_K, step_scale=1.0, memory=memory), held)

    def update(self, state: WeightState, observation: Observation) -> WeightState:
        """The multipliers after one dual step, and the weights that they make."""
        held = {name: Held(**entry) for name, entry in state.memory["constraints"].items()}
        held_out_MK = finite_vectors(observation, range(len(state.weights_K)))
        if len(held_out_MK):
            held = {n: replace(h, threshold=_initial(h, held_out_MK)) for n, h in held.items()}
        state, held = self._search(state, held, held_out_MK, observation.step)
        for name, h in held.items():
            values = observation.rewards_PGK[:, :, h.column]
            if np.isfinite(values).any():
                held[name] = self._observe(h, float(np.nanmean(values)), moves=observation.step >= self.config.delay)
        return self._tell(self._act(state, held), held)

    def _hold(self, column: int, objectives: Sequence[Objective], constraint: Any) -> Held:
        objective = objectives[column]
        low, high = objective.bounds
        worst, best = (low, high) if objective.maximize else (high, low)
        given = constraint.threshold
        threshold = None if given == "initial" else float(objective.scale(np.float64(given)))
        keep = constraint.kind == "equal" or (constraint.kind == "at_least") == objective.maximize
        start = min(self.config.start(constraint), self.config.cap)
        latent = math.atanh(start) if constraint.kind == "equal" else _logit(max(start, self._lowest))
        return Held(column, constraint.kind, worst, best, 1 if keep else -1, latent, threshold)

    @property
    def _lowest(self) -> float:
        """A multiplier of 0 could never move again: the sigmoid is flat there."""
        return max(self.config.floor, 1e-3)

    def _range(self, held: Held) -> tuple[float, float]:
        """Smallest and largest latent number."""
        if held.kind == "equal":
            return -math.atanh(self.config.cap), math.atanh(self.config.cap)
        return _logit(min(self._lowest, self.config.cap)), _logit(self.config.cap)

    def _observe(self, held: Held, mean: float, moves: bool) -> Held:
        """The constraint after a batch: the moving average and, if it moves, the multiplier."""
        keep = self.config.average if held.mean is not None else 0.0
        held = replace(held, mean=keep * (held.mean or 0.0) + (1 - keep) * mean)
        if held.threshold is None or not moves:
            return held
        low, high = self._range(held)
        held = (_descend if isinstance(self.config.dual, SgdDual) else _control)(held, self.config.dual, low, high)
        held = replace(held, error=held.gap)
        # An `equal` that is overshot is violated at the other end of its range.
        capped = abs(held.multiplier) >= NEARLY * self.config.cap
        at_cap = capped and (held.gap > 0 or held.kind == "equal")
        return replace(held, stuck=held.stuck + 1 if at_cap and held.violation > 0 else 0)

    def _act(self, state: WeightState, held: Mapping[str, Held]) -> WeightState:
        """The state whose weights are those of the multipliers, with the tables that are logged."""
        optimize, names = state.memory["problem"]["optimize"], state.memory["problem"]["names"]
        left = 1 - sum(h.multiplier for h in held.values()) / max(len(held), 1)
        shares_K = np.array(state.memory["problem"]["shares"])
        whole = dict(zip(names, (shares_K * np.count_nonzero(shares_K)).tolist(), strict=True))
        part = whole if optimize == "all" else {optimize: 1.0}
        weights = {name: left * part.get(name, 0.0) for name in names}
        for name, h in held.items():
            weights[name] += h.sign * h.multiplier / len(held)
        known = {n: h for n, h in held.items() if h.threshold is not None}
        tables = {
            "multiplier": {n: h.multiplier for n, h in held.items()},
            "threshold": {n: h.raw(h.threshold) for n, h in known.items()},
            "violation": {n: h.violation for n, h in known.items() if h.mean is not None},
            "constraints": {n: asdict(h) for n, h in held.items()},
        }
        kl_weight = left if optimize == "kl" else 0.0
        return replace(state, weights_K=tuple(weights.values()), kl_weight=kl_weight, memory={**state.memory, **tables})

    def _search(
        self, state: WeightState, held: Mapping[str, Held], held_out_MK: np.ndarray, step: int
    ) -> tuple[WeightState, dict[str, Held]]:
        """The thresholds to train towards now."""
        options, names = self.config.search, list(held)
        if options is None or any(h.threshold is None for h in held.values()):
            return state, dict(held)
        memory, thresholds = threshold_search.follow(
            options, state.memory.get("search"), list(held.values()), held_out_MK, step,
            state.memory["problem"]["names"].index(options.gold),
        )  # fmt: skip
        moved = {n: h if h.threshold == t else replace(h, threshold=t, stuck=0)
                 for n, h, t in zip(names, held.values(), thresholds, strict=True)}  # fmt: skip
        remarks = state.remarks
        if memory["ended"] and not (state.memory.get("search") or {}).get("ended"):
            found = ", ".join(f"{n} {h.raw(h.threshold):.3g}" for n, h in moved.items())
            remarks += (f"the search of thresholds has ended after {memory['points']} points and keeps {found}",)
        if memory["points"] > (state.memory.get("search") or {}).get("points", 0):
            tried = ", ".join(f"{n} {h.raw(h.threshold):.3g}" for n, h in held.items())
            gold = held_out_MK[-1, state.memory["problem"]["names"].index(options.gold)]
            remarks += (f"search, point {memory['points']}: {tried} gave {options.gold} {gold:.3g} (scaled to [0, 1])",)
        memory = {**state.memory, "search": memory, "search_points": memory["points"]}
        return replace(state, memory=memory, remarks=remarks), moved

    def _tell(self, state: WeightState, held: Mapping[str, Held]) -> WeightState:
        """Say, once each, what cannot be met; a search tries thresholds out of reach on purpose."""
        searching = self.config.search is not None and not state.memory.get("search", {}).get("ended")
        stuck = [] if searching else [name for name, h in held.items() if h.stuck >= PATIENCE]
        news = [name for name in stuck if name not in state.memory["told"]]
        if not news:
            return state
        memory = {**state.memory, "told": [*state.memory["told"], *news]}
        remark = _out_of_reach({name: held[name] for name in stuck}, self.config.cap)
        return replace(state, memory=memory, remarks=(*state.remarks, remark))


def _logit(m: float) -> float:
    return math.log(m / (1 - m))


def _initial(held: Held, held_out_MK: np.ndarray) -> float:
    """The threshold, or where the first held-out vector stands."""
    return float(held_out_MK[0, held.column]) if held.threshold is None else held.threshold


def _descend(held: Held, dual: Any, low: float, high: float) -> Held:
    """v <- momentum v + m'(l) error, l <- l + rate v (torch's SGD on the loss of the multipliers)."""
    velocity = dual.momentum * held.velocity + held.slope * held.gap
    return replace(held, velocity=velocity, latent=min(max(held.latent + dual.rate * velocity, low), high))


def _control(held: Held, dual: Any, low: float, high: float) -> Held:
    """I <- I + integral error, l <- I + proportional error + derivative (growth of the error), within the range.

    I starts at the first latent number and stays within the range too. In the paper the controller gives the multiplier
    itself, and only growing violations count in the derivative; for `equal`, shrinking ones do too.
    """
    integral = held.latent if held.error is None else held.integral
    integral = min(max(integral + dual.integral * held.gap, low), high)
    growth = 0.0 if held.error is None else held.gap - held.error
    growth = growth if held.kind == "equal" else max(growth, 0.0)
    latent = integral + dual.proportional * held.gap + dual.derivative * growth
    return replace(held, integral=integral, latent=min(max(latent, low), high))


def _out_of_reach(held: Mapping[str, Held], cap: float) -> str:
    states = [f"{n} is {h.raw(h.mean):.3g}, not {h.wanted} {h.raw(h.threshold):.3g}" for n, h in held.items()]
    whose = "its multiplier has" if len(held) == 1 else "their multipliers have"
    together = "These thresholds may not go together: relax one of them" if len(held) > 1 else "Relax the threshold"
    return (
        f"{' and '.join(states)}, though {whose} been at the cap {cap} for {PATIENCE} dual steps. What is optimised keeps "
        f"its weight. {together}, or, where an objective was lost on the way, start again with a smaller learning rate"
    )
