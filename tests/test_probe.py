"""The gradient probe in training: against plain autograd, over several processes, on resuming, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM
from trl import GRPOTrainer

from align.build import locate_model
from align.load import load_config
from align.probe import OBJECTIVE_ADVANTAGES, Probe
from align.probe_features import Matrix, Norm
from align.step import advantages_alone
from tests import forks, probe_run
from tests.conftest import QUICKSTART, ROOT, environment, overrides, read_lines, torchrun
from tests.test_train import ZERO

EXACT = "--weighting={type: gradient, probe: {features: exact}}"
SKETCH = "--weighting={type: gradient, probe: {features: sketch, size: 6, samples: 16, backward: BACKWARD}}"


@pytest.fixture
def grams(monkeypatch) -> list[np.ndarray]:
    """Every Gram matrix that a probe has held, in order."""
    kept, keep = [], Probe._keep
    monkeypatch.setattr(Probe, "_keep", lambda self, gram: (keep(self, gram), kept.append(self.waiting_KK))[0])
    return kept


def plain_gradients(learner, batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters, and their gradients (K, ...) of TRL's whole loss under each objective's advantages.

    Where the probe takes a part of the samples, the others have an advantage of 0, and these have more for it.
    """
    batch = dict(batch)
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    found = []
    alone_NK = torch.tensor(advantages_alone(learner.parts.rules, learner._gathered), dtype=torch.float32)
    probe = learner._probe
    if not probe.exact and not probe.ordinary and probe._options.samples < len(alone_NK):
        every = len(alone_NK) // probe._options.samples
        alone_NK[torch.arange(len(alone_NK)) % every != 0] = 0.0
        alone_NK *= every
    for column in alone_NK.T:
        loss = GRPOTrainer._compute_loss(learner, learner.model, batch | {"advantages": column})
        if learner.loss_type != "dapo":
            loss = loss * learner.args.gradient_accumulation_steps  # it is divided by them, and this is all in one
        found.append(torch.autograd.grad(loss, parameters))
    return parameters, [torch.stack(gradients) for gradients in zip(*found, strict=True)]


def gram_of_sketches(layers, parameters, gradients) -> np.ndarray:
    """Inner products of U^T G V, from full gradients."""
    by_parameter = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
    features = []
    for layer in layers:
        gradient = by_parameter[id(layer.module.weight)]
        if isinstance(layer, Norm):
            features.append(gradient)
        else:
            gradient = gradient.transpose(1, 2) if isinstance(layer, Matrix) else gradient
            features.append((layer.inputs.matrix.T @ gradient @ layer.outputs.matrix).flatten(1))
    features_KD = torch.cat(features, dim=1).double()
    return (features_KD @ features_KD.T).numpy()


@pytest.mark.parametrize(
    "more",
    [
        (EXACT,),
        (EXACT, "--trl.loss_type=grpo", "--learner.micro_batch_size=4", "--trl.beta=0.1", "--trl.entropy_coef=0.1"),
        (EXACT, "--policy.lora.r=4"),
        (SKETCH.replace("BACKWARD", "ordinary"),),
        (SKETCH.replace("BACKWARD", "extra"),),
        (SKETCH.replace("BACKWARD", "auto"), "--policy.lora.r=4", "--trl.gradient_checkpointing=true"),
        (SKETCH.replace("BACKWARD", "extra"), "--policy.lora.r=4", "--learner.micro_batch_size=8"),
        (SKETCH.replace("BACKWARD", "extra").replace("16", "4"),),
        (SKETCH.replace("BACKWARD", "extra").replace("16", "8"), "--trl.loss_type=grpo", "--learner.micro_batch_size=4"),
        (SKETCH.replace("BACKWARD", "ordinary"), "--learner.micro_batch_size=4", "--trl.gradient_checkpointing=true"),
        (SKETCH.replace("BACKWARD", "ordinary"), "--learner.micro_batch_size=4", "--trl.loss_type=grpo"),
        (SKETCH.replace("BACKWARD", "auto"), "--learner.micro_batch_size=4", "--trl.loss_type=grpo", "--trl.beta=0.1"),
    ],
    ids=lambda more: " ".join(more)[22:].replace("type: gradient, probe: ", ""),
)
def test_the_gram_matrix_is_that_of_plain_autograd(make_learner, grams, monkeypatch, more):
    learner = make_learner("--steps=1", "--evaluation.every=0", *more)
    for name, parameter in learner.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif learner.beta:  # so that the penalty has a gradient, which must not be seen
            parameter.data += 0.02 * torch.randn_like(parameter)
    generate, expected = GRPOTrainer._generate_and_score_completions, []

    def compare(learner, inputs):
        batch = generate(learner, inputs)
        learner.beta, beta, learner._entropy_bonus_enabled, bonus = 0.0, learner.beta, False, learner._entropy_bonus_enabled
        parameters, gradients = plain_gradients(learner, batch)
        learner.beta, learner._entropy_bonus_enabled = beta, bonus
        if learner._probe.exact:
            flat_KD = torch.cat([g.flatten(1) for g in gradients], dim=1).double()
            expected.append((flat_KD @ flat_KD.T).numpy())
        else:
            expected.append(gram_of_sketches(learner._probe._layers, parameters, gradients))
        learner._metrics["train"].clear()
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", compare)
    probe_gradients = learner._probe_gradients

    def leave_no_trace(batch, signals):
        probe_gradients(batch, signals)
        assert all("probe" in key for key, values in learner._metrics["train"].items() if values)
        assert all(p.grad is None for p in learner.model.parameters())

    monkeypatch.setattr(learner, "_probe_gradients", leave_no_trace)
    learner.train()
    assert len(grams) == 1
    np.testing.assert_allclose(grams[0], expected[0], rtol=1e-4, atol=1e-5 * np.abs(expected[0]).max())


def test_only_the_first_update_of_a_batch_is_read(make_learner, grams, monkeypatch):
    heard = []
    listen = Probe.listen
    monkeypatch.setattr(
        Probe, "listen", lambda self, loss, batch: (heard.append(learner._step), listen(self, loss, batch))[1]
    )
    learner = make_learner(
        "--steps=9", "--evaluation.every=0", SKETCH.replace("BACKWARD", "auto"), "--learner.updates_per_batch=2",
        "--learner.iterations_per_batch=2", "--learner.micro_batch_size=4",
    )  # fmt: skip
    learner.train()
    assert heard == [0, 1, 8, 9, 16, 17]  # two micro-batches are an update, and eight passes are made of a batch
    assert len(grams) == 3


def test_it_is_read_only_before_an_update_that_is_due(make_learner, grams, tmp_path):
    seen = {"ordinary": [], "extra": []}
    for backward, steps in seen.items():
        scheme = f"--weighting={{type: gradient, every: 3, warm_up: 2, probe: {{features: norms, backward: {backward}}}}}"
        learner = make_learner("--steps=7", "--evaluation.every=0", scheme, name=backward)
        learner.train()
        rows = read_lines(tmp_path / backward / "metrics.jsonl")
        steps += [row["step"] for row in rows if "probe/lost" in row]
        assert rows[0]["weights/brevity"] == rows[1]["weights/brevity"] != rows[2]["weights/brevity"]
    assert seen == {"ordinary": [2, 5], "extra": [3, 6]}  # updates look in the batches that make steps 3 and 6


def test_cosines_and_lengths_are_logged(make_learner, grams, tmp_path):
    make_learner("--steps=2", "--evaluation.every=0", EXACT).train()
    for row, gram_KK in zip(read_lines(tmp_path / "run" / "metrics.jsonl"), grams, strict=True):
        length_K = np.sqrt(np.diag(gram_KK))
        assert row["probe/norm/clarity"] == pytest.approx(length_K[2])
        assert row["probe/cosine/accuracy/clarity"] == pytest.approx(gram_KK[0, 2] / length_K[0] / length_K[2])
        assert [key for key in row if key.startswith("probe/cosine/")] == [
            "probe/cosine/accuracy/brevity", "probe/cosine/accuracy/clarity", "probe/cosine/brevity/clarity",
        ]  # fmt: skip


def test_a_batch_carries_the_advantages_of_each_objective_through_the_shuffle(make_learner, monkeypatch):
    batches = []
    monkeypatch.setattr(Probe, "listen", lambda self, loss, batch: (batches.append(batch), loss())[1])
    learner = make_learner("--steps=1", "--evaluation.every=0", SKETCH.replace("BACKWARD", "ordinary"))
    learner.train()
    alone_NK = advantages_alone(learner.parts.rules, learner._gathered)
    ours = {tuple(np.round(row, 5)) for row in alone_NK}
    assert {tuple(np.round(row, 5)) for row in batches[0][OBJECTIVE_ADVANTAGES].double().numpy()} == ours


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory) -> list[list[list[float]]]:
    return probe_run.main(str(tmp_path_factory.mktemp("one") / "grams"), [])


@pytest.mark.parametrize("sharding", ["DDP", "ZeRO-2", "ZeRO-3"])
def test_two_processes_have_the_gram_matrix_of_one(of_one_process, tmp_path, sharding):
    out, env = str(tmp_path / "grams"), environment(2)
    arguments = torchrun("tests.probe_run", out, processes=2)
    if sharding != "DDP":
        pytest.importorskip("deepspeed")
        file = tmp_path / "zero.yaml"
        file.write_text(ZERO.replace("STAGE", sharding[-1]))
        del env["ACCELERATE_USE_CPU"]
        arguments = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(file),
            "-m",
            "tests.probe_run",
            out,
        ]
    result = forks.run(arguments, cwd=ROOT, env=env, timeout=280)
    assert result.stdout.count("probes done") == 2, result.stderr
    first, second = (json.loads((tmp_path / f"grams.{rank}").read_text()) for rank in (0, 1))
    assert first == second  # to the last bit: the weights made of them must not differ
    assert len(first) == len(probe_run.PROBES)
    assert np.shape(first[0]) == (5, 5)
    first_domains, second_domains = (json.loads((tmp_path / f"grams.{rank}.domains").read_text()) for rank in (0, 1))
    assert first_domains == second_domains
    assert first_domains["weights"]["short"] != 0.5
    for found, expected in zip(first, of_one_process, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    # domains' gradients are under weights of the objectives, which move from step to step
    exact, extra_sketch, extra_norms, sketch, norms, again = (np.array(gram)[:3, :3] for gram in of_one_process)
    np.testing.assert_allclose(sketch, extra_sketch, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norms, extra_norms, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exact, again, rtol=1e-5)
    assert np.corrcoef(exact.flatten(), sketch.flatten())[0, 1] > 0.95


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_gram_matrix_that_waits_survives_a_stop(launch, tmp_path):
    scheme = SKETCH.replace("BACKWARD", "ordinary")
    folder = tmp_path / "run"
    changes = [a for a in overrides(folder, scheme, "--evaluation.every=0") if "fixed" not in a]
    assert launch("align.train", *changes).returncode == 0
    before = read_lines(folder / "metrics.jsonl")
    last = folder / "checkpoints" / "checkpoint-4" / "paretune.json"
    state = last.read_text()
    assert np.array(json.loads((folder / "checkpoints" / "checkpoint-2" / "paretune.json").read_text())["gram"]).shape == (
        3,
        3,
    )
    last.unlink()
    assert launch("align.train", "--resume", str(folder)).returncode == 0
    assert read_lines(folder / "metrics.jsonl") == before
    assert last.read_text() == state
    assert before[2]["weights/brevity"] != before[1]["weights/brevity"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "more", "sentence"),
    [
        ("features: exact, backward: ordinary", [], "exact needs backward passes of its own; take extra or auto"),
        ("backward: ordinary", ["--trl.beta=0.1"], "with trl.beta=0.1 the ordinary backward holds the gradient of the KL"),
        (
            "backward: ordinary",
            ["--trl.entropy_coef=0.01"],
            "with trl.entropy_coef=0.01 .* the entropy bonus too; take extra",
        ),
        ("backward: ordinary", ["--trl.use_adaptive_entropy=true"], "use_adaptive_entropy=True .* entropy bonus"),
        (
            "backward: ordinary",
            ["--trl.loss_type=cispo"],
            "trl.loss_type=cispo is not linear in the advantages .*grpo, bnpo",
        ),
        ("backward: ordinary", ["--trl.fp16=true"], "with trl.fp16 the gradients of small advantages vanish"),
        ("features: norms", ["--policy.lora.r=4"], "under policy.lora normalisation layers are frozen; take sketch"),
        ("features: norms", ["--trl.torch_compile=true"], "turn compilation off, or take exact"),
        ("size: 8", ['--trl.gradient_checkpointing_kwargs={"use_reentrant": true}'], "set it to false"),
    ],
)
def test_contradictions_are_refused_at_once(probe, more, sentence):
    with pytest.raises(ValueError, match=r"weighting\.probe") as error:
        load_config(QUICKSTART, [f"--weighting={{type: mgda, probe: {{{probe}}}}}", *more])
    assert error.match(sentence)


def test_auto_takes_the_ordinary_backward_where_it_is_exact(make_learner):
    auto = SKETCH.replace("BACKWARD", "auto")
    assert make_learner(auto, name="plain")._probe.ordinary
    assert not make_learner(auto, "--trl.beta=0.1", name="kl")._probe.ordinary
    assert not make_learner(auto, "--trl.loss_type=sapo", name="sapo")._probe.ordinary


def test_a_policy_without_such_layers_is_refused_before_training(launch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(locate_model("builtin:arithmetic"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    OlmoForCausalLM(OlmoConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path / "olmo")  # its norms have no weights
    tokenizer.save_pretrained(tmp_path / "olmo")
    changes = [a for a in overrides(tmp_path / "run", f"--policy.model={tmp_path / 'olmo'}") if "fixed" not in a]
    result = launch("align.train", *changes, "--weighting={type: gradient, probe: {features: norms}}")
    assert result.returncode == 2, result.stderr
    assert "error: weighting.probe.features=norms: this policy trains no normalisation layer with weights" in result.stderr
