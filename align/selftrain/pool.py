"""The pool of self-made samples that passed, the same in every process, and its file `pool.jsonl`. Imports no torch.

The file has a line of head, then a line for every sample that passed, in the order in which they did. Reading it from the
start gives the pool again: what was pushed out is pushed out again. A file that has grown to several times what a pool
holds is cut down after a checkpoint: the pool as it was then takes the place of all that led to it, and gives the same.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.config import Config
from align.config.selftrain import PoolConfig
from align.runlog import JsonLines
from align.selftrain.rows import Pair
from align.selftrain.sources import Trusted

POOL_FILE = "pool.jsonl"
FIRST_DUAL = 1.0
TIMES = 4  # lines of the file, in sizes of the pool, beyond which it is cut down
_HEAD = 0  # its step: it goes when a run begins anew
_NAN = math.nan

Key = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample that passed.

    Args:
        prompt: Id of its prompt.
        prompt_ids: Tokens of it.
        completion_ids: Tokens of the sample.
        text: They, decoded.
        step: First optimiser step, from 1, that its batch was sampled for; 0 of a seed.
        version: Optimiser steps that the policy had seen that sampled it.
        values_K: In raw units; NaN where missing.
        log_prob: Of the sample under what sampled it, nats; NaN where the sampler gave none.
        answer: Canonical; None where it states nothing, or nothing reads answers.
        entropy: Of the answers of its group, bits; NaN where nothing reads answers.
        means_K: Mean values of its group, missing ones left out.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    step: int
    version: int
    values_K: tuple[float, ...]
    log_prob: float
    answer: str | None
    entropy: float
    means_K: tuple[float, ...]

    @property
    def key(self) -> Key:
        """What makes two entries one: the tokens of prompt and completion, whatever row of the data they come from."""
        return self.prompt_ids, self.completion_ids

    @property
    def pair(self) -> Pair:
        """Its tokens."""
        return self.prompt_ids, self.completion_ids


def seed_entry(trusted: Trusted, objectives: int) -> Entry:
    """A trusted sample, of which no values are known."""
    unknown_K = (_NAN,) * objectives
    prompt_ids, completion_ids = (tuple(ids) for ids in trusted.pair)
    return Entry(trusted.prompt, prompt_ids, completion_ids, trusted.text, 0, 0, unknown_K, _NAN, None, _NAN, unknown_K)


class Pool:
    """A bounded list without repetitions, oldest first; every method is a pure function of what was added before.

    Args:
        rules: Its bounds.
        seeds: Entries that stay.
    """

    def __init__(self, rules: PoolConfig, seeds: Sequence[Entry]):
        self._rules = rules
        self._seeds = {entry.key: entry for entry in seeds}
        self._made: dict[Key, Entry] = {}
        self._of_prompt: dict[tuple[int, ...], dict[Key, None]] = {}
        self._duals: dict[Key, float] = {}

    @property
    def size(self) -> int:
        """Most samples that it holds, besides seeds."""
        return self._rules.size

    def __len__(self) -> int:
        return len(self._seeds) + len(self._made)

    @property
    def entries(self) -> list[Entry]:
        """Seeds, then samples by age, the oldest first."""
        return [*self._seeds.values(), *self._made.values()]

    @property
    def made(self) -> list[Entry]:
        """Samples by age, the oldest first."""
        return list(self._made.values())

    def add(self, entries: Iterable[Entry]) -> None:
        """Take in samples, one after the other. One that is here already becomes the newest, with its new values; one that
        equals a seed adds nothing."""
        for entry in entries:
            if entry.key in self._seeds:
                continue
            of_prompt = self._of_prompt.setdefault(entry.prompt_ids, {})
            if entry.key in self._made:
                del self._made[entry.key], of_prompt[entry.key]
            self._made[entry.key] = entry
            of_prompt[entry.key] = None
            if len(of_prompt) > self._rules.per_prompt:
                self._drop(next(iter(of_prompt)))
            if len(self._made) > self._rules.size:
                self._drop(next(iter(self._made)))

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Places (n,) in `entries`, all different, in random order: as many as asked for, or all there are."""
        return np.random.default_rng(seed).permutation(len(self))[:count]

    def duals(self, entries: Sequence[Entry]) -> np.ndarray:
        """Multipliers of samples (n,), 1 at first."""
        return np.array([self._duals.get(entry.key, FIRST_DUAL) for entry in entries])

    def set_duals(self, entries: Sequence[Entry], duals_n: Sequence[float]) -> None:
        """Keep the multipliers of samples, as long as they are here."""
        self._duals |= {entry.key: float(dual) for entry, dual in zip(entries, duals_n, strict=True)}

    def all_duals(self) -> list[float]:
        """Those of `entries`; none when no sample has had one."""
        return self.duals(self.entries).tolist() if self._duals else []

    def _drop(self, key: Key) -> None:
        del self._made[key], self._of_prompt[key[0]][key]
        self._duals.pop(key, None)
        if not self._of_prompt[key[0]]:
            del self._of_prompt[key[0]]


# --- the file ---------------------------------------------------------------------------------------------------------


class PoolFile:
    """`pool.jsonl` of a run; one process writes it.

    Args:
        lines: The file.
        config: Of the run.
    """

    def __init__(self, lines: JsonLines, config: Config):
        self._lines = lines
        self._names = list(config.objectives)
        self._head = _head(config)

    def append(self, entries: Sequence[Entry]) -> None:
        """Write down what passed."""
        head = [] if self._lines.written else [self._head]
        self._lines.extend([*head, *(_row(entry, self._names) for entry in entries)])

    def read(self) -> Iterator[Entry]:
        """All samples that are still in it, in order."""
        for row in self._lines.rows():
            if row["step"] != _HEAD:
                yield _entry(row, self._names)

    def cut_down(self, pool: Pool, step: int) -> None:
        """Put a pool in the place of all up to the step at which it was so, where the file has grown too large.

        Args:
            pool: An empty one, with the bounds and seeds of the run's: what it is to hold is read from the file.
            step: The earliest that a run may go on from.
        """
        if self._lines.count() <= TIMES * pool.size + 1:
            return
        head, *rows = self._lines.rows()
        later = [row for row in rows if row["step"] > step]
        pool.add(_entry(row, self._names) for row in rows[: len(rows) - len(later)])
        kept = [*(_row(entry, self._names) for entry in pool.made), *later]
        self._lines.replace([{**head, "since": step, "dropped": head["dropped"] + len(rows) - len(kept)}, *kept])


def refuse_other_pool(folder: Path, config: Config, step: int, pooled: int) -> None:
    """Raise ValueError when a run folder has a pool that is not this run's, not readable, or not whole.

    Args:
        folder: Of the run.
        config: Of the run.
        step: That it goes on from; below 0 from the start, with an empty pool.
        pooled: Samples that had passed by then.
    """
    path = folder / POOL_FILE
    way_out = "restore the file, or begin a new run"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    since, dropped = _head_of(path, whole[0], config, way_out) if whole else (0, 0)  # else cut off while it was begun
    try:
        steps = [json.loads(line)["step"] for line in whole]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: there is a line that is no sample: {way_out}") from error
    if 0 <= step < since:
        raise ValueError(
            f"{path}: this pool was cut down to what goes on from step {since} or later, and the checkpoint is of step "
            f"{step}: restore the file of that time, or begin a new run"
        )
    found = dropped + sum(_HEAD < at <= step for at in steps)
    if found < pooled:
        raise ValueError(f"{path}: of {pooled} samples that had passed at step {step} it accounts for {found}: {way_out}")


def _head_of(path: Path, line: str, config: Config, way_out: str) -> tuple[int, int]:
    """Step since which the file has all that passed, and how many samples it has no more. Raises ValueError."""
    try:
        head = json.loads(line)
        objectives, fingerprint, *counts = (head[key] for key in ("objectives", "config", "since", "dropped"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the first line does not say what made this pool: {way_out}") from error
    if objectives != list(config.objectives):
        raise ValueError(
            f"{path}: this pool has values of {', '.join(objectives)}, and the objectives are "
            f"{', '.join(config.objectives)}: {way_out}"
        )
    if fingerprint != config.fingerprint():
        raise ValueError(f"{path}: this pool was written by another configuration than that of {path.parent}: {way_out}")
    return counts[0], counts[1]


def _head(config: Config) -> dict[str, Any]:
    head = {"step": _HEAD, "objectives": list(config.objectives), "config": config.fingerprint()}
    return {**head, "since": 0, "dropped": 0}


def _row(entry: Entry, names: Sequence[str]) -> dict[str, Any]:
    return {
        "step": entry.step,
        "prompt_id": entry.prompt,
        "text": entry.text,
        "policy_version": entry.version,
        "values": _nulls(names, entry.values_K),
        "log_prob": entry.log_prob,
        "answer": entry.answer,
        "entropy": entry.entropy,
        "group_means": _nulls(names, entry.means_K),
        "prompt_ids": entry.prompt_ids,
        "completion_ids": entry.completion_ids,
    }


def _entry(row: Mapping[str, Any], names: Sequence[str]) -> Entry:
    return Entry(
        row["prompt_id"],
        tuple(row["prompt_ids"]),
        tuple(row["completion_ids"]),
        row["text"],
        row["step"],
        row["policy_version"],
        _values(row["values"], names),
        _number(row["log_prob"]),
        row["answer"],
        _number(row["entropy"]),
        _values(row["group_means"], names),
    )


def _nulls(names: Sequence[str], values_K: Sequence[float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in zip(names, values_K, strict=True)}


def _values(values: Mapping[str, float | None], names: Sequence[str]) -> tuple[float, ...]:
    return tuple(_number(values[name]) for name in names)


def _number(value: float | None) -> float:
    return _NAN if value is None else value
