"""Self-training inside training: its gradient against a loop over samples, over processes, with adapters; what it tells."""

import json
import sys
import zlib

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.build import locate_model
from align.selftrain.weights import answer_entropy, compose, distribution_shift, dual_step, entropy_weights, keep_nearest
from tests import forks, selftrain_run
from tests.conftest import ROOT, environment, read_lines, torchrun
from tests.test_train import ZERO

LAST = "run.run/checkpoints/checkpoint-2/model.safetensors"
RIGHT = "--selftrain={filter: {at_least: {accuracy: 1}}, term: {samples: 8}}"


def nats(model, pair) -> torch.Tensor:
    """Minus the log-probability of a completion, summed over its tokens, by the plainest means there are."""
    prompt, completion = pair
    tokens = torch.tensor([[*prompt, *completion]])
    log_probs = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=1)
    return -log_probs[torch.arange(len(tokens[0]) - 1), tokens[0, 1:]][len(prompt) - 1 :].sum()


def descend(model, draw, coefficient: float) -> float:
    """One step of plain gradient descent on a draw, sample by sample; the weighted loss."""
    for pair, factor in zip(draw.pairs, draw.factors_n, strict=True):
        (coefficient * factor * nats(model, pair)).backward()
    with torch.no_grad():
        total = sum(factor * nats(model, pair).item() for pair, factor in zip(draw.pairs, draw.factors_n, strict=True))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= selftrain_run.TRL["learning_rate"] * parameter.grad
                parameter.grad = None
    return total


def policy():
    return AutoModelForCausalLM.from_pretrained(locate_model("builtin:arithmetic"), dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in this process: its folder, learner and draws."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *selftrain_run.main(str(folder / "run"), [])


def test_every_update_is_that_of_a_loop_over_samples(alone):
    folder, _, draws = alone
    model, coefficient = policy(), selftrain_run.SELFTRAIN["term"]["coefficient"]
    rows = read_lines(folder / "run.run" / "metrics.jsonl")
    for draw, row in zip(draws, rows, strict=True):
        assert len(draw.pairs) == 11
        plain = sum(nats(model, pair).item() for pair in draw.pairs) / sum(len(pair[1]) for pair in draw.pairs)
        assert row["selftrain/nll"] == pytest.approx(plain, rel=1e-4)
        assert row["selftrain/term"] == pytest.approx(descend(model, draw, coefficient), rel=1e-4)
    trained = load_file(folder / LAST)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.data, rtol=1e-4, atol=1e-6)


def test_the_weights_of_an_update_by_hand(alone):
    """The second one: duals of samples that were drawn before have moved, the others begin at 1."""
    folder, learner, draws = alone
    rows = [row for row in read_lines(folder / "run.run" / "pool.jsonl") if row["step"] > 0]
    entropy = {(row["step"], tuple(row["prompt_ids"]), tuple(row["completion_ids"])): row["entropy"] for row in rows}
    trusted = [pair for pairs in learner.parts.sources.trusted.values() for pair in pairs]
    model, duals = policy(), {}
    for number, draw in enumerate(draws, 1):
        losses, distances = (
            np.array([nats(model, pair).item() / len(pair[1]) for pair in pairs]) for pairs in (draw.pairs, trusted)
        )
        keys = [tuple(map(tuple, pair)) for pair in draw.pairs]
        stepped = dual_step(np.array([duals.get(key, 1.0) for key in keys]), losses, 8.0, 0.2, 0.1)
        duals |= dict(zip(keys, stepped, strict=True))
        newest = [max(step for step in range(1, number + 1) if (step, *key) in entropy) for key in keys]
        entropies = np.array([entropy[step, *key] for step, key in zip(newest, keys, strict=True)])
        raws = [entropy_weights(entropies, 0.5), stepped, keep_nearest(distribution_shift(losses, distances), 0.8)]
        weights = compose(raws, 10, 0.1).values_n
        assert weights.std() > 0.1
        np.testing.assert_allclose(draw.factors_n, weights / sum(len(pair[1]) for pair in draw.pairs), rtol=1e-4)
        descend(model, draw, selftrain_run.SELFTRAIN["term"]["coefficient"])
    state = json.loads((folder / LAST).with_name("paretune.json").read_text())
    assert state["pooled"] == len(rows)
    kept = state["duals"]
    entries = [(entry.prompt_ids, entry.completion_ids) for entry in learner._pool.entries]
    np.testing.assert_allclose(kept, [duals.get(key, 1.0) for key in entries], rtol=1e-4)
    assert min(kept) < 1 < max(kept)


@pytest.mark.parametrize("sharding", ["DDP", "ZeRO-3"])
def test_two_processes_train_as_one(alone, tmp_path, sharding):
    out, env = str(tmp_path / "run"), environment(2)
    arguments = torchrun("tests.selftrain_run", out, "--learner.micro_batch_size=2", processes=2)
    if sharding != "DDP":
        pytest.importorskip("deepspeed")
        file = tmp_path / "zero.yaml"
        file.write_text(ZERO.replace("STAGE", sharding[-1]))
        del env["ACCELERATE_USE_CPU"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        arguments = [*launcher, "-m", "tests.selftrain_run", out]
    result = forks.run(arguments, cwd=ROOT, env=env, timeout=280)
    assert result.stdout.count("trained on the pool") == 2, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"run.{rank}").read_text()) for rank in (0, 1))
    assert first == second  # to the last bit
    folder, _, draws = alone
    for found, draw in zip(first, draws, strict=True):
        assert found["pairs"] == json.loads(json.dumps(draw.pairs))
        np.testing.assert_allclose(found["factors"], draw.factors_n, rtol=1e-4)
    one, two = load_file(folder / LAST), load_file(tmp_path / LAST)
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)
    for a, b in zip(*(read_lines(path / "run.run" / "metrics.jsonl") for path in (folder, tmp_path)), strict=True):
        keys = [key for key in a if key.startswith("selftrain/")]
        assert len(keys) == 8
        assert [b[key] for key in keys] == pytest.approx([a[key] for key in keys], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    pools = [(path / "run.run" / "pool.jsonl").read_text().splitlines()[1:] for path in (folder, tmp_path)]
    assert sorted(pools[0]) == sorted(pools[1])


def test_adapters_are_trained_and_sequences_count_alike(tmp_path):
    section = {"filter": {"at_least": {"even": 0.5}}, "term": {"coefficient": 0.5, "samples": 4, "normaliser": "sequences"}}
    changes = ["--policy.lora.r=4", "--rollout.temperature=0.7", "--steps=1", "--checkpoint.every=1"]
    changes += ["--trl.gradient_checkpointing=true"]
    learner, draws = selftrain_run.main(str(tmp_path / "run"), changes, section)
    trained = {name: p.data.clone() for name, p in learner.model.named_parameters() if p.requires_grad}
    lengths = np.array([len(pair[1]) for pair in draws[0].pairs])
    assert len(set(lengths)) > 1
    np.testing.assert_allclose(draws[0].factors_n, 1 / (4 * lengths))
    checkpoint = tmp_path / "run.run" / "checkpoints" / "checkpoint-1"
    model = PeftModel.from_pretrained(policy(), str(checkpoint), is_trainable=True)
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == trained.keys()
    for name, parameter in state.items():  # B is 0 at first, and so is the gradient of A: A is still what it was
        parameter.data.mul_(0 if "lora_B" in name else 1)
    descend(model, draws[0], 0.5)
    for name, parameter in state.items():
        torch.testing.assert_close(trained[name], parameter.data, rtol=1e-4, atol=1e-7)
    assert any(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)


# --- weights of prompts ---------------------------------------------------------------------------------------------------


def test_prompts_that_the_policy_is_of_several_minds_about_have_larger_advantages(make_learner):
    plain, weighed = (make_learner(*more, "--steps=1", name=f"run{len(more)}") for more in ((), (
        "--selftrain={prompts: [entropy], cap: 2.5}",)))  # fmt: skip
    for learner in (plain, weighed):
        learner.train()
    tables = [learner.parts.files.samples._batches[0].to_pydict() for learner in (plain, weighed)]
    assert tables[0]["text"] == tables[1]["text"]
    before, after = (np.array(table["advantage"]).reshape(4, 4) for table in tables)
    reader = weighed.parts.sources.reader
    answers = np.array([reader(text) or "" for text in tables[0]["text"]]).reshape(4, 4)
    entropies = np.array([answer_entropy(list(row)) for row in answers])
    expected = compose([entropy_weights(entropies, 1.0)], 2.5, 0.1).values_n
    assert expected.std() > 0.1
    np.testing.assert_allclose(after, before * expected[:, None], rtol=1e-12)


# --- bad input ------------------------------------------------------------------------------------------------------------


def told(capsys) -> list[str]:
    return [
        line.split("self-training: ")[1].strip() for line in capsys.readouterr().out.splitlines() if "training: " in line
    ]


def test_nothing_passes_but_seeds_are_there(make_learner, capsys, tmp_path):
    none = RIGHT.replace("accuracy: 1", "accuracy: 1, brevity: 1")
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in selftrain_run.TRUSTED))
    seeded = none.replace("term:", f"pool: {{seeds: {seeds}}}, weights: [{{type: loss}}], term:")
    for name, section in (("none", none), ("seeded", seeded)):
        make_learner(section, "--steps=2", "--evaluation.every=0", name=name).train()
        (line,) = told(capsys)
        assert line.startswith("no sample of 16 passes selftrain.filter; not met: accuracy at_least 1 by ")
        assert line.endswith(", brevity at_least 1 by 16")
    for row in read_lines(tmp_path / "none" / "metrics.jsonl"):
        assert (row["selftrain/pool"], row["selftrain/kept"]) == (0, 0)
        assert "selftrain/nll" not in row
    rows = read_lines(tmp_path / "seeded" / "metrics.jsonl")
    assert [row["selftrain/pool"] for row in rows] == [2, 2]
    assert 0 < rows[1]["selftrain/nll"] < rows[0]["selftrain/nll"]  # it learns them


def test_everything_passes_and_there_is_one_answer(make_learner, capsys, tmp_path):
    """No entropy at all: entropy weights are then equal."""
    section = "--selftrain={filter: {at_least: {brevity: 0}}, weights: [entropy], prompts: [entropy], term: {samples: 8}}"
    learner = make_learner(section, "--steps=2", "--evaluation.every=0")
    object.__setattr__(learner.parts.sources, "reader", lambda text: "7")
    learner.train()
    assert told(capsys) == ["all samples pass selftrain.filter: it chooses nothing here"]
    for row in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert (row["selftrain/kept"], row["selftrain/entropy"], row["selftrain/ess"]) == (1, 0, 1)
        assert row["selftrain/prompts_weight_max"] == 1


def fickle(text: str) -> float | None:
    """A reward that says nothing of some texts."""
    return None if zlib.crc32(text.encode()) % 6 == 0 else 1.0


@pytest.mark.parametrize("missing", ["drop_sample", "drop_group"])
def test_what_the_learner_leaves_out_does_not_join_the_pool(make_learner, tmp_path, missing):
    """The filter does not name the objective that some have no value of. And what the sampler says of the others is kept."""
    objectives = {
        "accuracy": {"reward": "arithmetic_accuracy"},
        "fickle": {"reward": "tests.test_selftrain_runs:fickle", "missing": missing},
    }
    more = ("--weighting={type: fixed, weights: {accuracy: 1, fickle: 1}}", "--steps=1", "--evaluation.every=0")
    section = "--selftrain={weights: [entropy], term: {samples: 8}}"
    learner = make_learner(f"--objectives={json.dumps(objectives)}", section, *more)
    model = policy()
    learner.train()
    entries, wanted = learner._pool.entries, 0
    for group in learner._groups:
        judged = [sample for sample in group.samples if fickle(sample.text)]
        kept = judged if missing == "drop_sample" or len(judged) == 4 else []
        ours = [entry for entry in entries if entry.prompt == group.prompt.id]
        assert {entry.completion_ids for entry in ours} == {sample.token_ids for sample in kept}
        entropy = answer_entropy([learner.parts.sources.reader(sample.text) for sample in judged])
        assert all(entry.entropy == entropy for entry in ours)
        wanted += len(kept)
    assert 0 < wanted < 16
    assert [entry.log_prob for entry in entries] == pytest.approx(
        [-nats(model, entry.pair).item() for entry in entries], 1e-4
    )


def test_weights_that_collapse_or_cannot_be_had_are_equal(make_learner, capsys, tmp_path):
    section = {"filter": {"at_least": {"accuracy": 1}}, "term": {"samples": 8}, "least_ess": 0.9, "weights": ["entropy"]}
    make_learner(f"--selftrain={json.dumps(section)}", "--steps=2", "--evaluation.every=0", name="collapsed").train()
    (line,) = told(capsys)
    assert line.startswith("selftrain.weights collapsed (effective share 0.")
    section["weights"] = [{"type": "tilt", "means": {"accuracy": 0.5}}, {"type": "feasible", "threshold": 0.1}]
    learner = make_learner(f"--selftrain={json.dumps(section)}", "--steps=2", "--evaluation.every=0", name="tilt")
    learner.train()
    assert learner.selftraining_duals() == []  # no multiplier has moved
    (line,) = told(capsys)
    assert line.endswith(": weights are equal until they can be had")
    for name in ("collapsed", "tilt"):
        rows = read_lines(tmp_path / name / "metrics.jsonl")
        assert [row["selftrain/collapsed"] for row in rows] == [1, 1]
        assert all((row["selftrain/ess"] is None) == (name == "tilt") for row in rows)
        assert all(row["selftrain/term"] == pytest.approx(row["selftrain/nll"]) for row in rows)
