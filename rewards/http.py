"""Rewards of another process or machine, over HTTP.

A request asks for one objective of some sample groups:

    POST URL/v1/score
    {"objective": "harmless",
     "groups": [{"prompt": "...", "columns": {"answer": 3},
                 "samples": [{"text": "...", "token_ids": [1, 2], "truncated": false}, ...]}, ...]}

and is answered with one value per sample, in their order, null where there is none, and the reasons of these by place:

    {"values": [0.5, null, ...], "errors": {"1": "TimeoutError: ..."}}

A service may say what it has, and is then asked before a run begins:

    GET URL/v1/objectives    ->    {"harmless": {"bounds": [0.0, 1.0], "direction": "maximize"}, ...}

`paretune rewards serve` answers so; anything else that does may take its place.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rewards.endpoint import Endpoint, EndpointError
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

SCORE, OBJECTIVES = "/v1/score", "/v1/objectives"


class RemoteReward:
    """A reward that is asked for over HTTP.

    Args:
        url: Of the service, without `/v1/score`.
        objective: Name of the objective there.
        key_variable: Environment variable that holds the service's key; empty where it wants none.
    """

    def __init__(self, url: str, objective: str, key_variable: str = "PARETUNE_REWARDS_KEY"):
        self._endpoint = Endpoint(url, key_variable)
        self._objective = objective

    async def __call__(self, groups: Sequence[SampleGroup]) -> list[float | Exception | None]:
        """Values of all samples in a row. Raises EndpointError for an answer of another form."""
        answer = await self._endpoint.post(SCORE, {"objective": self._objective, "groups": list(map(to_json, groups))})
        try:
            values, errors = list(answer["values"]), dict(answer.get("errors", {}))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise EndpointError(f"{self._endpoint.url}{SCORE} answered without values: {answer!r:.200}") from error
        return [RemoteError(errors[str(n)]) if str(n) in errors else value for n, value in enumerate(values)]

    async def ready(self) -> None:
        """Raise ValueError when the service is not there, wants another key, or says that it has no such objective."""
        way_out = "start it by `paretune rewards serve`, or mend `url`"
        status, text = await self._endpoint.find(OBJECTIVES, way_out)
        if status == 200 and self._objective not in (there := _names(text)):
            raise ValueError(f"{self._endpoint.url} has no objective {self._objective!r}; there are {', '.join(there)}")

    async def close(self) -> None:
        """Close the connections."""
        await self._endpoint.close()


def _names(text: str) -> Sequence[str]:
    """Objectives that an answer lists. Raises ValueError for an answer of another form."""
    with suppress(ValueError, RecursionError):
        if isinstance(listed := json.loads(text), dict):
            return list(listed)
    raise ValueError(f"{OBJECTIVES} is answered with something else than a table of objectives: {text!r:.200}")


class RemoteError(RuntimeError):
    """Why a service has no value for a sample."""


def to_json(group: SampleGroup) -> dict[str, Any]:
    """A group as it travels."""
    samples = [
        {"text": s.text, "token_ids": list(s.token_ids), "truncated": s.finish_reason == FinishReason.LENGTH}
        for s in group.samples
    ]
    return {"prompt": group.prompt.text, "columns": dict(group.prompt.columns), "samples": samples}


def from_json(data: Mapping[str, Any]) -> SampleGroup:
    """The group of `to_json`; prompts come without id and token ids. Raises ValueError that says what is missing."""
    try:
        samples = tuple(
            Sample(
                tuple(map(int, sample.get("token_ids", ()))),
                (),
                FinishReason.LENGTH if sample.get("truncated") else FinishReason.STOP,
                0,
                str(sample["text"]),
            )
            for sample in data["samples"]
        )
        return SampleGroup(Prompt("", str(data["prompt"]), (), dict(data.get("columns", {}))), samples)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a group is {{prompt, columns, samples: [{{text, token_ids, truncated}}]}}: {error!r}") from error
