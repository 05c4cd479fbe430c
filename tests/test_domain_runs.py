"""Weights of prompt domains in training: against a loop over samples, against the log, on resuming; what is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.advice import advise
from align.archive import Archive, ParetoPoint, read_points
from align.build import load_prompts, locate_model, objectives_of
from align.config import describe_domains
from align.domains import alignment
from align.evaluate_policies import _table
from align.load import ConfigError, load_config
from align.probe import Probe
from align.report_figures import figures_of
from align.summary import summarize
from align.weighting.gradient import influence
from tests.conftest import QUICKSTART, ROOT, overrides, read_lines

DOMAINS = str(ROOT / "configs" / "domains.yaml")


def expressions(split: str, count: int, terms: int) -> dict:
    args = {"split": split, "count": count, "terms": [terms]}
    return {"type": "function", "function": "rollout.arithmetic:expressions", "args": args}


TRAIN = {
    "type": "mixture",
    "sources": {"short": expressions("train", 8, 3), "long": expressions("train", 16, 4)},
    "shares": {"short": 3, "long": 1},
}
HELD_OUT = {
    "type": "mixture",
    "sources": {"short": expressions("evaluation", 4, 3), "long": expressions("evaluation", 8, 4)},
}
MIXTURE = (f"--prompts.train={json.dumps(TRAIN)}", f"--prompts.evaluation={json.dumps(HELD_OUT)}")
ALIGNMENT = "--domains={type: alignment, weights: {short: 1, long: 3}, rate: 1, probe: {PROBE}}"


@pytest.fixture
def grams(monkeypatch) -> list[np.ndarray]:
    """Every Gram matrix that a probe has held, in order."""
    kept, keep = [], Probe._keep
    monkeypatch.setattr(Probe, "_keep", lambda self, gram: (keep(self, gram), kept.append(self.waiting_KK))[0])
    return kept


def sampled(learner) -> dict[str, list]:
    """What the samples file of a learner has of all its steps."""
    tables = [batch.to_pydict() for batch in learner.parts.files.samples._batches]
    return {key: [value for table in tables for value in table[key]] for key in tables[0]}


def domains_of(ids: list[str]) -> np.ndarray:
    return np.array([name.partition("/")[0] for name in ids])


# --- what acts on the advantages --------------------------------------------------------------------------------------


def test_weights_multiply_the_advantages_and_have_mean_one(make_learner, tmp_path):
    sides = {"plain": (), "weighed": ("--domains={type: fixed, weights: {long: 3, short: 1}}",)}
    tables = {}
    for name, more in sides.items():
        learner = make_learner(*MIXTURE, *more, "--steps=1", "--evaluation.every=0", name=name)
        learner.train()
        tables[name] = sampled(learner)
    assert tables["plain"]["text"] == tables["weighed"]["text"]
    domains = domains_of(tables["plain"]["prompt_id"])
    assert sum(domains == "short") == 12  # three of four prompts, four samples each
    # weights 1/4 and 3/4, mean over prompts (3 * 1/4 + 3/4) / 4 = 3/8: factors 2/3 and 2
    factors = np.where(domains == "long", 2.0, 2 / 3)
    before, after = (np.array(tables[name]["advantage"]) for name in sides)
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(after, before * factors, rtol=1e-12)
    plain, weighed = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in sides)
    assert (plain["domains/long/weight"], weighed["domains/long/weight"]) == (0.5, 0.75)
    assert weighed["domains/long/share"] == 0.25


def test_excess_is_what_the_log_and_a_loop_say(make_learner, tmp_path):
    section = {"type": "excess", "reference": {"short": 0.9, "long": 0.4}, "rate": 2.0, "smoothing": 0.05, "average": 0.6}
    learner = make_learner(*MIXTURE, f"--domains={json.dumps(section)}", "--steps=3", "--evaluation.every=3")
    learner.train()
    weights, values = {"short": 0.5, "long": 0.5}, {}
    for row in read_lines(tmp_path / "run" / "metrics.jsonl"):
        raised = {}
        for name, weight in weights.items():
            means = [row[f"domains/{name}/mean/{objective}"] for objective in ("accuracy", "brevity", "clarity")]
            value = 0.5 * means[0] + 0.3 * means[1] + 0.2 * means[2]
            values[name] = 0.6 * values[name] + 0.4 * value if name in values else value
            excess = max(section["reference"][name] - values[name], 0.0)
            assert row[f"domains/{name}/excess"] == pytest.approx(excess)
            raised[name] = weight * np.exp(2.0 * excess)
        weights = {name: 0.95 * raised[name] / sum(raised.values()) + 0.025 for name in raised}
        for name, weight in weights.items():
            assert row[f"domains/{name}/weight"] == pytest.approx(weight)
    assert weights["short"] > 0.6
    charts = figures_of(
        learner.parts.rules.objectives, read_lines(tmp_path / "run" / "metrics.jsonl"), learner.parts.archive
    )
    drawn = {chart["title"]: [line["name"] for line in chart["data"]] for chart in charts.values()}
    assert drawn["weights of domains"] == drawn["brevity by domain"] == ["short", "long"]
    table = sampled(learner)
    own = (domains_of(table["prompt_id"]) == "long") & (np.array(table["step"]) == 3)
    assert np.mean(np.array(table["value/brevity"])[own]) == pytest.approx(row["domains/long/mean/brevity"])
    point = read_lines(tmp_path / "run" / "archive.jsonl")[-1]
    rows = pq.read_table(tmp_path / "run" / "evaluation" / "step-000003.parquet").to_pydict()
    held_out = domains_of(rows["prompt_id"])
    assert sorted(point["domains"]) == ["long", "short"]
    for name, means in point["domains"].items():
        assert means["brevity"] == pytest.approx(np.mean(np.array(rows["value/brevity"])[held_out == name]))
    assert point["values"]["brevity"] == pytest.approx(
        (4 * point["domains"]["short"]["brevity"] + 8 * point["domains"]["long"]["brevity"]) / 12
    )


# --- alignment --------------------------------------------------------------------------------------------------------


def gradient(model, group, sample) -> torch.Tensor:
    """Of the log-probability of a completion, by the plainest means there are."""
    prompt, completion = list(group.prompt.token_ids), list(sample.token_ids)
    tokens = torch.tensor([prompt + completion])
    log_probs = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=1)
    total = log_probs[torch.arange(len(tokens[0]) - 1), tokens[0, 1:]][len(prompt) - 1 :].sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]).double()


def test_alignment_is_that_of_each_domain_s_own_gradient(make_learner, grams):
    """Sample by sample with plain autograd, then by hand to the weights."""
    learner = make_learner(*MIXTURE, ALIGNMENT.replace("PROBE", "features: exact"), "--steps=1", "--evaluation.every=0")
    learner.train()
    model = AutoModelForCausalLM.from_pretrained(locate_model("builtin:arithmetic"), dtype=torch.float32)
    table, gradients = sampled(learner), {"short": [], "long": []}
    weights = learner.weight_state.domains["weights"]
    mean = (3 * weights["short"] + weights["long"]) / 4
    advantages = iter(table["advantage"])
    for group in learner._groups:
        for sample in group.samples:
            plain = next(advantages) / (weights[group.prompt.domain] / mean)
            gradients[group.prompt.domain].append(plain * gradient(model, group, sample))
    assert [len(own) for own in gradients.values()] == [12, 4]
    means = torch.stack([torch.stack(own).mean(dim=0) for own in gradients.values()])
    expected = (means @ means.T).numpy()
    np.testing.assert_allclose(grams[0] / np.trace(grams[0]), expected / np.trace(expected), rtol=1e-3, atol=1e-5)
    scores = expected.mean(axis=1) / expected.diagonal().mean()
    raised = np.array([0.25, 0.75]) * np.exp(scores)
    np.testing.assert_allclose(list(weights.values()), 0.99 * raised / raised.sum() + 0.005, rtol=1e-4)
    assert list(learner.weight_state.domains["scores"].values()) == pytest.approx(scores, rel=1e-3)


def test_one_probe_serves_the_scheme_and_the_domains(make_learner, grams):
    """With advantages that add up, the domains' gradients and the objectives' are two parts of the same batch's."""
    scheme = "--weighting={type: gradient, weights: {accuracy: 3, brevity: 2, clarity: 1}, probe: {features: exact}}"
    learner = make_learner(*MIXTURE, scheme, "--domains={type: alignment}", "--steps=1", "--evaluation.every=0")
    learner.train()
    (gram,) = grams
    difference = np.array([3 / 6, 2 / 6, 1 / 6, -3 / 4, -1 / 4])
    assert gram.shape == (5, 5)
    assert difference @ gram @ difference == pytest.approx(0, abs=1e-5 * np.trace(gram))
    named = learner.weight_state.memory["influence"]
    assert list(named.values()) == pytest.approx(influence(gram[:3, :3], cosine=False, self_term=True))
    scores = alignment(gram[3:, 3:], np.array([True, True]), cosine=False, self_term=True)
    assert learner.weight_state.domains["scores"] == pytest.approx(dict(zip(("short", "long"), scores, strict=True)))


def test_the_ordinary_backward_tells_the_same_and_acts_a_batch_later(make_learner, grams, tmp_path):
    for backward in ("extra", "ordinary"):
        probe = f"features: norms, backward: {backward}, samples: 16"
        make_learner(
            *MIXTURE, ALIGNMENT.replace("PROBE", probe), "--steps=2", "--evaluation.every=0", name=backward
        ).train()  # fmt: skip
    early, late = grams[0], grams[2]
    assert early.shape == (2, 2)
    np.testing.assert_allclose(late, early, rtol=1e-4, atol=1e-6 * np.trace(early))
    moved = [
        [r["domains/long/weight"] for r in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("extra", "ordinary")
    ]
    assert moved[0][0] != 0.75
    assert moved[1] == [0.75, pytest.approx(moved[0][0], rel=1e-4)]


def test_a_resumed_run_is_the_same(launch, tmp_path):
    """Alignment that waits for the next batch, scores and weights."""
    folder = tmp_path / "run"
    arguments = overrides(folder, *MIXTURE, "--domains={type: alignment, rate: 1}", "--evaluation.every=4")
    result = launch("align.train", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "domains    sampled short 0.75  long 0.25; weights alignment: equal at first" in result.stdout
    before, last = read_lines(folder / "metrics.jsonl"), folder / "checkpoints" / "checkpoint-4" / "paretune.json"
    state, archive = last.read_text(), (folder / "archive.jsonl").read_text()
    saved = json.loads((last.parent.with_name("checkpoint-2") / "paretune.json").read_text())
    assert np.array(saved["gram"]).shape == (2, 2)
    assert saved["weighting"]["domains"]["weights"]["long"] == before[1]["domains/long/weight"]
    assert len({row["domains/long/weight"] for row in before}) == 4
    last.unlink()
    assert launch("align.train", "--resume", str(folder)).returncode == 0
    assert read_lines(folder / "metrics.jsonl") == before
    assert last.read_text() == state
    assert (folder / "archive.jsonl").read_text() == archive


# --- what is refused --------------------------------------------------------------------------------------------------

EXACT = "probe: {features: exact, backward: ordinary}"
REFUSED = [  # overrides of configs/domains.yaml, what the message must say
    (["--domains={type: fixed, weights: {short: 1, lang: 1}}"],
     "domains.weights: unknown domain 'lang'; did you mean 'long'?"),
    (["--domains={type: fixed, weights: {short: 1}}"], "domains.weights has no number for 'long': add it"),
    (["--domains=fixed"], "domains.weights is missing: type fixed needs a weight of every domain (short, long)"),
    (["--domains={type: fixed, weights: {short: 1, long: 0}}"], "domains.weights.long: 0 is not valid: input should"),
    (["--domains={type: fixed, weights: {short: 1, long: .inf}}"], "domains.weights.long: inf is not valid"),
    (["--domains.reference={short: 0.5}"], "domains.reference has no number for 'long': add it"),
    (["--domains.reference={short: 0.5, long: 2}"], "domains.reference.long: 2 is not valid"),
    (["--domains.reference={}"], "domains.reference names no domain: give a value of each, or take best"),
    (["--domains.smoothing=0"], "domains.smoothing: 0 is not valid: input should be greater than 0"),
    (["--domains={type: alignment, target: [lang]}"], "domains.target: unknown domain 'lang'; did you mean 'long'?"),
    (["--domains={type: alignment, self_term: false}"], "domains.self_term=false: without it two domains agree"),
    (["--domains.type=magic"], "domains.type: 'magic' does not exist; one of 'fixed', 'excess', 'alignment'"),
    (["--domains.rat=1"], "domains: unknown key 'rat'; did you mean 'rate'?"),
    # sources
    (["--prompts.train.shares={short: 1, long: 0}"], "prompts.train.shares.long: 0 is not valid: input"),
    (["--prompts.train.shares={short: 1, long: -1}"], "prompts.train.shares.long: -1 is not valid"),
    (["--prompts.train.shares={short: 1}"], "prompts.train.shares has no number for 'long': add it"),
    (["--prompts.train.shares={short: 1, long: 1, lang: 1}"], "prompts.train.shares: unknown domain 'lang'"),
    (["--prompts.train={type: mixture, sources: {one: {type: file, path: x.jsonl}}}"],
     "prompts.train.sources: ['one'] is one source only: add another, or put it in prompts.train itself"),
    (["--prompts.train={type: mixture, sources: {}}"], "prompts.train.sources: {} is not valid"),
    (["--prompts.train={type: mixture, sources: {a: {type: mixture, sources: {}}, b: {type: file, path: x}}}"],
     "prompts.train.sources.a.type: 'mixture' does not exist; one of 'hub', 'file', 'function'"),
    (["--prompts.evaluation.shares={short: 1, long: 1}"],
     "prompts.evaluation.shares: every held-out prompt is evaluated: remove it"),
    (["--prompts.train={type: file, path: x.jsonl}"],
     "domains.type=excess: one source of prompts has nothing to weigh: make prompts.train a mixture"),
    # other ways to train
    (["--estimator={type: dpg, moments: {brevity: 0.5}}"], "domains: estimator.type=dpg trains towards one distribution"),
    (["--rounds={count: 1, prompts: 8, batch_size: 8}", "--selftrain={filter: {at_least: {accuracy: 1}}}"],
     "domains: rounds have no advantages to weigh"),
    # gradients that cannot be had
    ([f"--domains={{type: alignment, {EXACT}}}"], "domains.probe.backward=ordinary: exact needs backward passes of its own"),
    (["--domains={type: alignment, probe: {backward: ordinary}}", "--trl.beta=0.1"],
     "domains.probe.backward=ordinary: with trl.beta=0.1"),
    (["--domains={type: alignment, probe: {features: norms}}", "--policy.lora={}"],
     "domains.probe.features=norms: under policy.lora normalisation layers are frozen; take sketch"),
    (["--domains={type: alignment, probe: {size: 4}}", "--weighting={type: mgda}"],
     "domains.probe: weighting.type=mgda measures gradients too, and one pass reads all: say how in weighting.probe"),
    (["--domains=alignment", "--weighting={type: mgda, probe: {features: norms}}", "--policy.lora={}"],
     "weighting.probe.features=norms: under policy.lora normalisation layers are frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_contradictions_are_refused_at_once(changes, message):
    with pytest.raises(ConfigError) as error:
        load_config(DOMAINS, changes)
    assert message in str(error.value)


def test_fields_that_a_reward_needs_must_be_in_every_domain(tmp_path):
    rows = {"sums": {"prompt": "1+1=?", "answer": 2, "expression": "1+1"}, "words": {"question": "2*3?", "answer": 6}}
    sources = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        sources[name] = {"type": "file", "path": str(tmp_path / f"{name}.jsonl"), "prompt": next(iter(row))}
    tokenizer = AutoTokenizer.from_pretrained(locate_model("builtin:arithmetic"))
    mixture = f"--prompts.train={json.dumps({'type': 'mixture', 'sources': sources})}"
    config = load_config(QUICKSTART, [mixture, "--evaluation.every=0"])
    with pytest.raises(ValueError, match=r"objectives\.clarity: .* reads the field 'expression', which words of") as error:
        load_prompts(config, tokenizer, 256)
    assert "which words of prompts.train.sources does not have; " in str(error.value)
    assert "these have in common answer: rename fields" in str(error.value)
    config = load_config(
        QUICKSTART,
        [
            mixture,
            "--evaluation.every=0",
            "--objectives={accuracy: {reward: arithmetic_accuracy}}",
            "--weighting={type: fixed, weights: {accuracy: 1}}",
        ],
    )
    prompts = load_prompts(config, tokenizer, 256)
    assert prompts.columns == ["answer"]
    assert [prompt.domain for prompt in prompts.train] == ["sums", "words"]
    (tmp_path / "words.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"prompts\.train\.sources\.words: row 1 has no field 'question'"):
        load_prompts(config, tokenizer, 256)


def test_means_of_domains_are_in_the_table_and_in_the_archive(tmp_path):
    config, nothing = load_config(DOMAINS), float("nan")
    raw = np.array([[[0.0, 0.5]], [[1.0, 0.7]], [[nothing, 0.9]]])
    summary = summarize(raw, objectives_of(config), ["short", "short", "long"])
    assert summary.domains["short"] == pytest.approx({"accuracy": 0.5, "brevity": 0.6})
    lines = _table({"step 3": summary}, config).splitlines()
    assert [line.split() for line in lines[-2:]] == [["nan", "0.900", "long"], ["0.500", "0.600", "short"]]
    Archive(tmp_path / "archive.jsonl", objectives_of(config), {}, writes=True).append(
        ParetoPoint(3, **vars(summary), prompts=3, samples=3, checkpoint="")
    )
    (point,) = read_points(tmp_path / "archive.jsonl")
    assert point.domains["short"] == summary.domains["short"]
    assert np.isnan(point.domains["long"]["accuracy"])


def test_what_is_said_of_domains():
    config = load_config(DOMAINS)
    assert describe_domains(config) == ["sampled short 0.5  long 0.5; weights excess: equal at first"]
    assert describe_domains(load_config(QUICKSTART)) == []
    rare = load_config(DOMAINS, ["--prompts.train.shares={short: 99, long: 1}", "--weighting=gradient"])
    said = "\n".join(advise(rare))
    assert "some batches of 16 prompts have none of long" in said
    assert "weighting.type=gradient measures gradients of objectives without these weights" in said
