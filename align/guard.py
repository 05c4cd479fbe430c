"""Stops with a plain sentence when Python would import other people's `align`, `rewards` or `rollout`.

The three names also belong to unrelated packages, and installers merge folders without a word.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("align", "rewards", "rollout")
DISTRIBUTION = "paretune"


class ImportGuardError(ValueError):
    """A package of ours is shadowed by, or mixed with, another one."""


def check_imports() -> None:
    """Raise ImportGuardError unless every package of ours resolves beside `align/` and belongs to us alone."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != home / name / "__init__.py":
            raise ImportGuardError(
                f"`import {name}` finds {found or 'nothing'} instead of {home / name}: another module of that name comes "
                f"first on Python's path. Rename it, or start from another folder"
            )
    if home.name in ("site-packages", "dist-packages"):  # only there can installers mix folders
        _check_owners()


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Let a package seem not to be installed while others are imported that would import it, and take seconds for it."""
    before = sys.modules.pop(package, None)
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


def _check_owners() -> None:
    owners = packages_distributions()
    for name in PACKAGES:
        others = sorted({owner for owner in owners.get(name, []) if owner.lower() != DISTRIBUTION})
        if others:
            raise ImportGuardError(
                f"the package {name!r} is installed by {', '.join(others)} too, and the two are now mixed in one folder: "
                f"uninstall {others[0]} and reinstall {DISTRIBUTION}, or use an environment of its own"
            )
