"""All samples of a run for its page: in chunks beside it, scripts that the page loads when it needs them.

A page that is opened from disk may load scripts and images, and no other file. A chunk is compressed and has at most
`MAX_ROWS` rows and `MAX_CHARACTERS` of text (or one row), so what a page loads at once does not grow with the run.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.files import replace_text
from align.report_hacking import place

MAX_ROWS = 1000
MAX_CHARACTERS = 1_000_000
FOLDER = "report-samples"  # beside the page
KINDS = {"training": "samples/shard-*.rank*.parquet", "held_out": "evaluation/step-*.parquet"}

Listed = list[tuple[str, int, int, int]]  # of every chunk: name, rows, first step, last step


def write_chunks(folder: Path) -> dict[str, Listed]:
    """Write the chunks of a run folder beside its page, in the place of those of an earlier page; what there is, by kind."""
    (folder / FOLDER).mkdir(exist_ok=True)
    found: dict[str, Listed] = {kind: [] for kind in KINDS}
    for kind, name, table in _chunks(folder):
        found[kind].append(_listed(name, table))
        replace_text(folder / FOLDER / f"{name}.js", _script(name, table))
    names = {f"{chunk[0]}.js" for chunks in found.values() for chunk in chunks}
    for file in (folder / FOLDER).glob("*.js"):
        if file.name not in names:
            file.unlink(missing_ok=True)
    return found


def list_chunks(folder: Path) -> dict[str, Listed]:
    """As `write_chunks`, and nothing is written."""
    found: dict[str, Listed] = {kind: [] for kind in KINDS}
    for kind, name, table in _chunks(folder):
        found[kind].append(_listed(name, table))
    return found


def chunk_script(folder: Path, wanted: str) -> str | None:
    """The script of the chunk of that name, made now; None when there is none."""
    for _, name, table in _chunks(folder, wanted.rpartition("-")[0]):
        if name == wanted:
            return _script(name, table)
    return None


def _chunks(folder: Path, only: str = "") -> Iterator[tuple[str, str, pa.Table]]:
    """Kind, name and rows of every chunk in order of steps; `only` those of a shard or an evaluation."""
    for kind, pattern in KINDS.items():
        files = sorted(folder.glob(pattern), key=place)
        for number, group in groupby(files, key=lambda file: place(file)[0]):
            if only in ("", f"{kind}-{number}"):
                table = pa.concat_tables([pq.read_table(file) for file in group])
                table = table.take(np.argsort(table["step"].to_numpy(), kind="stable"))
                for i, (start, rows) in enumerate(_cuts(table)):
                    yield kind, f"{kind}-{number}-{i}", table.slice(start, rows)


def _cuts(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Start and length of every chunk of the rows; a row that has too many characters is one by itself."""
    long = [table[name] for name in table.column_names if name in ("prompt", "text") or name.startswith("error/")]
    characters_N = sum(pc.fill_null(pc.utf8_length(column), 0).to_numpy() for column in long)
    start, so_far = 0, 0
    for n, characters in enumerate(characters_N.tolist()):
        if n - start == MAX_ROWS or (n > start and so_far + characters > MAX_CHARACTERS):
            yield start, n - start
            start, so_far = n, 0
        so_far += characters
    if table.num_rows:
        yield start, table.num_rows - start


def _listed(name: str, table: pa.Table) -> tuple[str, int, int, int]:
    steps = table["step"]
    return name, table.num_rows, steps[0].as_py(), steps[-1].as_py()


def _script(name: str, table: pa.Table) -> str:
    """Hands the compressed columns to the page, each prompt once; no character of a text is left to be read as code."""
    prompts = table["prompt"].combine_chunks().dictionary_encode()
    columns = {column: _plain(table[column]) for column in table.column_names if column != "prompt"}
    columns |= {"prompts": prompts.dictionary.to_pylist(), "prompt": prompts.indices.to_pylist()}
    text = json.dumps(columns, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0)).decode("ascii")
    return f'samplesArrived("{name}","{packed}");\n'


def _plain(column: pa.ChunkedArray) -> Sequence[Any]:
    """As a list; numbers have six digits, and those that are not finite are None, which JSON has."""
    if not pa.types.is_floating(column.type):
        return column.to_pylist()
    numbers = pc.if_else(pc.is_finite(column), column, None).to_pylist()
    return [None if x is None else float(f"{x:.6g}") for x in numbers]
