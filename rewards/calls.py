"""How a reward is called: with which arguments, where, how many at once, for how long, and how often again."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from rollout.types import FinishReason, Sample, SampleGroup

Value = float | None
OF_A_SAMPLE = ("text", "prompt", "token_ids", "log_probs", "group", "truncated")
OF_ITS_OWN: Mapping[str, Callable[[Sample], Any]] = {  # those that differ within a group
    "text": attrgetter("text"),
    "token_ids": attrgetter("token_ids"),
    "log_probs": attrgetter("log_probs"),
    "truncated": lambda sample: sample.finish_reason == FinishReason.LENGTH,
}
TRL_ARGUMENTS = ("prompt", "prompts", "completions", "completion_ids")


class Isolation(StrEnum):
    """Where a reward runs. A coroutine function runs in an event loop, and nothing else does."""

    INLINE = "inline"  # in the thread that scores, one call after another; nothing can interrupt it
    THREAD = "thread"  # in threads; one that overruns is given up, and goes on in vain
    PROCESS = "process"  # in worker processes; one that overruns is killed
    ASYNC = "async"


@dataclass(frozen=True, slots=True)
class CallRules:
    """How calls are made.

    Args:
        isolation: Where.
        concurrency: Calls at once; in a process each.
        batch_size: Samples per call of a reward that takes many at once; 0 takes all.
        timeout: Seconds that one call may take; infinity where nothing could interrupt it.
        retries: Times that a failed call is made again.
    """

    isolation: Isolation
    concurrency: int
    batch_size: int
    timeout: float
    retries: int


class Call(NamedTuple):
    """One call.

    Args:
        arguments: By keyword.
        rows: Those that it gives values to.
        places: Of these among all values of the answer, where that has more.
    """

    arguments: Mapping[str, Any]
    rows: Sequence[int]
    places: Sequence[int] = ()


class Form(Protocol):
    """What a reward wants to be given, and what it gives back."""

    def calls(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Iterator[Call]:
        """The calls that score some rows; rows count the samples of all groups."""
        ...

    def values(self, call: Call, answer: Any) -> Sequence[Any]:
        """One value per row. Raises ValueError or TypeError when the answer has not as many."""
        ...


class PerSample:
    """A reward of one sample.

    Args:
        wanted: Names of its arguments.
    """

    def __init__(self, wanted: Sequence[str]):
        self._wanted = wanted

    def calls(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Iterator[Call]:
        """See `Form`: one call per sample."""
        own = [(name, OF_ITS_OWN[name]) for name in self._wanted if name in OF_ITS_OWN]
        n = -1
        for group in groups:
            shared = {**group.prompt.columns, "prompt": group.prompt.text}
            if "group" in self._wanted:
                shared["group"] = [sample.text for sample in group.samples]
            shared = {name: shared[name] for name in self._wanted if name in shared}
            for sample in group.samples:
                n += 1
                if n in rows:
                    arguments = shared.copy()
                    for name, get in own:
                        arguments[name] = get(sample)
                    yield Call(arguments, (n,))

    def values(self, call: Call, answer: Any) -> Sequence[Any]:
        """See `Form`."""
        return (answer,)


class Batched:
    """A reward of many samples, in TRL's form: lists of `prompts`, `completions`, `completion_ids` and of every data field.

    Args:
        batch_size: Samples per call; 0 takes all.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size

    def calls(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Iterator[Call]:
        """See `Form`: as many samples per call as there may be; None for a field that a row has not."""
        samples = [(group.prompt, sample) for group in groups for sample in group.samples]
        chosen = [n for n in range(len(samples)) if n in rows]
        size = self._batch_size or max(1, len(chosen))
        names = dict.fromkeys(name for group in groups for name in group.prompt.columns if name not in TRL_ARGUMENTS)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            pairs = [samples[n] for n in part]
            arguments = {
                "prompts": [prompt.text for prompt, _ in pairs],
                "completions": [sample.text for _, sample in pairs],
                "completion_ids": [list(sample.token_ids) for _, sample in pairs],
            }
            yield Call(arguments | {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names}, part)

    def values(self, call: Call, answer: Any) -> Sequence[Any]:
        """See `Form`."""
        return _as_many(answer, len(call.rows))


class Grouped:
    """A reward of whole sample groups: called with `groups`, answers with the values of all their samples in a row.

    Args:
        batch_size: Samples per call, but at least one group; 0 takes all.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size

    def calls(self, groups: Sequence[SampleGroup], rows: Collection[int]) -> Iterator[Call]:
        """See `Form`: groups that have a row in demand, as many per call as there may be."""
        chosen, some, places, first, size = [], [], [], 0, 0
        for group in groups:
            count = len(group.samples)
            part = [n for n in range(first, first + count) if n in rows]
            if chosen and part and self._batch_size and size + count > self._batch_size:
                yield Call({"groups": chosen}, some, places)
                chosen, some, places, size = [], [], [], 0
            if part:
                chosen, some = [*chosen, group], [*some, *part]
                places, size = [*places, *(size + n - first for n in part)], size + count
            first += count
        if chosen:
            yield Call({"groups": chosen}, some, places)

    def values(self, call: Call, answer: Any) -> Sequence[Any]:
        """See `Form`: of the values of all samples of the groups, those in demand."""
        values = _as_many(answer, sum(len(group.samples) for group in call.arguments["groups"]))
        return [values[place] for place in call.places]


def _as_many(answer: Any, count: int) -> Sequence[Any]:
    values = list(answer)
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} samples")
    return values
