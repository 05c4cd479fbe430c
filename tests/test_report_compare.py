"""The page that compares runs: what it draws, what it refuses, and that names stay text."""

import json
from pathlib import Path

import plotly.graph_objects as go
import pytest

from align.cli import main
from align.report_compare import write_comparison
from align.report_curves import MOST_POINTS, cosine_figures, curves
from tests.browser import Tab, chromium
from tests.page import Page
from tests.test_report import OBJECTIVES, make_run

HOSTILE = "<img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of 12 and 8 steps with the same objectives, one with a name that tries to be more; not to be changed."""
    folder = tmp_path_factory.mktemp("compare")
    for name, steps in (("plain", 12), (HOSTILE, 8)):
        make_run(folder / name, steps=steps)
    return [folder / "plain", folder / HOSTILE]


def test_runs_are_drawn_over_each_other(runs, tmp_path, capsys):
    path = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path)
    figures = page.islands["figures"]
    by_title = {figure["title"]: figure["data"] for figure in figures.values()}
    for figure in figures.values():
        go.Figure(figure["data"], figure["layout"])
    points = [json.loads(line) for line in (runs[1] / "archive.jsonl").read_text().splitlines()]
    first, second = by_title["accuracy (larger is better)"]
    assert (first["x"], second["x"]) == ([0, 4, 8, 12], [0, 4, 8])
    assert second["y"] == [point["values"]["accuracy"] for point in points]
    assert second["error_y"]["array"] == [point["standard_errors"]["accuracy"] for point in points]
    assert [len(line["x"]) for line in by_title["weight of length"]] == [12, 8]
    assert [len(line["x"]) for line in by_title["hypervolume of what was reached by then"]] == [4, 3]
    assert "share of clarity that is missing" in by_title
    assert "share of length that is missing" not in by_title  # nothing of it was
    assert first["name"] == "plain"
    assert second["name"] == "&lt;img src=x onerror=alert(1)&gt;&amp;"
    assert f"{HOSTILE} fixed 8 of 8 8" in page.text
    assert "img" not in page.tags


def test_runs_that_measure_otherwise_are_refused_and_other_objectives_are_not(runs, tmp_path, capsys):
    other = {**OBJECTIVES, "length": {"reward": "brevity", "direction": "maximize", "bounds": [0, 32]}}
    make_run(tmp_path / "turned", objectives=other, steps=2, every=0)
    assert main(["report", str(runs[0]), str(tmp_path / "turned"), "--output", str(tmp_path / "x.html")]) == 2
    assert "objectives.length.direction is minimize in plain and maximize in turned" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    assert main(["report", str(runs[0]), str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    make_run(tmp_path / "plain", objectives={"accuracy": OBJECTIVES["accuracy"]}, steps=1)
    page = Page(write_comparison([runs[0], tmp_path / "plain"], tmp_path / "two.html"))
    titles = [figure["title"] for figure in page.islands["figures"].values()]
    assert "hypervolume of what was reached by then" not in titles  # of other objectives
    assert "length (smaller is better)" in titles
    assert f"{tmp_path / 'plain'} fixed 1 of 1" in page.text  # two of the same name are told apart


def test_cosines_by_hand():
    """gram 3 of lengths 2 and 3: 3 / (2 * 3) = 0.5; none where a gradient is 0, or the scheme did not look."""
    rows = [
        {"step": 1, "gram/a/a": 4.0, "gram/a/b": 3.0, "gram/b/b": 9.0},
        {"step": 2},
        {"step": 3, "gram/a/a": 4.0, "gram/a/b": 0.0, "gram/b/b": 0.0},
        {"step": 4, "gram/a/a": 1.0, "gram/a/b": -1.0000001, "gram/b/b": 1.0},
    ]
    (chart,) = cosine_figures(rows, ["a", "b"])
    (line,) = chart["data"]
    assert (line["name"], line["x"], line["y"]) == ("a, b", [1, 3, 4], [0.5, None, -1.0])
    go.Figure(chart["data"], chart["layout"])
    assert cosine_figures(rows[1:2], ["a", "b"]) == []
    assert cosine_figures(rows, ["a"]) == []


def test_lines_of_many_steps_leave_some_out_and_keep_the_last():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 3 * MOST_POINTS)]
    (line,) = curves("loss", rows, {"": "loss"})["data"]
    assert len(line["x"]) == MOST_POINTS
    assert line["x"][-1] == 3 * MOST_POINTS - 1
    assert line["y"] == line["x"]


def test_the_comparison_opens_in_a_browser_and_fits_it(runs, tmp_path):
    path = write_comparison(runs, tmp_path / "both.html")
    with chromium() as browser:
        tab = Tab(browser, path, width=400, scheme="dark")
        tab.wait_until("document.querySelector('.main-svg') !== null", seconds=60)
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 400
        assert tab.requests == [tab.page.url]
        assert tab.errors == []
