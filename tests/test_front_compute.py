"""What front.json says of values that are known, and of values that one would rather not have."""

import csv
import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from align.fronts.compute import Measured, front_of, measured
from align.fronts.evaluation import Evaluated, Evaluations
from align.fronts.files import csv_of, read_front, table_of, write_files
from align.fronts.logs import Notes
from align.fronts.runs import Candidate
from align.load import load_config
from tests.conftest import QUICKSTART

CONFIG = load_config(QUICKSTART, ["--objectives.brevity={reward: brevity, direction: minimize, bounds: [0, 10]}"])
PROMPTS = 40


def candidates(runs: int, steps: int, methods: int = 1) -> list[Candidate]:
    return [
        Candidate(
            f"{m}-{r}@{s}",
            f"{m}/{r}/{s}",
            f"{m}/{r}",
            f"{m}/{r}",
            f"method {m}",
            s,
            r,
            100 * s,
            10 * s,
            2.0 * s,
            {"accuracy": 1.0},
        )
        for m in range(methods)
        for r in range(runs)
        for s in range(steps)
    ]


def evaluations(some: list[Candidate], values_MK: np.ndarray, noise: float = 0.1, prompts: int = PROMPTS) -> Evaluations:
    rng = np.random.default_rng(0)
    parts = np.clip(values_MK[:, None, None] + noise * rng.normal(size=(len(some), 2, prompts, values_MK.shape[1])), -99, 99)
    example = {"prompt": "1+1=?", "text": "#2", "values": {}}
    none = {"validation": [0.0] * values_MK.shape[1], "test": [0.0] * values_MK.shape[1]}
    found = {c.path: Evaluated(validation, test, none, [example]) for c, (validation, test) in zip(some, parts, strict=True)}
    return Evaluations(found, prompts={"validation": prompts, "test": prompts})


def make(some: list[Candidate], found: Evaluations, config=CONFIG, notes: Notes | None = None) -> tuple[dict, Measured]:
    data = measured(some, found, config)
    return front_of(data, found, config, [0], Notes() if notes is None else notes), data


def curve_of_three() -> tuple[list[Candidate], Evaluations]:
    """Two runs of three steps: accuracy rises, brevity (smaller is better, up to 10) gets worse, clarity stays."""
    values = np.array([[0.2, 1.0, 0.5], [0.5, 4.0, 0.5], [0.9, 8.0, 0.5]])
    some = candidates(2, 3)
    return some, evaluations(some, np.concatenate([values, values]), noise=1e-3)


def test_attainment_in_every_two_objectives_by_hand():
    """One run stops at accuracy .5 and brevity (smaller is better) 4, the other goes on to .9 and 8."""
    values = np.array([[0.2, 1.0, 0.5], [0.5, 4.0, 0.5], [0.9, 8.0, 0.5]])
    some = candidates(2, 3)[:5]
    front, _ = make(some, evaluations(some, np.concatenate([values, values[:2]]), noise=0.0))
    planes = [row for row in front["attainment_planes"] if (row["x"], row["y"]) == ("accuracy", "brevity")]
    assert [(row["method"], row["share"]) for row in planes] == [("method 0", 0.5), ("method 0", 1.0)]
    any_run, all_runs = ([*zip(row["xs"], row["ys"], strict=True)] for row in planes)
    np.testing.assert_allclose(any_run, [(0.2, 1.0), (0.5, 4.0), (0.9, 8.0)])
    np.testing.assert_allclose(all_runs, [(0.2, 1.0), (0.5, 4.0)])
    pairs = {(row["x"], row["y"]) for row in front["attainment_planes"]}
    assert pairs == {("accuracy", "brevity"), ("accuracy", "clarity"), ("brevity", "clarity")}


def test_points_methods_and_curves_by_hand():
    front, _ = make(*curve_of_three())
    assert [point["on_front"] for point in front["points"]].count(True) >= 3
    point = front["points"][1]
    assert (point["id"], point["method"], point["step"], point["seconds"]) == ("0-0@1", "method 0", 1, 2.0)
    assert point["test"]["values"] == pytest.approx({"accuracy": 0.5, "brevity": 4.0, "clarity": 0.5}, abs=1e-3)
    (method,) = front["methods"]
    # scaled: (.2, .9, .5), (.5, .6, .5), (.9, .2, .5) -> (.2 * .9 + .3 * .6 + .4 * .2) * .5 = .22
    assert method["runs"] == 2
    assert method["hypervolume"]["mean"] == pytest.approx(0.22, abs=2e-3)
    assert method["hypervolume"]["low"] <= method["hypervolume"]["mean"] <= method["hypervolume"]["high"]
    volumes = [row["hypervolume"] for row in method["curve"]]
    # (.2 * .9) * .5 = .09; and .3 * .6 * .5 = .09 more
    assert volumes == pytest.approx([0.09, 0.18, 0.22], abs=2e-3)
    assert [(row["samples"], row["tokens"], row["seconds"]) for row in method["curve"]] == [
        (0, 0, 0),
        (100, 10, 2),
        (200, 20, 4),
    ]
    assert {row["share"] for row in front["attainment"]} == {0.5, 1.0}
    assert front["reference"] == {"accuracy": 0.0, "brevity": 10.0, "clarity": 0.0}
    assert front["dominates"] == []
    json.dumps(front, allow_nan=False)


def test_one_method_dominates_the_other():
    some = candidates(2, 1, methods=2)
    front, _ = make(some, evaluations(some, np.array([[0.9, 1.0, 0.9]] * 2 + [[0.3, 6.0, 0.3]] * 2), noise=0.01))
    found = {(d["a"], d["b"]): d["probability"] for d in front["dominates"]}
    assert found == {("method 0", "method 1"): 1.0, ("method 1", "method 0"): 0.0}
    assert "| method 0 | method 1 | 1.00 |" in table_of(front)


# --- values that one would rather not have ----------------------------------------------------------------------------


def test_a_policy_without_a_value_is_in_the_table_and_on_no_front():
    some, found = curve_of_three()
    broken = found.by_path[some[2].path]
    broken.test_PK[:, 0] = np.nan
    broken.validation_PK[:, 2] = np.inf
    notes = Notes()
    front, _ = make(some, found, notes=notes)
    point = front["points"][2]
    assert not point["on_front"]
    assert point["test"]["values"]["accuracy"] is None
    assert f"{some[2].id} has no value of clarity on the validation prompts, accuracy on the test prompts" in notes[0]
    assert all(p["on_front"] for p in front["points"][:2])
    assert "missing" in table_of(front)
    assert ",,," in csv_of(front)


def test_single_missing_and_infinite_values_are_left_out_of_means():
    some, found = curve_of_three()
    evaluated = found.by_path[some[0].path]
    clean = make(some, found)[0]["points"][0]["test"]["values"]["accuracy"]
    evaluated.test_PK[3, 0], evaluated.test_PK[4, 0] = np.nan, np.inf
    point = make(some, found)[0]["points"][0]
    assert point["test"]["values"]["accuracy"] == pytest.approx(clean, abs=1e-3)
    assert point["on_front"]


def test_no_value_at_all():
    some = candidates(1, 1)
    with pytest.raises(
        ValueError, match="no policy has a value for every objective, so there is nothing to compare: 0-0@0 has"
    ):
        make(some, evaluations(some, np.full((1, 3), np.nan)))


def test_one_point_only():
    some, notes = candidates(1, 1), Notes()
    front, _ = make(some, evaluations(some, np.array([[0.5, 5.0, 0.5]])), notes=notes)
    assert notes == ["there is one policy only: it is the front, and nothing is compared"]
    assert front["points"][0]["on_front"]
    assert front["methods"][0]["igd_plus"]["mean"] == 0
    assert front["methods"][0]["hypervolume"]["mean"] == pytest.approx(0.125, abs=0.02)


def test_one_policy_dominates_all_others():
    some, notes = candidates(1, 3), Notes()
    values = np.array([[0.2, 8.0, 0.2], [0.9, 1.0, 0.9], [0.4, 6.0, 0.4]])
    front, _ = make(some, evaluations(some, values), notes=notes)
    assert "0-0@1 dominates all others on the validation prompts: the front is one point" in notes
    assert [p["on_front"] for p in front["points"]] == [False, True, False]
    assert "one run only of every method" in " ".join(notes)


def test_a_reference_point_inside_the_front_is_said():
    some, found = curve_of_three()
    config = CONFIG.model_copy(update={"evaluation": CONFIG.evaluation.model_copy(update={"reference": {"accuracy": 0.4}})})
    notes = Notes()
    front, _ = make(some, found, config, notes)
    assert notes == [
        "the reference point is not below 0-0@0, 0-1@0 in every objective: these add nothing to a hypervolume; "
        "evaluation.reference moves it"
    ]
    assert front["reference"]["accuracy"] == pytest.approx(0.4)
    # (.1 * .6 + .4 * .2) * .5 / .6
    assert front["methods"][0]["hypervolume"]["mean"] == pytest.approx(0.14 * 0.5 / 0.6, abs=3e-3)


def test_one_test_prompt_has_no_intervals():
    some = candidates(1, 2)
    front, _ = make(some, evaluations(some, np.array([[0.5, 5.0, 0.5], [0.6, 6.0, 0.5]]), prompts=1))
    assert front["methods"][0]["hypervolume"]["low"] is None
    assert "?" in table_of(front)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_they_were_written(tmp_path):
    front, data = make(*curve_of_three())
    write_files(tmp_path, front, data)
    again, validation, test = read_front(tmp_path)
    assert again == json.loads(json.dumps(front))
    assert np.array_equal(test, data.test_MPK)
    assert np.array_equal(validation, data.validation_MPK)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "front.csv").read_text())))
    assert len(rows) == 6
    assert float(rows[1]["test/brevity"]) == front["points"][1]["test"]["values"]["brevity"]
    assert (tmp_path / "front.md").read_text().count("\n| 0-") == 6


def test_a_front_that_is_none(tmp_path):
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(ValueError, match=r"front.json is not a front that paretune front has written"):
        read_front(tmp_path)
    front, data = make(*curve_of_three())
    write_files(tmp_path, front, data)
    (tmp_path / "vectors.npz").unlink()
    with pytest.raises(ValueError, match=r"vectors.npz cannot be read: run paretune front again"):
        read_front(tmp_path)
    write_files(tmp_path, front, replace(data, candidates=[replace(c, id=f"x{c.id}") for c in data.candidates]))
    with pytest.raises(ValueError, match=r"vectors.npz belongs to another front"):
        read_front(tmp_path / "front.json")


def test_names_cannot_break_a_table():
    some, found = curve_of_three()
    evil = [replace(c, method="a | b\n# c", id=f"|{c.id}") for c in some]
    table = table_of(make(evil, found)[0])
    assert "a \\| b # c" in table
    assert "\n# c" not in table


@pytest.mark.parametrize(("runs", "steps", "methods"), [(2, 10, 10), (1, 1, 200)])
def test_two_hundred_points_and_five_objectives_take_seconds(runs, steps, methods):
    more = [f"--objectives.{name}={{reward: brevity}}" for name in ("d", "e")]
    config = load_config(QUICKSTART, [*more, "--weighting={type: pama}"])
    values = np.abs(np.random.default_rng(0).normal(size=(200, 5)))
    values /= np.linalg.norm(values, axis=1, keepdims=True)  # all on the front
    some = candidates(runs, steps, methods)
    found = evaluations(some, values, prompts=256)
    start = time.process_time()
    make(some, found, config)
    assert time.process_time() - start < 5
