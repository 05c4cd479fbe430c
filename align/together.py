"""What one process does for all, and what must not fail in one process alone."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from rollout.sampler import RolloutError

Result = TypeVar("Result")


def check_agreement(step: int, digest: int) -> None:
    """Stop when processes have reached different weights: from then on they would train different policies."""
    digests = gather_object([digest])
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"step {step}: the learner processes hold different weights (digests {digests}); a weighting scheme must be a "
            "pure function of its state and observation"
        )


def together(act: Callable[[], Result]) -> Result:
    """Do something in every process, and let all fail when one does, so that none waits for it.

    Raises:
        RolloutError: It failed elsewhere; here, whatever `act` has raised.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    messages = gather_object(["" if failure is None else str(failure) or type(failure).__name__])
    if failure is not None:
        raise failure
    if elsewhere := next(filter(None, messages), ""):
        raise RolloutError(elsewhere)
    return result


def from_main(act: Callable[[], Result]) -> Result:
    """The main process's result, in all. Raises RolloutError in all when it fails."""
    main = PartialState().is_main_process
    result = together(lambda: act() if main else None)
    return gather_object([result])[0]
