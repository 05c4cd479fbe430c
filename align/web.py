"""What the pages have in common: templates that escape, and data that no text in it can get out of."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

_ESCAPED = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def templates() -> Environment:
    """The templates, which escape whatever is put into them."""
    folder = Path(__file__).parent / "templates"
    return Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def island(data: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or open another."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)
