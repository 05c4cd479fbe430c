"""The report: what it says of runs good and broken, and that model text stays text."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread

from align.archive import Archive, ParetoPoint
from align.build import objectives_of
from align.config import Config
from align.report import MAX_SAMPLES, write_report
from align.report_figures import staircase
from align.runlog import RunFiles, sample_rows
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

# --- a made-up run ----------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "accuracy": {"reward": "arithmetic_accuracy"},
    "length": {"reward": "brevity", "direction": "minimize", "bounds": [0, 32]},
    "clarity": {"reward": "arithmetic_clarity", "missing": "neutral"},
}
ANSWERS = ("7+5=12;12-3=9;#9", "#9", "7+5=12;#9", "7+5=11;11-3=8;#8", "9", "7-3=4;4+5=9;#9")


def config_of(objectives: dict, steps: int, every: int) -> Config:
    source = {"type": "function", "function": "rollout.arithmetic:expressions"}
    return Config.model_validate(
        {
            "output": "runs/made-up",
            "steps": steps,
            "policy": {"model": "builtin:arithmetic"},
            "prompts": {"train": source, "evaluation": source},
            "objectives": objectives,
            "weighting": {"type": "fixed", "weights": dict.fromkeys(objectives, 1.0)},
            "evaluation": {"every": every, "reference": {"length": 30.0} if "length" in objectives else {}},
        }
    )


def make_run(
    folder: Path,
    *,
    objectives: dict = OBJECTIVES,
    steps: int = 12,
    planned: int = 0,
    every: int = 4,
    prompts: int = 4,
    texts: Sequence[str] = ANSWERS,
) -> Config:
    """A run folder in which the objectives rise one after the other and one reward fails now and then."""
    config = config_of(objectives, planned or steps, every)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    rng = np.random.default_rng(0)
    maker = RunMaker(config, RunFiles(folder, 0, list(objectives)), rng, prompts, texts)
    archive = Archive(folder / "archive.jsonl", maker.objectives, config.evaluation.reference, writes=True)
    for step in range(steps + 1):
        if every and (step % every == 0 or step == steps):
            archive.append(maker.evaluate(step, step / max(steps, 1)))
        if step < steps:
            maker.train(step + 1, step / steps)
    maker.files.samples.flush()
    return config


class RunMaker:
    """Writes the files of a made-up run, step by step."""

    def __init__(self, config: Config, files: RunFiles, rng: np.random.Generator, prompts: int, texts: Sequence[str]):
        self.config, self.files, self.rng, self.prompts, self.texts = config, files, rng, prompts, texts
        self.objectives = objectives_of(config)

    def groups(self, step: int, size: int, prompts: int) -> list[SampleGroup]:
        made = []
        for p in range(prompts):
            texts = [self.texts[(step + p + g) % len(self.texts)] for g in range(size)]
            samples = [Sample((1,) * (len(t) % 40), (), FinishReason.STOP, max(step - 1, 0), t) for t in texts]
            made.append(SampleGroup(Prompt(f"p{p}", f"{p}+5-3=?", (1, 2), {}), tuple(samples)))
        return made

    def matrix(self, n: int, progress: float, step: int) -> RewardMatrix:
        """Accuracy saturates early, then brevity and clarity trade off."""
        rise = [1 - math.exp(-5 * progress), progress**2, 0.35 + 0.55 * math.sin(2.6 * progress)]
        scaled = self.rng.normal([0.1 + 0.75 * r for r in rise[: len(self.objectives)]], 0.15, (n, len(self.objectives)))
        raw_NK = np.empty_like(scaled)
        for k, o in enumerate(self.objectives):
            share = np.clip(scaled[:, k] if o.maximize else 1 - scaled[:, k], 0, 1)
            raw_NK[:, k] = o.bounds[0] + share * (o.bounds[1] - o.bounds[0])
        errors = {}
        if len(self.objectives) > 2 and step % 3 == 1:
            raw_NK[::5, 2] = np.nan
            errors = {(i, 2): "judge: HTTP 503 <Service Unavailable>" for i in range(0, n, 5)}
        return RewardMatrix(self.objectives, raw_NK, errors)

    def train(self, step: int, progress: float) -> None:
        size = 8
        groups = self.groups(step, size, self.prompts)
        matrix = self.matrix(size * self.prompts, progress, step)
        weights_K = np.full(len(self.objectives), 1 / len(self.objectives))
        advantages_N = self.rng.normal(size=size * self.prompts)
        self.files.samples.write(step, groups, matrix, weights_K, advantages_N)
        noise = float(self.rng.normal())
        row = {
            "step": step,
            "loss": 0.1 * noise,
            "grad_norm": 0.3 + 0.05 * noise,
            "entropy": 1.2 * math.exp(-progress) + 0.02 * noise,
        }
        row |= {"completions/mean_length": 20 - 8 * progress + noise, "groups/effective": min(1.0, 0.8 + 0.1 * noise)}
        row |= {"step_scale": 1.0, "policy_age": 0.0}
        for k, o in enumerate(self.objectives):
            row[f"weights/{o.name}"] = float(weights_K[k])
            row[f"objectives/{o.name}/mean"] = float(np.nanmean(matrix.raw_NK[:, k]))
            row[f"objectives/{o.name}/missing"] = float(matrix.missing_NK[:, k].mean())
        self.files.metrics.append(row)
        self.files.timings.append({"step": step, "time/sampling": 0.1, "step_time": 0.5})

    def evaluate(self, step: int, progress: float) -> ParetoPoint:
        prompts = 8 * self.prompts
        matrix = self.matrix(prompts, progress, step)
        self.files.write_evaluation(step, sample_rows(step, self.groups(step, 1, prompts), matrix, (), ()))
        tables = {
            "values": np.nanmean(matrix.raw_NK, axis=0),
            "standard_errors": np.nanstd(matrix.raw_NK, axis=0) / math.sqrt(prompts),
            "missing": matrix.missing_NK.mean(axis=0),
        }
        named = {key: {o.name: float(x) for o, x in zip(self.objectives, row, strict=True)} for key, row in tables.items()}
        return ParetoPoint(step, **named, prompts=prompts, samples=32 * step, checkpoint=f"checkpoints/checkpoint-{step}")


# --- reading a report -------------------------------------------------------------------------------------------------
