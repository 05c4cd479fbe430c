"""`estimator: dpg` in training: the learner's step, resuming, several processes, and what is refused."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from align.advice import advise
from align.build import locate_model
from align.callbacks import ScheduleCallback
from align.config import describe
from align.controlling import PROPOSAL_FILE
from align.learner_args import check_sharding
from align.load import ConfigError, load_config
from align.plan import Schedule
from align.runfolder import open_run
from align.train import build, build_learner
from tests.conftest import QUICKSTART, overrides, read_lines
from tests.test_train import run_in

ONE_STEP = '{one_step: {reward: regex_match, args: {pattern: "[^;]*;[^;]*"}}, accuracy: {reward: arithmetic_accuracy}}'
TARGET = (
    f"--objectives={ONE_STEP}",
    "--weighting={type: fixed, weights: {one_step: 1, accuracy: 1}}",
    "--estimator={type: dpg, moments: {one_step: 0.5}, fit: {prompts: 16, samples_per_prompt: 16}}",
)
ADAPTIVE = (*TARGET, "--estimator.proposal=adaptive")
SHORT = ("--evaluation.every=0", "--trl.learning_rate=1e-3")


def gradients_of(learner, batch, weights: torch.Tensor) -> list[torch.Tensor]:
    """Of -sum_n weight_n log pi(x_n) / tokens, by plain autograd."""
    parameters = list(learner.model.parameters())
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = learner.model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]
    completion = batch["completion_mask"]
    loss = -(weights[:, None] * log_probs * completion).sum() / completion.sum()
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("more", [TARGET, (*ADAPTIVE, "--policy.lora.r=4")], ids=["newest", "adaptive, lora"])
def test_the_learner_steps_by_p_over_q(make_learner, monkeypatch, more):
    """Advantages and gradients against the first policy's and the policy's own probabilities."""
    learner = make_learner(*more, *SHORT, "--steps=3")
    first = AutoModelForCausalLM.from_pretrained(locate_model("builtin:arithmetic")).eval()
    seen, score = [], type(learner)._generate_and_score_completions

    def spy(self, inputs):
        output = score(self, inputs)
        log_q = np.array([sum(sample.log_probs) for group in self._groups for sample in group.samples])
        log_pi = log_probs(self.model.eval(), output)
        seen.append(log_pi - log_q)
        log_a = log_probs(first, output)
        w = np.exp(log_a + self.weight_state.control["coefficients"][0] * self._gathered.raw_NK[:, 0] - log_q).reshape(4, 4)
        w /= w.mean(axis=1, keepdims=True)
        wanted = np.minimum(w, 10) - np.exp(log_pi - log_q).reshape(4, 4)
        assert output["advantages"].reshape(4, 4).numpy() == pytest.approx(wanted, abs=2e-3)
        if self._adaptive:
            assert log_q == pytest.approx(log_a, abs=1e-3)  # drawn by the first policy throughout: it never looks
            assert {sample.policy_version for group in self._groups for sample in group.samples} == {0}
        else:
            theirs = gradients_of(self, output, output["advantages"])
            self.current_gradient_accumulation_steps = 1
            ours = torch.autograd.grad(self._compute_loss(self.model, output), list(self.model.parameters()))
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
            self._metrics["train"].clear()
        self.model.train()
        return output

    monkeypatch.setattr(type(learner), "_generate_and_score_completions", spy)
    learner.train()
    assert len(seen) == 3
    assert (np.abs(seen[2]).max() > 0.01) == learner._adaptive


def log_probs(model, batch) -> np.ndarray:
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, :-1]
    found = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]
    return (found * batch["completion_mask"]).sum(1).double().numpy()


@pytest.mark.parametrize("every", [1, 2], ids=["the policy may be next", "an earlier one goes on"])
def test_a_resumed_run_is_the_uninterrupted_one(make_learner, tmp_path, every):
    more = (*ADAPTIVE, *SHORT, "--estimator.normaliser=batch", f"--estimator.every={every}")
    whole = make_learner(*more, "--steps=6", "--checkpoint.every=3", name="straight")
    (tmp_path / "straight" / "config.json").write_text(whole.parts.config.model_dump_json())
    whole.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")  # as if it had been killed after step 3
    run = open_run("", str(tmp_path / "run"), [])
    learner = build_learner(run, build(run), Schedule(6, 0, 3), [ScheduleCallback(Schedule(6, 0, 3), lambda: False)])
    learner.train(resume_from_checkpoint=run.checkpoint)
    straight, metrics = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert straight == metrics
    last = [tmp_path / name / "checkpoints" / "checkpoint-6" for name in ("straight", "run")]
    for file in ("model.safetensors", "paretune.json"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file
    proposals = [row["dpg/proposal"] for row in straight]
    assert proposals == sorted(proposals)
    assert any(proposals) == (every == 1)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3" / PROPOSAL_FILE).exists() == (proposals[3] != 3)


def test_two_processes_have_one_target_and_each_its_own_advantages(launch, tmp_path):
    result = launch("align.train", *overrides(tmp_path / "run", *TARGET, *SHORT, "--steps=2"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("dpg: target fitted on 16 x 16 samples") + result.stderr.count("dpg: target fitted") == 1
    first, *rest = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["dpg/fit/reached/one_step"] == pytest.approx(0.5, abs=0.01)
    assert len(rest) == 1
    rows = [row for file in (tmp_path / "run" / "samples").glob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    assert len(rows) == 2 * 16
    groups = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt_id"]), []).append((row["value/one_step"], row["advantage"]))
    for group in groups.values():
        assert sum(advantage for _, advantage in group) == pytest.approx(0, abs=1e-4)
        assert all(advantage >= -1e-4 for value, advantage in group if value)
    assert any(advantage > 0.1 for group in groups.values() for value, advantage in group if value)


# --- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--estimator.moments={}"], "estimator.type=dpg has no target: give estimator.moments"),
        (["--estimator.moments={one_stp: 0.5}"], "estimator.moments: unknown objective 'one_stp'; did you mean 'one_step'?"),
        (["--estimator.always=[acuracy]"], "estimator.always: unknown objective 'acuracy'; did you mean 'accuracy'?"),
        (["--estimator.always=[one_step]"], "'one_step' is in moments and in always: leave it in one of them"),
        (["--estimator.moments.one_step=1.5"], r"moments.one_step: 1.5 is outside the bounds \[0.0, 1.0\]"),
        (["--estimator.moments.one_step=1"], "moments.one_step: 1.0 is a bound, which no finite tilt reaches"),
        (["--weighting={type: mgda}"], "weighting.type=mgda would move them in vain; take fixed"),
        (["--rollout.temperature=0.7"], "rollout.temperature=0.7 draws from another distribution; set it to 1"),
        (["--rollout.top_p=0.9"], "rollout.top_p=0.9 draws from another distribution"),
        (["--rollout.top_k=5"], "rollout.top_k=5 draws from another distribution; set it to 0"),
        (["--rollout.min_p=0.1"], "rollout.min_p=0.1 draws from another distribution"),
        (["--rollout.repetition_penalty=1.1"], "rollout.repetition_penalty=1.1 draws from another distribution"),
        (["--rollout.correction=truncate"], "rollout.correction=truncate: .* would count twice; leave it out"),
        (["--learner.updates_per_batch=2"], "learner.updates_per_batch=2: .* so a batch serves for one: set it to 1"),
        (["--learner.iterations_per_batch=2"], "learner.iterations_per_batch=2"),
        (["--selftrain={term: {}}"], "selftrain pulls towards samples that pass a filter, and .* would miss its target"),
        (["--trl.loss_type=grpo"], "trl.loss_type=grpo does not treat all tokens of a batch alike"),
        (["--trl.beta=0.1"], "trl.beta=0.1 is a second pull towards the first policy"),
        (["--trl.mask_truncated_completions=true"], "leaves out samples that the target has"),
        (["--estimator.proposal=adaptive", "--rollout.engine=vllm"], "vLLM servers are sent the newest"),
        (["--estimator.cap=0.5"], "estimator.*cap"),
        (["--objectives.one_step.missing=neutral"], r"objectives\.one_step\.missing=neutral: estimator.type=dpg"),
        (
            ["--estimator.always=[accuracy]", "--objectives.accuracy.missing=neutral"],
            r"objectives\.accuracy\.missing=neutral: estimator.type=dpg would count the mean",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_the_estimator_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(QUICKSTART, [*TARGET, *changes])


def test_what_is_only_watched_may_be_filled_in():
    assert load_config(QUICKSTART, [*TARGET, "--objectives.accuracy.missing=neutral"])


def test_an_earlier_policy_cannot_be_sampled_under_fsdp():
    config = load_config(QUICKSTART, [*ADAPTIVE])
    check_sharding(config, SimpleNamespace(fsdp=None, deepspeed_plugin=None))
    with pytest.raises(ValueError, match="proposal=adaptive cannot be had under FSDP"):
        check_sharding(config, SimpleNamespace(fsdp="full_shard", deepspeed_plugin=None))


def test_fsdp_is_known_before_a_model_loads(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run = open_run(QUICKSTART, "", [*overrides(tmp_path / "run", *ADAPTIVE)[2:]])
    with pytest.raises(ValueError, match="proposal=adaptive cannot be had under FSDP"):
        build(run)


UNSURE = """
calls = 0
def unsure(text):
    global calls
    calls += 1
    return 0.5 if calls > 16 * 16 + 2 * 16 else float(len(text) % 2)  # after the fit and two batches
"""


def test_what_neither_holds_nor_not_stops_a_run_that_goes_on_once_it_is_mended(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(UNSURE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    odd = "--objectives={odd: {reward: my_rewards:unsure}}"
    always = "--estimator={type: dpg, always: [odd], fit: {prompts: 16, samples_per_prompt: 16}}"
    more = (odd, "--weighting={type: fixed, weights: {odd: 1}}", always, *SHORT, "--checkpoint.every=100")
    result = run_in(tmp_path, *overrides(tmp_path / "run", *more))
    assert result.returncode == 2
    assert "estimator.always: 'odd' had the value 0.5" in result.stderr
    assert "Nothing is lost: mend the reward, then " in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "paretune.json").exists()
    (tmp_path / "my_rewards.py").write_text(UNSURE.replace("0.5 if", "1.0 if"))
    assert run_in(tmp_path, "--resume", str(tmp_path / "run")).returncode == 0
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_target_is_told():
    config = load_config(QUICKSTART, [*TARGET, "--estimator.always=[accuracy]"])
    assert describe(config) == "none: towards one_step 0.5 on average, accuracy always"


def test_a_sampler_elsewhere_needs_no_correction():
    assert load_config(QUICKSTART, [*TARGET, "--rollout.engine=vllm"]).rollout.correction.type == "none"


def test_what_has_no_effect_is_said():
    warnings = advise(load_config(QUICKSTART, [*TARGET, "--combination=pareto_rank", "--rollout.engine=vllm"]))
    assert warnings[:2] == [
        "objective 'accuracy' is neither in estimator.moments nor in estimator.always: it is watched, not trained on",
        "estimator.type=dpg does not add objectives up: combination pareto_rank has no effect",
    ]
    assert not any("correction" in warning or "weight" in warning for warning in warnings)


def test_a_fit_of_tiny_groups_is_advised_against():
    found = [advise(load_config(QUICKSTART, [*TARGET, f"--estimator.fit.samples_per_prompt={n}"])) for n in (4, 8)]
    assert [sum("in groups so small" in warning for warning in warnings) for warnings in found] == [1, 0]


def test_a_target_out_of_reach_ends_the_run_before_it_begins(launch, tmp_path):
    never = '--objectives={never: {reward: regex_match, args: {pattern: "no"}}}'
    more = (never, *TARGET[1:], *SHORT, "--weighting.weights={never: 1}", "--estimator.moments={never: 0.5}")
    result = launch("align.train", *overrides(tmp_path / "run", *more))
    assert result.returncode == 2
    assert (
        "error: estimator.moments cannot be had from what the first policy samples: feature never never fires"
        in result.stderr
    )
    assert "begin another, with another --output" in result.stderr
    assert "Traceback" not in result.stderr
