"""Prompts of the built-in task: integer expressions such as `7+5-3=?`, made up here or taken out of GSM8K.

Rows have the fields `id` (the expression, so the same in every run), `prompt`, `expression` and `answer`, an int.
"""

import itertools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from rollout.prompts import rows_of_file

Row = dict[str, Any]

SPLITS = ("train", "evaluation")
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_NUMBER = r"(?:0|[1-9][0-9]*)"
_EQUATION = re.compile(rf"({_NUMBER}(?:[-+*/]{_NUMBER})+)=(-?{_NUMBER})")


# --- made up ------------------------------------------------------------------------------------------------------------


def expressions(split: str, count: int, seed: int = 0, terms: Sequence[int] = (3, 4), operators: str = "+-") -> list[Row]:
    """Draw expressions of digits 1 to 9, without repetition, in random order.

    A checksum of the expression decides its split, so that no expression is in both: a quarter are for evaluation.

    Args:
        split: "train" or "evaluation".
        count: Number of rows. Each number of terms gets the same share of them, as far as there are so many.
        seed: Draws and order depend on it.
        terms: Numbers of operands, each from 2 to 4.
        operators: Some of "+-*".

    Raises:
        ValueError: An argument is out of range, or the split holds fewer than `count` such expressions.
    """
    _check(split, count, terms, operators)
    pools = sorted((all_expressions(split, number, operators) for number in sorted(set(terms))), key=len)
    available = sum(map(len, pools))
    if count > available:
        raise ValueError(
            f"count={count}, but the {split} split holds {available} expressions with terms={list(terms)} and "
            f"operators={operators!r}: lower count, or allow more terms or operators"
        )
    rng, chosen = random.Random(seed), []
    for i, pool in enumerate(pools):
        share = (count - len(chosen)) // (len(pools) - i)
        chosen += rng.sample(pool, min(share, len(pool)))
    rng.shuffle(chosen)
    return [_row(expression, results(expression)[-1]) for expression in chosen]


def held_out(expression: str) -> bool:
    """Whether a made-up expression belongs to the evaluation split."""
    return zlib.crc32(expression.encode()) % 4 == 0


def _check(split: str, count: int, terms: Sequence[int], operators: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is neither of {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if not terms or not set(terms) <= {2, 3, 4}:
        raise ValueError(f"terms={terms} must be a list of one or more of 2, 3 and 4")
    if not operators or not set(operators) <= set("+-*") or len(set(operators)) < len(operators):
        raise ValueError(f"operators={operators!r} must be one or more of +, - and *, each once")


def all_expressions(split: str, terms: int, operators: str) -> list[str]:
    """All expressions of a split with that many terms."""
    digits = "123456789"
    followers = [operator + digit for operator in operators for digit in digits]
    chains = map("".join, itertools.product(digits, *[followers] * (terms - 1)))
    return [chain for chain in chains if held_out(chain) == (split == "evaluation")]


# --- out of GSM8K -------------------------------------------------------------------------------------------------------


def gsm8k_expressions(path: str, exclude: str = "", max_digits: int = 3, max_terms: int = 3) -> list[Row]:
    """Integer expressions out of the worked solutions of GSM8K, in the order of the file, each once.

    The solutions annotate their calculations, `<<48/2=24>>`. Those are kept that are flat, true, and stay among
    integers while they are worked out.

    Args:
        path: A .jsonl or .parquet file with a field `answer`.
        exclude: Another such file, whose expressions are left out; none when empty.
        max_digits: Digits of the longest number that comes up while an expression is worked out.
        max_terms: Most operands of an expression. With both defaults a worked answer takes at most 32 characters.

    Raises:
        ValueError: A file is missing or cannot be read, a row has no text in `answer`, or no expression is left.
    """
    known = {expression for expression, _ in _annotated(exclude)} if exclude else set()
    rows = {
        expression: _row(expression, values[-1])
        for expression, values in _annotated(path)
        if expression not in known and _fits(expression, values, max_digits, max_terms)
    }
    if not rows:
        left_out = f" that is not in {exclude!r}" if exclude else ""
        raise ValueError(
            f"{path!r} annotates no expression{left_out} with max_digits={max_digits} and max_terms={max_terms}: "
            "check that it is GSM8K, or raise the two"
        )
    return list(rows.values())


def _annotated(path: str) -> Iterator[tuple[str, list[int]]]:
    """Each true annotation of a file: the expression and the results of its operations."""
    for number, row in enumerate(rows_of_file(path), 1):
        answer = row.get("answer") if isinstance(row, dict) else None
        if not isinstance(answer, str):
            raise ValueError(f"{path}, line {number} has no text in a field 'answer'; GSM8K has `question` and `answer`")
        for annotation in _ANNOTATION.findall(answer):
            equation = _EQUATION.fullmatch(annotation)
            values = results(equation[1]) if equation else []
            if values and values[-1] == int(equation[2]):
                yield equation[1], values


def _fits(expression: str, values: list[int], max_digits: int, max_terms: int) -> bool:
    operands = re.findall("[0-9]+", expression)
    longest = max(len(number.lstrip("-")) for number in [*operands, *map(str, values)])
    return longest <= max_digits and len(operands) <= max_terms


# --- both ---------------------------------------------------------------------------------------------------------------


def results(expression: str) -> list[int]:
    """Results of the operations of a flat expression, products first and then from left to right; the last is its value.

    Empty when a division does not come out even, or is by zero.
    """
    numbers = [int(number) for number in re.findall("[0-9]+", expression)]
    operators = re.findall("[-+*/]", expression)
    found = []
    for rank in ("*/", "+-"):
        i = 0
        while i < len(operators):
            if operators[i] not in rank:
                i += 1
                continue
            operator, a, b = operators.pop(i), numbers[i], numbers.pop(i + 1)
            if operator == "/" and (b == 0 or a % b):
                return []
            numbers[i] = {"+": a + b, "-": a - b, "*": a * b, "/": b and a // b}[operator]
            found.append(numbers[i])
    return found


def _row(expression: str, answer: int) -> Row:
    return {"id": expression, "prompt": f"{expression}=?", "expression": expression, "answer": answer}
