"""Takes the conditions out of a test's assertions, so that the process that runs the test does not learn what is expected.

`assert abs(f(2) - 1.5) < 1e-6` becomes `__check__(0, (f(2),))`, the operands of condition 0: `abs(_0 - 1.5) < 1e-06`.
Part of a condition are comparisons (`==`, `<`, ..., `is None`, `in` something literal), `not`, differences and their `abs`,
`math.isclose`, and literals, in an `assert` or a TestCase's `assertEqual`, `assertTrue` and `assertFalse`; whatever else an
assertion consists of is an operand. Assertions where a failure may be caught, and those without operands, stay as they are.

Functions `test...()` without arguments and classes of tests that nothing calls are called at the end, as pytest would.
"""

import ast
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IDLE = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
LITERAL = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp)
PARTS = (ast.expr_context, ast.operator, ast.unaryop)
ORDER = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
SYMBOLS = {**ORDER, ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}


@dataclass(frozen=True, slots=True)
class Test:
    """A test without the conditions of its assertions.

    Args:
        source: Python, which calls `__check__(n, operands)`, with a third argument for conditions that are `free`, and
            `__run_case__(class)`.
        conditions: (expression in `_0`, `_1`, ..., free), n-th first. Free: it has no literals, so that what is no plain
            data can be compared where it is; the third argument does that.
        sure: Conditions that every run to the end comes by.
    """

    source: str
    conditions: tuple[tuple[str, bool], ...]
    sure: tuple[int, ...]


def take_apart(text: str) -> Test:
    """A test from its text. Raises ValueError when it is no Python, cannot be imported, or when nothing in it runs."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test {text!r:.80} is no Python: {error}") from error
    _check_imports(tree)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name, node in _definitions(tree.body).items():
        if _is_case(node):
            tree.body += ast.parse(f"__run_case__({name})").body
        elif name not in used and _is_test(node):
            tree.body += ast.parse(f"{name}()").body
        elif name not in used and name.lower().startswith("test"):
            raise ValueError(
                f"nothing calls {name} in the test {text!r:.80}: functions without arguments, and TestCases, are"
            )
    if all(_is_idle(statement) for statement in tree.body):
        raise ValueError(
            f"nothing runs in the test {text!r:.80}: it wants an assertion or a call at its top level, a function test...() "
            "without arguments, or a unittest.TestCase"
        )
    sure = {id(node) for node in _sure(tree.body, {_called(statement) for statement in tree.body})}
    apart = _Apart(sure, _bound(tree))
    apart.visit(tree)
    return Test(ast.unparse(ast.fix_missing_locations(tree)), tuple(apart.conditions), tuple(apart.sure))


class _Apart(ast.NodeTransformer):
    """Replaces assertions by calls of `__check__`.

    Args:
        surely: Ids of the statements that every run comes by.
        bound: Names that the test gives a meaning of its own.
    """

    def __init__(self, surely: Collection[int], bound: Collection[str]):
        self.conditions: list[tuple[str, bool]] = []
        self.sure: list[int] = []
        self._surely = surely
        self._bound = bound

    def visit_Try(self, node: ast.Try) -> ast.AST:
        return node if node.handlers else self.generic_visit(node)

    def visit_TryStar(self, node: ast.AST) -> ast.AST:
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        catches = any(word in ast.unparse(item) for item in node.items for word in ("aises", "suppress"))
        return node if catches else self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST | list[ast.stmt]:
        return self._replace(node, node.test)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.stmt]:
        condition = _condition(node)
        return self.generic_visit(node) if condition is None else self._replace(node, condition)

    def _replace(self, node: ast.stmt, condition: ast.expr) -> ast.AST | list[ast.stmt]:
        both = isinstance(condition, ast.BoolOp) and isinstance(condition.op, ast.And)
        split = [_Split(part, self._bound) for part in (condition.values if both else [condition])]
        if not all(part.operands for part in split):
            return node
        calls = []
        for part in split:
            if id(node) in self._surely:
                self.sure.append(len(self.conditions))
            calls.append(part.call(len(self.conditions)))
            self.conditions.append((part.expression, part.free))
        return calls


class _Split:
    """A condition and its operands.

    Args:
        condition: As it stands in the test.
        bound: As above.
    """

    def __init__(self, condition: ast.expr, bound: Collection[str]):
        self.operands: list[ast.expr] = []
        self._bound = bound
        self._literals = 0
        self.expression = self._split(condition)
        self.free = len(self.operands) > 1 and not self._literals

    def call(self, n: int) -> ast.stmt:
        """The statement that takes the place of the assertion."""
        names = ", ".join(f"_{n}" for n in range(len(self.operands)))
        condition = f", lambda {names}: {self.expression}" if self.free else ""
        statement = ast.parse(f"__check__({n}, (){condition})").body[0]
        statement.value.args[1].elts = self.operands
        return statement

    def _split(self, node: ast.expr) -> str:
        if _is_literal(node):
            self._literals += 1
            return f"({ast.unparse(node)})"
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return f"(not {self._split(operand)})"
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return f"({self._split(left)} - {self._split(right)})"
            case ast.Compare(left=left, ops=ops, comparators=rest) if self._is_open(ops, rest):
                pairs = (f" {SYMBOLS[type(op)]} {self._split(right)}" for op, right in zip(ops, rest, strict=True))
                return f"({self._split(left)}{''.join(pairs)})"
            case ast.Call(func=ast.Name("abs"), args=[ast.BinOp(op=ast.Sub()) as difference]) if "abs" not in self._bound:
                return f"abs({self._split(difference)})"
            case ast.Call(func=function, args=args, keywords=keywords) if name := self._function(function):
                named = (f"{keyword.arg}={self._split(keyword.value)}" for keyword in keywords)
                return f"{name}({', '.join((*map(self._split, args), *named))})"
        self.operands.append(node)
        return f"_{len(self.operands) - 1}"

    def _is_open(self, ops: Sequence[ast.cmpop], rest: Sequence[ast.expr]) -> bool:
        """Whether a comparison is of values, which may be copies, and not of objects."""
        match ops, rest:
            case [ast.Is() | ast.IsNot()], [ast.Constant(value=None | True | False)]:
                return True
            case [ast.In() | ast.NotIn()], [right]:
                return _is_literal(right)
        return all(type(op) in ORDER for op in ops)

    def _function(self, function: ast.expr) -> str:
        """What a condition may call, unless the test means something else by it."""
        match function:
            case ast.Name("isclose") if "isclose" not in self._bound:
                return "isclose"
            case ast.Attribute(ast.Name("math"), "isclose") if "math" not in self._bound:
                return "isclose"
        return ""


def _called(statement: ast.stmt) -> str:
    """Name of the function that a statement calls, if that is all it does."""
    match statement:
        case ast.Expr(ast.Call(func=ast.Name(name))):
            return name
    return ""


def _condition(statement: ast.stmt) -> ast.expr | None:
    """What a statement asserts by a method of a TestCase."""
    match statement:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("self"), "assertEqual"), [left, right, *_])):
            return ast.Compare(left, [ast.Eq()], [right])
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("self"), "assertTrue"), [value, *_])):
            return value
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("self"), "assertFalse"), [value, *_])):
            return ast.UnaryOp(ast.Not(), value)
    return None


def _is_literal(node: ast.expr) -> bool:
    return isinstance(node, LITERAL) and all(isinstance(part, LITERAL + PARTS) for part in ast.walk(node))


def _definitions(body: Sequence[ast.stmt]) -> dict[str, ast.stmt]:
    """Functions and classes by name; of those with the same name the last."""
    return {node.name: node for node in body if isinstance(node, DEFINITIONS)}


def _is_test(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    needed = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
    return node.name.startswith("test") and not node.decorator_list and not needed and None not in node.args.kw_defaults


def _is_case(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in node.bases)


def _is_idle(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If):
        return "__name__" in ast.unparse(statement.test)
    return isinstance(statement, IDLE) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def _sure(body: Sequence[ast.stmt], called: Collection[str]) -> Iterator[ast.stmt]:
    """Assertions that every run to the end comes by: in the top level, or a function called there, under no condition."""
    named = _definitions(body)
    for statement in body:
        if isinstance(statement, ast.Assert) or _condition(statement) is not None:
            yield statement
        elif isinstance(statement, ast.ClassDef):
            if named[statement.name] is statement and _is_case(statement) and not statement.decorator_list:
                yield from _sure(statement.body, {name for name in _definitions(statement.body) if name.startswith("test")})
        elif isinstance(statement, ast.FunctionDef):
            if named[statement.name] is statement and statement.name in called and _is_plain(statement):
                yield from _sure(statement.body, ())
        elif any(_may_end(node) for node in ast.walk(statement)):
            return


def _may_end(node: ast.AST) -> bool:
    return isinstance(node, ast.Return | ast.Raise) or (isinstance(node, ast.Attribute) and node.attr == "skipTest")


def _is_plain(function: ast.FunctionDef) -> bool:
    odd = (ast.Yield, ast.YieldFrom, ast.Await)
    return not function.decorator_list and not any(isinstance(node, odd) for node in ast.walk(function))


def _bound(tree: ast.AST) -> set[str]:
    """Names that the test assigns or defines; and `isclose`, unless it is the one of `math`."""
    names, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and node.module == "math":
            imported |= {alias.name for alias in node.names if not alias.asname}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if (alias.name, alias.asname) != ("math", None)}
    return names | ({"isclose"} - imported)


def _check_imports(tree: ast.AST) -> None:
    guarded = {id(n) for node in ast.walk(tree) if isinstance(node, ast.Try) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."]
            for name in names:
                root = name.partition(".")[0]
                if root != "solution" and root not in sys.stdlib_module_names:
                    raise ValueError(
                        f"a test imports {name!r}: the sandbox has the standard library alone, and `solution`, the code"
                    )
