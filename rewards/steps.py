"""Steps of a worked solution in free form: calculations that are true, and made of what the prompt gives."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

_LONGEST_TEXT = 100_000  # characters that are read
_MOST_OPERANDS = 16  # of one side of an equation; one with more is not judged
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}(?:\.[0-9]{1,15})?|[0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})"
_TOKEN = re.compile(
    rf"""
    (?P<number> (?:\\?[$€£]\s?)? {_DIGITS} (?:\s?\\?%)? (?! [\w^°(\[{{] | [.,:][0-9] | \*\*[\w(] | !(?!\s*(?:[a-zA-Z]|$)) ) )
    | (?P<operator> (?<=[0-9%]\s)[xX](?=\s[$0-9]) | \\(?:times|cdot|div)(?![a-zA-Z]) | [+/×·∙⋅÷−–] | -(?!>) | \*(?!\*) )
    | (?P<equals> ={{1,2}}(?!>) )
    | (?P<word> \w+(?:[.,:^!]+\w+)* | \\(?:text|textbf|mathrm|quad|qquad)(?![a-zA-Z]) )
    | (?P<stop> [.,;:?"'“”‘’`$€£%|—] | !(?!=) | << | >> | -> | => | [→⇒⟹] | \\[()\[\]\\,;:!$\s]
        | (?<![\w)\s])\*\* | \*\*(?![\w(\s]) | (?<!\s)\*\*(?=\s) | (?<=\s)\*\*(?!\s) )
    | (?P<opening> [(\[{{] )
    | (?P<closing> [)\]}}] )
    | (?P<odd> \*\* | [<>!]= | \\[a-zA-Z]+ | [^\s&] )
    """,
    re.VERBOSE,
)
_SIGNS = {
    **dict.fromkeys(("×", "·", "∙", "⋅", "x", "X", "\\times", "\\cdot"), "*"),
    "÷": "/",
    "\\div": "/",
    "−": "-",
    "–": "-",
}
_WORDS = """
one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10 eleven:11 twelve:12 thirteen:13 fourteen:14 fifteen:15
sixteen:16 seventeen:17 eighteen:18 nineteen:19 twenty:20 thirty:30 forty:40 fifty:50 sixty:60 seventy:70 eighty:80 ninety:90
hundred:100 thousand:1000 million:1000000 dozen:12 twice:2 double:2 doubled:2 both:2 pair:2 couple:2 thrice:3 triple:3
tripled:3 half:1,2 halve:1,2 third:1,3 quarter:1,4 fourth:1,4 fifth:1,5 tenth:1,10 percent:100 percentage:100 cent:100
dollar:100 minute:60 hour:60 day:24 week:7 month:4,12 year:12,52,365 foot:12 feet:12 yard:3
"""
_IMPLIED = {  # numbers by the word of a prompt that states or implies them, in the singular
    word: tuple(map(int, numbers.split(","))) for word, _, numbers in (entry.partition(":") for entry in _WORDS.split())
}


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written.

    Args:
        value: What it is.
        decimals: Digits after its point.
        percent: Whether a percent sign follows.
    """

    value: Fraction
    decimals: int
    percent: bool


Side = list[Number | str]  # of an equation: numbers at even positions, + - * / at odd ones
Product = tuple[tuple[Fraction, int], ...]  # factors in order, each with its exponent


def worked_steps(text: str, prompt: str, target: int = 3) -> float:
    """Share of `target` calculations that the text works out, less the false ones; in [0, 1].

    max(0, min(C, target) - F) / target. C counts distinct calculations `a op b ... = c` (or `c = a op b ...`) that are
    true, not trivial, and whose operands are numbers of the prompt or results of those counted before; F counts equations
    of numbers that are false. Truth is exact, but for a result rounded to two decimals or more. Calculations are one when
    they say the same of the same numbers (3 + 4 = 7, 4 + 3 = 7, 7 - 4 = 3), and trivial when they say nothing (x + 0,
    x * 1, x - x, x + y - y). A prompt's numbers are also those in English words, and those that its words imply (half,
    dozen, hour, %). What has brackets, powers, letters or units between its numbers is not judged.

    Raises:
        ValueError: `target` is less than 1.
    """
    if target < 1:
        raise ValueError(f"worked_steps wants a target of at least one step, not {target!r}")
    known, counted, false = set(_numbers_of(prompt)), set(), 0
    for sides in _equations(text[:_LONGEST_TEXT]):
        true = next((reading for reading in _readings(sides) if _holds(reading)), None)
        if true is None:
            false += 1
            continue
        result = next((side[0] for side in reversed(true) if len(side) == 1), None)
        for side in true:
            if result is None or len(side) == 1 or any(abs(number.value) not in known for number in side[::2]):
                continue
            if meaning := _meaning(side, result.value):
                counted.add(meaning)
                known |= _forms(result)
    return max(0, min(len(counted), target) - false) / target


# --- reading ----------------------------------------------------------------------------------------------------------


def _equations(text: str) -> Iterator[list[Side]]:
    """Sides of every equation of the text, of numbers alone and with a calculation on some side."""
    for line in text.splitlines():
        if "=" in line:
            reader = _Reader()
            for token in _TOKEN.finditer(line):
                reader.take(str(token.lastgroup), token[0], line[token.end() : token.end() + 1])
            reader.stop()
            yield from (sides for sides in reader.equations if any(len(side) > 1 for side in sides))


_BEFORE_A_SIGN = ("start", "equals", "operator", "opening")


class _Reader:
    """Reads the tokens of a line. What it cannot read whole, it does not judge in part."""

    def __init__(self):
        self.equations: list[list[Side]] = []
        self._sides: list[Side] = []
        self._side: Side = []
        self._broken = False  # up to the next word, stop or equals sign
        self._negative = False
        self._opened = 0
        self._before = "start"

    def take(self, kind: str, token: str, after: str) -> None:
        """One token, and the character after it."""
        if kind == "number" and self._before == "label":
            self.stop()
            self._before = "start"  # of what "Step 2 - " introduces
            return
        match kind:
            case "number":
                self._number(token)
            case "operator":
                self._operator(_SIGNS.get(token, token), not after.isspace())
            case "equals":
                self._equals()
            case "opening":
                self._open(after)
            case "closing":
                self._close()
            case "odd":
                self._broken = True
            case _:
                self.stop()
        self._before = "label" if token.lower() == "step" else kind

    def stop(self) -> None:
        """An equation ends here, if there is one."""
        if self._complete():
            self._sides.append(self._side)
        if len(self._sides) > 1:
            self.equations.append(self._sides)
        self._sides, self._side, self._broken, self._negative = [], [], False, False

    def _complete(self) -> bool:
        return len(self._side) % 2 == 1 and not self._broken

    def _number(self, token: str) -> None:
        if len(self._side) % 2 == 1 or len(self._side) >= 2 * _MOST_OPERANDS:
            self._broken = True
        else:
            number = _number(token)
            self._side.append(Number(-number.value, number.decimals, number.percent) if self._negative else number)
        self._negative = False

    def _operator(self, operator: str, attached: bool) -> None:
        if self._complete():
            self._side.append(operator)
        elif self._before == "start" and not attached:
            pass  # the mark of an item in a list
        elif operator == "-" and attached and not self._negative and self._before in _BEFORE_A_SIGN:
            self._negative = True
        else:
            self._broken = True

    def _equals(self) -> None:
        if self._complete():
            self._sides.append(self._side)
            self._side = []
        else:
            self._side = []
            self.stop()

    def _open(self, after: str) -> None:
        if self._complete() and self._before == "number" and after.isalpha():
            self.stop()  # it opens a remark
        self._broken = bool(self._side or self._sides or self._broken)
        self._opened += 1

    def _close(self) -> None:
        if not self._opened or (self._complete() and self._sides):
            self.stop()
        self._broken = self._opened > 0  # else it is the mark of an item in a list
        self._opened = max(0, self._opened - 1)


def _number(token: str) -> Number:
    digits = re.sub(r"[^0-9.]", "", token)
    return Number(Fraction("0" + digits), len(digits.partition(".")[2]), "%" in token)


@lru_cache(maxsize=64)
def _numbers_of(prompt: str) -> frozenset[Fraction]:
    """Numbers that a prompt states or implies."""
    found = {value for token in set(re.findall(_DIGITS + r"(?:\s?\\?%)?", prompt)) for value in _forms(_number(token))}
    implied = [_IMPLIED.get(word.removesuffix("s"), ()) for word in re.findall(r"[a-z]+", prompt.lower())]
    found |= {Fraction(n) for numbers in implied for n in numbers}
    found |= {Fraction(a[0] + b[0]) for a, b in pairwise(implied) if a and b and a[0] in range(20, 100, 10) and b[0] < 10}
    return frozenset(found | {Fraction(100)} if "%" in prompt else found)


def _forms(number: Number) -> set[Fraction]:
    """A number; with a percent sign also its hundredth, or what it is the hundredth of."""
    value = abs(number.value)
    return {value, value / 100, value * 100} if number.percent else {value}


# --- judging ----------------------------------------------------------------------------------------------------------


def _readings(sides: Sequence[Side]) -> Iterator[list[Side]]:
    """An equation as it stands, and with every percentage as hundredths."""
    yield list(sides)
    if any(isinstance(part, Number) and part.percent for side in sides for part in side):
        yield [[_hundredths(part) for part in side] for side in sides]


def _hundredths(part: Number | str) -> Number | str:
    return Number(part.value / 100, part.decimals + 2, True) if isinstance(part, Number) and part.percent else part


def _holds(sides: Sequence[Side]) -> bool:
    """Whether all sides are equal, up to the rounding of those that are a single number."""
    try:
        values = [_value(side) for side in sides]
    except ZeroDivisionError:
        return False
    exact = next(value for side, value in zip(sides, values, strict=True) if len(side) > 1)
    return all(abs(value - exact) <= _rounding(side) for side, value in zip(sides, values, strict=True))


def _rounding(side: Side) -> Fraction:
    """How far a side may be from what it rounds: half of its last decimal, if it is one number and has two or more."""
    return Fraction(len(side) == 1 and side[0].decimals >= 2, 2 * 10 ** side[0].decimals)


def _value(side: Side) -> Fraction:
    return sum((sign * _product(factors) for sign, factors in _terms(side)), Fraction(0))


def _terms(side: Side) -> list[tuple[int, list[tuple[Fraction, int]]]]:
    """The side as a sum: signs, and factors with exponents 1 or -1."""
    terms = [(1, [(side[0].value, 1)])]
    for operator, number in zip(side[1::2], side[2::2], strict=True):
        if operator in "+-":
            terms.append((1 if operator == "+" else -1, [(number.value, 1)]))
        else:
            terms[-1][1].append((number.value, 1 if operator == "*" else -1))
    return terms


def _product(factors: Sequence[tuple[Fraction, int]]) -> Fraction:
    product = Fraction(1)
    for value, exponent in factors:
        product *= value if exponent > 0 else 1 / value
    return product


def _meaning(side: Side, result: Fraction) -> tuple[object, ...]:
    """What an equation says, alike for all ways to turn it around; empty when it says nothing.

    All is brought to one side and cancelled. Where two products are left, their quotient is taken and cancelled as well.
    """
    total: Counter[Product] = Counter()
    for sign, factors in [*_terms(side), (-1, [(result, 1)])]:
        if all(value for value, _ in factors):
            sign *= (-1) ** sum(value < 0 for value, _ in factors)
            total[_cancelled(factors)] += sign
    sums = sorted((product, count) for product, count in total.items() if count)
    if [count for _, count in sums] in ([1, -1], [-1, 1]):
        quotient = _cancelled([*sums[0][0], *((value, -exponent) for value, exponent in sums[1][0])])
        return min(quotient, tuple((value, -exponent) for value, exponent in quotient))
    return min(tuple(sums), tuple((product, -count) for product, count in sums))


def _cancelled(factors: Sequence[tuple[Fraction, int]]) -> Product:
    exponents: Counter[Fraction] = Counter()
    for value, exponent in factors:
        exponents[abs(value)] += exponent
    return tuple(sorted((value, exponent) for value, exponent in exponents.items() if exponent and value != 1))
