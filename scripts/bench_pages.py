"""How long the pages of a run and of a front take to open from disk in Chromium, and how large their files are.

    python scripts/bench_pages.py [--samples 50000] [--rounds 5]

The run and the front are made up, and completions are words drawn at random. Times are medians, in seconds since the
navigation: to the first paint with content, to the first samples or examples that are shown, and to the last figure in the
window. Needs playwright and a Chromium (`CHROMIUM` names another than the one on the path). The last line is a JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.fronts.compute import front_of, measured
from align.fronts.evaluation import Evaluated, Evaluations
from align.fronts.page import write_page
from align.fronts.runs import Candidate, Notes
from align.load import load_config
from align.report import write_report
from align.runlog import RunFiles, sample_rows
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, SIZE, WORDS = 16, 8, 60  # of a batch; words of a completion, on average
POLICIES = 200
WATCH = """
  window.seen = {};
  const wanted = {"samples_s": "#completion, #examples pre", "figures_s": "[data-figure], #cloud, #forest, #curve"};
  const there = {
    "samples_s": (e) => e.textContent !== "",
    "figures_s": (e) => e.getBoundingClientRect().top > innerHeight || e.querySelector(".main-svg") !== null,
  };
  const look = () => {
    for (const [name, selector] of Object.entries(wanted)) {
      const found = [...document.querySelectorAll(selector)];
      if (!(name in seen) && found.length && found.every(there[name])) seen[name] = performance.now() / 1000;
    }
    const paint = performance.getEntriesByName("first-contentful-paint")[0];
    if (paint) seen["paint_s"] = paint.startTime / 1000;
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
"""


def main() -> None:
    """Make the pages, open them in turn, and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "run", options.samples)
        before = set(Path(folder).rglob("*"))
        start = time.process_time()
        pages = {"report": write_report(Path(folder) / "run"), "front": Path(folder) / "front.html"}
        written_s = round(time.process_time() - start, 2)
        found: dict[str, object] = {"samples": options.samples, "report_written_cpu_s": written_s}
        write_page(pages["front"], make_front())
        written = [file for file in set(Path(folder).rglob("*")) - before if file.is_file() and file.suffix != ".png"]
        for name, path in pages.items():
            found[f"{name}_page_mb"] = round(path.stat().st_size / 1e6, 2)
        rest = sum(file.stat().st_size for file in written if file not in pages.values())
        found["report_beside_mb"] = round(rest / 1e6, 2)
        times = open_all(pages, options.rounds)
    found |= {key: round(statistics.median(values), 2) for key, values in times.items()}
    print(json.dumps(found | {"rounds": options.rounds}))


def make_run(folder: Path, samples: int) -> None:
    """A run folder with that many training samples, and ten evaluations."""
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"))
    objectives, rng = objectives_of(config), np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    files = RunFiles(folder, 0, [o.name for o in objectives])
    archive = Archive(folder / "archive.jsonl", objectives, config.evaluation.reference, writes=True)
    steps, names = -(-samples // (PROMPTS * SIZE)), [o.name for o in objectives]
    weights_K = np.full(len(names), 1 / len(names))
    for step in range(1, steps + 1):
        groups, n = batch(rng, step), PROMPTS * SIZE
        matrix = RewardMatrix(objectives, rng.random((n, len(names))), {})
        files.samples.write(step, groups, matrix, weights_K, rng.normal(size=n))
        row = {f"objectives/{name}/{key}": float(rng.random()) for name in names for key in ("mean", "std")}
        row |= {f"weights/{name}": float(w) for name, w in zip(names, weights_K, strict=True)}
        files.metrics.append({"step": step, "loss": float(rng.normal()), "entropy": float(rng.random()), "kl": 0.1, **row})
        files.timings.append({"step": step, "step_time": 1.0})
        if step % max(1, steps // 10) == 0:
            files.write_evaluation(step, sample_rows(step, groups, matrix, (), ()))
            tables = [dict(zip(names, row, strict=True)) for row in rng.random((2, len(names)))]
            archive.append(ParetoPoint(step, tables[0], tables[1], dict.fromkeys(names, 0.0), n, n * step, ""))
    files.samples.flush()


def batch(rng: np.random.Generator, step: int) -> list[SampleGroup]:
    """Samples of random words, from a vocabulary of 2,000."""

    def text() -> str:
        return " ".join(f"w{word:x}" for word in rng.integers(2000, size=rng.integers(2 * WORDS)))

    def sample() -> Sample:
        return Sample((1,) * 20, (), FinishReason.STOP, step - 1, text())

    prompts = [Prompt(f"p{p}", text(), (1, 2), {}) for p in rng.integers(1000, size=PROMPTS)]
    return [SampleGroup(prompt, tuple(sample() for _ in range(SIZE))) for prompt in prompts]


def make_front() -> dict:
    """A front of policies of twenty methods, with three examples each."""
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"))
    rng, some, found = np.random.default_rng(0), [], {}
    for i in range(POLICIES):
        method, run = f"method {i // 10}", f"runs/{i // 5}"
        some.append(Candidate(f"{run}@{i % 5}", f"{run}/{i % 5}", run, run, method, i % 5, i // 5 % 2, i, i, i, {}))
        values = rng.random(3) + 0.1 * rng.normal(size=(2, 40, 3))
        examples = [{"prompt": "1+1=?", "text": "#2 " * 100, "values": {"accuracy": 0.5}}] * 3
        found[some[-1].path] = Evaluated(*values.clip(0, 1), dict.fromkeys(("validation", "test"), [0.0] * 3), examples)
    evaluations = Evaluations(found, prompts={"validation": 40, "test": 40})
    return front_of(measured(some, evaluations, config), evaluations, config, [0], Notes())


def open_all(pages: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Times of every page, in a browser of its own that has opened none before."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {}
    with sync_playwright() as driver:
        for _ in range(rounds):
            for name, path in pages.items():
                browser = driver.chromium.launch(
                    executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                page.add_init_script(WATCH)
                page.goto(path.as_uri(), wait_until="commit")
                seen: dict[str, float] = {}
                while len(seen) < 3:
                    page.wait_for_timeout(200)
                    seen = page.evaluate("window.seen") or {}
                for key, seconds in seen.items():
                    times.setdefault(f"{name}_{key}", []).append(seconds)
                browser.close()
    return times


if __name__ == "__main__":
    main()
