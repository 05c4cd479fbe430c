"""`paretune replay`: a run's logged observations through another weighting scheme, beside its real weights. No torch."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.archive import ParetoPoint, read_points
from align.build import objectives_of
from align.config import Config, describe
from align.files import replace_text
from align.load import load_config
from align.plan import make_plan
from align.step import StepRules, gram_keys, take_step
from align.weighting import Signal, build_scheme
from rewards.types import Missing, Objective, RewardMatrix

SHOWN = 12  # batches in the table
CANNOT_TELL = (
    "The policy followed the real weights. Under the replayed ones it would have moved elsewhere, and with it the rewards, "
    "held-out vectors and gradients that the scheme looks at: the further the two lie apart, and the longer, the less the "
    "later steps say. Whether the replayed weights train a better policy is not to be seen here; only a run can tell."
)
GRADIENTS_AS_MEASURED = (
    "Gradients are those that the run's own probe measured, with its features and combination, at the batches where its own "
    "scheme wanted them; the others are replayed as batches without."
)


@dataclass(frozen=True)
class Logged:
    """What a run folder holds of what its scheme looked at.

    Args:
        config: Of the run.
        metrics: Lines of metrics.jsonl by step.
        points: Held-out evaluations, oldest first.
        batches: Step and raw values (N, K) of every batch that is there in full, in order, without a gap.
        notes: What could not be read.
    """

    config: Config
    metrics: Mapping[int, Mapping[str, Any]]
    points: Sequence[ParetoPoint]
    batches: Sequence[tuple[int, np.ndarray]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Replay:
    """Real and replayed series, batch by batch.

    Args:
        steps: First optimiser step of every batch, from 1.
        real: By metric, `weights/NAME` and `step_scale`; None where the log has no number.
        replayed: The same metrics, and what the scheme logs of its own numbers (`weighting/...`).
        own: Whether the scheme is the run's own.
        notes: For the user.
    """

    steps: Sequence[int]
    real: Mapping[str, Sequence[float | None]]
    replayed: Mapping[str, Sequence[float | None]]
    own: bool
    notes: Sequence[str]

    def largest_difference(self) -> tuple[float, str, int]:
        """Largest distance between a real number and its replayed one, the metric, and the step."""
        found = [
            (abs(a - b), key, step)
            for key, series in self.real.items()
            for step, a, b in zip(self.steps, series, self.replayed[key], strict=True)
            if a is not None and b is not None
        ]
        return max(found, key=lambda item: item[0], default=(math.nan, "", 0))


def replay_run(folder: str, overrides: Sequence[str], json_path: str, png_path: str) -> int:
    """Replay, print a table, and write the series and the picture where files are named. Raises ValueError."""
    run = Path(folder)
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.json")
    if others := [o for o in overrides if re.split("[.=]", o.removeprefix("--"))[0] not in ("weighting", "combination")]:
        raise ValueError(f"{others[0]}: a replay changes weighting and combination alone; the rest is as the run logged it")
    own = load_config(str(file))
    config = load_config(str(file), overrides)
    for path in filter(None, (json_path, png_path)):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {Path(path).parent}")
    found = replay(read_logged(run, own), config)
    print(_text(found, run, own, config))
    if json_path:
        replace_text(Path(json_path), json.dumps(_figures(found, run, own, config), indent=1, allow_nan=False) + "\n")
    if png_path:
        from align.replay_figure import draw_replay

        draw_replay(Path(png_path), found, list(config.objectives), own.weighting.type, config.weighting.type)
    return 0


# --- the mathematics --------------------------------------------------------------------------------------------------


def replay(logged: Logged, config: Config) -> Replay:
    """The states that the scheme of `config` reaches on the logged observations, by the code that takes a run's steps.

    Raises:
        ValueError: The scheme looks at something that the run did not log.
    """
    objectives = [_tolerant(objective) for objective in objectives_of(config)]
    rules = StepRules(
        objectives, build_scheme(config.weighting), config.estimator, config.combination,
        config.rollout.samples_per_prompt, max_failed=1.0,
    )  # fmt: skip
    notes = [*logged.notes, *_refuse_unlogged(logged, config)]
    state = rules.scheme.init(objectives)
    found: list[Mapping[str, float]] = []
    for step, raw_NK in logged.batches:
        signals = _signals(logged, objectives, step)
        result = take_step(rules, state, RewardMatrix(objectives, raw_NK, {}), step - 1, signals)
        state = result.state
        found.append({key: value for key, value in result.metrics.items() if _is_of_the_scheme(key)})
    notes += [f"the scheme said: {remark}" for remark in state.remarks]
    steps = [step for step, _ in logged.batches]
    rows = [logged.metrics.get(step, {}) for step in steps]
    compared = [f"weights/{objective.name}" for objective in objectives] + ["step_scale"]
    if any(row.get("weights/kl") for row in [*rows, *found]):
        compared.append("weights/kl")
    real = {key: [row.get(key, 0.0 if key == "weights/kl" and row else None) for row in rows] for key in compared}
    keys = dict.fromkeys([*compared, *(key for row in found for key in row)])
    replayed = {key: [_finite(row.get(key, 0.0 if key == "weights/kl" else None)) for row in found] for key in keys}
    return Replay(steps, real, replayed, own=config.weighting == logged.config.weighting, notes=notes)


def _tolerant(objective: Objective) -> Objective:
    """A run may go on with another policy for missing values than it began with; a logged batch was not refused."""
    return replace(objective, missing=Missing.DROP_SAMPLE) if objective.missing is Missing.FAIL else objective


def _signals(logged: Logged, objectives: Sequence[Objective], step: int) -> dict[Signal, np.ndarray]:
    """What the scheme could look at when it weighted the batch that `step` was the first to train on."""
    signals = {}
    vectors = [point.vector_K(objectives) for point in logged.points if point.step < step]
    if vectors:
        signals[Signal.VALIDATION] = np.array(vectors)
    row, places = logged.metrics.get(step, {}), gram_keys(objectives)
    if all(row.get(key) is not None for key in places):
        gram_KK = np.empty((len(objectives), len(objectives)))
        for key, (i, j) in places.items():
            gram_KK[i, j] = gram_KK[j, i] = row[key]
        signals[Signal.GRAM] = gram_KK
    return signals


def _refuse_unlogged(logged: Logged, config: Config) -> list[str]:
    """Notes on what the scheme needs. Raises ValueError where the run did not log it."""
    needs, kind = config.weighting.needs, config.weighting.type
    if config.estimator.type == "dpg":
        raise ValueError("estimator: dpg goes towards a distribution and uses no weights, so there is nothing to replay")
    if Signal.VALIDATION in needs and not logged.points and kind != "lagrangian":
        raise ValueError(f"weighting.type={kind} looks at held-out vectors, and archive.jsonl of the run has none")
    if Signal.GRAM not in needs:
        return []
    keys = list(gram_keys(objectives_of(config)))
    having = sum(keys[0] in row for row in logged.metrics.values())
    if not having:
        raise ValueError(
            f"weighting.type={kind} looks at inner products of the objectives' gradients, and metrics.jsonl of the run has "
            f"none ({keys[0]}): only runs under gradient or mgda measure them"
        )
    return [f"{having} of {len(logged.batches)} batches have gradients. {GRADIENTS_AS_MEASURED}"]


def _is_of_the_scheme(key: str) -> bool:
    return key == "step_scale" or key.startswith(("weights/", "weighting/"))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_logged(folder: Path, config: Config) -> Logged:
    """What a run folder holds of what its scheme looked at. Raises ValueError where there is nothing to replay."""
    if config.rounds is not None:
        raise ValueError(
            f"{folder} is a run of self-training rounds, which weight no objectives: there is nothing to replay"
        )
    metrics, notes = _read_metrics(folder / "metrics.jsonl")
    archive = folder / "archive.jsonl"
    batches, ends = _whole_batches(_batches(folder, list(config.objectives)), config)
    if not batches:
        raise ValueError(f"{folder} has no whole batch of samples yet, so there is nothing to replay")
    behind = max(metrics, default=0)
    if not ends and behind >= batches[-1][0] + make_plan(config, 1).steps_per_batch:
        ends = [f"samples/ ends at step {batches[-1][0]} and metrics.jsonl at step {behind}: the run was cut off"]
    lost = [step for step, _ in batches if "step_scale" not in metrics.get(step, {})]
    if lost:
        notes.append(f"metrics.jsonl lacks the real weights of {len(lost)} batches, the first at step {lost[0]}")
    return Logged(config, metrics, read_points(archive) if archive.exists() else [], batches, [*notes, *ends])


def _read_metrics(path: Path) -> tuple[dict[int, Mapping[str, Any]], list[str]]:
    """Rows by step, and a note for every line that is none."""
    rows, notes = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            notes.append(f"{path}, line {number} is not a line of metrics: skipped")
    return rows, notes


def _batches(folder: Path, objectives: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Step and raw values (N, K) of every batch with samples, in order; the processes' parts in the order of their ranks."""
    shards: dict[int, list[Path]] = {}
    for path in folder.glob("samples/shard-*.rank*.parquet"):
        shards.setdefault(int(path.name.split(".")[0].removeprefix("shard-")), []).append(path)
    for _, paths in sorted(shards.items()):
        paths.sort(key=lambda path: int(path.name.split(".")[1].removeprefix("rank")))
        tables = [_read_values(path, objectives) for path in paths]
        steps_N = np.concatenate([steps for steps, _ in tables])
        values_NK = np.concatenate([values for _, values in tables])
        for step in np.unique(steps_N):
            yield int(step), values_NK[steps_N == step]


def _read_values(path: Path, objectives: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (N,) and raw values (N, K), NaN where missing, of one file of samples."""
    try:
        table = pq.read_table(path, columns=["step", *(f"value/{name}" for name in objectives)])
        columns = [table[f"value/{name}"].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in objectives]
        return table["step"].to_numpy(), np.stack(columns, axis=1).astype(float)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _whole_batches(
    batches: Iterator[tuple[int, np.ndarray]], config: Config
) -> tuple[list[tuple[int, np.ndarray]], list[str]]:
    """Batches up to the first that is missing or not there in full, and a note on that one."""
    plan, whole = make_plan(config, 1), []
    for step, raw_NK in batches:
        expected = 1 + len(whole) * plan.steps_per_batch
        if step != expected:
            return whole, [f"samples/ lacks the batch of step {expected}: the replay ends before it"]
        if len(raw_NK) != plan.samples_per_batch:
            share = f"{len(raw_NK)} of the {plan.samples_per_batch} samples"
            return whole, [f"samples/ has {share} of step {step}: the replay ends before it"]
        whole.append((step, raw_NK))
    return whole, []


# --- what is said -----------------------------------------------------------------------------------------------------


def _text(found: Replay, run: Path, own: Config, config: Config) -> str:
    lines = [
        f"run        {run}: {len(found.steps)} batches, up to step {found.steps[-1]}",
        f"real       {describe(own)}",
        f"replayed   {describe(config)}" + (" (the run's own scheme)" if found.own else ""),
        "",
        *_table(found),
        "",
        _verdict(found),
        *(f"note: {note}" for note in found.notes),
    ]
    return "\n".join(lines if found.own else [*lines, CANNOT_TELL])


def _table(found: Replay) -> list[str]:
    """Real and replayed numbers of some batches; the step scale only where it is not 1 all the time."""
    keys = [
        key for key in found.real
        if key.startswith("weights/") or {*found.real[key], *found.replayed[key]} - {1.0, None}
    ]  # fmt: skip
    labels = [key.removeprefix("weights/").replace("_", " " if key == "step_scale" else "_") for key in keys]
    width = max(17, *(len(label) for label in labels))
    heads = ("  ".join(f"{head:>{width}}" for head in heads) for heads in (labels, ["real → replayed"] * len(keys)))
    lines = [f"{begin:>6}  {head}" for begin, head in zip(("step", ""), heads, strict=True)]
    count = len(found.steps)
    for i in dict.fromkeys(round(n * (count - 1) / max(SHOWN - 1, 1)) for n in range(SHOWN)):
        cells = [f"{_number(found.real[key][i])} → {_number(found.replayed[key][i])}" for key in keys]
        lines.append(f"{found.steps[i]:>6}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _verdict(found: Replay) -> str:
    difference, key, step = found.largest_difference()
    if math.isnan(difference):
        return "metrics.jsonl has none of the real weights, so there is nothing to compare with"
    if found.own and difference == 0:
        return "replayed and real weights are equal to the last bit"
    largest = f"largest difference: {difference:.3g} ({key.removeprefix('weights/')}, step {step})"
    if found.own:
        largest += "; the run's own scheme should give none: its files, or the code since, have changed"
    return largest


def _figures(found: Replay, run: Path, own: Config, config: Config) -> dict[str, Any]:
    difference, key, step = found.largest_difference()
    return {
        "format": 1,
        "run": str(run),
        "objectives": list(config.objectives),
        "real_weighting": own.weighting.model_dump(mode="json"),
        "replayed_weighting": config.weighting.model_dump(mode="json"),
        "own": found.own,
        "steps": found.steps,
        "real": found.real,
        "replayed": found.replayed,
        "largest_difference": {"value": _finite(difference), "metric": key, "step": step},
        "notes": found.notes,
        "cannot_tell": CANNOT_TELL,
    }
