"""Groups of things that fit into a limit together."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def packed(things: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Neighbours together while their sizes stay within the limit; what is larger is alone."""
    groups: list[list[T]] = []
    held = 0
    for thing in things:
        own = size(thing)
        if not groups or held + own > limit:
            groups.append([])
            held = 0
        groups[-1].append(thing)
        held += own
    return groups
