"""The command and the environment of one vLLM server. Pure: starts nothing, imports no vLLM."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.server_guard import KEY_VARIABLE

SERVED_NAME = "policy"
SERVERS_KEY = "PARETUNE_VLLM_KEY"  # variable with the key of servers that no run has started
BACKENDS = {"directory": "directory", "transfer": "nccl"}  # vLLM's names of the ways that weights come
_DEVICES = "CUDA_VISIBLE_DEVICES"
_ROOT = Path(__file__).resolve().parent.parent
_SMALLEST_BATCH = 4096  # tokens; a CPU server takes whole prompts, so that its batch must hold the longest
RESERVED = (  # arguments of vLLM that would break what the trainer relies on
    *("model", "revision", "host", "port", "dtype", "max_num_seqs", "max_model_len", "tensor_parallel_size"),
    *("gpu_memory_utilization", "trust_remote_code", "logprobs_mode", "served_model_name", "worker_extension_cls"),
    *("weight_transfer_config", "middleware", "api_key", "root_path", "uds", "config"),
)
# What launchers tell their processes. vLLM would take its own rank and rendezvous from some of them.
_LAUNCHER_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
)
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "TORCH_NCCL_", "ROLE_", "FSDP_", "PMI_", "PMIX_", "OMPI_", "MV2_")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to serve a model.

    Args:
        model: Folder, or name on the hub.
        revision: Of the hub; the newest when empty.
        dtype: "float32", "bfloat16", "float16" or "auto".
        max_concurrent: Most sequences generated at once.
        max_model_len: Most tokens of a prompt with its completion; the model's own when 0.
        tensor_parallel: Devices that share one model.
        gpu_memory: Share of each device's memory to use, over 0 up to 1.
        cpu_cache_gib: GiB of the key-value cache on a CPU.
        trust_remote_code: Whether code that comes with the model may run.
        sync: How new weights get there: "directory" or "transfer".
        args: Further arguments of vLLM by name. A flag is a bool, a list several values, a table JSON.

    Raises:
        ValueError: `sync` is unknown, or `args` has something that is set otherwise.
    """

    model: str
    revision: str
    dtype: str
    max_concurrent: int
    max_model_len: int
    tensor_parallel: int
    gpu_memory: float
    cpu_cache_gib: float
    trust_remote_code: bool
    sync: str
    args: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.sync not in BACKENDS:
            raise ValueError(f"sync={self.sync!r} is neither of {', '.join(BACKENDS)}")
        for name in self.args:
            plain = name.lstrip("-").replace("-", "_")
            if plain.removeprefix("no_") in RESERVED:
                raise ValueError(
                    f"vLLM argument {name!r} cannot be given: it has an option of its own, or is not free to choose"
                )


def server_command(options: ServerOptions, host: str, port: int, cpu: bool) -> list[str]:
    """The command line of a server that generates samples and takes new weights. Holds no secret.

    Args:
        options: What to serve.
        host: Address to listen on.
        port: Port to listen on.
        cpu: Whether vLLM is its CPU build.
    """
    values = {
        "model": options.model,
        "revision": options.revision or None,
        "host": host,
        "port": port,
        "dtype": options.dtype,
        "max_num_seqs": options.max_concurrent,
        "max_model_len": options.max_model_len or None,
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": None if cpu else options.gpu_memory,
        "trust_remote_code": options.trust_remote_code or None,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "served_model_name": SERVED_NAME,
        "seed": 0,
        "worker_extension_cls": "rollout.vllm_worker.WeightsFromFiles",
        "weight_transfer_config": {"backend": BACKENDS[options.sync]},
        "disable_uvicorn_access_log": True,
        "disable_log_stats": True,
        "middleware": "rollout.server_guard.RequireKey",
        **(_on_cpu(options) if cpu else {}),
    }
    values |= {name.lstrip("-").replace("-", "_"): value for name, value in options.args.items()}
    arguments = [word for name, value in values.items() for word in _words(name, value)]
    return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *arguments]


def _on_cpu(options: ServerOptions) -> dict[str, Any]:
    # In chunks, vLLM 0.31 dies on a CPU with "CPU Generator does not use offset" at a request that has a seed of its own.
    whole = {"enable_chunked_prefill": False}
    if options.max_model_len:
        whole["max_num_batched_tokens"] = max(_SMALLEST_BATCH, options.max_model_len)
    # The argument takes bytes; vLLM's variable for it, VLLM_CPU_KVCACHE_SPACE, takes whole GiB only.
    return {"enforce_eager": True, "kv_cache_memory_bytes": int(options.cpu_cache_gib * 2**30), **whole}


def _words(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping):
        return [flag, json.dumps(dict(value))]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def server_environment(key: str, cpu: bool, threads: int, gpus: Sequence[int], options: ServerOptions) -> dict[str, str]:
    """What a server needs in its environment, to be added by `child_environment`.

    Args:
        key: What it asks callers for. Not an argument: those are shown to every user of the machine.
        cpu: Whether vLLM is its CPU build.
        threads: Threads to compute with, on a CPU.
        gpus: Devices to use, counted among those visible here; all of them when empty.
        options: What to serve.
    """
    values = {
        KEY_VARIABLE: key,
        "VLLM_SERVER_DEV_MODE": "1",  # pausing and taking weights
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(_ROOT),
    }
    if cpu:
        values["OMP_NUM_THREADS"] = str(threads)
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # `auto` would put every server on the same cores
    elif gpus:
        values[_DEVICES] = ",".join(map(str, gpus))
    return values


def child_environment(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher told this process, and with additions.

    Args:
        base: Usually os.environ.
        additions: Variables to set. PYTHONPATH comes in front of what is there, and the devices in CUDA_VISIBLE_DEVICES
            are counted among those that are visible here.
    """
    merged = {name: value for name, value in base.items() if not of_launcher(name)} | dict(additions)
    if "PYTHONPATH" in additions and base.get("PYTHONPATH"):
        merged["PYTHONPATH"] = os.pathsep.join([additions["PYTHONPATH"], base["PYTHONPATH"]])
    visible = [device.strip() for device in base.get(_DEVICES, "").split(",") if device.strip()]
    if visible and _DEVICES in additions:
        merged[_DEVICES] = ",".join(visible[int(device)] for device in additions[_DEVICES].split(","))
    return merged


def of_launcher(name: str) -> bool:
    """Whether a variable is one by which torchrun, accelerate or MPI tell a process its place."""
    return name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES)
