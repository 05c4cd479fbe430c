"""Evaluations that were made before, one parquet file each, named by the hash of all that made it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.runlog import write_parquet


class Cache:
    """A folder of evaluations.

    Args:
        folder: Created with the first of them.
        objectives: Names of the objectives.
    """

    def __init__(self, folder: Path, objectives: Sequence[str]):
        self.folder = folder
        self._objectives = objectives

    def path(self, key: str) -> Path:
        """File of an evaluation."""
        return self.folder / f"{key}.parquet"

    def put(self, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the samples of an evaluation, as `align.runlog.sample_rows` makes them, in the order of the prompts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_parquet(self.path(key), rows, self._objectives)

    def get(self, key: str, prompts: int, samples: int) -> pa.Table | None:
        """The samples of an evaluation of so many prompts; None where there are none, or the file is not whole."""
        try:
            table = pq.read_table(self.path(key))
        except (OSError, pa.ArrowInvalid):
            return None
        return table if len(table) == prompts * samples else None

    def values(self, table: pa.Table, samples: int) -> np.ndarray:
        """Raw values (P, G, K) of an evaluation; NaN where missing."""
        columns = [table[f"value/{name}"].to_numpy(zero_copy_only=False).astype(np.float64) for name in self._objectives]
        return np.stack(columns, axis=-1).reshape(-1, samples, len(self._objectives))
