"""The benchmark of sampling: its arithmetic, and one small run to the line of JSON."""

import json
import time
from contextlib import contextmanager

import pytest

from rollout.client import Server
from rollout.types import FinishReason, Sample
from scripts import bench_rollout, bench_rollout_runs, bench_rollout_sampling
from scripts.bench_rollout_common import ROOT, Setting, in_turn, ratios, spread
from scripts.bench_rollout_sampling import differences, longest_first


def test_the_longest_jobs_are_dealt_first():
    """7 | 5; 4 to the second: 7 | 9; 3 to the first: 10 | 9; 2 to the second: 10 | 11."""
    assert longest_first([2, 3, 7, 5, 4], 2) == [[2, 1], [3, 4, 0]]


def test_figures_are_medians_with_their_range():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "count": 3}
    assert ratios([1.0, 6.0, 2.0], [2.0, 2.0, 2.0]) == {"median": 1.0, "min": 0.5, "max": 3.0, "count": 3}
    assert in_turn("ab", 0) == ["a", "b"]
    assert in_turn("ab", 1) == ["b", "a"]


def test_log_probabilities_are_compared_up_to_the_first_other_token():
    def sample(ids: tuple[int, ...], log_probs: tuple[float, ...]) -> Sample:
        return Sample(ids, log_probs, FinishReason.LENGTH, 0, "")

    first = [sample((1, 2, 3), (-1.0, -1.0, -1.0)), sample((4,), (-2.0,))]
    second = [sample((1, 5, 3), (-1.5, -9.0, -9.0)), sample((4,), (-2.0,))]
    assert differences(first, second) == (0.5, 0.5)


@pytest.fixture
def one_server(vllm_workers, monkeypatch):
    """Lets the benchmark use the server of the test session, in the place of any number of its own."""

    @contextmanager
    def serve(setting, count):
        yield vllm_workers

    for module in (bench_rollout_sampling, bench_rollout_runs):
        monkeypatch.setattr(module, "serve", serve)
    monkeypatch.setattr(Setting, "context", 128)
    monkeypatch.setattr(bench_rollout.signal, "signal", lambda *_: None)
    yield
    policy = str(ROOT / "align" / "policies" / "arithmetic")  # `lookahead` has trained it
    Server(vllm_workers.urls[0], vllm_workers.key, 60.0).load({"path": policy})


def test_a_small_run_ends_in_a_line_of_json(one_server, capsys):
    sizes = ("--model=shipped", "--rounds=1", "--tokens=4", "--samples=16", "--delay=0.5")
    start = time.perf_counter()
    bench_rollout.main(["--only=balance,lookahead,repeat", *sizes])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"model", "rounds", "tokens", "samples", "cores", "load_before", "load_after"} <= set(figures)
    assert {"throughput", "sync", "memory"}.isdisjoint(figures)
    for case in ("at_once", "queued"):
        part = figures["balance"][case]
        assert part["ours_to_hindsight"]["count"] == 1
        assert part["wall_to_mean_busy"]["median"] == pytest.approx(1.0)  # of one server
        assert 0 < part["wall"]["ours"]["min"] < time.perf_counter() - start
    assert figures["repeat"].keys() == {"same_server", "one_against_two", "took"}
    assert 0 <= figures["repeat"]["same_server"]["other_tokens"]["max"] <= 1
    assert figures["lookahead"]["step_s_0"]["min"] >= 1.0  # two delays one after another
    assert figures["lookahead"]["ratio"]["min"] > 0


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_rollout.main(["--only=speed"])
    assert "there is no speed" in capsys.readouterr().err
