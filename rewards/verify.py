"""Rewards that check an answer against the data."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?\d[\d,]{0,30}(?:\.\d{1,30})?|-?\.\d{1,30}")


def stated_answer(solution: str) -> str:
    """The answer of a reference solution: what follows its last `####` (GSM8K's mark), or all of it."""
    return solution.rpartition("####")[2].strip()


def numeric_answer(text: str, answer: str | float) -> float:
    """1 when the last number in the text equals the stated answer, else 0; thousands separators are ignored.

    Raises:
        ValueError: The stated answer is no number, so nothing can be compared with it.
    """
    wanted = _last_number(stated_answer(str(answer)))
    if wanted is None:
        raise ValueError(f"the stated answer {answer!r:.80} holds no number")
    return float(_last_number(text) == wanted)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def math_answer(text: str, answer: str | float) -> float:
    """1 when math-verify finds an answer in the text that equals the stated one (numbers, LaTeX, `\\boxed{}`), else 0.

    Raises:
        ValueError: The stated answer cannot be parsed.
    """
    from math_verify import parse, verify  # sympy takes a second to import

    wanted = parse(stated_answer(str(answer)))
    if not wanted:
        raise ValueError(f"the stated answer {answer!r:.80} cannot be parsed")
    return float(verify(wanted, parse(text)))
