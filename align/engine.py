"""From `rollout.engine` to a sampler: local vLLM servers are started by the main process, and all processes share them."""

import os
import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from align.build import PromptSets
from align.config import Config
from align.config.rollout_rules import is_loopback
from align.launch import told_to_use_cpu
from rollout.sampler import RolloutError, Sampler
from rollout.server import SERVERS_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.learner import Learner
    from align.loaded import LoadedPolicy
    from rollout.client import Server
    from rollout.publish import Leader
    from rollout.workers import LocalWorkers

ROOT = Path(__file__).resolve().parent.parent
ANOTHER_MODEL = "start it with the model of policy.model"
PROBES = ("The answer is 42.", " 3 + 4 = 7\n", "naïve café, 東京, \t{}[]<>")


def check_engine(config: Config) -> None:
    """Raise ValueError when the engine cannot be had on this machine."""
    engine = config.rollout.engine
    if engine.type != "vllm":
        return
    if (not engine.urls or engine.sync.type == "transfer") and find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine.type=vllm: vLLM is not installed: run `scripts/setup vllm`, or name running servers in "
            "rollout.engine.urls"
        )
    for url in engine.urls:
        try:
            urlsplit(url).port  # noqa: B018, raises
        except ValueError as error:
            raise ValueError(f"rollout.engine.urls: {url!r} is not of the form http://host:port: {error}") from error
    if engine.sync.type == "directory" and not Path(engine.sync.path).is_dir():
        raise ValueError(f"rollout.engine.sync.path: {engine.sync.path!r} is not a folder")


@dataclass(frozen=True)
class Engine:
    """Where samples come from, before there is a learner.

    Args:
        sampler: Makes the sampler around a learner, or a policy that is evaluated.
        close: Releases what was started, where no sampler was made.
    """

    sampler: Callable[["Learner | LoadedPolicy"], Sampler]
    close: Callable[[], None]


def open_engine(
    config: Config, prompts: PromptSets, tokenizer: "PreTrainedTokenizerBase", model: str, folder: Path
) -> Engine:
    """Start or find what samples.

    Args:
        config: Says which engine.
        prompts: Decide how long a context is needed.
        tokenizer: The policy's.
        model: Folder or hub name of the policy.
        folder: The run's; the servers' logs go there.

    Raises:
        RolloutError: In every process, when a server cannot be started, or is not fit for this policy.
    """
    if config.rollout.engine.type == "transformers":
        from rollout.local import LocalSampler

        size = config.rollout.engine.batch_size
        return Engine(lambda learner: LocalSampler(learner.policy, tokenizer, learner.eos_token_ids, size), lambda: None)
    return _Servers(config, prompts, tokenizer, model, folder).engine()


class _Servers:
    """vLLM servers of a run, as one learner process sees them."""

    def __init__(self, config: Config, prompts: PromptSets, tokenizer: "PreTrainedTokenizerBase", model: str, folder: Path):
        from align.together import from_main, together

        self._config = config
        self._options = config.rollout.engine
        self._tokenizer = tokenizer
        self._stack = ExitStack()
        self._workers: LocalWorkers | None = None
        longest = max(len(prompt.token_ids) for prompt in (*prompts.train, *prompts.evaluation))
        self._context = longest + config.rollout.max_tokens
        urls, key, self._run = from_main(lambda: self._found(model, folder))
        self.servers = tuple(self._server(url, key) for url in urls)
        try:
            together(self._check)
        except BaseException:
            self._stack.close()
            raise

    def engine(self) -> Engine:
        """See `Engine`."""
        return Engine(self._sampler, self._stack.close)

    def _found(self, model: str, folder: Path) -> tuple[Sequence[str], str, str]:
        """Addresses, key, and a name for this run's versions; in the main process."""
        run = secrets.token_hex(4)
        if self._options.urls:
            self._wait_for_others()
            return tuple(self._options.urls), os.environ.get(SERVERS_KEY, ""), run
        from rollout.workers import LocalWorkers

        cpu = on_cpu(self._config)
        workers = LocalWorkers(
            server_options(self._config, model, self._context),
            self._options.workers,
            folder / "workers",
            placement(self._config, cpu),
            restarts=self._options.restarts,
            start_timeout=self._options.start_timeout,
        )
        self._stack.callback(workers.close)
        workers.start()
        self._workers = workers
        return workers.urls, workers.key, run

    def _wait_for_others(self) -> None:
        """Wait until the servers that somebody else starts answer. Raises RolloutError when one does not in time."""
        deadline = time.monotonic() + self._options.start_timeout
        for url in self._options.urls:
            self._server(url, os.environ.get(SERVERS_KEY, "")).wait(deadline - time.monotonic())

    def _server(self, url: str, key: str) -> "Server":
        """One server. Where it is somebody else's to start, its errors say how."""
        from rollout.client import Server

        if not self._options.urls:
            return Server(url, key, self._options.request_timeout)
        parts = urlsplit(url)
        words = ["paretune", "worker", self._config.policy.model]
        words += [] if is_loopback(parts.hostname) else ["--host", "0.0.0.0"]
        words += ["--port", str(parts.port)] if parts.port else []
        words += ["--sync", "transfer"] if self._options.sync.type == "transfer" else []
        advice = f"start it (again) by `{shlex.join(words)}`, with the same {SERVERS_KEY}"
        return Server(url, key, self._options.request_timeout, advice)

    def _check(self) -> None:
        """Raise RolloutError when a server has another vocabulary or tokenizer, or too small a context."""
        vocabulary = list(range(len(self._tokenizer)))
        for server in self.servers:
            context = server.context()
            if context < self._context:
                raise RolloutError(
                    f"{server.url} has a context of {context} tokens; prompts and rollout.max_tokens need {self._context}: "
                    "start it with a larger --max-model-len"
                )
            here, there = self._tokenizer.decode(vocabulary), server.detokenize(vocabulary)
            if here != there:
                same = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(there))
                raise RolloutError(
                    f"{server.url} has another vocabulary than the policy: its tokens, one after another, read "
                    f"{there[same : same + 20]!r} where those here read {here[same : same + 20]!r}; {ANOTHER_MODEL}"
                )
            for text in PROBES:
                here, there = self._tokenizer(text, add_special_tokens=False)["input_ids"], server.tokenize(text)
                if list(here) != list(there):
                    raise RolloutError(
                        f"{server.url} has another tokenizer than the policy: {text!r} is {there[:12]} there and "
                        f"{list(here)[:12]} here; {ANOTHER_MODEL}"
                    )

    def _sampler(self, learner: "Learner | LoadedPolicy") -> Sampler:
        from rollout.publish import Follower
        from rollout.vllm import Limits, VllmSampler

        rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
        start = rank * len(self.servers) // processes  # processes begin with different servers
        return VllmSampler(
            self.servers[start:] + self.servers[:start],
            self._leader(learner) if learner.accelerator.is_main_process else Follower(),
            lambda ids: self._tokenizer.batch_decode(ids, skip_special_tokens=True),
            learner.eos_token_ids,
            Limits(-(-self._options.max_concurrent // processes), self._options.start_timeout),
            self._run,
        )

    def _leader(self, learner: "Learner | LoadedPolicy") -> "Leader":
        from rollout.publish import Leader
        from rollout.transfer import DirectoryTransfer, NcclTransfer

        if self._options.sync.type == "transfer":
            transfer = NcclTransfer(self._options.sync.address, learner.describe_weights)
        else:
            transfer = DirectoryTransfer(self._shared_folder())
        return Leader(self.servers, transfer, self._restart, self._options.start_timeout, self._stack.close)

    def _shared_folder(self) -> Path:
        """A folder for weights, which goes with this process, whatever ends it."""
        from rollout.keeper import start_keeper, stop_keeper
        from rollout.server import child_environment

        folder = Path(tempfile.mkdtemp(prefix="paretune-", dir=self._options.sync.path))
        folder.chmod(0o755 if self._options.urls else 0o700)  # servers elsewhere may run under another user
        environment = child_environment(os.environ, {"PYTHONPATH": str(ROOT)})
        self._stack.callback(stop_keeper, start_keeper([], [str(folder)], environment, subprocess.DEVNULL))
        return folder

    def _restart(self, index: int, hangs: bool) -> None:
        if self._workers is None:
            return  # somebody else looks after it
        if hangs:
            self._workers.kill(index)
        print(f"vLLM worker {index} {'hangs' if hangs else 'is gone'}; starting it again", flush=True)
        self._workers.restart(index)


def on_cpu(config: Config) -> bool:
    """Whether servers compute on the CPU."""
    import torch

    return told_to_use_cpu(os.environ) or bool(config.trl.get("use_cpu")) or not torch.cuda.is_available()


def server_options(config: Config, model: str, context: int) -> Any:
    """What a local server is started with; its context is no longer than the run needs."""
    from rollout.server import ServerOptions

    engine = config.rollout.engine
    return ServerOptions(
        model=model,
        revision="" if Path(model).is_dir() else config.policy.revision,
        dtype=engine.dtype or config.policy.dtype,
        max_model_len=context,
        trust_remote_code=config.policy.trust_remote_code,
        sync=engine.sync.type,
        **engine.model_dump(include={"max_concurrent", "tensor_parallel", "gpu_memory", "cpu_cache_gib", "args"}),
    )


def placement(config: Config, cpu: bool) -> list[list[int]]:
    """GPUs of every local server; none on a CPU.

    Raises:
        RolloutError: Learner processes and servers together need more GPUs than there are.
    """
    engine = config.rollout.engine
    if cpu:
        return [[] for _ in range(engine.workers)]
    import torch

    needed = engine.workers * engine.tensor_parallel
    there, learners = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not engine.gpus and there < learners + needed:
        raise RolloutError(
            f"{learners} learner process(es) and rollout.engine workers={engine.workers} x tensor_parallel="
            f"{engine.tensor_parallel} need {learners + needed} GPUs and there are {there}: start fewer learners "
            "(--num_processes), or let them share by rollout.engine.gpus and gpu_memory"
        )
    if max(engine.gpus, default=0) >= there:
        raise RolloutError(f"rollout.engine.gpus={engine.gpus}: there are {there} GPUs, from 0 to {there - 1}")
    gpus = engine.gpus or list(range(there - needed, there))
    size = engine.tensor_parallel
    return [gpus[i * size : (i + 1) * size] for i in range(engine.workers)]
