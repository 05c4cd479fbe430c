"""Rewards of the text itself."""

import re
from collections.abc import Sequence
from itertools import pairwise

import regex


def brevity(token_ids: Sequence[int], max_tokens: int) -> float:
    """1 for an empty completion, falling linearly to 0 at `max_tokens` tokens: max(0, 1 - T / max_tokens)."""
    return max(0.0, 1.0 - len(token_ids) / max_tokens)


def length_target(token_ids: Sequence[int], target: float, tolerance: float) -> float:
    """1 for T tokens within `tolerance` of `target`, falling linearly to 0 at no tokens and at twice the target.

    max(0, 1 - max(0, |T - target| - tolerance) / (target - tolerance)).

    Raises:
        ValueError: Not 0 <= tolerance < target.
    """
    if not 0 <= tolerance < target < float("inf"):
        raise ValueError(f"length_target wants 0 <= tolerance < target, in tokens, not {tolerance!r} and {target!r}")
    outside = max(0.0, abs(len(token_ids) - target) - tolerance)
    return max(0.0, 1.0 - outside / (target - tolerance))


def overlong(token_ids: Sequence[int], max_tokens: int, buffer: int, truncated: bool) -> float:
    """1 up to `max_tokens - buffer` tokens, from there falling linearly to 0 at `max_tokens`; 0 when truncated.

    One plus the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), with L_max = max_tokens and
    L_cache = buffer: of T tokens, min(1, max(0, (max_tokens - T) / buffer)).

    Raises:
        ValueError: Not 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"overlong wants 0 < buffer <= max_tokens, in tokens, not {buffer!r} and {max_tokens!r}")
    return 0.0 if truncated else min(1.0, max(0.0, (max_tokens - len(token_ids)) / buffer))


# Characters of scripts without spaces, pieces of words, signs, and every white space that follows another: spam of any
# kind is many words.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|"
    r"[\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]{1,12}|[^\w\s]|(?<=\s)\s",
    flags=regex.VERSION1,
)


def repetition(text: str, n: int = 4) -> float:
    """Share of the text's n-grams of words that are distinct: 1 - (G - D) / G, with D distinct ones among G.

    Words as a reader sees them, not tokens: the same text cut into other tokens is repetition as well. Case does not
    count. A text of fewer than n words has 1.

    Raises:
        ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"repetition wants n-grams of at least one word, not n = {n!r}")
    words = _WORD.findall(text.casefold())
    grams = len(words) - n + 1
    return len(set(zip(*(words[start:] for start in range(n)), strict=False))) / grams if grams > 0 else 1.0


_DIGIT = re.compile(r"\d")


def step_lines(text: str, target: int = 3) -> float:
    """Share of `target` distinct lines that state a calculation (digits on both sides of one `=`); in [0, 1].

    A surface measure for free-form solutions: it sees that steps are written down, not that they are right
    (`worked_steps` does).
    """
    lines = {line.strip() for line in text.splitlines()}
    return min(1.0, sum(map(_states, lines)) / target)


def _states(line: str) -> bool:
    """Whether there are digits on both sides of one `=`."""
    return any(a and b for a, b in pairwise(bool(_DIGIT.search(side)) for side in line.split("=")))
