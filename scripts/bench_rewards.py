"""The reward bus: what it adds to the calls themselves, whether rewards wait at the same time, and hostile texts.

    python scripts/bench_rewards.py [--only overhead,endpoints,fuzz] [--rounds 5] [--texts 20000]

What is compared takes turns within one run; ratios are taken round by round.

overhead   4,096 samples on three trivial functions: the bus, against a plain loop that calls them with the same arguments.
endpoints  Three services that each take 200 ms an answer, 256 samples, 64 requests at once each: all three objectives,
           against the slowest of them alone. They listen on this machine, in a process of their own each.
fuzz       Every built-in reward on hostile texts (`tests/hostile.py`), a quarter of them with each of four seeds; models are
           tiny, and services answer from this process. Counts of values and of missing cells, the slowest call, and the
           largest resident memory (MiB) of this process and of its workers during each quarter. Stops at a value out of
           bounds or a call too late.

The last line of stdout is a JSON object; words go to stderr. Times are in seconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.types import Missing, Objective
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

DELAY = 0.2  # seconds that a service takes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts one after another, and print the JSON object."""
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "overhead": overhead,
        "endpoints": endpoints,
        "fuzz": fuzz,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="some of the parts, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=20_000, help="of the part fuzz")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(parts):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    figures: dict[str, Any] = {"rounds": options.rounds, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    for name in options.only.split(","):
        figures[name] = parts[name](options)
        print(f"{name}: {json.dumps(figures[name], indent=1)}", file=sys.stderr, flush=True)
    print(json.dumps(figures | {"load_after": os.getloadavg()[0]}))


def groups_of(count: int, size: int) -> list[SampleGroup]:
    """Groups of short texts."""
    samples = tuple(Sample((1,) * (i % 32), (), FinishReason.STOP, 0, f"it is {i}") for i in range(size))
    return [SampleGroup(Prompt(str(n), "ask", (1,), {"answer": n % size}), samples) for n in range(count)]


@contextmanager
def bus_of(rewards: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> Iterator[RewardBus]:
    """A bus of rewards, each with its args and the rules of its calls."""
    objectives = [Objective(f"o{k}", True, (0.0, 1.0), Missing.NEUTRAL) for k in range(len(rewards))]
    components = {f"o{k}": load_component(name, args, ["answer"], rules) for k, (name, args, rules) in enumerate(rewards)}
    with closing(RewardBus(components, objectives)) as bus:
        yield bus


def seconds(act: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- overhead ---------------------------------------------------------------------------------------------------------


def by_text(text: str) -> float:
    """Trivial."""
    return len(text) / 100


def by_tokens(token_ids: Sequence[int]) -> float:
    """Trivial."""
    return len(token_ids) / 100


def by_answer(text: str, answer: int) -> float:
    """Trivial, with a field of the data."""
    return float(text == f"it is {answer}")


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The bus against a plain loop."""
    groups = groups_of(512, 8)
    ours, plain = [], []

    def loop() -> list[list[float]]:
        samples = [(group.prompt.columns, sample) for group in groups for sample in group.samples]
        return [
            [by_text(text=sample.text) for _, sample in samples],
            [by_tokens(token_ids=sample.token_ids) for _, sample in samples],
            [by_answer(text=sample.text, answer=columns["answer"]) for columns, sample in samples],
        ]

    with bus_of([(f"scripts.bench_rewards:{name}", {}, {}) for name in ("by_text", "by_tokens", "by_answer")]) as bus:
        assert bus.score(groups).raw_NK.T.tolist() == loop()
        for i in range(4 * options.rounds):
            turns = [(ours, lambda: bus.score(groups)), (plain, loop)]
            for times, act in turns if i % 2 else turns[::-1]:
                times.append(seconds(act))
    return {
        "samples": 4096,
        "bus_s": spread(ours),
        "loop_s": spread(plain),
        "added_s": spread([a - b for a, b in zip(ours, plain, strict=True)]),
    }


# --- endpoints --------------------------------------------------------------------------------------------------------


def slow_service(pipe: Any) -> None:
    """Body of a process that answers every request for values after a while; sends its port."""
    from aiohttp import web

    async def score(request: web.Request) -> web.Response:
        groups = (await request.json())["groups"]
        await asyncio.sleep(DELAY)
        return web.json_response({"values": [0.5 for group in groups for _ in group["samples"]]})

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.post("/v1/score", score)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.to_thread(pipe.poll, None)  # until the other end is closed

    asyncio.run(serve())


def endpoints(options: argparse.Namespace) -> dict[str, Any]:
    """Three services at once against the slowest of them alone."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(3)]
    processes = [context.Process(target=slow_service, args=(there,), daemon=True) for _, there in pairs]
    for process in processes:
        process.start()
    urls = [f"http://127.0.0.1:{here.recv()}" for here, _ in pairs]
    groups, together, alone = groups_of(256, 1), [], []
    rewards = [
        ("remote", {"url": url, "objective": "o", "key_variable": ""}, {"batch_size": 1, "concurrency": 64}) for url in urls
    ]
    with (
        bus_of(rewards) as three,
        bus_of(rewards[:1]) as first,
        bus_of(rewards[1:2]) as second,
        bus_of(rewards[2:]) as third,
    ):
        buses = (first, second, third)
        for bus in (three, *buses):
            assert not bus.score(groups[:8]).errors  # connections are open
        for _ in range(options.rounds):
            together.append(seconds(lambda: three.score(groups)))
            alone.append(max(seconds(lambda bus=bus: bus.score(groups)) for bus in buses))
    for process in processes:
        process.terminate()
    return {
        "samples": 256,
        "at_once": 64,
        "ideal_s": 256 / 64 * DELAY,
        "three_s": spread(together),
        "slowest_alone_s": spread(alone),
        "ratio": spread([a / b for a, b in zip(together, alone, strict=True)]),
    }


# --- fuzz -------------------------------------------------------------------------------------------------------------


def fuzz(options: argparse.Namespace) -> dict[str, Any]:
    """Hostile texts through the built-in rewards."""
    from tests.fuzz_cases import all_cases
    from tests.test_reward_fuzz import SEED
    from tests.test_reward_fuzz import fuzz as put_to

    found: dict[str, dict[str, Any]] = {}
    memory, start = [], time.perf_counter()
    with TemporaryDirectory() as folder, all_cases(Path(folder)) as cases:
        for quarter in range(4):
            with watched_memory() as peaks:
                for name, facts in put_to(options.texts // 4, SEED + quarter, cases).items():
                    so_far = found.setdefault(name, {"values": 0, "missing": Counter(), "slowest_s": 0.0})
                    so_far["values"] += facts["values"]
                    so_far["missing"].update(facts["missing"])
                    so_far["slowest_s"] = max(so_far["slowest_s"], facts["slowest"])
            memory.append({kind: round(peak) for kind, peak in peaks.items()})
    return {"texts": options.texts, "took_s": time.perf_counter() - start, "memory_mib": memory, "rewards": found}


@contextmanager
def watched_memory() -> Iterator[dict[str, float]]:
    """Largest resident memory in MiB, of this process and of all below it together, looked at every half second."""
    peaks, done, here = {"here": 0.0, "workers": 0.0}, threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.5):
            workers = 0
            for child in here.children(recursive=True):
                with suppress(psutil.Error):
                    workers += child.memory_info().rss
            peaks["here"] = max(peaks["here"], here.memory_info().rss / 2**20)
            peaks["workers"] = max(peaks["workers"], workers / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
