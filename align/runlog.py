"""What a run writes while it goes: metrics, timings, the pool and the samples, so that a resumed run can go on in them.

Every file is cut back to the step that a run resumes from. Wall-clock times have a file of their own, so that two runs
of the same seed leave equal metrics, byte for byte.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.files import replace_text, replacing
from rewards.types import RewardMatrix
from rollout.types import SampleGroup

STEPS_PER_SHARD = 20


class JsonLines:
    """A file of JSON objects, each with a `step`, that grows at its end."""

    def __init__(self, path: Path):
        self._path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; numbers that are not finite become null."""
        self.extend([row])

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))

    @property
    def written(self) -> bool:
        """Whether there is anything in it."""
        return self._path.exists() and self._path.stat().st_size > 0

    def count(self) -> int:
        """Its lines."""
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            return sum(1 for _ in file)

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows in the place of all, whole or not at all."""
        replace_text(self._path, "".join(map(_line, rows)))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, from the first."""
        if self._path.exists():
            with self._path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def truncate(self, step: int) -> None:
        """Drop rows of later steps, and a last line that was cut off by a crash."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        replace_text(self._path, "".join(kept))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class SampleWriter:
    """Samples of one process as parquet shards of `STEPS_PER_SHARD` steps each.

    The shard that is being filled is rewritten whole at every `flush`, so its content depends on the steps alone and not
    on when the run was interrupted.
    """

    def __init__(self, folder: Path, rank: int, objectives: Sequence[str]):
        self._folder = folder
        self._rank = rank
        self._objectives = objectives
        self._shard = 0
        self._batches: list[pa.Table] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        matrix: RewardMatrix,
        weights_K: Sequence[float],
        advantages_N: np.ndarray,
    ) -> None:
        """Add this process's samples of a batch, `step` being the first optimiser step (from 1) that trains on them."""
        if _shard_of(step) != self._shard:
            self.flush()
            self._shard, self._batches = _shard_of(step), []
        rows = sample_rows(step, groups, matrix, weights_K, advantages_N)
        self._batches.append(_table(rows, self._objectives))

    def flush(self) -> None:
        """Write the current shard to disk."""
        if self._batches:
            _write(self._path(self._shard), pa.concat_tables(self._batches))

    def resume(self, step: int) -> None:
        """Go back to `step`: drop later samples, and continue the shard that it lies in."""
        self._shard = _shard_of(step)
        for path in self._folder.glob(f"*.rank{self._rank}.parquet"):
            if int(path.name.split(".")[0].removeprefix("shard-")) > self._shard:
                path.unlink(missing_ok=True)
        path = self._path(self._shard)
        kept = pq.read_table(path).filter(pc.field("step") <= step) if path.exists() else ()
        self._batches = [kept] if len(kept) else []
        if not self._batches:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the samples of all processes."""
        for path in self._folder.glob("*.parquet"):
            path.unlink(missing_ok=True)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:06d}.rank{self._rank}.parquet"


def _shard_of(step: int) -> int:
    return (step - 1) // STEPS_PER_SHARD


def sample_rows(
    step: int,
    groups: Sequence[SampleGroup],
    matrix: RewardMatrix,
    weights_K: Sequence[float],
    advantages_N: Sequence[float],
) -> list[dict[str, Any]]:
    """One row per sample, with all K raw values and the reasons for missing ones; held-out samples have no weights
    and no advantages (give none)."""
    names = [objective.name for objective in matrix.objectives]
    weights = {f"weight/{name}": float(weight) for name, weight in zip(names, weights_K, strict=False)}
    rows, n = [], 0
    for group in groups:
        for index, sample in enumerate(group.samples):
            row = {
                "step": step,
                "prompt_id": group.prompt.id,
                "sample": index,
                "prompt": group.prompt.text,
                "text": sample.text,
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason.value,
                "policy_version": sample.policy_version,
                "advantage": float(advantages_N[n]) if len(advantages_N) else None,
            }
            for k, name in enumerate(names):
                value = float(matrix.raw_NK[n, k])
                row[f"value/{name}"] = value if math.isfinite(value) else None
                row[f"error/{name}"] = matrix.errors.get((n, k))
            rows.append(row | weights)
            n += 1
    return rows


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> None:
    """Write sample rows, whole or not at all."""
    _write(path, _table(rows, objectives))


def _table(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> pa.Table:
    schema = pa.schema(
        [
            ("step", pa.int32()),
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("prompt", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.int32()),
            ("finish_reason", pa.string()),
            ("policy_version", pa.int32()),
            ("advantage", pa.float64()),
            *((f"value/{name}", pa.float64()) for name in objectives),
            *((f"error/{name}", pa.string()) for name in objectives),
            *((f"weight/{name}", pa.float64()) for name in objectives),
        ]
    )
    return pa.Table.from_pylist(list(rows), schema=schema)


def _write(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table.combine_chunks(), temporary)  # the same bytes however many batches it came in


class RunFiles:
    """The files of a run that one process writes: the main one everything, the others their samples.

    Args:
        folder: The run folder.
        rank: Of this process.
        objectives: Names of the objectives.
    """

    def __init__(self, folder: Path, rank: int, objectives: Sequence[str]):
        self._objectives = objectives
        self._evaluations = folder / "evaluation"
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.timings = JsonLines(folder / "timings.jsonl")
        self.pool = JsonLines(folder / "pool.jsonl")
        self.samples = SampleWriter(folder / "samples", rank, objectives)
        self._is_main = rank == 0

    def resume(self, step: int) -> None:
        """Cut everything back to `step`; -1 clears it, whatever number of processes wrote it."""
        self.samples.resume(step)
        if self._is_main:
            if step < 0:
                self.samples.clear()
            self.metrics.truncate(step)
            self.timings.truncate(step)
            self.pool.truncate(step)

    def write_evaluation(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the held-out samples of an evaluation."""
        self._evaluations.mkdir(exist_ok=True)
        write_parquet(self._evaluations / f"step-{step:06d}.parquet", rows, self._objectives)
