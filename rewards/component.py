"""What a reward may be, and how it is found.

A reward is a function (or a class whose instances are called) of one sample, and names the arguments it wants:

* `text`: the completion; `prompt`: the text that the policy read; `token_ids`: the completion's tokens; `log_probs`: their
  log-probabilities (nats) under the policy that drew them, empty unless `rollout.correction` has them recorded;
  `group`: the texts of all samples of the same prompt; `truncated`: whether the token limit ended it;
* any field of the data row, by its name;
* anything given as `args` in the configuration.

It returns a number, or None when there is no value. A function with a `completions` argument is a reward in TRL's
form: called for many samples at once with lists of `prompts`, `completions` (both as text) and of every data field. One
with a `groups` argument gets whole sample groups, and answers with the values of all their samples in a row. Any of
them may be a coroutine function.

An object may have a method `ready`, called once before a run loads anything, which raises ValueError when what the reward
needs elsewhere is not there, and a method `close`; either may be asynchronous.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import partial
from math import inf
from pkgutil import resolve_name
from typing import Any

from rewards.calls import OF_A_SAMPLE, Batched, CallRules, Form, Grouped, Isolation, PerSample
from rewards.execution import Asynchronous, Component, Concurrent, Inline, Processes, Threads
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

NOTHING = SampleGroup(Prompt("", "", (), {}), (Sample((), (), FinishReason.STOP, 0, ""),))
MANY_AT_ONCE = {"completions": Batched, "groups": Grouped}  # argument -> form
DEFAULTS = {
    Isolation.INLINE: CallRules(Isolation.INLINE, concurrency=1, batch_size=0, timeout=inf, retries=0),
    Isolation.THREAD: CallRules(Isolation.THREAD, concurrency=8, batch_size=0, timeout=60.0, retries=0),
    Isolation.PROCESS: CallRules(Isolation.PROCESS, concurrency=2, batch_size=0, timeout=30.0, retries=0),
    Isolation.ASYNC: CallRules(Isolation.ASYNC, concurrency=64, batch_size=0, timeout=60.0, retries=2),
}


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """Where a built-in reward is, and how it is called unless the configuration says otherwise."""

    path: str
    rules: Mapping[str, Any] = field(default_factory=dict)


BUILT_IN = {
    "arithmetic_accuracy": BuiltIn("rewards.arithmetic:arithmetic_accuracy"),
    "arithmetic_clarity": BuiltIn("rewards.arithmetic:arithmetic_clarity"),
    "brevity": BuiltIn("rewards.text:brevity"),
    "classifier": BuiltIn("rewards.model:Classifier"),
    "code_tests": BuiltIn("rewards.code:CodeTests", {"concurrency": 2, "timeout": 60.0, "retries": 0}),
    "exact_match": BuiltIn("rewards.verify:exact_match"),
    "fluency": BuiltIn("rewards.model:Fluency"),
    "judge": BuiltIn("rewards.judge:Judge", {"concurrency": 32, "timeout": 120.0, "retries": 3}),
    "json_schema": BuiltIn("rewards.verify:json_schema", {"isolation": "process"}),  # a schema may have patterns
    "kl_to_reference": BuiltIn("rewards.reference:KlToReference"),
    "length_target": BuiltIn("rewards.text:length_target"),
    "math_answer": BuiltIn("rewards.verify:math_answer", {"isolation": "process"}),  # sympy may think for ever
    "numeric_answer": BuiltIn("rewards.verify:numeric_answer"),
    "overlong": BuiltIn("rewards.text:overlong"),
    "pooling": BuiltIn("rewards.pooling:Pooling", {"batch_size": 16}),
    "regex_match": BuiltIn("rewards.verify:regex_match"),
    "remote": BuiltIn("rewards.http:RemoteReward", {"batch_size": 16}),
    "repetition": BuiltIn("rewards.text:repetition"),
    "similarity": BuiltIn("rewards.embedding:Similarity"),
    "step_lines": BuiltIn("rewards.text:step_lines"),
    "worked_steps": BuiltIn("rewards.steps:worked_steps"),
}


@dataclass(frozen=True)
class Recipe:
    """Makes a reward; travels to the processes that are to have one."""

    reward: str
    args: Mapping[str, Any]

    def __call__(self) -> Callable[..., Any]:
        """An instance of a class, or a function with its args."""
        found = find_reward(self.reward)
        if inspect.isclass(found):
            return found(**self.args)
        return partial(found, **self.args) if self.args else found


def load_component(reward: str, args: Mapping[str, Any], columns: Sequence[str], rules: Mapping[str, Any]) -> Component:
    """Find a reward and check that it can be called.

    Args:
        reward: A name of `BUILT_IN`, or `module:attribute`.
        args: Keyword arguments bound to a function or passed to a class.
        columns: Fields that every data row has.
        rules: Fields of `CallRules` in the place of those that a reward of its kind has by default.

    Raises:
        ValueError: It cannot be imported, is not callable, wants an argument that nobody provides, or cannot be called
            by those rules; or it is a built-in one that cannot use its args.
    """
    found = find_reward(reward)
    parameters = _parameters(reward, found, args)
    batched = next((form for name, form in MANY_AT_ONCE.items() if name in parameters), None)
    chosen = _rules(reward, inspect.iscoroutinefunction(_called(found)), batched is not None, rules)
    form: Form = batched(chosen.batch_size) if batched else PerSample(_wanted(reward, parameters, columns))
    make = Recipe(reward, args)
    if reward in BUILT_IN and inspect.isfunction(found) and not set(parameters) & (set(columns) - set(OF_A_SAMPLE)):
        _try_on_nothing(reward, make, form)
    match chosen.isolation:
        case Isolation.INLINE:
            return Inline(make(), form)
        case Isolation.THREAD:
            return Concurrent(Threads(make(), chosen.timeout), form, chosen)
        case Isolation.PROCESS:
            return Concurrent(Processes(make, chosen), form, chosen)
        case Isolation.ASYNC:
            return Concurrent(Asynchronous(make(), chosen.timeout), form, chosen)


def open_arguments(reward: str, args: Mapping[str, Any]) -> list[str]:
    """Names of the arguments of a reward that `args` leave open. Raises ValueError as `load_component` does."""
    return list(_parameters(reward, find_reward(reward), args))


def wanted_columns(reward: str, args: Mapping[str, Any]) -> list[str]:
    """Arguments of a reward that only fields of the data can provide. Raises ValueError as `load_component` does."""
    return [name for name in open_arguments(reward, args) if name not in (*OF_A_SAMPLE, *MANY_AT_ONCE)]


def find_reward(reward: str) -> Callable[..., Any]:
    """The function or class behind a built-in name or `module:attribute`. Raises ValueError when there is none."""
    if ":" not in reward and reward not in BUILT_IN:
        hint = _did_you_mean(reward, BUILT_IN) or f"; there are: {', '.join(BUILT_IN)}."
        raise ValueError(f"no built-in reward {reward!r}{hint} Your own is `module:function`")
    try:
        function = resolve_name(BUILT_IN[reward].path if reward in BUILT_IN else reward)
    except (ImportError, AttributeError, ValueError) as error:
        public = [name for name in dir(getattr(error, "obj", None)) if not name.startswith("_")]
        hint = _did_you_mean(getattr(error, "name", None) or "", public)
        raise ValueError(
            f"reward {reward!r} cannot be imported from the current folder or environment: {error}{hint}"
        ) from error
    if not callable(function):
        raise ValueError(f"reward {reward!r} is a {type(function).__name__}, not a function or class")
    return function


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _arguments_of(found: Callable[..., Any]) -> str:
    """The arguments that a reward has, for an error; "" where Python cannot tell."""
    try:
        return f"; it has {', '.join(inspect.signature(found).parameters) or 'none'}"
    except (TypeError, ValueError):
        return ""


def _try_on_nothing(reward: str, make: Recipe, form: Form) -> None:
    """Call a function on an empty completion. Raises ValueError where it cannot be called: its args are at fault."""
    (call,) = form.calls([NOTHING], [0])
    try:
        make()(**call.arguments)
    except Exception as error:
        raise ValueError(f"reward {reward!r} cannot use args {dict(make.args)!r:.200}: {error}") from error


def _called(found: Callable[..., Any]) -> Callable[..., Any]:
    """What is called: of a class the instances' `__call__`."""
    if inspect.isclass(found) or not (inspect.isroutine(found) or isinstance(found, partial)):
        return found.__call__
    return found


def _parameters(reward: str, found: Callable[..., Any], args: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """Arguments still open, by name. Raises ValueError for args that do not fit, and for what is not called by keyword."""
    is_class = inspect.isclass(found)
    try:
        signature = inspect.signature(found)
        signature.bind(**args) if is_class else signature.bind_partial(**args)
        if is_class:
            signature = inspect.signature(found.__call__)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {reward!r} does not take args {dict(args)}: {error}{_arguments_of(found)}") from error
    parameters = dict(list(signature.parameters.items())[is_class:])  # without `self`
    parameters = {n: p for n, p in parameters.items() if is_class or n not in args}
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters.values()):
        raise ValueError(f"reward {reward!r} has positional-only arguments; rewards are called by keyword")
    return {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _wanted(reward: str, parameters: Mapping[str, inspect.Parameter], columns: Sequence[str]) -> tuple[str, ...]:
    """The arguments that a sample and its data row provide. Raises ValueError when one has no source."""
    known = {*OF_A_SAMPLE, *columns}
    for name, parameter in parameters.items():
        if name not in known and parameter.default is parameter.empty:
            raise ValueError(
                f"reward {reward!r} wants an argument {name!r}, which is neither one of {', '.join(OF_A_SAMPLE)}, nor a "
                f"field of the data ({', '.join(sorted(columns)) or 'none'}): rename it, or give it under `args`"
            )
    return tuple(name for name in parameters if name in known)


def _rules(reward: str, asynchronous: bool, batched: bool, asked: Mapping[str, Any]) -> CallRules:
    """Rules for a reward. Raises ValueError for those that contradict what it is."""
    if asynchronous and "isolation" in asked:
        raise ValueError(f"reward {reward!r} is asynchronous and runs in an event loop: leave `isolation` out")
    own = BUILT_IN[reward].rules if reward in BUILT_IN else {}
    merged = {**own, **({"isolation": "async"} if asynchronous else {}), **asked}
    isolation = Isolation(merged.get("isolation", "inline"))
    if isolation == Isolation.INLINE:
        for name in ("concurrency", "timeout", "retries"):
            if name in asked:
                raise ValueError(
                    f"reward {reward!r} runs inline, where nothing can interrupt or repeat it: `{name}` needs "
                    "`isolation: process` (or thread)"
                )
    if "batch_size" in asked and not batched:
        raise ValueError(
            f"reward {reward!r} takes one sample at a time: `batch_size` needs one with `completions` or `groups`"
        )
    return CallRules(**{**asdict(DEFAULTS[isolation]), **merged, "isolation": isolation})
