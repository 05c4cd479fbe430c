"""Canonical answers: what a completion answers, as the built-in accuracy rewards read it, so that equal answers are one.

Texts with one canonical answer are right or wrong together. The other way round it need not be: two canonical answers may
both be right, where the reward is lenient about the one that is stated.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache, partial
from math import inf
from typing import Any

from rewards.arithmetic import stated_integer
from rewards.component import BUILT_IN
from rewards.verify import MATH_SECONDS, as_plain, given_answer, given_expressions, last_number, refuse_threads

_MOST_NODES = 100  # of an expression that is worked out
_LARGEST = 1e100  # numbers in it, and their inverses
_LARGEST_POWER = 64

Reader = Callable[[str], str | None]


def answer_reader(reward: str, args: Mapping[str, Any]) -> Reader | None:
    """What finds the canonical answer of a completion; None for a reward that reads none.

    Args:
        reward: A built-in name or its `module:function`; answers are read by `arithmetic_accuracy`, `exact_match`,
            `math_answer` and `numeric_answer`.
        args: Of the reward, as in the configuration.

    Returns:
        A function of a completion. It gives None where the completion states no answer that the reward can read: such a
        completion is never right. Equal answers are equal strings; what else is in them is for people.
    """
    name = next((name for name in _READERS if reward in (name, BUILT_IN[name].path)), None)
    return None if name is None else _READERS[name](args)


def _integer(text: str) -> str | None:
    stated = stated_integer(text)
    return None if stated is None else str(stated)


def _number(text: str) -> str | None:
    number = last_number(text)
    return None if number is None else _digits(number)


def _digits(number: Decimal) -> str:
    """All digits of a number and no more: 1.50 is 1.5, and -0 is 0."""
    written = f"{number:f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if not number else written


def _whole(text: str, strip: bool, ignore_case: bool) -> str | None:
    text = text.strip() if strip else text
    return (text.casefold() if ignore_case else text) or None


def _math(text: str, worked_out: bool) -> str | None:
    """The answer of `math_answer`.

    Numbers are written to six decimals (math-verify compares so where either is a decimal fraction: 1/2 and 0.5 are one),
    percentages of integers as such (50% is right for 50 and for 0.5), x = 5 and 2 + 3 = 5 as their right-hand side; with
    `worked_out`, what still is to be worked out, and integers as fractions, are answers of their own. So two texts with one
    canonical answer get different values only where the stated answer is an equation, is another exact number within 5e-7,
    or is a tuple or interval and the texts have a set.

    An expression that cannot be worked out safely and within 3 s counts as it is written; what math-verify cannot read, or
    not within 3 s, is None. That depends on the machine: processes that must agree pass answers on instead of reading twice.
    Raises RuntimeError in a thread, as the reward does.
    """
    refuse_threads()
    return _math_form(given_answer(text), worked_out)


_READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "arithmetic_accuracy": lambda args: _integer,
    "exact_match": lambda args: partial(_whole, strip=args.get("strip", True), ignore_case=args.get("ignore_case", False)),
    "math_answer": lambda args: partial(_math, worked_out=args.get("worked_out", True)),
    "numeric_answer": lambda args: _number,
}


# --- what math-verify has read ----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _math_form(given: str, worked_out: bool) -> str | None:
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        found = given_expressions(given)
    except RuntimeError:  # it took too long
        return None
    if not found:
        return None
    if isinstance(found[0], str):
        return f"written: {found[0].strip()}"
    try:
        return timeout(MATH_SECONDS)(_worked_form)(found, worked_out)
    except (Exception, TimeoutException):  # of any kind, from sympy
        return f"written: {str(found[-1]).strip()}" if isinstance(found[-1], str) else None


def _worked_form(found: list[Any], worked_out: bool) -> str:
    """The form of what was found. Raises ValueError where working it out may never end."""
    from math_verify.grader import is_equation, take_first_relation, take_last_relation
    from sympy import Integer, Rational, Symbol
    from sympy.core.function import AppliedUndef

    if not _tame(found[0]):
        raise ValueError("not to be worked out")
    value = found[0]
    if is_equation(value):
        left = take_first_relation(value).lhs
        if isinstance(left, Symbol | AppliedUndef) or not left.free_symbols:
            value = take_last_relation(value).rhs
    form = _form(value)
    if not worked_out or not getattr(value, "is_number", False):
        return form
    if not as_plain([Rational(1, 2)], found):
        return f"{form} not worked out"
    if form.lstrip("-").isdigit() and not as_plain([Integer(1)], found):
        return f"{form} as a fraction"
    return form


def _tame(expression: Any) -> bool:
    """Whether an expression is so small, and made of such parts, that it can be worked out."""
    import sympy
    from latex2sympy2_extended.logic import And
    from sympy.core.function import AppliedUndef

    parts = (
        *(sympy.Number, sympy.NumberSymbol, sympy.core.numbers.ImaginaryUnit, sympy.Symbol, sympy.Add, sympy.Mul, sympy.Pow),
        *(sympy.UnevaluatedExpr, sympy.Tuple, sympy.Set, sympy.core.relational.Relational, sympy.And, And, AppliedUndef),
        *(sympy.sin, sympy.cos, sympy.tan, sympy.log, sympy.exp, sympy.Abs, sympy.logic.boolalg.BooleanAtom),
    )
    elements = expression.flat() if isinstance(expression, sympy.MatrixBase) else [expression]
    nodes = [node for element in elements for node in sympy.postorder_traversal(element)]  # parts before what they make up
    return len(nodes) <= _MOST_NODES and all(isinstance(node, parts) and _moderate(node) for node in nodes)


def _moderate(node: Any) -> bool:
    """Whether a part is no huge number, and no high power, given that its own parts are not."""
    if node.is_Pow and node.exp.is_number and abs(complex(node.exp.evalf(5))) > _LARGEST_POWER:
        return False
    if not getattr(node, "is_number", False):
        return True
    size = abs(complex(node.doit().evalf(5)))  # percent signs are left to be worked out
    return size in (0, inf) or 1 / _LARGEST < size < _LARGEST


def _form(value: Any) -> str:
    """How a value is written, whatever it was written like."""
    import sympy
    from sympy.core.relational import Relational

    if isinstance(value, sympy.MatrixBase):
        return f"matrix {value.shape}: {', '.join(map(_form, value.flat()))}"
    if isinstance(value, sympy.FiniteSet):
        return f"{{{', '.join(sorted(map(_form, value.args)))}}}"
    if isinstance(value, sympy.Tuple):
        return f"({', '.join(map(_form, value.args))})"
    if isinstance(value, sympy.Interval):
        ends = f"{_form(value.start)}, {_form(value.end)}"
        return f"interval {'(' if value.left_open else '['}{ends}{')' if value.right_open else ']'}"
    if isinstance(value, Relational):
        return _relation(value)
    if isinstance(value, sympy.Symbol):
        return f"word {value.name.lower() if len(value.name) > 1 else value.name}"
    if not isinstance(value, sympy.Expr):
        return sympy.srepr(value)  # of sets that are put together, and relations
    return _number_form(value) if value.is_number else _symbolic_form(value)


def _relation(value: Any) -> str:
    """An inequality by the difference of its sides; an equation by each, for the last may count alone."""
    import sympy

    if isinstance(value, sympy.StrictLessThan | sympy.LessThan):
        return f"{'<' if isinstance(value, sympy.StrictLessThan) else '<='}: {_form(value.rhs - value.lhs)}"
    if isinstance(value, sympy.StrictGreaterThan | sympy.GreaterThan):
        return f"{'<' if isinstance(value, sympy.StrictGreaterThan) else '<='}: {_form(value.lhs - value.rhs)}"
    return f"{type(value).__name__}: {_form(value.lhs)}, {_form(value.rhs)}"


def _number_form(value: Any) -> str:
    from math_verify.grader import get_pct_val
    from sympy import Integer, srepr

    if isinstance(get_pct_val(value), Integer):
        return f"{get_pct_val(value)}%"
    value = value.doit()
    if value.is_infinite:
        return str(value)
    if value.is_real:
        return _digits(Decimal(str(value.round(6))))
    real, imaginary = value.as_real_imag()
    if real.is_real and imaginary.is_real:
        return f"{_number_form(real)} + {_number_form(imaginary)} i"
    return srepr(value)


def _symbolic_form(value: Any) -> str:
    from sympy import E, Mul, Symbol, cancel, nsimplify, simplify, srepr

    if isinstance(value, Mul) and all(part == E or isinstance(part, Symbol) for part in value.args):
        return "word " + "".join("e" if part == E else part.name for part in value.args)  # so math-verify may take it
    exact = nsimplify(value.doit(), rational=True)  # without decimal fractions
    return srepr(cancel(exact) if exact.is_rational_function() else simplify(exact))
