"""Serves components over the schema of `rewards.http`, so that heavy ones live apart from the trainer."""

import asyncio
import hmac
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from rewards.bus import RewardBus
from rewards.http import OBJECTIVES, SCORE, from_json
from rewards.types import Objective, RewardMatrix
from rollout.types import SampleGroup

LARGEST_REQUEST = 256 * 2**20  # bytes


class Batcher:
    """Scores requests that arrive while another is scored together, in one call of the bus.

    Args:
        bus: Of one objective.
    """

    def __init__(self, bus: RewardBus):
        self.bus = bus
        self._waiting: list[tuple[Sequence[SampleGroup], asyncio.Future[RewardMatrix]]] = []
        self._lock = asyncio.Lock()  # one batch at a time

    async def score(self, groups: Sequence[SampleGroup]) -> RewardMatrix:
        """The matrix of some groups, (N, 1)."""
        answer: asyncio.Future[RewardMatrix] = asyncio.get_running_loop().create_future()
        self._waiting.append((groups, answer))
        async with self._lock:
            if not answer.done():  # else it was part of a batch while this waited for its turn
                await self._score_all()
        return answer.result()

    async def _score_all(self) -> None:
        batch, self._waiting = self._waiting, []
        matrix = await asyncio.to_thread(self.bus.score, [group for groups, _ in batch for group in groups])
        first = 0
        for groups, answer in batch:
            rows = range(first, first + sum(len(group.samples) for group in groups))
            first = rows.stop
            answer.set_result(part(matrix, rows))


def part(matrix: RewardMatrix, rows: range) -> RewardMatrix:
    """Some rows of a matrix."""
    errors = {(n - rows.start, k): why for (n, k), why in matrix.errors.items() if n in rows}
    return RewardMatrix(matrix.objectives, matrix.raw_NK[rows.start : rows.stop], errors)


def make_app(buses: Mapping[str, tuple[Objective, RewardBus]], key: str) -> web.Application:
    """The service.

    Args:
        buses: By the objective's name; each with that objective alone.
        key: What requests must bring as a bearer token, `/health` excepted; empty lets everybody in.
    """
    batchers = {name: Batcher(bus) for name, (_, bus) in buses.items()}

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if request.path != "/health" and key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            return web.json_response({"error": "wrong or missing key"}, status=401)
        return await handler(request)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def objectives(request: web.Request) -> web.Response:
        described = {
            name: {"bounds": list(objective.bounds), "direction": "maximize" if objective.maximize else "minimize"}
            for name, (objective, _) in buses.items()
        }
        return web.json_response(described)

    async def score(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            name, groups = body["objective"], [from_json(group) for group in body["groups"]]
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response({"error": f"the body is {{objective, groups: [...]}}: {error!r}"}, status=400)
        if name not in batchers:
            return web.json_response({"error": f"no objective {name!r}; there are {', '.join(batchers)}"}, status=404)
        matrix = await batchers[name].score(groups)
        values = [None if math.isnan(value) else value for value in matrix.raw_NK[:, 0].tolist()]
        return web.json_response({"values": values, "errors": {str(n): why for (n, _), why in matrix.errors.items()}})

    app = web.Application(middlewares=[guard], client_max_size=LARGEST_REQUEST)
    app.add_routes([web.get("/health", health), web.get(OBJECTIVES, objectives), web.post(SCORE, score)])
    return app
