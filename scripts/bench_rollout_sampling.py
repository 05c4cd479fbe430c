"""The parts of `bench_rollout.py` that only sample: throughput, balance, and whether equal batches come out equal."""

import asyncio
import multiprocessing
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import aiohttp
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout.arithmetic import expressions
from rollout.client import Server
from rollout.local import LocalSampler
from rollout.publish import Follower
from rollout.sampler import SamplingParams
from rollout.types import Prompt, Sample
from rollout.vllm import Limits, VllmSampler
from rollout.workers import LocalWorkers
from scripts.bench_rollout_common import CACHE_GIB, CORES, GROUP, Setting, in_turn, ratios, say, serve, spread

params_of = partial(SamplingParams, samples_per_prompt=GROUP, log_probs=True)  # as training asks for them


# --- samplers, prompts ------------------------------------------------------------------------------------------------


def sampler_on(setting: Setting, workers: LocalWorkers, count: int, stop: list[int], concurrent: int = 256) -> VllmSampler:
    """Our sampler on the first `count` servers."""
    decode = partial(AutoTokenizer.from_pretrained(setting.policy).batch_decode, skip_special_tokens=True)
    servers = [Server(url, workers.key, 600.0) for url in workers.urls[:count]]
    for server in servers:
        server.carry("bench-0")
    return VllmSampler(servers, Follower(), decode, stop, Limits(concurrent, 600.0), "bench")


def forget(sampler: VllmSampler) -> None:
    """Drop cached prefixes: a batch shall not profit from the one before."""
    for server in sampler.servers:
        server.post("/reset_prefix_cache")


def real_prompts(setting: Setting) -> list[Prompt]:
    """Expressions of the built-in task, for a batch."""
    tokenizer, rows = AutoTokenizer.from_pretrained(setting.policy), expressions("train", -(-setting.samples // GROUP))
    return [Prompt(row["id"], row["prompt"], tuple(tokenizer(row["prompt"])["input_ids"]), row) for row in rows]


def uneven_prompts(setting: Setting, seed: int) -> list[Prompt]:
    """Random bytes, of lengths that a lognormal distribution gives: the median 24, one in forty over 170."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(24), 1.0, -(-setting.samples // GROUP)).clip(4, setting.context - setting.longest)
    return [Prompt(str(i), "", tuple(rng.integers(256, size=int(n)).tolist()), {}) for i, n in enumerate(lengths)]


def drawn(sampler: Any, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[float, list[Sample]]:
    """A batch and its seconds."""
    start = time.perf_counter()
    groups = sampler.sample(prompts, params)
    return time.perf_counter() - start, [sample for group in groups for sample in group.samples]


# --- throughput -------------------------------------------------------------------------------------------------------


def throughput(setting: Setting) -> dict[str, Any]:
    """Our sampler on one server, against vLLM's offline class."""
    with offline(setting) as (engine, pid), serve(setting, 1) as workers:
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        return race(
            setting, workers, "offline", lambda sampler, prompts, params: engine(sampler._requests(prompts, params)), tree
        )


def transformers(setting: Setting) -> dict[str, Any]:
    """Our sampler on one server, against transformers' generation."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(setting.policy), AutoTokenizer.from_pretrained(setting.policy)

    def draw(sampler: VllmSampler, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[float, list[Sample]]:
        return drawn(LocalSampler(lambda: nullcontext(model), tokenizer, sampler._stop, 256), prompts, params)

    with serve(setting, 1) as workers:
        return race(setting, workers, "transformers", draw, [os.getpid()])


def race(setting: Setting, workers: LocalWorkers, other: str, draw: Callable, pids: Sequence[int]) -> dict[str, Any]:
    """Tokens per second and per second of a processor by our sampler and another way, which the processes `pids` go."""
    prompts, cases = real_prompts(setting), {"even": ([], setting.tokens), "uneven": (setting.stop, setting.longest)}
    used = {"server": [os.getpid(), *workers.pids(0)], other: pids}
    figures, same = {}, []
    for case, (stop, tokens) in cases.items():
        server, speeds, by_processor = sampler_on(setting, workers, 1, stop), defaultdict(list), defaultdict(list)
        ways = {"server": drawn, other: draw}
        for i in range(-1, setting.rounds):  # the first round is a warm-up
            params, found = params_of(max_tokens=tokens if i >= 0 else 4, seed=i + 1), {}
            for name in in_turn(list(ways), i):
                forget(server)
                before = processor_seconds(used[name])
                seconds, samples = ways[name](server, prompts, params)
                busy = processor_seconds(used[name]) - before
                found[name] = [tuple(sample.token_ids) for sample in samples]
                total = sum(map(len, found[name]))
                say(f"round {i}, {case}, {name}: {total} tokens in {seconds:.2f} s, {busy:.2f} s of processors")
                if i >= 0:
                    speeds[name].append(total / seconds)
                    by_processor[name].append(total / busy)
            same.append(statistics.mean(a == b for a, b in zip(found["server"], found[other], strict=True)))
        figures[case] = {
            "tokens_per_s": {name: spread(values) for name, values in speeds.items()},
            f"server_to_{other}": ratios(speeds["server"], speeds[other]),
            f"server_to_{other}_by_processor_time": ratios(by_processor["server"], by_processor[other]),
        }
    return {"threads": torch.get_num_threads(), "equal_samples": min(same)} | figures


def processor_seconds(pids: Sequence[int]) -> float:
    """Processor time that processes have used so far, without their children."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


@contextmanager
def offline(setting: Setting) -> Iterator[tuple[Callable[[list[dict[str, Any]]], tuple[float, list[Any]]], int]]:
    """vLLM's offline class in a process of its own, which works only while it is asked to.

    Yields a function from requests to seconds and samples, and the process's id.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=offline_engine, args=(there, setting.policy, setting.context))
    threads = {"OMP_NUM_THREADS": str(CORES), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # as `rollout.server` sets them
    with patch.dict(os.environ, threads | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}):
        process.start()
    there.close()

    try:
        here.recv()  # it is ready
        yield (lambda requests: here.send(requests) or here.recv()), process.pid
    finally:
        here.close()  # at which it ends
        process.join(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def offline_engine(pipe: Any, model: str, context: int) -> None:
    """Body of that process."""
    os.setsid()
    os.dup2(2, 1)
    import vllm

    engine = vllm.LLM(  # as `rollout.server` says it
        model=model, dtype="float32", max_num_seqs=256, max_model_len=context, enforce_eager=True, seed=0,
        enable_chunked_prefill=False, max_num_batched_tokens=max(4096, context), disable_log_stats=True,
        kv_cache_memory_bytes=int(CACHE_GIB * 2**30), logprobs_mode="processed_logprobs", generation_config="vllm",
    )  # fmt: skip
    other = {"prompt", "return_token_ids"}
    pipe.send("ready")
    with suppress(EOFError):
        while requests := pipe.recv():
            engine.reset_prefix_cache()
            start = time.perf_counter()
            prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
            params = [vllm.SamplingParams(**{key: request[key] for key in request.keys() - other}) for request in requests]
            outputs = engine.generate(prompts, params, use_tqdm=False)
            samples = [SimpleNamespace(token_ids=tuple(one.token_ids)) for output in outputs for one in output.outputs]
            pipe.send((time.perf_counter() - start, samples))


# --- balance ----------------------------------------------------------------------------------------------------------


def balance(setting: Setting) -> dict[str, Any]:
    """Wall time of two servers against that of the best assignment known afterwards."""
    figures: dict[str, Any] = {}
    with serve(setting, 2) as workers:
        for case, concurrent in {"at_once": 256, "queued": max(1, setting.samples // 8)}.items():
            walls, busy = defaultdict(list), defaultdict(list)
            sampler = sampler_on(setting, workers, 2, setting.stop, concurrent)
            drawn(sampler, uneven_prompts(setting, 0)[:2], params_of(max_tokens=4, seed=0))  # warm-up
            for i in range(setting.rounds):
                prompts, params = uneven_prompts(setting, i), params_of(max_tokens=setting.longest, seed=i)
                requests = sampler._requests(prompts, params)
                made = iter(drawn(sampler, prompts, params)[1])
                costs = [len(r["prompt"]) + sum(len(next(made).token_ids) for _ in range(r["n"])) for r in requests]
                for name in in_turn(("ours", "hindsight"), i):
                    with watched(sampler, walls[name], busy[name]):
                        if name == "ours":
                            drawn(sampler, prompts, params)
                        else:
                            asyncio.run(by_hindsight(sampler, requests, costs, concurrent))
                say(f"round {i}, {case}: {walls['ours'][-1]:.2f} s, by hindsight {walls['hindsight'][-1]:.2f} s")
            figures[case] = {
                "in_flight_per_server": concurrent,
                "wall": {name: spread(values) for name, values in walls.items()},
                "ours_to_hindsight": ratios(walls["ours"], walls["hindsight"]),
                "wall_to_mean_busy": spread(busy["ours"]),
                "hindsight_wall_to_mean_busy": spread(busy["hindsight"]),
            }
    return figures


@contextmanager
def watched(sampler: VllmSampler, walls: list[float], busy: list[float]) -> Iterator[None]:
    """Note the time from the first request to the last answer, and its ratio to the mean of those of the servers."""
    spans: dict[str, list[float]] = defaultdict(list)
    original = Server.complete

    async def complete(self: Server, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        spans[self.url].append(time.perf_counter())
        answer = await original(self, session, request)
        spans[self.url].append(time.perf_counter())
        return answer

    forget(sampler)
    with patch.object(Server, "complete", complete):
        yield
    walls.append(max(map(max, spans.values())) - min(map(min, spans.values())))
    busy.append(walls[-1] / statistics.mean(max(times) - min(times) for times in spans.values()))


async def by_hindsight(sampler: VllmSampler, requests: Sequence[dict], costs: Sequence[int], concurrent: int) -> None:
    """Send every request to the server that the true costs assign it to, as many samples at a time as ours sends."""
    shares, at_once = longest_first(costs, len(sampler.servers)), max(1, concurrent // max(r["n"] for r in requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, limit_per_host=at_once)) as session:
        pairs = [(server, requests[i]) for server, share in zip(sampler.servers, shares, strict=True) for i in share]
        await asyncio.gather(*(server.complete(session, request) for server, request in pairs))


def longest_first(costs: Sequence[int], count: int) -> list[list[int]]:
    """Deal out jobs to `count` workers: the longest first, each to who has least."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: sum(costs[j] for j in share)).append(i)
    return shares


def repeat(setting: Setting) -> dict[str, Any]:
    """How far equal batches differ: on one server twice, and on one against two."""
    pairs: dict[str, list[tuple[float, float]]] = {"same_server": [], "one_against_two": []}
    prompts = real_prompts(setting)
    with serve(setting, 2) as workers:
        one, two = (sampler_on(setting, workers, count, []) for count in (1, 2))
        for i in range(setting.rounds):
            params = params_of(max_tokens=setting.tokens, seed=i)
            first, again, spread_out = (drawn(sampler, prompts, params)[1] for sampler in (one, one, two))
            pairs["same_server"].append(differences(first, again))
            pairs["one_against_two"].append(differences(first, spread_out))
    return {
        name: {"other_tokens": spread([a for a, _ in values]), "largest_log_prob_difference": max(b for _, b in values)}
        for name, values in pairs.items()
    }


def differences(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[float, float]:
    """Share of samples with other tokens; largest difference (nats) of log-probabilities of tokens up to there."""
    other, largest = 0, 0.0
    for a, b in zip(first, second, strict=True):
        other += a.token_ids != b.token_ids
        for x, y, p, q in zip(a.token_ids, b.token_ids, a.log_probs, b.log_probs, strict=False):
            if x != y:
                break
            largest = max(largest, abs(p - q))
    return other / len(first), largest
