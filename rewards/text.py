"""Rewards of the text itself."""

import re
from collections.abc import Sequence


def brevity(token_ids: Sequence[int], max_tokens: int) -> float:
    """1 for an empty completion, falling linearly to 0 at `max_tokens` tokens: max(0, 1 - T / max_tokens)."""
    return max(0.0, 1.0 - len(token_ids) / max_tokens)


_STEP_LINE = re.compile(r"[^=\n]*\d[^=\n]*=[^=\n]*\d")


def step_lines(text: str, target: int = 3) -> float:
    """Share of `target` distinct lines that state a calculation (digits on both sides of one `=`); in [0, 1].

    A surface measure for free-form solutions: it sees that steps are written down, not that they are right.
    """
    lines = {line.strip() for line in text.splitlines()}
    return min(1.0, sum(bool(_STEP_LINE.search(line)) for line in lines) / target)
