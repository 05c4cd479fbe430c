"""The report: what it says of runs good and broken, and that model text stays text."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.config import Config
from align.report import write_report
from align.report_figures import staircase
from align.runlog import RunFiles, sample_rows
from align.step import StepRules, take_step
from align.weighting import build_scheme
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup
from tests.page import Page, samples_beside

OBJECTIVES = {
    "accuracy": {"reward": "arithmetic_accuracy"},
    "length": {"reward": "brevity", "direction": "minimize", "bounds": [0, 32]},
    "clarity": {"reward": "arithmetic_clarity", "missing": "neutral"},
}
ANSWERS = ("7+5=12;12-3=9;#9", "#9", "7+5=12;#9", "7+5=11;11-3=8;#8", "9", "7-3=4;4+5=9;#9")
DELETED = 8  # step whose checkpoint is gone


def config_of(objectives: dict, steps: int, every: int) -> Config:
    source = {"type": "function", "function": "rollout.arithmetic:expressions"}
    return Config(
        output="runs/made-up",
        steps=steps,
        policy={"model": "builtin:arithmetic"},
        prompts={"train": source, "evaluation": source},
        objectives=objectives,
        weighting={"type": "fixed", "weights": dict.fromkeys(objectives, 1.0)},
        evaluation={"every": every, "reference": {"length": 30.0} if "length" in objectives else {}},
    )


def make_run(folder: Path, objectives=OBJECTIVES, steps=12, planned=0, every=4, prompts=4, texts=ANSWERS) -> Archive:
    """A run folder, and its archive: accuracy rises and is then given up for length, and a reward fails now and then."""
    config = config_of(objectives, planned or steps, every)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    run = MadeUpRun(config, RunFiles(folder, 0, list(objectives)), prompts, texts)
    archive = Archive(folder / "archive.jsonl", run.objectives, config.evaluation.reference, writes=True)
    for step in range(steps + 1):
        if every and (step % every == 0 or step == steps):
            archive.append(run.evaluate(step))
            if step != DELETED:
                (folder / archive.points[-1].checkpoint).mkdir(parents=True)
        if step < steps:
            run.train(step + 1)
    run.files.samples.flush()
    return archive


class MadeUpRun:
    """Writes the files of a run, step by step."""

    def __init__(self, config: Config, files: RunFiles, prompts: int, texts: tuple[str, ...]):
        self.config, self.files, self.prompts, self.texts = config, files, prompts, texts
        self.objectives = objectives_of(config)
        self.rng = np.random.default_rng(0)
        parts = (build_scheme(config.weighting), config.estimator, config.combination)
        self.rules = StepRules(self.objectives, *parts, group_size=8, max_failed=0.5)

    def groups(self, step: int, prompts: int, size: int) -> list[SampleGroup]:
        def sample(i: int) -> Sample:
            text = self.texts[(step + i) % len(self.texts)]
            return Sample((1,) * (len(text) % 40), (), FinishReason.STOP, max(step - 1, 0), text)

        expressions = [Prompt(f"p{p}", f"{p}+5-3=?", (1, 2), {}) for p in range(prompts)]
        return [SampleGroup(prompt, tuple(sample(p + g) for g in range(size))) for p, prompt in enumerate(expressions)]

    def matrix(self, n: int, step: int) -> RewardMatrix:
        t = step / self.config.steps
        rise_K = [1 - math.exp(-6 * t) - 0.5 * t**3, t**2, 0.35 + 0.55 * math.sin(2.6 * t), t][: len(self.objectives)]
        shares_NK = np.clip(self.rng.normal(0.1 + 0.75 * np.array(rise_K), 0.15, (n, len(rise_K))), 0, 1)
        columns = [(s if o.maximize else 1 - s) * o.bounds[1] for s, o in zip(shares_NK.T, self.objectives, strict=True)]
        raw_NK, failed = np.stack(columns, axis=1), range(0, n, 5) if len(rise_K) > 2 and step % 7 == 3 else ()
        raw_NK[list(failed), 2:3] = np.nan
        errors = {(i, 2): "judge: HTTP 503 <Service Unavailable>" for i in failed}
        return RewardMatrix(self.objectives, raw_NK, errors)

    def train(self, step: int) -> None:
        groups, matrix = self.groups(step, self.prompts, 8), self.matrix(8 * self.prompts, step)
        result = take_step(self.rules, self.rules.scheme.init(self.objectives), matrix, step - 1, {})
        self.files.samples.write(step, groups, matrix, result.state.weights_K, result.advantages_PG.reshape(-1))
        t, noise = step / self.config.steps, float(self.rng.normal())
        trl = {"loss": 0.1 * noise, "grad_norm": 0.3 + 0.05 * noise, "entropy": 1.2 * math.exp(-t) + 0.02 * noise}
        trl |= {"completions/mean_length": 20 - 8 * t + noise, "policy_age": 0.0}
        self.files.metrics.append({"step": step, **trl, **result.metrics})
        self.files.timings.append({"step": step, "time/sampling": 0.1, "step_time": 0.5})

    def evaluate(self, step: int) -> ParetoPoint:
        prompts, matrix = 8 * self.prompts, self.matrix(8 * self.prompts, step)
        self.files.write_evaluation(step, sample_rows(step, self.groups(step, prompts, 1), matrix, (), ()))
        means, spreads = np.nanmean(matrix.raw_NK, axis=0), np.nanstd(matrix.raw_NK, axis=0)
        rows = (means, spreads / math.sqrt(prompts), matrix.missing_NK.mean(axis=0))
        tables = [{o.name: float(x) for o, x in zip(self.objectives, row, strict=True)} for row in rows]
        return ParetoPoint(step, *tables, prompts, 8 * self.prompts * step, f"checkpoints/checkpoint-{step}")


def report(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A made-up run of 12 of 20 steps and its page; not to be changed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    archive, page = make_run(folder, planned=20), report(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(archive=archive, metrics=metrics, page=page, figures=page.islands["figures"])


def test_head_says_what_the_run_was(standard):
    head = standard.page.text.partition("Pareto front")[0]
    first, final = standard.archive.hypervolume(1), standard.archive.hypervolume()
    for part in ("steps 12 of 20", "training samples 384", "weighting fixed", "estimator grpo", "not finished"):
        assert part in head
    assert f"at the start {first:.3g} hypervolume of the archive {final:.3g} ratio {final / first:.3g} ×" in head
    assert 0 < first < final


def test_table_and_figure_of_the_front(standard):
    for point in standard.archive.points:
        accuracy = f"{point.values['accuracy']:.3f} ± {point.standard_errors['accuracy']:.3f}"
        length = f"{point.values['length']:.2f} ± {point.standard_errors['length']:.2f}"
        assert f"{point.step} {accuracy} {length}" in standard.page.text
    front = standard.archive.front()
    kept = {point.step for point in front} - {DELETED}
    assert kept < {point.step for point in front}
    assert standard.page.text.count("yes checkpoints/") == len(kept)
    stairs, *clouds = standard.figures["front:0"]["data"]
    steps = {cloud["name"]: cloud["marker"]["color"] for cloud in clouds}
    assert steps["initial policy"] == [0]
    assert steps["on the Pareto front"] == [point.step for point in front if point.step]
    shown = standard.page.islands["front"]["shown"][0]
    assert {point.values[shown] for point in front} >= set(stairs["x"])


def test_any_two_objectives_can_be_chosen(standard):
    front = standard.page.islands["front"]
    assert front["names"] == list(OBJECTIVES)
    covariances = np.cov(standard.archive.vectors_MK().T)
    i, j = np.unravel_index(np.argmin(covariances), covariances.shape)
    assert set(front["shown"]) == {list(OBJECTIVES)[i], list(OBJECTIVES)[j]}
    for name in OBJECTIVES:
        drawn = sorted(value for trace in front["traces"][name] for value in trace["values"])
        assert drawn == sorted(point.values[name] for point in standard.archive.points)
        assert set(front["stairs"][name]) == set(OBJECTIVES) - {name}


def test_figures_are_valid_for_plotly_and_carry_the_metrics(standard):
    sections = [key.split(":")[0] for key in standard.figures]
    assert sections.count("objectives") == 3
    assert {"front", "missing", "weights", "curves"} < set(sections)
    for figure in standard.figures.values():
        go.Figure(figure["data"], figure["layout"])  # raises for an attribute or value that plotly does not know
    training, held_out = standard.figures["objectives:1"]["data"]
    assert training["y"] == [row["objectives/length/mean"] for row in standard.metrics]
    assert held_out["x"] == [0, 4, 8, 12]
    titles = [figure["title"] for key, figure in standard.figures.items() if key.startswith(("curves", "weights"))]
    assert titles[:3] == ["weights", "loss", "gradient norm"]
    assert not any("step scale" in title or "age" in title or "KL" in title for title in titles)


def test_scheme_numbers_and_step_scale_are_drawn_when_there_are_any(run, standard):
    make_run(run)
    scheme = {"weighting/gap": 2.0, "weighting/dual/accuracy": 1.0, "weighting/dual/length": 0.5}
    rows = [{**row, **scheme, "step_scale": 1.5, "kl": 0.1} for row in standard.metrics]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_title = {figure["title"]: figure["data"] for figure in report(run).islands["figures"].values()}
    assert by_title["step scale (multiplies the advantages)"][0]["y"] == [1.5] * 12
    assert by_title["gap (of the scheme)"][0]["y"] == [2.0] * 12
    assert [line["y"][0] for line in by_title["dual (of the scheme)"]] == [1.0, 0.5]
    assert by_title["KL divergence from the reference policy"][0]["y"] == [0.1] * 12


def test_staircase_by_hand():
    """In (larger, smaller is better): (1, 1) and (3, 4) are not dominated, (2, 5) is by (3, 4)."""
    axes = objectives_of(config_of({"up": {"reward": "r", "bounds": [0, 10]}, "down": OBJECTIVES["length"]}, 1, 0))
    values = [{"up": 3.0, "down": 4.0}, {"up": 2.0, "down": 5.0}, {"up": 1.0, "down": 1.0}]
    points = [ParetoPoint(0, table, {}, {}, 1, 0, "") for table in values]
    assert staircase(points, *axes) == ([1.0, 1.0, 3.0], [1.0, 4.0, 4.0])
    assert staircase(points, *axes[::-1]) == ([4.0, 4.0, 1.0], [3.0, 1.0, 1.0])
    assert staircase([], *axes) == ([], [])


def test_missing_values_are_missing_and_not_zero(run):
    make_run(run, steps=14, every=3)
    page = report(run)
    samples = samples_beside(run / "report.html", "training")
    values, reasons = samples["value/clarity"], samples["error/clarity"]
    missing = [i for i, value in enumerate(values) if value is None]
    assert len(missing) == 14  # 7 of 32 samples, in steps 3 and 10
    assert {reasons[i] for i in missing} == {"judge: HTTP 503 <Service Unavailable>"}
    assert sum(reason is not None for reason in reasons) == len(missing)
    assert "clarity 21.9 %" in page.text
    assert "up to 21.9 % of a batch" in page.text


def test_a_mean_that_nobody_could_measure_is_a_gap(run):
    archive = make_run(run)
    tables = {"accuracy": math.nan, "length": 3.0, "clarity": 0.5}
    archive.append(ParetoPoint(16, tables, dict.fromkeys(tables, math.nan), dict.fromkeys(tables, 1.0), 1, 0, ""))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "loss": None, "objectives/accuracy/mean": None}) + "\n")
    page = report(run)
    assert "16 missing 3.00 0.500 accuracy 100 %" in page.text
    assert page.islands["figures"]["objectives:0"]["data"][0]["y"][-1] is None
    assert [values[-1] for values in page.islands["front"]["traces"]["accuracy"][0].values()] == [None, None]
    assert is_picture(run / "front.png")


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><!--<script>",
    "]]>&lt;&amp;\"'`{{ run }}{% raw %}${x}\\u003c",
    "NUL \x00, bell \x07, return \r\n\t, line \u2028 paragraph \u2029",
    "right \u202eto left\u202c \u2067isolate\u2069 \ufeff\U0001f600 \ufffd\uffff",
    "<" * 100_000,
    "",
)


def test_hostile_text_changes_no_element_and_survives_exactly(tmp_path, standard):
    make_run(tmp_path / "<b onclick=alert(1)>&", planned=20, texts=HOSTILE)
    page = report(tmp_path / "<b onclick=alert(1)>&")
    assert page.tags == standard.page.tags
    assert "<b onclick=alert(1)>& builtin:arithmetic" in page.text
    for kind in ("training", "held_out"):  # and no character of them is left in the scripts beside the page
        assert set(samples_beside(tmp_path / "<b onclick=alert(1)>&" / "report.html", kind)["text"]) == set(HOSTILE)


def test_script_writes_text_only():
    folder = Path(sys.modules["align.report"].__file__).parent / "templates"
    script = "".join((folder / name).read_text() for name in ("common.js", "figures.js", "samples.js"))
    assert script.count("textContent") > 5
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|DOMParser|ContextualFragment", script)


def test_page_asks_for_nothing_from_the_network_and_labels_its_controls(standard):
    names, values = zip(*standard.page.attributes, strict=True)
    assert not [name for name in names if name in ("src", "href", "action", "srcset") or name.startswith("on")]
    assert ["http" in value for value in values if value.startswith("default-src 'none'; ")] == [False]
    assert [standard.page.tags.count(tag) for tag in ("select", "input", "label")] == [7, 9, 16]


@pytest.mark.parametrize(
    ("pauses", "sentence"),
    [
        ((), ""),
        ((1,), "The run paused once for rewards that failed, for 30 s in all."),
        ((2, 1), "The run paused 3 times for rewards that failed, for 1,260 s in all."),
    ],
)
def test_pauses_are_counted(run, pauses, sentence):
    """30 s, or 30 + 1230 s."""
    make_run(run)
    lines = (run / "timings.jsonl").read_text().splitlines()
    for n, count in enumerate(pauses):
        lines[n] = json.dumps(json.loads(lines[n]) | {"time/pauses": count, "time/paused": 30.0 + 1200.0 * n})
    (run / "timings.jsonl").write_text("\n".join(lines) + "\n")
    text = report(run).text
    assert ("The run paused" in text) == bool(sentence)
    assert sentence in text


def test_one_objective_has_values_over_steps(run):
    make_run(run, objectives={"accuracy": OBJECTIVES["accuracy"]})
    page = report(run)
    (line,) = page.islands["figures"]["front:0"]["data"]
    assert (line["x"], len(line["error_y"]["array"])) == ([0, 4, 8, 12], 4)
    assert "form" not in page.tags[: page.tags.index("table")]
    assert "Pareto front" not in page.text
    assert is_picture(run / "front.png")


def test_without_evaluation_the_report_says_so(run):
    make_run(run, every=0)
    page = report(run)
    assert "No policy has been evaluated: evaluation.every is 0." in page.text
    assert is_picture(run / "front.png")


def test_a_run_without_a_step_says_so_until_there_is_one(run):
    make_run(run, steps=0, planned=9, every=0)
    (run / "metrics.jsonl").touch()
    page = report(run)
    assert "steps 0 of 9" in page.text
    assert page.text.count("No step has been finished yet.") == 3
    assert "No samples have been written yet." in page.text
    assert page.islands["figures"] == {}
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert "steps 1 of 9" in report(run).text


def test_a_line_that_is_being_written_does_not_count(run):
    make_run(run)
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert "steps 11 of 12" in report(run).text
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        write_report(run)


@pytest.mark.parametrize(("name", "content"), [("x", ""), ("config.json", '{"model_type": "gpt2"}'), ("config.json", "{")])
def test_a_folder_that_is_no_run_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is not a run folder.*give the folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_picture_is_an_image_wide_enough_for_a_readme(run, count):
    objectives = {**OBJECTIVES, "safety": {"reward": "brevity", "bounds": [0, 5]}}
    make_run(run, objectives=dict(list(objectives.items())[:count]))
    assert is_picture(write_report(run).with_name("front.png"))


def is_picture(path: Path) -> bool:
    """Whether it is an image of the right size with something on it, and not too much."""
    pixels = imread(path)
    return pixels.shape[:2] == (800, 1280) and 0.002 < (pixels[..., :3].min(axis=-1) < 0.85).mean() < 0.3


def test_it_imports_no_torch(run):
    make_run(run)
    code = (
        f"import sys, align.report as r; r.write_report(r.Path({str(run)!r}));"
        "print(*({'torch', 'transformers', 'trl', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
