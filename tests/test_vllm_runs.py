"""Whole training runs with vLLM: alone, ahead, in several processes, resumed, interrupted, and with servers that fail."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from rollout.client import Server
from tests import forks
from tests.conftest import ROOT, command, environment, overrides, read_lines
from tests.test_dpg_runs import TARGET
from tests.test_rounds import CONFIG as ROUNDS
from tests.test_rounds import TINY

VLLM = "--rollout.engine.type=vllm"
STARTED = time.time()
SHARDED = str(ROOT / "configs" / "accelerate" / "zero3_cpu.yaml")


@pytest.fixture
def on_servers(vllm_workers, monkeypatch):
    """Overrides that make a run use the servers of the test session."""
    monkeypatch.setenv("PARETUNE_VLLM_KEY", vllm_workers.key)
    return [VLLM, f"--rollout.engine.urls={json.dumps(list(vllm_workers.urls))}"]


def leftovers(output: Path) -> set[str]:
    """Processes that have to do with a run's folder, and shared memory that nobody uses."""
    found, in_use = set(), ""
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(OSError):
            line = " ".join(process.info["cmdline"] or ())
            files = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()]
            if process.pid != os.getpid() and any(str(output) in name for name in (line, *files)):
                found.add(f"{process.pid} {line[:120]}")
            in_use += line + "".join(files) + Path(f"/proc/{process.pid}/maps").read_text()
    shared = [path for path in Path("/dev/shm").iterdir() if path.name.startswith(("paretune-", "psm_"))]
    return found | {str(path) for path in shared if path.name not in in_use and path.stat().st_ctime > STARTED}


def wait_until_nothing_is_left(output: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while (more := leftovers(output)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not more


def rows(output: Path) -> list[dict]:
    return read_lines(output / "metrics.jsonl")


def succeeded(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_a_run_starts_its_server_trains_and_leaves_nothing(launch, tmp_path):
    result = launch("align.train", *overrides(tmp_path / "run", VLLM))
    succeeded(result)
    wait_until_nothing_is_left(tmp_path / "run")
    trained = rows(tmp_path / "run")
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    for row in trained:
        assert row["policy_age"] == 0
        assert row["sync/gap_max"] < 1e-3
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["sampling/effective_sample_size"] == pytest.approx(1.0, abs=1e-4)
    assert (tmp_path / "run" / "workers" / "worker-0.log").stat().st_size
    assert "time/sync" in read_lines(tmp_path / "run" / "timings.jsonl")[0]
    assert "VLLM_API_KEY" not in (tmp_path / "run" / "environment.json").read_text()


def test_lookahead_draws_one_batch_ahead_and_no_further(launch, tmp_path, on_servers):
    succeeded(launch("align.train", *overrides(tmp_path / "run", "--rollout.lookahead=1", *on_servers)))
    trained = rows(tmp_path / "run")
    assert [row["policy_age"] for row in trained] == [0, 1, 1, 1]
    assert trained[0]["sampling/sampling_logp_difference/max"] < 1e-3
    assert trained[1]["sampling/sampling_logp_difference/max"] > 1e-3  # another policy's, and corrected
    assert trained[1]["sampling/importance_sampling_ratio/max"] <= 3.0
    succeeded(launch("align.train", *overrides(tmp_path / "sync", *on_servers)))
    data = [[row["prompt"] for row in samples_of(tmp_path / name)] for name in ("run", "sync")]
    assert data[0] == data[1]  # the same prompts in the same order
    first = [[row["text"] for row in samples_of(tmp_path / name)][:16] for name in ("run", "sync")]
    assert first[0] == first[1]


def samples_of(output: Path) -> list[dict]:
    import pyarrow.parquet as pq

    files = sorted((output / "samples").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_several_updates_of_a_batch_make_older_samples_still_bounded(launch, tmp_path, on_servers):
    more = ["--rollout.lookahead=1", "--learner.updates_per_batch=2", "--steps=6", "--checkpoint.every=6"]
    more += ["--selftrain={filter: {at_least: {accuracy: 1}}, weights: [{type: loss}], term: {samples: 8}}"]
    succeeded(launch("align.train", *overrides(tmp_path / "run", *more, *on_servers)))
    assert [row["policy_age"] for row in rows(tmp_path / "run")[::2]] == [0, 2, 2]
    passed = read_lines(tmp_path / "run" / "pool.jsonl")[1:]
    assert {(row["step"], row["policy_version"]) for row in passed} == {(1, 0), (3, 0), (5, 2)}  # as old as their batch
    assert all(row["log_prob"] < 0 for row in passed)  # what sampled them tells
    assert all(row["selftrain/nll"] > 0 for row in rows(tmp_path / "run"))


def test_sharded_and_plain_processes_follow_one_process(launch, tmp_path, on_servers):
    """The same seeds per sample give the same samples; losses agree within 2e-5, 999 of 1,000 weights within 1e-5."""
    succeeded(launch("align.train", *overrides(tmp_path / "one", *on_servers)))
    succeeded(launch("align.train", *overrides(tmp_path / "ddp", *on_servers), processes=2))
    for stage in (2, 3):
        result = forks.run(
            [*command("align.train", processes=2)[:3], "--config_file", sharded(stage, tmp_path), "-m", "align.train",
             *overrides(tmp_path / f"zero{stage}", *on_servers)],
            cwd=ROOT, env={k: v for k, v in environment(2).items() if k != "ACCELERATE_USE_CPU"}, timeout=280,
        )  # fmt: skip
        succeeded(result)
    reference = rows(tmp_path / "one")
    final = load_file(tmp_path / "one" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    for name in ("ddp", "zero2", "zero3"):
        trained = rows(tmp_path / name)
        for mine, theirs in zip(trained, reference, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
            assert mine["objectives/accuracy/mean"] == theirs["objectives/accuracy/mean"]
        weights = load_file(tmp_path / name / "checkpoints" / "checkpoint-4" / "model.safetensors")
        gaps = np.concatenate([np.abs(weights[key].numpy() - tensor.numpy()).ravel() for key, tensor in final.items()])
        # Adam's first steps go by the sign of a gradient, and where that is 0 rounding decides on it: up to 2 steps of 3e-4.
        assert np.mean(gaps > 1e-5) < 1e-3
        assert gaps.max() < 4 * 2 * 3e-4


def test_rounds_of_self_training_sample_on_servers(tmp_path, on_servers):
    from align.rounds import rounds

    assert rounds(ROUNDS, "", [f"--output={tmp_path / 'run'}", *TINY, *on_servers]) == 0
    trained = rows(tmp_path / "run")
    assert [row["step"] for row in trained] == [1, 2]
    assert max(row["sync/gap_max"] for row in trained) < 1e-3
    assert [point["step"] for point in read_lines(tmp_path / "run" / "archive.jsonl")] == [0, 1, 2]


def test_distributional_control_knows_what_the_servers_drew_from(launch, tmp_path, on_servers):
    succeeded(launch("align.train", *overrides(tmp_path / "run", *TARGET, "--steps=2", "--evaluation.every=0", *on_servers)))
    first, second = rows(tmp_path / "run")
    assert first["dpg/fit/reached/one_step"] == pytest.approx(0.5, abs=0.01)
    for row in (first, second):
        assert row["sync/gap_max"] < 1e-3
        assert 0 < row["dpg/ess"] < 1
        assert row["dpg/kl_target_policy"] > 0
    assert first["dpg/kl_policy_reference"] == pytest.approx(
        0, abs=1e-4
    )  # the policy is the reference, as servers compute it
    advantages = np.array([row["advantage"] for row in samples_of(tmp_path / "run")]).reshape(-1, 4)
    assert np.abs(advantages.sum(axis=1)).max() < 1e-2  # w has mean one, and r is one
    assert np.abs(advantages).max() > 0.1


def sharded(stage: int, folder: Path) -> str:
    text = Path(SHARDED).read_text(encoding="utf-8").replace("zero_stage: 3", f"zero_stage: {stage}")
    if stage == 2:
        text = text.replace("zero3_init_flag: false, zero3_save_16bit_model: true", "zero3_init_flag: false")
    file = folder / f"zero{stage}.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_adapters_are_merged_on_their_way(launch, tmp_path, on_servers):
    succeeded(
        launch("align.train", *overrides(tmp_path / "run", "--policy.lora={r: 4}", "--trl.learning_rate=0.02", *on_servers))
    )
    trained = rows(tmp_path / "run")
    assert max(row["sync/gap_max"] for row in trained) < 1e-3
    assert trained[-1]["sampling/sampling_logp_difference/max"] < 1e-3
    # `paretune eval` samples by the engine that trained, on the same seeds: what the run itself has found.
    succeeded(launch("align.cli", "eval", str(tmp_path / "run"), "--checkpoints=2,4", f"--json={tmp_path / 'figures.json'}"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    points = {point["step"]: point["values"] for point in read_lines(tmp_path / "run" / "archive.jsonl")}
    for step in (2, 4):
        assert figures[f"step {step}"]["values"] == pytest.approx(points[step], abs=0.02)  # one token may turn out otherwise
    assert points[2] != points[4]


def test_a_resumed_run_goes_on_with_the_same_data_weights_and_versions(launch, tmp_path, on_servers):
    more = ["--weighting=hypervolume", *on_servers]
    succeeded(launch("align.train", *overrides(tmp_path / "whole", *more)))
    succeeded(launch("align.train", *overrides(tmp_path / "parts", *more, "--steps=2")))
    succeeded(launch("align.train", "--resume", str(tmp_path / "parts"), "--steps=4"))
    whole, parts = samples_of(tmp_path / "whole"), samples_of(tmp_path / "parts")
    assert [(row["prompt"], row["policy_version"]) for row in whole] == [(r["prompt"], r["policy_version"]) for r in parts]
    same = np.mean([a["text"] == b["text"] for a, b in zip(whole, parts, strict=True)])
    assert same > 0.95  # vLLM's rounding depends on what else is in a batch, so a token may turn out otherwise
    if same == 1:
        for mine, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert [mine[k] for k in mine if k.startswith("weights/")] == [
                theirs[k] for k in mine if k.startswith("weights/")
            ]


# --- faults -----------------------------------------------------------------------------------------------------------


def start(output: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    starter = forks.Fork if processes == 1 else subprocess.Popen
    return starter(
        command("align.train", *overrides(output, *more), processes=processes),
        cwd=ROOT, env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_rows(output: Path, count: int, process: subprocess.Popen, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and len(rows(output)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate(timeout=5)[0][-3000:] if process.poll() is not None else "too slow")


def servers_of(output: Path) -> list[psutil.Process]:
    """The servers that a run has started: those that log into its folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or ()
        if "vllm.entrypoints.openai.api_server" in line and "rollout.keeper" not in line:
            files = [os.path.realpath(f"/proc/{process.pid}/fd/{fd}") for fd in (1, 2)]
            if any(file.startswith(str(output)) for file in files):
                found.append(process)
    return found


@pytest.mark.parametrize("how", ["killed", "interrupted twice", "two processes interrupted"])
def test_a_trainer_that_is_stopped_leaves_nothing(tmp_path, how):
    more = [VLLM, "--steps=2000", "--evaluation.every=0", "--checkpoint.every=1000"]
    process = start(tmp_path / "run", *more, processes=2 if how.startswith("two") else 1)
    wait_for_rows(tmp_path / "run", 2, process)
    assert servers_of(tmp_path / "run")
    if how == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    if how == "interrupted twice":  # at once, without a checkpoint
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    wait_until_nothing_is_left(tmp_path / "run")
    if how == "two processes interrupted":
        assert "go on with" in output
        assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/paretune.json"))


def test_interrupted_while_servers_start(tmp_path):
    process = start(tmp_path / "run", VLLM)
    deadline = time.monotonic() + 120
    while not servers_of(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_until_nothing_is_left(tmp_path / "run")


def test_a_killed_process_of_two_takes_the_rest_along(tmp_path):
    process = start(tmp_path / "run", VLLM, "--steps=2000", "--evaluation.every=0", processes=2)
    wait_for_rows(tmp_path / "run", 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    second = next(c for c in children if c.is_running() and c.environ().get("RANK") == "1")
    second.kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    wait_until_nothing_is_left(tmp_path / "run")


def test_a_run_survives_its_server_and_stops_with_a_checkpoint_when_it_may_not(tmp_path):
    """Killed once it is started again; killed once more with no restart left, the run ends, and says how to go on."""
    limits = ["--rollout.engine.restarts=1", "--rollout.engine.start_timeout=200"]
    process = start(tmp_path / "run", VLLM, *limits, "--steps=2000", "--evaluation.every=0", "--checkpoint.every=1000")
    wait_for_rows(tmp_path / "run", 2, process)
    servers_of(tmp_path / "run")[0].kill()
    done = len(rows(tmp_path / "run"))
    wait_for_rows(tmp_path / "run", done + 3, process)
    servers_of(tmp_path / "run")[0].kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output[-3000:]
    assert "error: " in output
    assert "Nothing is lost" in output
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/paretune.json"))
    wait_until_nothing_is_left(tmp_path / "run")


def test_a_worker_says_how_to_use_it_and_a_run_that_loses_it_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETUNE_VLLM_KEY", "a key")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = tmp_path / "told"
    with told.open("wb") as log:
        arguments = ["worker", "builtin:arithmetic", "--port", port, "--cpu-cache", "0.25"]
        worker = subprocess.Popen(command("align.cli", *arguments), cwd=ROOT, env=environment(1), stdout=log, stderr=log)
    try:
        while not (said := re.search(r"^paretune train \.\.\. (.*)$", told.read_text(errors="replace"), re.MULTILINE)):
            assert worker.poll() is None
            time.sleep(0.2)
        more = ["--rollout.engine.start_timeout=4", "--steps=2000", "--evaluation.every=0", "--checkpoint.every=1000"]
        process = start(tmp_path / "run", *shlex.split(said[1]), *more)
        wait_for_rows(tmp_path / "run", 2, process)
    finally:
        worker.terminate()
        worker.wait(60)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2, output[-3000:]
    again = f"start it (again) by `paretune worker builtin:arithmetic --port {port}`"
    assert f"vLLM server http://127.0.0.1:{port}: Connection refused; {again}" in output  # while it was waited for
    assert again in output.partition("error: ")[2]
    assert f"paretune train --resume {tmp_path / 'run'}" in output
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/paretune.json"))
    wait_until_nothing_is_left(tmp_path / "run")


# --- servers that are not fit -----------------------------------------------------------------------------------------


def test_a_server_with_another_tokenizer_is_refused(launch, tmp_path, on_servers):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.build import locate_model

    source = locate_model("builtin:arithmetic")
    tokenizer = AutoTokenizer.from_pretrained(source)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    file.write_text(json.dumps(data), encoding="utf-8")
    result = launch("align.train", *overrides(tmp_path / "run", f"--policy.model={tmp_path / 'other'}", *on_servers))
    assert result.returncode == 2
    assert "another vocabulary" in result.stderr
    assert "read '3456789" in result.stderr
    assert "those here read '4356789" in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_that_do_not_fit_are_named(launch, tmp_path, on_servers, vllm_workers):
    """The same tokenizer, another model: after two pushes the run stops, before it has trained on wrong samples."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from align.build import locate_model

    source = locate_model("builtin:arithmetic")
    config = AutoConfig.from_pretrained(source)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 50.0}
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "other")
    result = launch("align.train", *overrides(tmp_path / "run", f"--policy.model={tmp_path / 'other'}", *on_servers))
    assert result.returncode == 2
    assert "after two pushes" in result.stderr
    assert "rollout.engine.verify" in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")
    Server(vllm_workers.urls[0], vllm_workers.key, 60).load({"path": source})


def test_a_server_that_is_not_there_and_one_with_another_key(launch, tmp_path, on_servers, monkeypatch):
    missing = [VLLM, "--rollout.engine.urls=['http://127.0.0.1:9']", "--rollout.engine.start_timeout=3"]
    result = launch("align.train", *overrides(tmp_path / "run", *missing))
    assert result.returncode == 2
    what = "http://127.0.0.1:9: Connection refused; start it (again) by `paretune worker builtin:arithmetic --port 9`, "
    assert f"waiting for a vLLM server: {what}" in result.stdout
    assert f"error: no vLLM server within rollout.engine.start_timeout: {what}" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("PARETUNE_VLLM_KEY", "wrong")
    result = launch("align.train", *overrides(tmp_path / "run2", *on_servers))
    assert result.returncode == 2
    assert "PARETUNE_VLLM_KEY" in result.stderr
