"""Reward models behind the pooling routes of a vLLM server (0.31): /classify, /pooling and /score."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from math import isfinite, tanh
from typing import Any

from rewards.endpoint import Endpoint, EndpointError, EndpointRefused, disarmed, sendable

CLASSIFY, POOLING, SCORE = "/classify", "/pooling", "/score"
NUMBERS = {CLASSIFY: "probs", POOLING: "data", SCORE: "score"}  # route -> field of an entry of its answer
OF_TOKENS = {"last": lambda row: row[-1], "mean": lambda row: sum(row) / len(row), "min": min}
OWN_FIELDS = ("model", "input", "messages", "text_1", "text_2", "use_activation", "encoding_format")  # not free to choose
COMPLETION = "completion"
_FIELD = re.compile(r"\{(\w+)\}")


class Pooling:
    """The number that a reward model gives a completion: as it comes, or its sigmoid 1 / (1 + exp(-x)).

    What comes is a logit without limits (the objective's `bounds` must hold it), with `use_activation` what the model makes
    of it, such as probabilities. The model reads one text, made by `text`; or, with `chat`, a conversation of `query`
    (the user) and `text` (the assistant) in its own chat template; or, by `/score`, the pair of both.

    In `query` and `text`, `{completion}` and `{prompt}` (as the policy read it) stand for those, and other names in braces
    for fields of the data. `query` may be one field with a list of chat messages. Control tokens that a completion spells
    out are broken up; those of the data and of the templates are not.

    Args:
        url: Of the server, without a route.
        model: Name of the reward model there.
        route: /classify, /pooling or /score.
        chat: Ask with a conversation, one request per sample.
        query: Template of what the completion answers, by default `{prompt}`. Where a chat template has made the prompt,
            name the field that it was made from.
        text: Template of what is scored; by default `{prompt}{completion}`, or `{completion}` next to a query.
        head: Which of the model's outputs counts, from 0; needed where it has several.
        tokens: What stands for all tokens, where each has a number: `last`, `mean` or `min`.
        use_activation: Have the server apply the model's activation: sigmoid of one output, softmax of several.
        sigmoid: Apply one here.
        request: Further fields of the request, such as `{truncate_prompt_tokens: -1}`.
        key_variable: Environment variable that holds the server's key; empty where it wants none.

    Raises:
        ValueError: An argument is unusable, or the key is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        route: str = CLASSIFY,
        chat: bool = False,
        query: str = "",
        text: str = "",
        head: int | None = None,
        tokens: str = "last",
        use_activation: bool = False,
        sigmoid: bool = False,
        request: Mapping[str, Any] | None = None,
        key_variable: str = "",
    ):
        if route not in NUMBERS:
            raise ValueError(f"route={route!r} is none of {', '.join(NUMBERS)}")
        if chat and route == SCORE:
            raise ValueError(f"chat has no effect on {SCORE}, which takes pairs of texts: choose {CLASSIFY} or {POOLING}")
        if query and not chat and route != SCORE:
            raise ValueError(f"query={query!r} has no effect on {route} without chat: put it into `text`")
        if head is not None and head < 0:
            raise ValueError(f"head={head} is counted from 0")
        if tokens not in OF_TOKENS:
            raise ValueError(f"tokens={tokens!r} is none of {', '.join(OF_TOKENS)}")
        if sigmoid and use_activation:
            raise ValueError("sigmoid and use_activation together would squash values twice: choose one")
        if taken := [name for name in request or {} if name in OWN_FIELDS]:
            raise ValueError(f"request has {taken[0]!r}, which is not free to choose: leave it out")
        paired = chat or route == SCORE
        self._query = query or "{prompt}" if paired else ""
        self._text = text or ("{completion}" if paired else "{prompt}{completion}")
        if COMPLETION not in _FIELD.findall(self._text):
            raise ValueError(f"text={text!r} must hold {{completion}}, which is what is scored")
        if COMPLETION in _FIELD.findall(self._query):
            raise ValueError(f"query={query!r} holds {{completion}}, which belongs into `text`")
        self._route, self._chat, self._head, self._of_tokens = route, chat, head, OF_TOKENS[tokens]
        self._sigmoid = sigmoid
        self._fields = {"model": model, "use_activation": use_activation, **(request or {})}
        self._endpoint = Endpoint(url, key_variable)

    async def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | Exception]:
        """One value per completion; an exception for one that the server refuses while it takes others.

        Raises:
            ValueError: A template names a field that the data has not, or `head` does not fit the model.
            EndpointError: The server's answer is none, or has another form.
            ConnectionError: Nobody answers.
        """
        rows = [
            {name: values[n] for name, values in columns.items()} | {"prompt": prompts[n], COMPLETION: disarmed(completion)}
            for n, completion in enumerate(completions)
        ]
        if self._chat:
            return await self._each(rows)
        try:
            return await self._ask(rows)
        except EndpointRefused:
            if len(rows) == 1:
                raise
            return await self._each(rows)  # one that is too long must not cost the others their values

    async def _each(self, rows: Sequence[Mapping[str, Any]]) -> list[float | Exception]:
        answers = await asyncio.gather(*(self._ask([row]) for row in rows), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, EndpointRefused):
                raise answer
        return [answer if isinstance(answer, EndpointRefused) else answer[0] for answer in answers]

    async def _ask(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The values of some samples, by one request."""
        answer = await self._endpoint.post(self._route, {**self._fields, **self._inputs(rows)})
        try:
            return [self._value(entry) for entry in _entries(answer, len(rows), NUMBERS[self._route])]
        except EndpointError as error:
            raise EndpointError(self._endpoint.quote(f"{self._endpoint.url}{self._route} {error}")) from error

    def _inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = [fill(self._text, row) for row in rows]
        if self._chat:
            return {"messages": [*_messages(self._query, rows[0]), {"role": "assistant", "content": texts[0]}]}
        if self._route == SCORE:
            return {"text_1": [fill(self._query, row) for row in rows], "text_2": texts}
        return {"input": texts}

    def _value(self, found: Any) -> float:
        """The number that counts, of one number, those of the heads, or those of the heads at every token."""
        if isinstance(found, list) and found and all(isinstance(row, list) for row in found):
            number = self._of_tokens([self._of_heads(row) for row in found])
        else:
            number = self._of_heads(found if isinstance(found, list) else [found])
        return 0.5 + 0.5 * tanh(number / 2) if self._sigmoid else number  # the sigmoid, without overflow

    def _of_heads(self, numbers: Sequence[Any]) -> float:
        if not numbers or not all(type(number) in (int, float) and isfinite(number) for number in numbers):
            raise EndpointError(f"answered {numbers!r:.200} in place of finite numbers")
        if len(numbers) > 1 and self._head is None:
            raise ValueError(f"the model has {len(numbers)} outputs: choose one by `head`, from 0")
        if self._head is not None and self._head >= len(numbers):
            raise ValueError(f"the model has {len(numbers)} outputs, counted from 0, so that there is no head {self._head}")
        return float(numbers[self._head or 0])

    async def ready(self) -> None:
        """Raise ValueError when nobody is there."""
        await self._endpoint.find("/health", "start the server, or mend `url`")

    async def close(self) -> None:
        """Close the connections."""
        await self._endpoint.close()


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with the fields of a row in it, in one pass: what a field brings along is not filled again."""
    return sendable(_FIELD.sub(lambda found: str(_field(found[1], row)), template))


def _messages(template: str, row: Mapping[str, Any]) -> Sequence[Any]:
    alone = _FIELD.fullmatch(template)
    value = _field(alone[1], row) if alone else None
    return value if isinstance(value, list) else [{"role": "user", "content": fill(template, row)}]


def _field(name: str, row: Mapping[str, Any]) -> Any:
    if row.get(name) is None:
        raise ValueError(f"a template names {{{name}}}, and the data has no such field or nothing in it: {', '.join(row)}")
    return row[name]


def _entries(answer: Any, count: int, field: str) -> list[Any]:
    """A field of all entries of an answer, in the order of their samples. Raises EndpointError for another form."""
    try:
        by_index = {entry["index"]: entry[field] for entry in answer["data"]}
        if len(answer["data"]) != count:
            raise ValueError
        return [by_index[n] for n in range(count)]
    except (TypeError, KeyError, ValueError) as error:
        raise EndpointError(f"answered without {field!r} of {count} samples: {answer!r:.200}") from error
