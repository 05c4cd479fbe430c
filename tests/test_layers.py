"""The house rules that a machine can check: who imports whom, and how long things get."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("align", "rewards", "rollout")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALLOWED = {  # package -> what it may import of ours
    "rollout": ("rollout",),
    "rewards": ("rewards", "rollout.types"),
    "align": PACKAGES,
}
TORCH_FREE = (  # modules that answer at once, or read run folders only
    "align.cli", "align.config", "align.load", "align.check", "align.build", "align.runfolder", "align.plan",
    "align.checkpoint", "align.archive", "align.runlog", "align.step", "align.weighting", "align.report", "align.advice",
    "align.replay", "align.report_compare", "align.sweep",
    "align.engine", "align.rounds", "align.selftrain.choose", "align.selftrain.pool", "align.selftrain.rows",
    "align.selftrain.sources", "align.selftrain.tilt", "align.selftrain.weigh", "align.selftrain.weights", "align.summary",
    "align.fronts.card", "align.fronts.choose", "align.fronts.evaluation", "align.fronts.export", "align.fronts.front",
    "align.fronts.page", "align.fronts.pick", "align.fronts.picture", "align.fronts.statistics", "rewards.answers",
    "rewards.bus", "rewards.component", "rollout.prompts", "rollout.sampler", "rollout.server", "rollout.keeper",
    "rollout.workers", "align.watch",
)  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; ours are absolute"
            yield node.module or ""


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_point_one_way_and_engines_have_one_seam(path):
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        if within(module, PACKAGES):
            assert within(module, ALLOWED[package]), f"{path.name} imports {module}"
        if within(module, ("trl",)) and path.name not in ("learner.py", "tuners.py"):
            pytest.fail(f"{path.name} imports trl; only align/learner.py and align/selftrain/tuners.py may")
        if within(module, ("vllm",)):
            assert path.name in ("vllm_worker.py", "transfer.py"), f"{path.name} imports vllm"


def test_trl_is_named_outside_the_seam_for_types_only():
    tree = ast.parse((ROOT / "align" / "train.py").read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in guarded:
        tree.body.remove(node)
    assert not any(within(a, ("trl",)) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in [n.module])


def test_modules_that_must_not_import_torch_do_not():
    code = (
        f"import sys\nfor name in {TORCH_FREE!r}: __import__(name)\nprint([m for m in ('torch', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_gets_long(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{path.name} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} has more than 60 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
