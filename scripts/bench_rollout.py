"""Sampling with vLLM servers: speed, balance, weight pushes, lookahead, memory, and whether equal batches come out equal.

    python scripts/bench_rollout.py [--only throughput,balance,sync,lookahead,memory,repeat] [--model 25m|shipped]

What is compared takes turns within one run, so that other work on the machine meets both; ratios are taken round by round.

throughput  One server through `VllmSampler`, against vLLM's offline class in a process of its own: the same requests, seeds,
            threads, cache and options; both make texts and log-probabilities. Beside them transformers generation. `even`:
            nothing stops a sample before `--tokens`. `uneven`: some tokens do, four times as many tokens at the latest.
balance     Two servers, uneven prompts and completions: wall time against that of the same requests dealt out by hindsight
            (longest first, by true numbers of tokens), and against the mean time that a server had something to do.
            `at_once`: all samples are in flight from the start, as by default. `queued`: an eighth of them per server.
sync        A verified push of weights as a share of a whole step; TRL's `step_time`, also given, lacks the optimiser step.
lookahead   Steps whose sampling and whose training each sleep `--delay` seconds, with and without lookahead.
memory      Largest resident memory of every process: one learner, two under ZeRO-2, two under ZeRO-3, each with a server.
repeat      Equal batches: share of samples with other tokens, and the largest difference of log-probabilities before them.

Words go to stderr, and so does all else that is said; the last line of stdout is a JSON object. Times are in seconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `paretune` does

# ruff: noqa: E402
import aiohttp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.build import locate_model
from rollout.arithmetic import expressions
from rollout.client import Server
from rollout.local import LocalSampler
from rollout.publish import Follower
from rollout.sampler import SamplingParams
from rollout.server import ServerOptions
from rollout.types import Prompt, Sample
from rollout.vllm import Limits, VllmSampler, _seeds
from rollout.workers import LocalWorkers

GROUP = 8  # samples per prompt
CACHE_GIB = 1.5  # of every server: 256 sequences of the larger model take 1 GiB or a little more
CORES = len(os.sched_getaffinity(0))
params_of = partial(SamplingParams, samples_per_prompt=GROUP, log_probs=True)  # as training asks for them
PARTS = ("throughput", "balance", "sync", "lookahead", "memory", "repeat")  # those not here: `bench_rollout_runs`


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    model: str
    rounds: int
    tokens: int
    samples: int
    delay: float
    folder: Path

    @property
    def policy(self) -> str:
        """Folder of the policy; one of random weights is made when it is first asked for."""
        if self.model == "shipped":
            return locate_model("builtin:arithmetic")
        if not (self.folder / "policy").exists():
            from scripts.bench_probe import random_policy

            random_policy(self.folder, self.model)
        return str(self.folder / "policy")

    @property
    def context(self) -> int:
        """Tokens of a sequence: the shipped policy's, or a little more than the longest ones take."""
        return 256 if self.model == "shipped" else 8 * self.tokens + 32

    @property
    def longest(self) -> int:
        """Tokens of an uneven completion at most."""
        return min(4 * self.tokens, self.context // 2)

    @property
    def stop(self) -> list[int]:
        """Tokens that end an uneven sample: the shipped policy's own, or some, each as likely as the other 257."""
        return [256] if self.model == "shipped" else list(range(65, 73))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts one after another, and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts, with commas")
    parser.add_argument("--model", choices=("25m", "shipped"), default="25m", help="25m: 26 million random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of an even sample")
    parser.add_argument("--samples", type=int, default=256, help="of a batch")
    parser.add_argument("--delay", type=float, default=3.0, help="of lookahead: seconds slept per batch and per update")
    parser.add_argument("--device-note", default="", help="what the figures were taken on")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, what was started is stopped
    figures: dict[str, Any] = vars(options) | {"cores": CORES, "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        setting = Setting(options.model, options.rounds, options.tokens, options.samples, options.delay, Path(folder))
        for name in chosen:
            start = time.perf_counter()
            part = globals().get(name) or getattr(import_module("scripts.bench_rollout_runs"), name)
            figures[name] = part(setting) | {"took": round(time.perf_counter() - start, 1)}
            say(f"{name}: {json.dumps(figures[name], indent=1)}")
    print(json.dumps(figures | {"load_after": os.getloadavg()[0]}))


# --- servers, prompts, figures ----------------------------------------------------------------------------------------


@contextmanager
def serve(setting: Setting, count: int) -> Iterator[LocalWorkers]:
    """Local servers of the policy, as a run starts them."""
    options = ServerOptions(
        model=setting.policy, revision="", dtype="float32", max_concurrent=256, max_model_len=setting.context,
        tensor_parallel=1, gpu_memory=0.9, cpu_cache_gib=CACHE_GIB, trust_remote_code=False, transfer="directory", args={},
    )  # fmt: skip
    workers = LocalWorkers(options, count, setting.folder / "workers", [[]] * count)
    workers.start()
    with closing(workers):
        yield workers


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


def requests_of(sampler: VllmSampler, prompts: Sequence[Prompt], params: SamplingParams) -> list[dict[str, Any]]:
    """What the sampler would ask its servers for."""
    rows = zip(prompts, _seeds(len(prompts), params), strict=True)
    return [sampler._request(prompt, seed, params) for prompt, seeds in rows for seed in seeds]


def drawn(sampler: Any, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[float, list[Sample]]:
    """A batch and its seconds."""
    start = time.perf_counter()
    groups = sampler.sample(prompts, params)
    return time.perf_counter() - start, [sample for group in groups for sample in group.samples]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of two series, pair by pair."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def in_turn(names: Sequence[str], round_number: int) -> list[str]:
    """To and fro."""
    return list(names) if round_number % 2 == 0 else list(reversed(names))


def say(text: str) -> None:
    """To stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- throughput -------------------------------------------------------------------------------------------------------


def throughput(setting: Setting) -> dict[str, Any]:
    """Tokens per second of the three ways to sample."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(setting.policy), AutoTokenizer.from_pretrained(setting.policy)
    prompts, cases = real_prompts(setting), {"even": ([], setting.tokens), "uneven": (setting.stop, setting.longest)}
    speeds, same = {case: defaultdict(list) for case in cases}, []
    with offline(setting) as engine, serve(setting, 1) as workers:
        for i in range(-1, setting.rounds):  # the first round is a warm-up
            for case, (stop, tokens) in cases.items():
                params, found = params_of(max_tokens=tokens if i >= 0 else 4, seed=i + 1), {}
                server = sampler_on(setting, workers, 1, stop)
                requests = requests_of(server, prompts, params)
                samplers = {"server": server, "transformers": LocalSampler(lambda: nullcontext(model), tokenizer, stop, 256)}
                for name in in_turn(["server", "offline", "transformers"], i):
                    forget(server)
                    seconds, samples = engine(requests) if name == "offline" else drawn(samplers[name], prompts, params)
                    found[name] = [tuple(sample.token_ids) for sample in samples]
                    say(f"round {i}, {case}, {name}: {sum(map(len, found[name]))} tokens in {seconds:.2f} s")
                    if i >= 0:
                        speeds[case][name].append(sum(map(len, found[name])) / seconds)
                same.append(statistics.mean(a == b for a, b in zip(found["server"], found["offline"], strict=True)))
    return {
        "threads": torch.get_num_threads(),
        "equal_samples_server_offline": min(same),
    } | {
        case: {
            "tokens_per_s": {name: spread(values) for name, values in of_case.items()},
            "server_to_offline": ratios(of_case["server"], of_case["offline"]),
            "server_to_transformers": ratios(of_case["server"], of_case["transformers"]),
        }
        for case, of_case in speeds.items()
    }


@contextmanager
def offline(setting: Setting) -> Iterator[Callable[[list[dict[str, Any]]], tuple[float, list[Any]]]]:
    """vLLM's offline class in a process of its own, which works only while it is asked to; gives seconds and samples."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=offline_engine, args=(there, setting.policy, setting.context))
    threads = {"OMP_NUM_THREADS": str(CORES), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # as `rollout.server` sets them
    with patch.dict(os.environ, threads | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}):
        process.start()
    there.close()

    try:
        here.recv()  # it is ready
        yield lambda requests: here.send(requests) or here.recv()
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
            samples = [SimpleNamespace(token_ids=tuple(output.outputs[0].token_ids)) for output in outputs]
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
                requests = requests_of(sampler, prompts, params)
                with watched(sampler, walls["ours"], busy["ours"]):
                    samples = drawn(sampler, prompts, params)[1]
                costs = [len(r["prompt"]) + len(s.token_ids) for r, s in zip(requests, samples, strict=True)]
                with watched(sampler, walls["hindsight"], busy["hindsight"]):
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

    async def complete(self: Server, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> Mapping[str, Any]:
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
    """Send every request to the server that the true costs assign it to."""
    shares = longest_first(costs, len(sampler.servers))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, limit_per_host=concurrent)) as session:
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


if __name__ == "__main__":
    main()
