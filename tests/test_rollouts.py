"""Between learner and sampler: scores, checks that are repeated, batches drawn ahead, and errors that reach everybody."""

import numpy as np
import pytest
import torch

from align.config.rollout import CorrectionConfig, VerifyConfig
from align.correction import correction_metrics, correction_sums
from align.push import band_of, canaries
from rollout.sampler import Check, Gap, RolloutError
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.conftest import read_lines

SEQUENCES = [[50, 43, 51, 61, 9], [0, 1, 2, 256, 4]]


class Pretender:
    """A sampler whose gaps are given; it notes what is asked of it."""

    shares_weights = False

    def __init__(self, gaps):
        self.gaps = list(gaps)
        self.pushes = []
        self.batches = []

    def sync(self, weights, version, check):
        self.pushes.append((version, [name for name, _ in weights]))
        self.check = check
        return self.gaps.pop(0) if self.gaps else Gap()

    def sample(self, prompts, params):
        version = self.pushes[-1][0]
        self.batches.append(([prompt.id for prompt in prompts], params.seed, version))
        sample = Sample((65, 256), (-1.0, -2.0), FinishReason.STOP, version, "A")
        return [SampleGroup(prompt, (sample,) * params.samples_per_prompt) for prompt in prompts]

    def differing(self):
        return ("model.norm.weight",)

    def close(self):
        pass


@pytest.fixture
def learner_with(make_learner, monkeypatch):
    def make(gaps, *more, name="run"):
        pretender = Pretender(gaps)
        engine = type(
            "Engine", (), {"sampler": staticmethod(lambda learner: pretender), "close": staticmethod(lambda: None)}
        )
        monkeypatch.setattr("align.engine.open_engine", lambda *arguments: engine)
        vllm = ["--rollout.engine={type: vllm, urls: ['http://127.0.0.1:9']}", "--evaluation.every=0"]
        return make_learner(*vllm, *more, name=name), pretender

    return make


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_those_of_the_policy_itself_at_any_sampling_temperature(make_learner, temperature):
    learner = make_learner(f"--rollout.temperature={temperature}")
    tokens = torch.tensor(SEQUENCES)
    with torch.no_grad():
        expected = learner.model.eval()(tokens).logits[:, :-1].double().log_softmax(-1)
    expected = expected.gather(2, tokens[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(learner.score(SEQUENCES), expected, atol=1e-5)


def test_a_push_that_arrives_is_made_once_and_one_that_does_not_twice(learner_with):
    learner, sampler = learner_with([Gap(0.2, 0.9), Gap(0.0, 0.0)])
    learner.rollouts.sync(0)
    assert [version for version, _ in sampler.pushes] == [0, 0]
    assert len(sampler.pushes[0][1]) == 39  # all weights of the policy, the second time too
    assert sampler.pushes[0] == sampler.pushes[1]
    learner.rollouts.sync(0)  # known to be there
    assert len(sampler.pushes) == 2
    learner.rollouts.sync(1)
    assert len(sampler.pushes) == 3
    assert learner.rollouts.take_metrics()["sync/gap_max"] == 0.0


def test_after_two_pushes_in_vain_it_stops_and_names_what_differs(learner_with):
    learner, sampler = learner_with([Gap(0.2, 0.9), Gap(0.2, 0.8)])
    with pytest.raises(RolloutError, match=r"two pushes.*0\.2 nats.*model\.norm\.weight.*rollout\.engine\.verify"):
        learner.rollouts.sync(0)
    assert sampler.batches == []


@pytest.mark.parametrize("gap", [Gap(float("nan"), float("nan")), Gap(0.0, float("nan")), Gap(0.0, 1.0)])
def test_what_is_no_number_is_no_agreement(gap):
    assert not Check(SEQUENCES, np.zeros((2, 4)), Gap(1e-3, 1e-2)).passes(gap)
    assert Check(SEQUENCES, np.zeros((2, 4)), Gap(1e-3, 1e-2)).passes(Gap(1e-3, 1e-2))


@pytest.mark.parametrize(("lookahead", "versions"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_batches_come_in_order_from_the_policy_they_should(learner_with, lookahead, versions):
    learner, sampler = learner_with([], f"--rollout.lookahead={lookahead}", "--trl.learning_rate=1e-9")
    learner.train()
    assert [version for _, _, version in sampler.batches] == versions
    assert len({seed for _, seed, _ in sampler.batches}) == 4
    plain, other = learner_with([], "--trl.learning_rate=1e-9", name="other")
    plain.train()
    assert [batch[:2] for batch in sampler.batches] == [batch[:2] for batch in other.batches]  # prompts and seeds


def test_an_error_while_drawing_ahead_comes_out_at_the_next_batch(learner_with):
    learner, sampler = learner_with([], "--rollout.lookahead=1", "--trl.learning_rate=1e-9")
    original, calls = sampler.sample, []

    def sample(prompts, params):
        calls.append(params.seed)
        if len(calls) == 2:
            raise RolloutError("the servers are gone")
        return original(prompts, params)

    sampler.sample = sample
    with pytest.raises(RolloutError, match="the servers are gone"):
        learner.train()
    assert learner.state.global_step == 1


def test_bands_follow_the_coarser_type():
    verify = VerifyConfig()
    assert band_of(verify, exact=True) == Gap(1e-3, 1e-2)
    assert band_of(verify, exact=False) == Gap(0.05, 0.5)
    assert band_of(VerifyConfig(mean_gap=0.2), exact=True) == Gap(0.2, 1e-2)


def test_canaries_are_fixed_of_one_length_and_within_the_context():
    prompts = [Prompt(str(i), "", tuple(range(10, 10 + length)), {}) for i, length in enumerate((3, 40, 1))]
    found = canaries(prompts, VerifyConfig(sequences=5, tokens=12), 100, 300, seed=0)
    assert [len(sequence) for sequence in found] == [12] * 5
    assert found[1][:6] == [10, 11, 12, 13, 14, 15]
    assert found == canaries(prompts, VerifyConfig(sequences=5, tokens=12), 100, 300, seed=0)
    assert found != canaries(prompts, VerifyConfig(sequences=5, tokens=12), 100, 300, seed=1)
    assert len(canaries(prompts, VerifyConfig(tokens=50), 20, 300, seed=0)[0]) == 19  # one more is made while scoring
    assert max(max(sequence) for sequence in found) < 300


def test_figures_of_the_correction_by_hand():
    options = CorrectionConfig(type="truncate", max=2.0)
    ratios = torch.tensor([[1.0, 2.0, 9.0], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # three tokens: 1, 2, .5; sum 3.5, squares 5.25; (3.5^2) / (3 * 5.25) = 12.25 / 15.75; one of three at the bound
    figures = correction_metrics(correction_sums(ratios, mask, options))
    assert figures["sampling/effective_sample_size"] == pytest.approx(12.25 / 15.75)
    assert figures["sampling/beyond_bounds"] == pytest.approx(1 / 3)
    # at sequence level one ratio per row counts: 1.5 and 0 (masked); (1.5^2) / (2 * 2.25) = .5; half is masked
    sums = correction_sums(torch.tensor([[1.5], [0.0]]), mask, CorrectionConfig(type="mask", level="sequence"))
    figures = correction_metrics(sums)
    assert (figures["sampling/effective_sample_size"], figures["sampling/beyond_bounds"]) == (pytest.approx(0.5), 0.5)
    halves = correction_sums(ratios[:1], mask[:1], options) + correction_sums(ratios[1:], mask[1:], options)
    assert correction_metrics(halves)["sampling/effective_sample_size"] == pytest.approx(12.25 / 15.75)


@pytest.mark.parametrize("correction", ["{type: truncate}", "{type: mask, max: 1.2}", "{type: truncate, level: sequence}"])
def test_the_learners_own_samples_need_no_correction_and_get_none(make_learner, tmp_path, correction):
    """The built-in sampler's log-probabilities are the learner's: every ratio is 1, and training is as without."""
    losses = []
    for name, more in (("plain", []), ("corrected", [f"--rollout.correction={correction}"])):
        learner = make_learner(*more, "--steps=2", name=name)
        learner.train()
        trained = read_lines(tmp_path / name / "metrics.jsonl")
        losses.append([row["loss"] for row in trained])
    for row in trained:
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, abs=1e-4)
        assert row["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_an_error_in_one_process_reaches_all(launch):
    result = launch("tests.together_run", processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    for line in (
        "rank 0: RolloutError on 0: RolloutError(broken on 0)",
        "rank 1: RolloutError on 0: RolloutError(broken on 0)",
        "rank 0: ZeroDivisionError on 1: RolloutError(broken on 1)",
        "rank 1: ZeroDivisionError on 1: ZeroDivisionError(broken on 1)",
        "rank 1: ValueError on 9: fine",
        "rank 0: main says 40",
        "rank 1: main says 40",
    ):
        assert line in result.stdout
