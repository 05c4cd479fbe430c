"""The circuit breaker: training waits for a reward that fails, with a checkpoint, and loses nothing."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from align.missing import MissingRewardError, failing, refuse_missing
from rewards.types import Missing, Objective, RewardMatrix
from tests import forks
from tests.conftest import FIXED, command, environment, overrides, read_lines, torchrun

JUDGE = """
import os, pathlib
import rewards.text
here = pathlib.Path(__file__).parent
attempts = 0

async def judge(token_ids):
    global attempts
    attempts += 1
    first, last = json.loads((here / "down").read_text())  # attempts that find nobody
    if first <= attempts <= last and os.environ.get("RANK", "0") == (here / "rank").read_text():
        raise ConnectionError("nobody is there")
    return rewards.text.brevity(token_ids, 32)
""".replace("import os", "import json, os")
BATCH = 16  # samples
SETTINGS = (
    "--objectives.brevity.reward=my_rewards:judge",
    "--objectives.brevity.args={}",
    "--objectives.brevity.calls={retries: 1, concurrency: 1}",
    "--scoring={pause: 0.1, pauses: 2}",
    "--evaluation.every=0",
    "--checkpoint.every=100",
)


def matrix(policy: Missing, *reasons: str) -> RewardMatrix:
    """One objective, a sample per reason; those with an empty one have a value."""
    raw_NK = np.array([[np.nan if reason else 0.5] for reason in reasons])
    errors = {(n, 0): reason for n, reason in enumerate(reasons) if reason}
    return RewardMatrix([Objective("o", True, (0.0, 1.0), policy)], raw_NK, errors)


def test_more_than_the_limit_fails():
    half = matrix(Missing.NEUTRAL, "late", "", "late", "")
    assert failing(half, 0.5) == {}
    assert failing(half, 0.49) == {"o": "objective 'o' failed on 2 of 4 samples; the first: late"}


def test_what_must_not_be_missing_may_not_fail_at_all():
    assert failing(matrix(Missing.FAIL, "", "", "late", ""), 1.0).keys() == {"o"}


def test_who_says_that_there_is_no_value_has_not_failed():
    assert failing(matrix(Missing.FAIL, "no value", "no value"), 0.0) == {}


def test_a_process_without_samples_has_no_failures():
    assert failing(matrix(Missing.FAIL), 0.0) == {}


def test_nothing_is_trained_on_what_is_left():
    with pytest.raises(MissingRewardError, match=r"2 of 3 samples; the first: late.*scoring\.max_failed \(now 0\.5\)"):
        refuse_missing(matrix(Missing.DROP_SAMPLE, "late", "late", ""), 0.5)
    refuse_missing(matrix(Missing.DROP_SAMPLE, "late", "", ""), 0.5)


@pytest.mark.parametrize("policy", [Missing.DROP_SAMPLE, Missing.FAIL])
def test_where_all_is_missing_nobody_is_told_to_leave_it_out(policy):
    with pytest.raises(MissingRewardError) as all_of_it:
        refuse_missing(matrix(policy, "late", "late"), 0.5)
    assert str(all_of_it.value).endswith(
        "2 of 2 samples; the first: late. Mend the reward: without a single value there is nothing to go on with "
        "(`paretune rewards try` scores texts by hand)"
    )
    with pytest.raises(MissingRewardError, match=r"drop_sample|max_failed"):
        refuse_missing(matrix(policy, "late", "late", ""), 0.5)


def prepare(folder: Path, down: tuple[int, int], rank: str = "0") -> None:
    """Put the judge there, and when it is down, and for which process."""
    (folder / "my_rewards.py").write_text(JUDGE, encoding="utf-8")
    (folder / "down").write_text(json.dumps(down), encoding="utf-8")
    (folder / "rank").write_text(rank, encoding="utf-8")


def train(folder: Path, name: str, down: tuple[int, int], *arguments: str, rank: str = "0", processes: int = 1):
    """Train with a judge that is down for some of its attempts."""
    prepare(folder, down, rank)
    arguments = arguments or overrides(folder / name, FIXED, *SETTINGS)
    words = torchrun("align.train", *arguments, processes=processes)
    return forks.run(words, cwd=folder, env=environment(processes), timeout=240)


def learned(folder: Path) -> list[dict]:
    timings = ("time/", "step_time")
    return [
        {k: v for k, v in row.items() if not k.startswith(timings) and k != "date"}
        for row in read_lines(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run learns whose judge is always there."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = train(folder, "run", (0, 0))
    assert result.returncode == 0, result.stderr
    return learned(folder / "run")


def test_a_run_waits_for_a_judge_that_is_away_and_learns_the_same(tmp_path, undisturbed):
    """Attempts 1 to 32 are those of two batches. From the 37th on 12 samples find nobody, twice each; then it is back."""
    away = train(tmp_path, "away", (37, 60))
    assert away.returncode == 0, away.stderr
    assert "paused: objective 'brevity' failed on 12 of 16 samples; the first: ConnectionError: nobody" in away.stdout
    assert "(1 of 2)" in away.stdout
    assert "the run goes on" in away.stdout
    assert (tmp_path / "away" / "checkpoints" / "checkpoint-2").is_dir()
    assert learned(tmp_path / "away") == undisturbed
    (pause,) = [row for row in read_lines(tmp_path / "away" / "timings.jsonl") if "time/pauses" in row]
    assert (pause["step"], pause["time/pauses"]) == (3, 1)
    assert 0.1 <= pause["time/paused"] < 30
    assert "The run paused once for rewards that failed, for" in (tmp_path / "away" / "report.html").read_text()


def test_a_run_whose_judge_stays_away_stops_and_can_go_on(tmp_path, undisturbed):
    away = train(tmp_path, "away", (37, 10**6))
    assert away.returncode == 2
    assert "(2 of 2)" in away.stdout
    assert "objective 'brevity'" in away.stderr
    assert "Nothing is lost" in away.stderr
    back = train(tmp_path, "away", (0, 0), "--resume", str(tmp_path / "away"))
    assert back.returncode == 0, back.stderr
    assert learned(tmp_path / "away") == undisturbed


def test_processes_wait_together_for_the_judge_of_one(tmp_path):
    """Each scores 8 samples of a batch; the third batch begins with attempt 17."""
    away = train(tmp_path, "away", (17, 20), rank="1", processes=2)
    assert away.returncode == 0, away.stderr
    assert "failed on 2 of 16 samples" in away.stdout
    assert len(learned(tmp_path / "away")) == 4


FATAL = """
import os
calls = 0

def fatal(token_ids):
    global calls
    calls += 1
    if calls > 16 and os.environ["RANK"] == "1":
        os._exit(3)
    return len(token_ids) / 32
"""


def test_a_process_that_a_reward_ends_leaves_no_other_waiting(tmp_path):
    """In the third batch: each process scores 8 samples of one."""
    (tmp_path / "my_rewards.py").write_text(FATAL, encoding="utf-8")
    changes = ('--objectives.brevity={reward: "my_rewards:fatal"}', "--evaluation.every=0", "--checkpoint.every=1")
    result = subprocess.run(
        command("align.train", *overrides(tmp_path / "run", FIXED, *changes), processes=2),
        cwd=tmp_path,
        env=environment(2),
        capture_output=True,
        timeout=200,  # not that of a collective operation, which is longer
    )
    assert result.returncode != 0
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


def test_who_is_asked_to_stop_does_not_wait_on(tmp_path):
    """The checkpoint is there already."""
    prepare(tmp_path, (37, 10**6))
    arguments = overrides(tmp_path / "away", FIXED, *SETTINGS, "--scoring={pause: 300, pauses: 9}")
    with forks.Fork(
        command("align.train", *arguments),
        cwd=tmp_path,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = iter(process.stdout.readline, "")
        assert any("paused: " in line for line in lines)
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
        assert process.wait(60) == 2
    assert "stopped while the run waited for a reward: objective 'brevity' failed" in rest
    assert (tmp_path / "away" / "checkpoints" / "checkpoint-2").is_dir()
