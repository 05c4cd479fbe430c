"""Rewards that check an answer against the data."""

import json
import re
import threading
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from math import isfinite
from typing import Any

import regex

_NUMBER = re.compile(r"-?\d[\d,]{0,30}(?:\.\d{1,30})?|-?\.\d{1,30}")


def stated_answer(solution: str) -> str:
    """The answer of a reference solution: what follows its last `####` (GSM8K's mark), or all of it."""
    return solution.rpartition("####")[2].strip()


def exact_match(text: str, answer: str | float, strip: bool = True, ignore_case: bool = False) -> float:
    """1 when the text is the answer, character by character, else 0.

    Args:
        text: The completion.
        answer: What it should be; a number counts as Python writes it.
        strip: Leave white space at the ends of both out of account.
        ignore_case: Leave case out of account (Unicode's case folding).

    Raises:
        ValueError: There is no answer, or an empty one: saying nothing would be right.
    """
    pair = [text, "" if answer is None else str(answer)]
    if strip:
        pair = [side.strip() for side in pair]
    if ignore_case:
        pair = [side.casefold() for side in pair]
    if not pair[1]:
        raise ValueError(f"the stated answer {answer!r} is empty, so an empty completion would match it")
    return float(pair[0] == pair[1])


def regex_match(text: str, pattern: str, whole: bool = True, seconds: float = 1.0) -> float:
    """1 when the text matches a regular expression (of the `regex` package), else 0.

    Args:
        text: The completion.
        pattern: The expression. One that may backtrack without end has no value on a text that makes it do so.
        whole: The whole text must match, rather than any part of it.
        seconds: Of this process's CPU time, before the match is given up.

    Raises:
        ValueError: `pattern` is no regular expression, or `seconds` not positive.
        RuntimeError: Whether the text matches was not known in that time.
    """
    if not seconds > 0:
        raise ValueError(f"regex_match wants seconds above 0, not {seconds!r}")
    compiled = _compile(pattern)
    try:
        return float((compiled.fullmatch if whole else compiled.search)(text, timeout=seconds) is not None)
    except TimeoutError:  # would read as the time limit of the whole call
        raise RuntimeError(f"pattern {pattern!r:.80} is undecided after {seconds:g} s on {len(text)} characters") from None


@lru_cache(maxsize=256)
def _compile(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern {pattern!r:.80} is not a regular expression: {error}") from error


# --- JSON -------------------------------------------------------------------------------------------------------------

_DEEPEST_JSON = 50  # levels of lists and objects
_LONGEST_NUMBER = 300  # characters: beyond, an integer is none of the numbers that JSON's readers agree on (RFC 8259)


def json_schema(text: str, schema: Mapping[str, Any] | str) -> float:
    """1 when the text is JSON that is valid under a JSON Schema, else 0.

    The text is the JSON, or has one fenced block that begins with a line "```json". Not JSON are: names that appear
    twice in one object, NaN and infinities, numbers beyond double precision, and more than 50 levels. `format` is not
    checked (a mere annotation, in the standard), and `$ref` fetches nothing.

    Args:
        text: The completion.
        schema: As an object, or as JSON text (better in a data column: Parquet adds empty fields to objects); of draft
            2020-12 unless its `$schema` says otherwise.

    Raises:
        ValueError: The schema is none, refers to what it does not have, or to itself without end.
    """
    validator = _validator(schema if isinstance(schema, str) else _dumped(schema))
    for candidate in (text, _fenced(text)):
        try:
            value = json.loads(
                candidate, object_pairs_hook=_distinct, parse_constant=_refuse, parse_float=_double, parse_int=_integer
            )
        except (ValueError, RecursionError):
            continue
        try:
            return float(_depth_within(value, _DEEPEST_JSON) and validator.is_valid(value))
        except RecursionError as error:  # not the text's doing, with so few levels
            raise ValueError(f"schema {schema!r:.80} refers to itself without end") from error
    return 0.0


def _fenced(text: str) -> str:
    """What is within the only block fenced as JSON; nothing when there is none, or several."""
    blocks: list[list[str]] = []
    inside = False
    for line in text.split("\n"):
        mark = line.strip()
        if inside and mark == "```":
            inside = False
        elif inside:
            blocks[-1].append(line)
        elif mark.lower() == "```json":
            inside = True
            blocks.append([])
    return "\n".join(blocks[0]) if len(blocks) == 1 and not inside else ""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _double(digits: str) -> float:
    number = float(digits)
    return number if isfinite(number) else _refuse(digits)


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else int(_refuse(digits[:9]))


def _depth_within(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [inner for inner in level if isinstance(inner, list | dict)]
        if not level:
            return True
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return False


def _dumped(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema {schema!r:.80} cannot be written as JSON: {error}") from error


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Of a schema that is known to be one, with every reference in it resolved within it."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY  # without a way to fetch what is not in it
    from referencing.jsonschema import DRAFT202012, UnknownDialect

    try:
        contents = json.loads(schema, object_pairs_hook=_distinct, parse_constant=_refuse)
        if not isinstance(contents, dict):
            raise ValueError("it is not an object")
        kind = validator_for(contents, default=Draft202012Validator)
        kind.check_schema(contents)
        resource = DRAFT202012.create_resource(contents)
        if "$schema" in contents:
            resource = type(resource).from_contents(contents)
        _resolve(resource, REGISTRY.resolver_with_root(resource))
    except SchemaError as error:
        raise ValueError(f"schema {schema!r:.80} is not a JSON Schema: {error.message}") from error
    except UnknownDialect as error:
        raise ValueError(f"schema {schema!r:.80} is of a draft that is not known: {error.uri}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"schema {schema!r:.80} is not a JSON Schema: {error}") from error
    return kind(contents, registry=REGISTRY)


def _resolve(resource: Any, resolver: Any) -> None:
    """Look every reference of a schema up. Raises ValueError for one that leads nowhere."""
    from referencing.exceptions import Unresolvable

    if isinstance(resource.contents, dict):
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(reference := resource.contents.get(keyword), str):
                try:
                    resolver.lookup(reference)
                except Unresolvable as error:
                    raise ValueError(f"it refers to {reference!r}, which it does not have (nothing is fetched)") from error
    for inner in resource.subresources():
        _resolve(inner, resolver.in_subresource(inner))


# --- numbers and mathematics ------------------------------------------------------------------------------------------


def numeric_answer(text: str, answer: str | float) -> float:
    """1 when the last number in the text equals the stated answer, else 0; thousands separators are ignored.

    Raises:
        ValueError: The stated answer is no number, so nothing can be compared with it.
    """
    wanted = last_number(stated_answer(str(answer)))
    if wanted is None:
        raise ValueError(f"the stated answer {answer!r:.80} holds no number")
    return float(last_number(text) == wanted)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators left out; None when there is none, or none that can be read."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


_LONGEST_ANSWER = 1000  # characters
_DEEPEST_ANSWER = 8  # brackets within brackets; the parser takes a second for 12, and for 30 for ever
MATH_SECONDS = 3  # to parse an answer, and as many to compare it
_BOX = re.compile(r"\\(?:boxed|fbox) ?\{")
_WITH_UNIT = re.compile(r"-?(?=[.\d])(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?\s?%?(?:\s+(?!pi\b|sqrt)[a-zA-Z]{2,}[a-zA-Z ./]*)?")
_PROSE = re.compile(r"[a-zA-Z]{2,}\s+[a-zA-Z]{2,}")
_MIXED = re.compile(r"(-?\d{1,15})\s+(\d{1,15})/(\d{1,15})")
_FRACTION = re.compile(r"-?\d{1,15}/\d{1,15}\.?")
_POWER_OF_TEN = re.compile(r"-?\d{1,30}(?:\.\d{0,30})?[eE][+-]?\d{1,2}")
_FONT = re.compile(r"\\(?:textbf|mathbf|boldsymbol|bm)\{([^{}]*)\}")
_CURRENCY = str.maketrans("", "", "$€£")


def math_answer(text: str, answer: str | float, worked_out: bool = True) -> float:
    """1 when the text's answer equals the stated one in the eyes of math-verify (numbers, LaTeX, `\\boxed{}`), else 0.

    One answer counts: what is in the last box, or without a box what math-verify finds in the last 1000 characters. One
    of more than 1000 characters, with brackets nine deep, or that cannot be read, is wrong.

    Args:
        text: The completion.
        answer: The stated answer, as `stated_answer` finds it; LaTeX may do without dollar signs.
        worked_out: Where the stated answer is a number, the text's must be one as well: not the sum that was to be
            worked out (`48/2+48`), not `2^{10}`, and no fraction in the place of an integer.

    Raises:
        ValueError: math-verify cannot read the stated answer, so that no text could have it (a word it reads as a product).
        RuntimeError: math-verify did not come to an end, or is in a thread, where it cannot keep its time.
    """
    refuse_threads()
    if answer is None or answer != answer:
        raise ValueError(f"there is no stated answer: {answer!r}")
    wanted = _wanted(str(answer))
    found = given_expressions(given_answer(text))
    if not found or (worked_out and not as_plain(wanted, found)):
        return 0.0
    return float(_equal(wanted, found))


@lru_cache(maxsize=1024)
def _wanted(answer: str) -> list[Any]:
    """What math-verify reads in a stated answer. Raises ValueError where that is nothing that another answer could equal."""
    wanted = _expressions(_stated(stated_answer(answer)))
    if all(isinstance(part, str) for part in wanted) or not _equal(wanted, wanted):
        raise ValueError(
            f"the stated answer {answer!r:.80} cannot be read by math-verify: mend the row, or compare texts by exact_match"
        )
    return wanted


def _stated(answer: str) -> str:
    box = _last_box(answer)
    marked = any(mark in answer.replace("\\$", "") for mark in ("$", "\\(", "\\["))
    return answer if marked and box is None else _marked(answer if box is None else box)


def refuse_threads() -> None:
    """Raises RuntimeError in a thread other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify keeps its time by signals, which no thread gets: leave `isolation` at process")


def given_answer(text: str) -> str:
    """The part of a completion that is read: its last box, or without one its end."""
    box = _last_box(text)
    return text[-_LONGEST_ANSWER:].replace("#", " ") if box is None else _marked(box)  # math-verify reads no number in #16


def _last_box(text: str) -> str | None:
    r"""What is in the last `\boxed{}`; None without any, empty when it is not closed within the longest answer."""
    start = max((match.end() for match in _BOX.finditer(text)), default=None)
    if start is None:
        return None
    depth, escaped = 1, False
    for length, character in enumerate(text[start : start + _LONGEST_ANSWER]):
        if not escaped:
            depth += (character == "{") - (character == "}")
        if not depth:
            return text[start : start + length]
        escaped = character == "\\" and not escaped
    return ""


def _marked(answer: str) -> str:
    """An answer as math-verify reads all of it: unmarked, it would see the 3 alone of `3\\sqrt{2}`."""
    answer = _FONT.sub(r"\1", answer).strip()
    if _WITH_UNIT.fullmatch(plain := answer.replace("\\$", "").translate(_CURRENCY)):
        return plain
    if mixed := _MIXED.fullmatch(answer):
        return rf"\boxed{{{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}}}"
    if _POWER_OF_TEN.fullmatch(answer):
        return f"{Decimal(answer):f}"
    prose = "\\" not in answer and _PROSE.search(answer)
    return answer if prose or not answer else rf"\boxed{{{answer}}}"


def given_expressions(given: str) -> list[Any]:
    """What math-verify reads in the answer of a completion; empty when that is nothing. Raises RuntimeError after 3 s."""
    return _expressions(given) if _nesting(given) <= _DEEPEST_ANSWER else []


def _nesting(answer: str) -> int:
    deepest = depth = 0
    for character in answer:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        deepest = max(deepest, depth)
    return deepest


def _expressions(answer: str) -> list[Any]:
    """What math-verify reads: an expression and how it is written, or that alone; empty when there is nothing to read."""
    from math_verify import parse  # sympy takes a second to import
    from math_verify.errors import TimeoutException

    try:
        return parse(answer, parsing_timeout=MATH_SECONDS, raise_on_error=True)
    except TimeoutException:
        raise RuntimeError(f"math-verify did not parse an answer within {MATH_SECONDS} s: {answer!r:.80}") from None
    except Exception:  # of any kind, from sympy and its parser
        return []


def _equal(wanted: list[Any], found: list[Any]) -> bool:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        return verify(wanted, found, timeout_seconds=MATH_SECONDS, raise_on_error=True)
    except TimeoutException:
        raise RuntimeError(f"math-verify did not compare an answer within {MATH_SECONDS} s") from None
    except Exception:  # as above: whatever it is, it is no such answer
        return False


def as_plain(wanted: list[Any], found: list[Any]) -> bool:
    """Whether what was found is a number, too, in case a number is wanted."""
    from sympy import Equality, Integer, Mul, Number, Pow, UnevaluatedExpr

    if not isinstance(wanted[0], Number):
        return True
    value = found[0].rhs if isinstance(found[0], Equality) else found[0]
    if isinstance(wanted[0], Integer) and re.search(r"/|frac", str(found[-1]).rpartition("=")[2]):
        return False
    if _FRACTION.fullmatch(str(found[-1])):
        return True
    factors = value.args if isinstance(value, Mul) else (value,)
    numbers = [factor for factor in factors if isinstance(factor, Number) and factor != -1]
    scales = [
        factor
        for factor in factors
        if (isinstance(factor, UnevaluatedExpr) and isinstance(factor.args[0], Number))  # of a percent sign
        or (isinstance(factor, Pow) and factor.base == 10 and isinstance(factor.exp, Integer) and abs(factor.exp) < 100)
    ]
    return len(numbers) <= 1 and len(numbers) + len(scales) + factors.count(-1) == len(factors)
