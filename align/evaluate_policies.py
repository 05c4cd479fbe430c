"""`paretune eval`: held-out figures of checkpoints of a run, or of any model, with standard errors."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from align.archive import hypervolume_share, reference_vector, scaled_vector
from align.build import load_prompts, load_tokenizer, locate_model, objectives_of
from align.checkpoint import complete_checkpoints
from align.config import Config
from align.engine import check_engine
from align.fronts.fingerprint import Hashes, tokenizer_of
from align.launch import quiet
from align.load import load_config
from align.sampling import Place, evaluation_params
from align.summary import Summary, summarize


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: its name in the table, and the folder or hub name of its weights."""

    name: str
    path: str


def evaluate_policies(target: str, config_path: str, checkpoints: str, json_path: str, overrides: Sequence[str]) -> int:
    """Evaluate, print a table, and write the figures to a file where one is named. Raises ValueError for bad input."""
    run = Path(target) if (Path(target) / "metrics.jsonl").exists() or (Path(target) / "environment.json").exists() else None
    if run is None and not config_path:
        raise ValueError(f"{target} is not a run folder, so the objectives and prompts must come from --config FILE")
    config = load_config(config_path or str(run / "config.json"), overrides)
    if not config.evaluation.every:
        raise ValueError("evaluation.every is 0: evaluation is off; set it, and prompts.evaluation")
    check_engine(config)
    policies = _policies_of(run, config, checkpoints) if run else [Policy(target, locate_model(target))]
    quiet()
    with TemporaryDirectory(prefix="paretune-eval-") as folder:
        summaries = _evaluate(policies, config, run or Path(folder))
    print(_table(summaries, config))
    if json_path:
        figures = {n: {key: _without_nan(table) for key, table in vars(s).items() if table} for n, s in summaries.items()}
        Path(json_path).write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0


def _without_nan(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nan(value) if isinstance(value, dict) else value if math.isfinite(value) else None
        for name, value in table.items()
    }


def _policies_of(run: Path, config: Config, checkpoints: str) -> list[Policy]:
    """The chosen checkpoints of a run; step 0 is the policy that it started from."""
    start = Policy("step 0", locate_model(config.policy.model))
    saved = {step: Policy(f"step {step}", str(path)) for step, path in complete_checkpoints(run / "checkpoints")}
    if checkpoints == "all":
        return [start, *saved.values()]
    if checkpoints == "last":
        return [list(saved.values())[-1] if saved else start]
    chosen = []
    for text in checkpoints.split(","):
        if not text.strip().isdigit() or int(text) not in {0, *saved}:
            raise ValueError(f"--checkpoints: {run} has none of step {text!r}; it has {', '.join(map(str, [0, *saved]))}")
        chosen.append(start if int(text) == 0 else saved[int(text)])
    return chosen


def _evaluate(policies: Sequence[Policy], config: Config, folder: Path) -> dict[str, Summary]:
    """Figures by name: all are sampled by the engine of the configuration, one after another, on equal seeds.

    Policies of one tokenizer, architecture and end tokens share an engine; each kind has its own.

    Raises:
        ValueError: A policy, prompt or reward cannot be had, or the engine samples with none of the weights.
    """
    from align.evaluator import open_evaluator

    hashes, kinds = Hashes(folder / "hashes.json"), {}
    for policy in policies:
        kinds.setdefault(hashes.kind(policy.path, config.policy.revision), []).append(policy)
    summaries = {}
    for some in kinds.values():
        tokenizer, context = load_tokenizer(tokenizer_of(some[0].path), config)
        prompts = load_prompts(config, tokenizer, context)
        with open_evaluator(config, prompts, tokenizer, some[0].path, folder) as evaluator:
            for number, policy in enumerate(some):
                evaluator.take(policy.path, number)
                found = evaluator.evaluate(prompts.evaluation, evaluation_params(config, Place()), step=number)
                summaries[policy.name] = summarize(found.raw_PGK, objectives_of(config), found.domains)
    return {policy.name: summaries[policy.name] for policy in policies}


def _table(summaries: dict[str, Summary], config: Config) -> str:
    """One row per policy: mean +- standard error of every objective, and the hypervolume of the policy alone."""
    objectives = objectives_of(config)
    reference_K = reference_vector(config.evaluation.reference, objectives)
    width = max(len("policy"), *(len(name) for name in summaries))
    lines = [f"{'policy':<{width}}  " + "  ".join(f"{o.name:>16}" for o in objectives) + "  own hypervolume"]
    for name, summary in summaries.items():
        cells = [f"{summary.values[o.name]:8.3f} ± {summary.standard_errors[o.name]:5.3f}" for o in objectives]
        vector_K = scaled_vector(summary.values, objectives)
        volume = hypervolume_share(vector_K[None], reference_K) if np.isfinite(vector_K).all() else math.nan
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>16}" for cell in cells) + f"  {volume:15.3f}")
        lines += [f"{'':<{width}}  {share:.1%} of {o} missing" for o, share in summary.missing.items() if share]
        for domain, values in summary.domains.items():
            cells = [f"{values[o.name]:8.3f}        " for o in objectives]
            lines.append(f"{'':<{width}}  " + "  ".join(f"{cell:>16}" for cell in cells) + f"  {domain}")
    return "\n".join(lines)
