"""What a reward may be, how it is found, and how it is called.

A reward is a function (or a class whose instances are called) of one sample, and names the arguments it wants:

* `text`: the completion; `prompt`: the text that the policy read; `token_ids`: the completion's tokens;
  `group`: the texts of all samples of the same prompt;
* any field of the data row, by its name;
* anything given as `args` in the configuration.

It returns a number, or None when there is no value. A function with a `completions` argument is a reward in TRL's
form: called once for all samples with lists of `prompts`, `completions` (both as text) and of every data field.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import Any, Protocol

from rollout.types import SampleGroup

Value = float | None
OF_A_SAMPLE = ("text", "prompt", "token_ids", "group")


class Component(Protocol):
    """A reward, ready to score."""

    def __call__(self, groups: Sequence[SampleGroup]) -> list[Value | Exception]:
        """One value, None, or the exception that prevented it, per sample in the order of the groups."""
        ...


BUILT_IN = {
    "arithmetic_accuracy": "rewards.arithmetic:arithmetic_accuracy",
    "arithmetic_clarity": "rewards.arithmetic:arithmetic_clarity",
    "brevity": "rewards.text:brevity",
    "math_answer": "rewards.verify:math_answer",
    "numeric_answer": "rewards.verify:numeric_answer",
    "step_lines": "rewards.text:step_lines",
}


def load_component(reward: str, args: Mapping[str, Any], columns: Sequence[str]) -> Component:
    """Find a reward and check that it can be called.

    Args:
        reward: A name of `BUILT_IN`, or `module:attribute`.
        args: Keyword arguments bound to a function or passed to a class.
        columns: Fields that every data row has.

    Raises:
        ValueError: It cannot be imported, is not callable, or wants an argument that nobody provides.
    """
    function = _bind(reward, find_reward(reward), args)
    parameters = _parameters(reward, function)
    if "completions" in parameters:
        return TrlReward(function)
    known = {*OF_A_SAMPLE, *columns}
    for name, parameter in parameters.items():
        if name not in known and parameter.default is parameter.empty:
            raise ValueError(
                f"reward {reward!r} wants an argument {name!r}, which is neither one of {', '.join(OF_A_SAMPLE)}, nor a "
                f"field of the data ({', '.join(sorted(columns)) or 'none'}): rename it, or give it under `args`"
            )
    return SampleReward(function, tuple(name for name in parameters if name in known))


def find_reward(reward: str) -> Callable[..., Any]:
    """The function or class behind a built-in name or `module:attribute`. Raises ValueError when there is none."""
    if ":" not in reward and reward not in BUILT_IN:
        raise ValueError(f"no built-in reward {reward!r}: there are {', '.join(BUILT_IN)}; your own is `module:function`")
    try:
        function = resolve_name(BUILT_IN.get(reward, reward))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward {reward!r} cannot be imported from the current folder or environment: {error}") from error
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            f"reward {reward!r} is asynchronous; rewards are called one after the other: make it a plain function"
        )
    if not callable(function):
        raise ValueError(f"reward {reward!r} is a {type(function).__name__}, not a function or class")
    return function


def _bind(reward: str, function: Callable[..., Any], args: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        if inspect.isclass(function):
            return function(**args)
        inspect.signature(function).bind_partial(**args)
        return partial(function, **args) if args else function
    except TypeError as error:
        raise ValueError(f"reward {reward!r} does not take args {dict(args)}: {error}") from error


def _parameters(reward: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments still open, by name. Raises ValueError for functions that cannot be called by keyword."""
    bound = function.keywords if isinstance(function, partial) else {}
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in bound}
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()):
        raise ValueError(f"reward {reward!r} has positional-only arguments; rewards are called by keyword")
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


class SampleReward:
    """A function of one sample; an exception costs that sample its value, not the others."""

    def __init__(self, function: Callable[..., Any], wanted: Sequence[str]):
        self._function = function
        self._wanted = wanted

    def __call__(self, groups: Sequence[SampleGroup]) -> list[Value | Exception]:
        values: list[Value | Exception] = []
        for group in groups:
            available = {**group.prompt.columns, "prompt": group.prompt.text}
            if "group" in self._wanted:
                available["group"] = [sample.text for sample in group.samples]
            for sample in group.samples:
                available["text"], available["token_ids"] = sample.text, sample.token_ids
                try:
                    values.append(self._function(**{name: available[name] for name in self._wanted}))
                except Exception as error:  # a reward is other people's code: the boundary is here
                    values.append(error)
        return values


class TrlReward:
    """A function in TRL's form; what goes wrong costs all samples their value."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, groups: Sequence[SampleGroup]) -> list[Value | Exception]:
        rows = [(group.prompt, sample) for group in groups for sample in group.samples]
        columns = {name: [p.columns[name] for p, _ in rows] for name in rows[0][0].columns if name not in TRL_ARGUMENTS}
        try:
            values = self._function(
                prompts=[p.text for p, _ in rows],
                completions=[s.text for _, s in rows],
                completion_ids=[list(s.token_ids) for _, s in rows],
                **columns,
            )
            values = list(values)
            if len(values) != len(rows):
                raise ValueError(f"returned {len(values)} values for {len(rows)} samples")
        except Exception as error:  # as above
            return [error] * len(rows)
        return values


TRL_ARGUMENTS = ("prompt", "prompts", "completions", "completion_ids")
