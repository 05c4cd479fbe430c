"""Writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MERGE_FILE = "merge.json"  # in the folder of a merged model: what it is made of


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lends a path to write to, and puts that file in place once it is complete; a crash leaves the old one or the new."""
    temporary = path.with_name(path.name + ".partial")
    yield temporary
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
