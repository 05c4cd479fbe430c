"""`paretune rewards`: scores by hand, and a service that a run can use."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests import forks
from tests.conftest import FIXED, QUICKSTART, ROOT, environment, overrides, read_lines

PARETUNE = [sys.executable, "-m", "align.cli", "rewards"]


def rewards(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return forks.run([*PARETUNE, *arguments], cwd=cwd, env=environment(1), timeout=60)


def test_texts_are_scored_on_the_first_training_prompt(tmp_path):
    """2+7+1+6 = 16. Brevity is 1 - tokens / 32: 3 bytes give .90625."""
    figures = tmp_path / "figures.json"
    result = rewards("try", QUICKSTART, "--text", "#16", "--text", "#20", "--json", str(figures))
    assert result.returncode == 0, result.stderr
    assert "prompt: '2+7+1+6=?'" in result.stdout
    rows = json.loads(figures.read_text(encoding="utf-8"))
    assert rows[0] == {"text": "#16", "accuracy": 1.0, "brevity": 0.90625, "clarity": 0.0}
    assert rows[1]["accuracy"] == 0.0
    line = next(line for line in result.stdout.splitlines() if line.startswith("'#16'"))
    assert line.split()[1:] == ["1", "(1.000)", "0.9062", "(0.906)", "0", "(0.000)"]


def test_rows_of_a_file_bring_their_own_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "#3", "answer": 3, "expression": "1+2"}, {"text": "#3", "answer": "x", "expression": "1+2"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = rewards("try", QUICKSTART, "--jsonl", str(path), "--objectives.accuracy.reward=numeric_answer")
    assert result.returncode == 0, result.stderr
    assert "missing" in result.stdout.splitlines()[2]
    assert result.stdout.splitlines()[-1] == "accuracy, text 2: ValueError: the stated answer 'x' holds no number"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --text (once or several times) or --jsonl"),
        (("--text", "a", "--row", "[1]"), '--row must be a JSON object, such as {"answer": 3}'),
        (("--text", "a", "--row", "{"), "--row is not JSON"),
        (("--text", "a", "--row", "{}"), "objectives.accuracy: reward 'arithmetic_accuracy' wants an argument 'answer'"),
        (("--jsonl", "absent.jsonl"), "--jsonl absent.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_said(arguments, message):
    result = rewards("try", QUICKSTART, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_with_objectives_alone_is_enough(tmp_path):
    """Tokens are bytes of the policy that ships: 1 - 3 / 32 = .90625."""
    file = tmp_path / "rewards.yaml"
    file.write_text("objectives:\n  right: {reward: numeric_answer}\n  steps: {reward: step_lines, args: {target: 1}}\n")
    asked = rewards("try", str(file), "--text", "1+2 = 3", "--text", "4", "--row", '{"answer": 3}')
    assert asked.returncode == 0, asked.stderr
    assert "fields of the data, from --row or --jsonl: answer; no policy" in asked.stdout
    assert [line.split()[-4:] for line in asked.stdout.splitlines()[-2:]] == [
        ["1", "(1.000)", "1", "(1.000)"],
        ["0", "(0.000)", "0", "(0.000)"],
    ]
    (tmp_path / "rows.jsonl").write_text('{"text": "3", "answer": 3}\n')
    rows = rewards("try", str(file), "--jsonl", str(tmp_path / "rows.jsonl"))
    assert rows.returncode == 0, rows.stderr
    bare = rewards("try", str(file), "--text", "3")
    assert (bare.returncode, "--row or --jsonl: none" in bare.stdout) == (2, True)
    assert "wants an argument 'answer'" in bare.stderr
    short = ("--objectives.steps={reward: brevity, args: {max_tokens: 32}}", "--text", "#16", "--row", '{"answer": 16}')
    unknown = rewards("try", str(file), *short)
    assert unknown.returncode == 2
    assert "objectives.steps: reward 'brevity' wants token_ids, and no policy is named" in unknown.stderr
    known = rewards("try", str(file), *short, "--policy.model=builtin:arithmetic")
    assert known.stdout.split()[-2:] == ["0.9062", "(0.906)"], known.stderr


def test_a_service_that_is_away_at_the_start_is_said_before_the_policy_is_loaded(launch, tmp_path):
    """The policy has no weights to load, which is seen next."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "align" / "policies" / "arithmetic", model, ignore=shutil.ignore_patterns("*.safetensors"))
    remote = {"reward": "remote", "args": {"url": "http://127.0.0.1:9", "objective": "short", "key_variable": ""}}
    changes = (f"--policy.model={model}", f"--objectives.brevity={json.dumps(remote)}")
    for module, *arguments in (
        ("align.train", *overrides(tmp_path / "run", *changes)),
        ("align.cli", "check", QUICKSTART, *changes),
        ("align.cli", "eval", str(model), "--config", QUICKSTART, *changes),
    ):
        result = launch(module, *arguments)
        assert result.returncode == 2, result.stderr
        assert "error: objectives.brevity: there is no service at http://127.0.0.1:9 (" in result.stderr
        assert "start it by `paretune rewards serve`, or mend `url`" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def service(tmp_path):
    """A served `brevity`, from a file that has nothing but objectives: its url and its key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "served.yaml"
    path.write_text("objectives:\n  short: {reward: brevity, args: {max_tokens: 32}}\n  other: {reward: step_lines}\n")
    command = [*PARETUNE, "serve", str(path), "--objectives", "short", "--port", str(port)]
    plain = {k: v for k, v in environment(1).items() if k != "PARETUNE_REWARDS_KEY"}
    with subprocess.Popen(command, cwd=ROOT, env=plain, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines[2] == f"serving short on http://127.0.0.1:{port}\n"
            yield f"http://127.0.0.1:{port}", lines[1].strip().partition("=")[2], process
        finally:
            process.kill()


def until_healthy(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError("no answer")


def test_a_run_uses_a_served_reward_and_learns_the_same(service, launch, tmp_path, monkeypatch):
    url, key, process = service
    until_healthy(url)
    monkeypatch.setenv("PARETUNE_REWARDS_KEY", key)
    remote = json.dumps({"reward": "remote", "args": {"url": url, "objective": "short"}})
    for name, changes in (("here", ()), ("there", (f"--objectives.brevity={remote}",))):
        result = launch("align.train", *overrides(tmp_path / name, FIXED, "--evaluation.every=0", *changes))
        assert result.returncode == 0, result.stderr
    here, there = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("here", "there"))
    for name in ("loss", "objectives/brevity/mean", "objectives/accuracy/mean", "grad_norm"):
        assert [row[name] for row in here] == [row[name] for row in there]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_others_are_let_in_with_a_key_only():
    plain = {k: v for k, v in environment(1).items() if k != "PARETUNE_REWARDS_KEY"}
    command = [*PARETUNE, "serve", QUICKSTART, "--host", "0.0.0.0"]
    result = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "set PARETUNE_REWARDS_KEY to a secret" in result.stderr


def test_a_service_that_cannot_start_says_why():
    environment = {**os.environ, "PARETUNE_REWARDS_KEY": "x"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, message in (
            (("--port", str(taken.getsockname()[1])), "give another --port"),
            (("--objectives", "shrot"), "--objectives: there is no shrot; there are accuracy, brevity, clarity"),
            (("--objectives.brevity.reward=brefity",), "objectives.brevity: no built-in reward 'brefity'"),
        ):
            command = [*PARETUNE, "serve", QUICKSTART, *arguments]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
            assert result.returncode == 2
            assert message in result.stderr
