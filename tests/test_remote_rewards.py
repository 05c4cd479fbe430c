"""Rewards over HTTP, and the server of them: real requests to a real server in this process."""

import asyncio
import json
import threading
from contextlib import contextmanager

import aiohttp
import pytest
from aiohttp import web

from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.http import from_json, to_json
from rewards.server import make_app
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

KEY = "a secret"


@contextmanager
def running(app: web.Application):
    """Serves on a free port of this machine; gives the url."""
    loop, started, ports = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        started.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    started.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def bus_of(reward: str, columns=(), args=None, rules=None) -> RewardBus:
    objective = Objective("o", True, (0.0, 1.0), Missing.NEUTRAL)
    return RewardBus({"o": load_component(reward, args or {}, columns, rules or {})}, [objective])


def served(**rewards: RewardBus) -> web.Application:
    return make_app({name: (bus._objectives[0], bus) for name, bus in rewards.items()}, KEY)


@pytest.fixture
def remote(monkeypatch):
    """A bus that asks a server for one of its objectives."""
    monkeypatch.setenv("PARETUNE_REWARDS_KEY", KEY)
    buses = []

    def make(url: str, objective: str, **rules) -> RewardBus:
        buses.append(bus_of("remote", args={"url": url, "objective": objective}, rules={"retries": 0} | rules))
        return buses[-1]

    yield make
    for bus in buses:
        bus.close()


def group(*texts: str, **columns) -> SampleGroup:
    samples = tuple(Sample((7,) * len(text), (), FinishReason.STOP, 0, text) for text in texts)
    return SampleGroup(Prompt("p", "ask", (1,), columns), samples)


def test_values_are_those_of_the_reward_itself(remote):
    groups = [group("it is 3", "it is 4", answer=3), group("5", answer=5)]
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        matrix = remote(url, "right", batch_size=2).score(groups)
    assert matrix.raw_NK[:, 0].tolist() == [1, 0, 1]
    assert matrix.errors == {}


def test_what_has_no_value_there_has_none_here_and_the_reason_comes_along(remote):
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        matrix = remote(url, "right").score([group("3", answer="none"), group("3", answer=3)])
    assert matrix.missing_NK[:, 0].tolist() == [True, False]
    assert "RemoteError: ValueError: the stated answer 'none' holds no number" in matrix.errors[0, 0]


def test_requests_that_wait_are_scored_together(remote):
    """Each call asks for one group; while the first is scored, the others gather."""
    from tests import odd_rewards

    odd_rewards.reset()
    with running(served(slow=bus_of("tests.odd_rewards:slow_of_groups"))) as url:
        matrix = remote(url, "slow", batch_size=1).score([group("a" * n) for n in range(8)])
    assert matrix.raw_NK[:, 0].tolist() == pytest.approx([n / 10 for n in range(8)])
    assert sum(odd_rewards.attempts.values()) == 8
    assert len(odd_rewards.attempts) <= 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (web.json_response({"values": [0.5]}), "returned 1 values for 2 samples"),
        (web.json_response({"value": 3}), "answered without values"),
        (web.json_response([1, 2]), "answered without values"),
        (web.Response(text="<html>"), "did not answer with JSON: '<html>'"),
        (web.Response(status=503, text="busy"), "answered 503: busy"),
        (web.json_response({"values": ["much", "nan"]}), "not a number: 'much'"),
        (web.json_response({"values": [7, None]}), "7 is outside its bounds"),
    ],
)
def test_answers_of_another_form_are_missing_with_a_reason(remote, answer, reason):
    app = web.Application()

    async def say(request):
        return web.Response(body=answer.body, status=answer.status, content_type=answer.content_type)

    app.add_routes([web.post("/v1/score", say)])
    with running(app) as url:
        matrix = remote(url, "o").score([group("a", "b")])
    assert matrix.missing_NK.all()
    assert reason in matrix.errors[0, 0]


def test_nobody_there_is_a_connection_error(remote):
    matrix = remote("http://127.0.0.1:9", "o").score([group("a")])
    assert matrix.errors[0, 0].startswith("ConnectionError: http://127.0.0.1:9/v1/score")


REMOTE, JUDGE = {"objective": "o", "key_variable": ""}, {"model": "m", "rubric": "is it?", "key_variable": ""}


@pytest.mark.parametrize(("reward", "args"), [("remote", REMOTE), ("judge", JUDGE), ("pooling", {"model": "m"})])
def test_a_service_that_is_not_there_is_said_when_asked_for(reward, args, monkeypatch):
    def ready(url: str) -> None:
        load_component(reward, {"url": url} | args, [], {}).ready()

    way_out = r".*: start (it by `paretune rewards serve`|the server), or mend `url`$"
    with pytest.raises(ValueError, match=f"^there is no service at http://127.0.0.1:9 .*127.0.0.1:9{way_out}"):
        ready("http://127.0.0.1:9")
    with running(web.Application()) as url:  # it answers 404: somebody is there
        ready(url)
    for answer, reason in ((behind_a_proxy, "answered 502"), (silent, "TimeoutError")):
        monkeypatch.setattr("rewards.endpoint.READY_TIMEOUT", 0.2)
        app = web.Application()
        app.add_routes([web.get("/{any:.*}", answer)])
        with running(app) as url, pytest.raises(ValueError, match=f"{reason}.*{way_out}"):
            ready(url)


async def behind_a_proxy(request):
    return web.Response(status=502)


async def silent(request):
    await asyncio.sleep(1)


def test_a_wrong_key_is_said_when_asked_for(monkeypatch):
    monkeypatch.setenv("PARETUNE_REWARDS_KEY", KEY)
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        load_component("remote", {"url": url, "objective": "right"}, [], {}).ready()
        monkeypatch.setenv("PARETUNE_REWARDS_KEY", "another")
        component = load_component("remote", {"url": url, "objective": "right"}, [], {})
        with pytest.raises(ValueError, match=f"^the service at {url} refuses the key of PARETUNE_REWARDS_KEY$"):
            component.ready()
        component = load_component("judge", {"url": url, **JUDGE}, [], {})
        with pytest.raises(ValueError, match=f"^the service at {url} wants a key: give key_variable$"):
            component.ready()


def test_a_wrong_name_is_said_when_asked_for(monkeypatch):
    monkeypatch.setenv("PARETUNE_REWARDS_KEY", KEY)
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        component = load_component("remote", {"url": url, "objective": "rihgt"}, [], {})
        with pytest.raises(ValueError, match=f"^{url} has no objective 'rihgt'; there are right$"):
            component.ready()


def test_a_wrong_key_and_a_wrong_name_are_told_apart(remote, monkeypatch):
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        assert "no objective 'rihgt'; there are right" in remote(url, "rihgt").score([group("a", answer=1)]).errors[0, 0]
        monkeypatch.setenv("PARETUNE_REWARDS_KEY", "another")
        assert "401: " in remote(url, "right").score([group("a", answer=1)]).errors[0, 0]


def test_a_key_that_is_not_set_is_said_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("PARETUNE_REWARDS_KEY", raising=False)
    with pytest.raises(ValueError, match="PARETUNE_REWARDS_KEY, which is not set"):
        load_component("remote", {"url": "http://localhost:1", "objective": "o"}, [], {})
    with pytest.raises(ValueError, match=r"'localhost:1' is not of the form http://host:port"):
        load_component("remote", {"url": "localhost:1", "objective": "o", "key_variable": ""}, [], {})


def ask(url: str, route: str, body: str = "", key: str = KEY) -> tuple[int, dict]:
    async def get() -> tuple[int, dict]:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
            call = session.post(url + route, data=body) if body else session.get(url + route)
            async with call as answer:
                return answer.status, await answer.json()

    return asyncio.run(get())


def test_the_server_says_what_it_has_and_refuses_what_it_cannot_read():
    with running(served(right=bus_of("numeric_answer", ["answer"]))) as url:
        assert ask(url, "/health", key="")[0] == 200
        assert ask(url, "/v1/objectives", key="")[0] == 401
        assert ask(url, "/v1/objectives")[1] == {"right": {"bounds": [0, 1], "direction": "maximize"}}
        for body in ("no json", "[]", "{}", json.dumps({"objective": "right", "groups": [{"prompt": "a"}]})):
            status, answer = ask(url, "/v1/score", body)
            assert status == 400, body
            assert "groups" in answer["error"]


def test_groups_travel_whole():
    truncated = Sample((1, 2), (), FinishReason.LENGTH, 0, "caf\u00e9 \ud800")
    before = SampleGroup(Prompt("p", "ask", (1,), {"answer": [1, "x"]}), (truncated,))
    after = from_json(json.loads(json.dumps(to_json(before))))
    assert after.samples == before.samples
    assert (after.prompt.text, after.prompt.columns) == ("ask", {"answer": [1, "x"]})
