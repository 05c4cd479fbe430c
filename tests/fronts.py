"""Made-up runs whose checkpoints are the policy that ships, each with its last norm scaled."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from align.checkpoint import RunState, checkpoint_name, write_state
from align.load import load_config
from tests.conftest import QUICKSTART, ROOT

SHIPPED = ROOT / "align" / "policies" / "arithmetic"
WEIGHTS = {"accuracy": 0.5, "brevity": 0.3, "clarity": 0.2}


def make_policy(folder: Path, scale: float) -> str:
    """A policy of the kind of the one that ships."""
    shutil.copytree(SHIPPED, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def make_run(folder: Path, scales: Mapping[int, float], *overrides: str, seed: int = 0) -> Path:
    """A finished run with a checkpoint for every step in `scales`."""
    steps = max(scales, default=4)
    fixed = f"--weighting={json.dumps({'type': 'fixed', 'weights': WEIGHTS})}"
    small = ("--prompts.evaluation.args.count=16", f"--steps={steps}", f"--seed={seed}", f"--output={folder}")
    config = load_config(QUICKSTART, [fixed, *small, *overrides])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (folder / "environment.json").write_text('{"processes": 1}')
    rows = [
        {"step": s, "num_tokens": 100.0 * s, **{f"weights/{n}": w for n, w in WEIGHTS.items()}} for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timings.jsonl").write_text("".join(json.dumps({"step": r["step"], "step_time": 0.5}) + "\n" for r in rows))
    for step, scale in scales.items():
        checkpoint = folder / "checkpoints" / checkpoint_name(step)
        make_policy(checkpoint, scale)
        write_state(checkpoint, RunState(step, 0, 1, config.fingerprint(), {}))
    return folder
