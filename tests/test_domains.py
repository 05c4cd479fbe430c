"""Weights of prompt domains: the formulas, by hand, by their properties and by brute force; the order of a mixture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from align.config.domains import AlignmentDomains, ExcessDomains, FixedDomains
from align.domains import (
    DomainRules,
    alignment,
    domain_columns,
    domain_means,
    excess,
    exponentiated,
    prompt_factors,
    weigh_domains,
)
from rollout.prompts import mix, mixed_order
from rollout.types import Prompt

NAN = np.nan
NO_GRAM = np.zeros((0, 0))
GRAM = np.array([[4.0, -1.0], [-1.0, 2.0]])  # g_a = (2, 0), g_b = (-.5, sqrt 1.75)


def some_weights(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(count))


# --- factors ----------------------------------------------------------------------------------------------------------


def test_factors_by_hand():
    # three prompts of weight .75, one of .25: mean .625; .75 / .625 = 1.2, .25 / .625 = .4
    np.testing.assert_allclose(prompt_factors(np.array([0.75, 0.25]), np.array([0, 0, 1, 0])), [1.2, 1.2, 0.4, 1.2])
    np.testing.assert_array_equal(prompt_factors(np.array([0.1, 0.7, 0.2]), np.array([2, 2])), [1, 1])  # it is alone
    np.testing.assert_array_equal(prompt_factors(np.full(3, 1 / 3), np.array([2, 0, 1, 1])), np.ones(4))  # to the last bit


@given(count=st.integers(1, 5), prompts=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_factors_have_mean_one_and_no_scale(count, prompts, seed, scale):
    weights_J, domains_P = some_weights(count, seed), np.random.default_rng(seed).integers(count, size=prompts)
    factors_P = prompt_factors(weights_J, domains_P)
    assert factors_P.mean() == pytest.approx(1)
    np.testing.assert_allclose(factors_P / weights_J[domains_P], factors_P[0] / weights_J[domains_P[0]])
    np.testing.assert_allclose(prompt_factors(scale * weights_J, domains_P), factors_P)
    order = np.random.default_rng(seed).permutation(count)
    np.testing.assert_allclose(prompt_factors(weights_J[order], np.argsort(order)[domains_P]), factors_P)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_an_update_by_hand():
    # .5 e^ln2 = 1 and .5 are in proportion 2/3 : 1/3; nine tenths of that and a tenth of (1/2, 1/2): .65, .35
    updated = exponentiated(np.array([0.5, 0.5]), np.array([np.log(2), 0.0]), rate=1.0, smoothing=0.1)
    np.testing.assert_allclose(updated, [0.65, 0.35])


@given(
    count=st.integers(2, 5), seed=st.integers(0, 99), rate=st.floats(0.01, 50), smoothing=st.floats(1e-4, 1),
    shift=st.floats(-1e3, 1e3),
)  # fmt: skip
def test_an_update_stays_on_the_simplex_and_above_its_floor(count, seed, rate, smoothing, shift):
    weights_J, scores_J = some_weights(count, seed), np.random.default_rng(seed).normal(size=count)
    updated_J = exponentiated(weights_J, scores_J, rate, smoothing)
    assert updated_J.sum() == pytest.approx(1)
    assert updated_J.min() >= smoothing / count * (1 - 1e-9)
    np.testing.assert_allclose(exponentiated(weights_J, scores_J + shift, rate, smoothing), updated_J, rtol=1e-6)
    order = np.random.default_rng(seed).permutation(count)
    np.testing.assert_allclose(exponentiated(weights_J[order], scores_J[order], rate, smoothing), updated_J[order])
    np.testing.assert_allclose(exponentiated(weights_J, np.ones(count), rate, 1e-300), weights_J)


def test_an_update_is_a_step_of_mirror_ascent():
    """It maximises rate <s, v> - KL(v, w) over the simplex, by a general solver."""
    weights_J, scores_J, rate = np.array([0.2, 0.5, 0.3]), np.array([0.4, -0.1, 0.9]), 0.7

    def loss(v):
        return -rate * v @ scores_J + v @ np.log(v / weights_J)

    bounds, simplex = [(1e-9, 1)] * 3, {"type": "eq", "fun": lambda v: v.sum() - 1}
    found = minimize(loss, np.full(3, 1 / 3), bounds=bounds, constraints=simplex, tol=1e-14)
    np.testing.assert_allclose(exponentiated(weights_J, scores_J, rate, 1e-300), found.x, atol=1e-6)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_excess_by_hand():
    np.testing.assert_allclose(excess(np.array([0.9, 0.5, NAN]), np.array([0.6, 0.7, 0.1])), [0.3, 0.0, NAN])


def test_alignment_by_hand():
    # mean of both: <a, (a + b) / 2> = (4 - 1) / 2, <b, .> = (-1 + 2) / 2; over the mean square (4 + 2) / 2 = 3: 1/2, 1/6
    both, b = np.array([True, True]), np.array([False, True])
    np.testing.assert_allclose(alignment(GRAM, both, cosine=False, self_term=True), [1 / 2, 1 / 6])
    np.testing.assert_allclose(alignment(GRAM, b, cosine=False, self_term=True), [-1 / 3, 2 / 3])
    np.testing.assert_allclose(alignment(GRAM, b, cosine=False, self_term=False), [-1 / 3, NAN])
    cosine = -1 / np.sqrt(8)
    np.testing.assert_allclose(alignment(GRAM, both, cosine=True, self_term=True), [(1 + cosine) / 2] * 2)
    np.testing.assert_allclose(alignment(GRAM, both, cosine=True, self_term=False), [cosine] * 2)


def test_a_domain_without_a_gradient_has_no_alignment_and_no_part_in_that_of_others():
    padded = np.zeros((3, 3))
    padded[np.ix_([0, 2], [0, 2])] = GRAM
    everything = np.ones(3, dtype=bool)
    np.testing.assert_allclose(alignment(padded, everything, cosine=False, self_term=True), [1 / 2, NAN, 1 / 6])
    assert np.isnan(alignment(padded, ~everything, cosine=False, self_term=True)).all()
    assert np.isnan(alignment(np.zeros((2, 2)), everything[:2], cosine=True, self_term=True)).all()


@given(
    count=st.integers(2, 4),
    seed=st.integers(0, 99),
    cosine=st.booleans(),
    self_term=st.booleans(),
    scale=st.floats(1e-4, 1e4),
)
def test_alignment_is_that_of_the_gradients_themselves(count, seed, cosine, self_term, scale):
    rng = np.random.default_rng(seed)
    gradients, target = rng.normal(size=(count, 5)), rng.random(count) < 0.6
    found = alignment(scale * gradients @ gradients.T, target, cosine, self_term)
    sizes = [np.linalg.norm(g) for g in gradients]
    for j, score in enumerate(found):
        unit = [g / size if cosine else g for g, size in zip(gradients, sizes, strict=True)]
        others = [unit[t] for t in range(count) if target[t] and (self_term or t != j)]
        expected = unit[j] @ np.mean(others, axis=0) if others else NAN
        assert score == pytest.approx(expected if cosine else expected / np.mean(np.square(sizes)), nan_ok=True)


# --- columns and means ------------------------------------------------------------------------------------------------


def test_a_column_makes_the_mean_gradient_of_its_domain_of_the_batch_s():
    rng = np.random.default_rng(0)
    advantages_PG, scores_PGD, domains_P = rng.normal(size=(5, 3)), rng.normal(size=(5, 3, 4)), np.array([2, 0, 2, 2, 0])
    columns_PGJ = domain_columns(advantages_PG, domains_P, count=3)
    found_JD = np.einsum("pgj,pgd->jd", columns_PGJ, scores_PGD) / 15
    for domain in (0, 2):
        own = domains_P == domain
        np.testing.assert_allclose(found_JD[domain], (advantages_PG[own][:, :, None] * scores_PGD[own]).mean(axis=(0, 1)))
    assert not columns_PGJ[:, :, 1].any()  # no prompt of it: no gradient, and no division by zero


def test_means_of_domains_leave_out_what_is_missing():
    # domain 0: prompts 0 and 2, values 1, 3 and 5 of the first objective; domain 1 has no value of the second
    values = np.array([[[1, 0], [3, 1]], [[2, NAN], [4, NAN]], [[5, 2], [NAN, 3]]])
    means_JK = domain_means(values, np.array([0, 1, 0]), count=3)
    np.testing.assert_array_equal(means_JK, [[3, 1.5], [3, NAN], [NAN, NAN]])


# --- step by step -----------------------------------------------------------------------------------------------------


def rules(config, shares_K=(1.0,)) -> DomainRules:
    return DomainRules(("a", "b"), config, shares_K)


def of(a: float, b: float) -> np.ndarray:
    """Rewards of a batch of two prompts, one of a and one of b, two equal samples each."""
    return np.array([[[a], [a]], [[b], [b]]])


def test_excess_step_by_step():
    config = ExcessDomains(type="excess", reference={"a": 0.9, "b": 0.5}, rate=1.0, smoothing=1e-12, average=0.5)
    step = weigh_domains(rules(config), {}, np.array([0, 1]), of(0.4, 0.6), NO_GRAM)
    # excess .5 and 0: weights in proportion e^.5 : 1
    odds = np.exp(0.5)
    assert step.memory["weights"] == pytest.approx({"a": odds / (1 + odds), "b": 1 / (1 + odds)})
    assert step.metrics["domains/a/excess"] == pytest.approx(0.5)
    np.testing.assert_allclose(step.factors_P, [2 * odds / (1 + odds), 2 / (1 + odds)])
    # a alone: its average becomes (.4 + .8) / 2 = .6, excess .3; b keeps its average and its score
    step = weigh_domains(rules(config), step.memory, np.array([0, 0]), of(0.8, 0.8), NO_GRAM)
    assert step.memory["values"] == pytest.approx({"a": 0.6, "b": 0.6})
    assert step.memory["scores"] == pytest.approx({"a": 0.3, "b": 0.0})
    assert step.memory["weights"]["a"] / step.memory["weights"]["b"] == pytest.approx(np.exp(0.5 + 0.3))
    np.testing.assert_array_equal(step.factors_P, [1, 1])
    assert step.metrics["domains/b/share"] == 0


def test_the_best_so_far_as_reference():
    config = ExcessDomains(type="excess", average=0.0, rate=1.0, smoothing=1e-12)
    step = weigh_domains(rules(config), {}, np.array([0, 1]), of(0.4, 0.6), NO_GRAM)
    assert step.memory["weights"] == {"a": 0.5, "b": 0.5}
    step = weigh_domains(rules(config), step.memory, np.array([0, 1]), of(0.7, 0.2), NO_GRAM)
    assert step.memory["best"] == {"a": 0.7, "b": 0.6}
    assert step.memory["scores"] == pytest.approx({"a": 0.0, "b": 0.4})
    assert step.memory["weights"]["b"] > 0.5


def test_objectives_count_by_the_user_s_shares_and_those_that_are_watched_not_at_all():
    rewards = np.array([[[0.2, 0.6, NAN]], [[1.0, 0.0, NAN]]])
    config = ExcessDomains(type="excess", reference={"a": 1, "b": 1})
    step = weigh_domains(rules(config, (0.75, 0.25, 0.0)), {}, np.array([0, 1]), rewards, NO_GRAM)
    assert step.memory["values"] == pytest.approx({"a": 0.3, "b": 0.75})  # .75 * .2 + .25 * .6, .75 * 1


def test_a_domain_that_no_one_has_seen_is_taken_for_an_average_one():
    config = ExcessDomains(type="excess", reference={"a": 1, "b": 1}, smoothing=1e-12)
    step = weigh_domains(rules(config), {}, np.array([0, 0]), of(0.3, 0.3), NO_GRAM)
    assert step.memory["weights"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert "b" not in step.memory["scores"]
    assert np.isnan(step.metrics["domains/b/excess"])


def test_alignment_step_by_step():
    config = AlignmentDomains(type="alignment", weights={"a": 3, "b": 1}, rate=1.0, smoothing=1e-12)
    step = weigh_domains(rules(config), {}, np.array([0, 1]), of(0.0, 0.0), NO_GRAM)
    assert step.memory["weights"] == {"a": 0.75, "b": 0.25}  # no gradients yet
    step = weigh_domains(rules(config), step.memory, np.array([0, 1]), of(0.0, 0.0), GRAM)
    assert step.memory["weights"]["a"] / step.memory["weights"]["b"] == pytest.approx(3 * np.exp(1 / 2 - 1 / 6))
    toward = AlignmentDomains(type="alignment", target=["b"], rate=1.0, smoothing=1e-12)
    step = weigh_domains(rules(toward), {}, np.array([0, 1]), of(0.0, 0.0), GRAM)
    assert step.memory["weights"]["a"] / step.memory["weights"]["b"] == pytest.approx(np.exp(-1 / 3 - 2 / 3))


def test_fixed_weights_stay():
    config, memory = FixedDomains(type="fixed", weights={"b": 1, "a": 3}), {}
    for _ in range(3):
        step = weigh_domains(rules(config), memory, np.array([0, 1]), of(0.0, 1.0), NO_GRAM)
        memory = step.memory
        assert memory["weights"] == {"a": 0.75, "b": 0.25}
        np.testing.assert_allclose(step.factors_P, [1.5, 0.5])


# --- the prompts of a mixture -----------------------------------------------------------------------------------------


def test_an_order_by_hand():
    # a comes at 2/3, 2, 10/3, 14/3, 6, ..., b at 2, 6, ...; of two at once the first named is first
    order = mixed_order(["a", "a", "b", "a"], {"a": 3, "b": 1}, total=7, seed=0)
    assert ["aaba"[i] for i in order] == list("aabaaab")


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    total=st.integers(0, 90),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_every_domain_has_its_share_at_any_time_and_a_longer_run_begins_the_same(sizes, total, seed, data):
    domains = [name for name, size in zip("abcd", sizes, strict=False) for _ in range(size)]
    raw = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    shares = dict(zip("abcd", raw, strict=False))
    order = mixed_order(domains, shares, total, seed)
    assert len(order) == total
    np.testing.assert_array_equal(mixed_order(domains, shares, total + 17, seed)[:total], order)
    for name, size in zip("abcd", sizes, strict=False):
        own = np.array([domains[i] == name for i in order], dtype=bool)
        share = shares[name] / sum(raw)
        wanted = share * np.arange(1, total + 1)
        assert (np.abs(np.cumsum(own) - wanted) <= (1 + share * len(sizes)) / 2 + 1e-6).all()
        turns = order[own]
        for start in range(0, len(turns) - size + 1, size):
            assert len(set(turns[start : start + size].tolist())) == size  # pass after pass


def test_domains_of_one_size_are_not_in_the_same_order_and_seeds_differ():
    domains, shares = ["a"] * 50 + ["b"] * 50, {"a": 1, "b": 1}
    order = mixed_order(domains, shares, 100, 0)
    assert (order[order < 50] != order[order >= 50] - 50).any()
    assert (order != mixed_order(domains, shares, 100, 1)).any()


def test_prompts_of_a_mixture_know_their_domain_and_have_the_fields_of_all():
    one = [Prompt("1", "x", (1,), {"prompt": "x", "answer": 3, "extra": 0}), Prompt("2", "y", (2,), {})]
    other = [Prompt("1", "z", (3,), {"question": "z", "answer": 4})]
    mixed = mix({"one": one, "other": other})
    assert [(p.id, p.domain, p.text) for p in mixed] == [
        ("one/1", "one", "x"),
        ("one/2", "one", "y"),
        ("other/1", "other", "z"),
    ]
    assert [dict(p.columns) for p in mixed] == [{"answer": 3}, {}, {"answer": 4}]
