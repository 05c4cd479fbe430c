"""What one process does for all, and what must not fail in one process alone."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from rollout.sampler import RolloutError

Result = TypeVar("Result")


def together(act: Callable[[], Result]) -> Result:
    """Do something in every process. Raises RolloutError in all when it fails in one, so that none waits for it."""
    result, error = None, ""
    try:
        result = act()
    except RolloutError as failure:
        error = str(failure) or type(failure).__name__
    errors = [message for message in gather_object([error]) if message]
    if errors:
        raise RolloutError(errors[0])
    return result


def from_main(act: Callable[[], Result]) -> Result:
    """The main process's result, in all. Raises RolloutError in all when it fails."""
    main = PartialState().is_main_process
    result = together(lambda: act() if main else None)
    return gather_object([result])[0]
