"""Where rewards run and how they are called: at the same time, in time, again, and with nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rewards import execution
from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests import odd_rewards
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    odd_rewards.reset()
    monkeypatch.setattr(execution, "BACKOFF", (0.01, 0.02))


@pytest.fixture
def make_bus():
    """A bus of rewards of `odd_rewards`, by name, each with the rules of its calls."""
    buses = []

    def make(args=None, **rewards: dict) -> RewardBus:
        components = {
            name: load_component(f"tests.odd_rewards:{name}", args or {}, [], rules) for name, rules in rewards.items()
        }
        objectives = [Objective(name, True, (0.0, 1.0), Missing.NEUTRAL) for name in rewards]
        buses.append(RewardBus(components, objectives))
        return buses[-1]

    yield make
    for bus in buses:
        bus.close()


def group(*texts: str) -> SampleGroup:
    return SampleGroup(Prompt("p", "ask", (1,), {}), tuple(Sample((1,), (), FinishReason.STOP, 0, text) for text in texts))


def place(what: str) -> str:
    """Where it is raised."""
    lines = Path(odd_rewards.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.strip().startswith("raise") and what in line]
    return f"odd_rewards.py:{number}"


THREADS = {"isolation": "thread"}
PROCESS = {"isolation": "process", "concurrency": 1}


@pytest.mark.parametrize(("reward", "rules"), [("sleeps", THREADS), ("awaits", {})])
def test_values_stand_where_their_samples_do_whoever_is_done_first(make_bus, reward, rules):
    matrix = make_bus(**{reward: rules}).score([group("0.3", "0", "0.2"), group("0.1", "0.25")])
    assert matrix.raw_NK[:, 0].tolist() == pytest.approx([0.03, 0, 0.02, 0.01, 0.025])


@pytest.mark.parametrize(("reward", "rules"), [("sleeps", THREADS), ("awaits", {})])
def test_no_more_calls_at_once_than_allowed(make_bus, reward, rules):
    bus = make_bus(**{reward: rules | {"concurrency": 3}})
    assert not bus.score([group(*["0.02"] * 12)]).errors
    assert odd_rewards.most == 3


def test_rewards_that_wait_do_so_at_the_same_time(make_bus):
    """Each waits for 8 * 0.5 / 4 = 1 s."""
    bus = make_bus(sleeps=THREADS | {"concurrency": 4}, awaits={"concurrency": 4})
    start = time.perf_counter()
    bus.score([group(*["0.5"] * 8)])
    assert 1.0 <= time.perf_counter() - start < 1.8
    assert all(1.0 <= scores.seconds < 1.8 for scores in bus.latest.values())
    assert len(bus.latest["awaits"].latencies) == 8


@pytest.mark.parametrize(("reward", "rules"), [("sleeps", THREADS), ("awaits", {}), ("sleeps", PROCESS)])
def test_who_overruns_has_no_value_and_keeps_nobody_else_from_theirs(make_bus, reward, rules):
    matrix = make_bus(**{reward: rules | {"timeout": 0.5, "retries": 0}}).score([group("0", "30", "0.1")])
    assert matrix.raw_NK[[0, 2], 0].tolist() == pytest.approx([0, 0.01])
    assert matrix.errors == {(1, 0): "TimeoutError: no answer within 0.5 s"}


def test_what_cannot_be_interrupted_is_killed(make_bus):
    bus = make_bus(bait=PROCESS | {"timeout": 1.0})
    start = time.perf_counter()
    matrix = bus.score([group("a" * 64, "aab", "x")])
    assert matrix.missing_NK[:, 0].tolist() == [True, False, False]
    assert matrix.raw_NK[1:, 0].tolist() == [1, 0]
    assert time.perf_counter() - start < 20


def test_a_process_that_dies_costs_its_own_sample(make_bus):
    matrix = make_bus(dies=PROCESS).score([group("a", "die", "b")])
    assert matrix.missing_NK[:, 0].tolist() == [False, True, False]
    assert "its process died" in matrix.errors[1, 0]


@pytest.mark.parametrize(
    ("reward", "rules"),
    [("leaves", {}), ("leaves", THREADS), ("leaves", PROCESS), ("leaves_elsewhere", {"retries": 0})],
    ids=["inline", "thread", "process", "async"],
)
def test_who_ends_the_program_has_no_value_and_ends_nothing(make_bus, reward, rules):
    bus = make_bus(**{reward: rules})
    for _ in range(2):  # the event loop is still there
        matrix = bus.score([group("a", "leave", "b")])
        assert matrix.missing_NK[:, 0].tolist() == [False, True, False]
        assert matrix.errors[1, 0].startswith("RuntimeError: it raised SystemExit (3) (odd_rewards.py:")


def test_an_error_that_cannot_travel_costs_its_own_sample(make_bus):
    matrix = make_bus(raises=PROCESS).score([group("a", "raise", "b")])
    assert matrix.missing_NK[:, 0].tolist() == [False, True, False]


ANYWHERE = [("stumbles", {}), ("stumbles", THREADS), ("stumbles", PROCESS), ("stumbles_async", {"retries": 0})]


@pytest.mark.parametrize(("reward", "rules"), ANYWHERE)
def test_an_error_says_where_it_was_raised(make_bus, reward, rules):
    matrix = make_bus(**{reward: rules}).score([group("0.5", "x", "x" * 10**6)])
    assert matrix.raw_NK[0, 0] == 0.5
    assert matrix.errors[1, 0] == f"LookupError: no number: x ({place('no number')})"
    assert matrix.errors[2, 0].endswith(f"xxx... ({place('no number')})")
    assert len(matrix.errors[2, 0]) < 600


def test_an_error_of_a_library_says_who_called_it(make_bus):
    matrix = make_bus(falls={}).score([group("x")])
    line = odd_rewards.falls.__code__.co_firstlineno + 2
    assert matrix.errors == {(0, 0): f"JSONDecodeError: Expecting value: line 1 column 1 (char 0) (odd_rewards.py:{line})"}


@pytest.mark.parametrize(("reward", "rules"), [("Absent", {}), ("Absent", THREADS), ("AbsentAsync", {})])
def test_a_reward_may_say_that_what_it_needs_is_not_there(reward, rules):
    component = load_component(f"tests.odd_rewards:{reward}", {}, [], rules)
    with pytest.raises(ValueError, match="it is not there"):
        component.ready()


def test_other_rewards_are_ready(make_bus):
    for reward, rules in (("lengths", {}), ("sleeps", THREADS), ("Absent", PROCESS), ("Connected", {}), ("awaits", {})):
        load_component(f"tests.odd_rewards:{reward}", {}, [], rules).ready()


def test_a_class_is_made_in_its_processes_alone(make_bus, tmp_path):
    bus = make_bus(args={"folder": str(tmp_path)}, WhereMade=PROCESS | {"concurrency": 2})
    assert not bus.score([group(*"abcdef")]).errors
    made = {path.name for path in tmp_path.iterdir()}
    assert 1 <= len(made) <= 2
    assert f"made-{os.getpid()}" not in made


@pytest.mark.parametrize(("reward", "rules"), [("flaky", THREADS), ("flaky_async", {})])
def test_failed_calls_are_made_again_as_often_as_told(make_bus, reward, rules):
    matrix = make_bus(**{reward: rules | {"retries": 2}}).score([group("0", "2", "3")])
    assert matrix.missing_NK[:, 0].tolist() == [False, False, True]
    assert matrix.errors == {(2, 0): f"ConnectionError: not yet ({place('not yet')})"}
    assert odd_rewards.attempts == {"0": 1, "2": 3, "3": 3}


@pytest.mark.parametrize(("reward", "rules"), [("lengths", THREADS), ("lengths_async", {}), ("lengths", {})])
def test_many_samples_come_in_batches(make_bus, reward, rules):
    texts = ["x" * n for n in range(7)]
    matrix = make_bus(**{reward: rules | {"batch_size": 3}}).score([group(*texts[:4]), group(*texts[4:])])
    assert matrix.raw_NK[:, 0].tolist() == pytest.approx([n / 10 for n in range(7)])
    assert sorted(odd_rewards.attempts.values()) == [1, 3, 3]


@pytest.mark.parametrize(("size", "calls"), [(0, [3]), (5, [2, 1]), (4, [1, 2]), (3, [1, 1, 1]), (1, [1, 1, 1])])
def test_groups_are_not_torn_apart(make_bus, size, calls):
    texts = [["", "a", "aa"], ["aaa", "aaaa"], ["aaaaa", "aaaaaa"]]
    rules = {"batch_size": size} if size else {}
    matrix = make_bus(of_groups=rules).score([group(*some) for some in texts])
    assert matrix.raw_NK[:, 0].tolist() == pytest.approx([n / 10 for n in range(7)])
    assert list(odd_rewards.attempts.values()) == calls


def test_of_groups_scored_again_only_what_failed_changes(make_bus):
    bus, groups = make_bus(of_groups={}), [group("a", "aa"), group("down", "late"), group("late", "aaa")]
    first = bus.score(groups)
    assert [n for n, _ in first.errors] == [3, 4]
    second = bus.score_again(groups, first, ["of_groups"])
    assert second.raw_NK[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4, 0.3])
    assert list(odd_rewards.attempts.values()) == [3, 2]  # the first group had nothing to mend


def test_only_what_failed_is_scored_again(make_bus):
    bus = make_bus(flaky=THREADS, lengths={})
    groups = [group("0", "1"), group("2", "0")]
    first = bus.score(groups)
    assert first.missing_NK[:, 0].tolist() == [False, True, True, False]
    second = bus.score_again(groups, first, ["flaky"])
    assert second.missing_NK[:, 0].tolist() == [False, False, True, False]
    assert second.errors == {(2, 0): f"ConnectionError: not yet ({place('not yet')})"}
    assert odd_rewards.attempts["1"] == 2
    assert bus.latest.keys() == {"flaky"}
    assert second.raw_NK[:, 1].tolist() == first.raw_NK[:, 1].tolist()
    assert not bus.score_again(groups, second, ["flaky"]).errors


def test_a_matrix_without_failures_is_not_scored_again(make_bus):
    bus = make_bus(lengths={})
    matrix = bus.score([group("a", "b")])
    assert bus.score_again([group("a", "b")], matrix, ["lengths"]).raw_NK.tolist() == matrix.raw_NK.tolist()
    assert len(odd_rewards.attempts) == 1


def test_threads_that_hang_are_counted(make_bus, monkeypatch):
    monkeypatch.setattr(execution, "ABANDONED", 2)
    bus = make_bus(sleeps=THREADS | {"timeout": 0.05, "concurrency": 1})
    matrix = bus.score([group("1.5", "1.5", "0")])
    assert "set isolation to process" in matrix.errors[2, 0]
    time.sleep(2)
    assert not bus.score([group("0")]).errors


@pytest.mark.parametrize(
    ("reward", "rules", "message"),
    [
        ("awaits", {"isolation": "process"}, "asynchronous.*leave `isolation` out"),
        ("sleeps", {"timeout": 1.0}, "inline.*`timeout` needs `isolation: process`"),
        ("sleeps", {"isolation": "inline", "retries": 1}, "inline.*`retries` needs"),
        ("sleeps", {"isolation": "thread", "batch_size": 4}, "one sample at a time"),
    ],
)
def test_rules_that_contradict_the_reward_are_refused(reward, rules, message):
    with pytest.raises(ValueError, match=message):
        load_component(f"tests.odd_rewards:{reward}", {}, [], rules)


def test_closing_ends_processes_and_connections(make_bus):
    odd_rewards.Connected.closed = 0
    before = set(psutil.Process().children(recursive=True))
    bus = make_bus(dies=PROCESS | {"concurrency": 2}, Connected={})
    bus.score([group("a", "b")])
    started = set(psutil.Process().children(recursive=True)) - before
    assert len(started) >= 2
    bus.close()
    _, alive = psutil.wait_procs(started, 5)
    assert not [process for process in alive if "resource_tracker" not in " ".join(process.cmdline())]
    assert odd_rewards.Connected.closed == 1


RUN = """
import sys
from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.types import Missing, Objective
from tests.test_reward_calls import group

if __name__ == "__main__":
    component = load_component("tests.odd_rewards:bait", {}, [], {"isolation": "process", "timeout": 600.0})
    bus = RewardBus({"bait": component}, [Objective("bait", True, (0.0, 1.0), Missing.FAIL)])
    bus.score([group("b")])
    print("ready", flush=True)
    if sys.argv[1] == "hang":
        bus.score([group("a" * 64)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process dies with its parent on Linux")
def test_nothing_outlives_a_killed_scorer(tmp_path: Path):
    script = tmp_path / "scorer.py"
    script.write_text(RUN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), "hang"], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, 10)[1]


def test_a_program_that_does_not_close_its_bus_ends_nevertheless(tmp_path: Path):
    script = tmp_path / "scorer.py"
    script.write_text(RUN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script), "end"], env=environment, check=True, timeout=60)


def test_a_reward_sees_how_its_sample_was_drawn(make_bus):
    """-log p of two tokens, .25 + .5, tenths."""
    samples = (Sample((1, 2), (-0.25, -0.5), FinishReason.LENGTH, 0, "a"), Sample((1,), (), FinishReason.STOP, 0, "b"))
    matrix = make_bus(how_drawn={}).score([SampleGroup(Prompt("p", "ask", (1,), {}), samples)])
    assert matrix.raw_NK[:, 0].tolist() == pytest.approx([0.075 + 0.5, 0.0])


def test_timings_are_those_of_calls(make_bus):
    bus = make_bus(sleeps=THREADS | {"concurrency": 2}, lengths={})
    bus.score([group(*["0.1"] * 4)])
    timings = bus.timings()
    assert timings["time/reward/sleeps"] >= 0.2
    assert 0.1 <= timings["time/call/sleeps/median"] <= timings["time/call/sleeps/p95"] <= timings["time/reward/sleeps"]
    assert timings["time/reward/lengths"] < 0.1


def test_pauses_are_timed_until_they_were_asked_for(make_bus):
    """Two of 0.1 s; scoring itself is none."""
    bus, groups = make_bus(sleeps={}), [group("0.2", "x")]
    matrix = bus.score(groups)
    assert "time/pauses" not in bus.timings()
    for _ in range(2):
        time.sleep(0.1)
        matrix = bus.score_again(groups, matrix, ["sleeps"])
    timings = bus.timings()
    assert timings["time/pauses"] == 2
    assert 0.2 <= timings["time/paused"] < 0.35
    assert "time/paused" not in bus.timings()
