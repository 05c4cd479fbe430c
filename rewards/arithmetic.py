"""Rewards of the built-in task: integer expressions, answered tersely (`#9`) or worked out (`7+5=12;12-3=9;#9`).

An expression is a flat chain of non-negative integers joined by `+ - * /`; `*` and `/` bind tighter, equal ranks go
from left to right, and every division must come out even. A worked answer reduces the expression one operation at a
time, each step written `a+b=c;`, and ends in `#` and the result.
"""

import re

_EXPRESSION = re.compile(r"[0-9]{1,18}([-+*/][0-9]{1,18})*")
_STEP = re.compile(r"(-?[0-9]{1,18})([-+*/])([0-9]{1,18})=(-?[0-9]{1,18})")
_ANSWER = re.compile(r"#(-?[0-9]{1,18})")

Chain = list[int | str]  # numbers at even positions, operators at odd ones


def parse(expression: str) -> Chain:
    """Split `"7+5-3"` into `[7, "+", 5, "-", 3]`. Raises ValueError when it is not a flat integer expression."""
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"not a flat integer expression: {expression!r} (digits joined by + - * /)")
    tokens = re.split(r"([-+*/])", expression)
    return [int(token) if i % 2 == 0 else token for i, token in enumerate(tokens)]


def apply(a: int, operator: str, b: int) -> int:
    """`a operator b`. Raises ValueError when a division does not come out even."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    if b == 0 or a % b:
        raise ValueError(f"{a}/{b} does not come out even")
    return a // b


def reducible(chain: Chain) -> list[int]:
    """Positions of the operators that may be worked out next without changing the value of the chain."""
    operators = chain[1::2]
    positions = []
    for i, operator in enumerate(operators):
        if operator in "*/":
            allowed = i == 0 or operators[i - 1] not in "*/"
        else:
            allowed = i == 0 and (len(operators) == 1 or operators[1] not in "*/")
        if allowed:
            positions.append(2 * i + 1)
    return positions


def reduce_at(chain: Chain, position: int) -> Chain:
    """The chain with the operation at `position` replaced by its result."""
    a, operator, b = chain[position - 1 : position + 2]
    return [*chain[: position - 1], apply(a, operator, b), *chain[position + 2 :]]


def worked_steps(expression: str) -> list[str]:
    """The steps of the standard worked answer, products first and then from left to right: `["7+5=12", "12-3=9"]`."""
    chain, steps = parse(expression), []
    while len(chain) > 1:
        products = [p for p in reducible(chain) if chain[p] in "*/"]
        position = (products or reducible(chain))[0]
        a, operator, b = chain[position - 1 : position + 2]
        chain = reduce_at(chain, position)
        steps.append(f"{a}{operator}{b}={chain[position - 1]}")
    return steps


def evaluate(expression: str) -> int:
    """Value of a flat integer expression. Raises ValueError when malformed or when a division does not come out even."""
    chain = parse(expression)
    while len(chain) > 1:
        chain = reduce_at(chain, reducible(chain)[0])
    return chain[0]


def arithmetic_accuracy(text: str, answer: str | int) -> float:
    """1 when the text ends in `#` and exactly the right integer, else 0."""
    stated = stated_integer(text)
    return float(stated is not None and stated == int(answer))


def stated_integer(text: str) -> int | None:
    """The integer after the last `#`, when the text ends in it."""
    match = _ANSWER.fullmatch(text[text.rfind("#") :]) if "#" in text else None
    return None if match is None else int(match[1])


def arithmetic_clarity(text: str, expression: str) -> float:
    """Share of the required steps that are shown, in a valid order, correct and well formed; in [0, 1].

    score = max(0, valid - invalid) / required, with `required` the number of operators. A step is valid when it works
    out an operation that can be worked out next and gets it right. Anything else between semicolons is invalid, so
    filler, repetition and made-up steps lower the score. The answer must follow, and agree with what the steps led to.
    """
    *steps, answer = text.split(";")
    if not _ANSWER.fullmatch(answer):
        return 0.0
    chain, valid, invalid = parse(expression), 0, 0
    required = len(chain) // 2
    for step in steps:
        reduced = _follow(chain, step)
        if reduced is None:
            invalid += 1
        else:
            chain, valid = reduced, valid + 1
    if len(chain) == 1 and int(answer[1:]) != chain[0]:
        invalid += 1
    return max(0, valid - invalid) / required if required else 1.0


def _follow(chain: Chain, step: str) -> Chain | None:
    """The chain after `step`, or None when the step is malformed, not possible next, or wrong."""
    match = _STEP.fullmatch(step)
    if not match:
        return None
    a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
    for position in reducible(chain):
        if chain[position - 1 : position + 2] == [a, operator, b] and _equals(a, operator, b, result):
            return reduce_at(chain, position)
    return None


def _equals(a: int, operator: str, b: int, result: int) -> bool:
    try:
        return apply(a, operator, b) == result
    except ValueError:
        return False
