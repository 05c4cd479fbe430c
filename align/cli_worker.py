"""`paretune worker`: one vLLM server in the foreground, for trainers on other machines."""

import argparse
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from align.launch import told_to_use_cpu

if TYPE_CHECKING:
    from rollout.client import Server


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune worker`: those of a server, under the names of `rollout.server.ServerOptions`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder or hub name: the policy that training starts from")
    add("--revision", default="", help="of a model on the hub (default: the newest)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8100, help="port to listen on (default: %(default)s)")
    add("--dtype", default="float32", help="of the weights: float32, bfloat16, float16 or auto (default: %(default)s)")
    add(
        "--max-concurrent",
        type=int,
        default=256,
        help="most sequences at once (default: %(default)s)",
    )
    add("--max-model-len", type=int, default=0, help="most tokens of prompt and completion (default: the model's own)")
    add(
        "--tensor-parallel",
        type=int,
        default=1,
        help="GPUs that share it (default: %(default)s)",
    )
    add("--gpu-memory", type=float, default=0.9, help="share of each GPU's memory to use (default: %(default)s)")
    cache = "key-value cache on a CPU (default: %(default)s)"
    add("--cpu-cache", dest="cpu_cache_gib", type=float, default=1.0, metavar="GIB", help=cache)
    add("--threads", type=int, default=0, help="threads to compute with on a CPU (default: one per core)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="what vLLM is built for (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="let code that comes with the model run")
    add(
        "--sync",
        choices=("directory", "transfer"),
        default="directory",
        help="how new weights arrive (default: %(default)s)",
    )
    add("--args", metavar="JSON", default="{}", help='further arguments of vLLM, such as \'{"quantization": "fp8"}\'')


def run_worker(options: argparse.Namespace) -> int:
    """Serve until the server ends, or this process does, which takes it along; the server's exit status.

    Raises:
        ValueError: vLLM is not installed, an argument is out of range, the port is taken, or others could reach a server
            without a key.
    """
    from align.build import locate_model  # after the command line has seen to it that these are ours
    from align.service_key import service_key
    from rollout.client import Server
    from rollout.keeper import start_keeper, stop_keeper
    from rollout.server import SERVERS_KEY, ServerOptions, child_environment, server_command, server_environment

    values = vars(options) | {"model": locate_model(options.model), "args": _further(options.args)}
    served = ServerOptions(**{field.name: values[field.name] for field in fields(ServerOptions)})
    _check_port(options.host, options.port)
    key = service_key(options.host, SERVERS_KEY, "whoever reaches this server can run code on it")
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed: run `scripts/setup vllm`")
    cpu = options.device == "cpu" or (options.device == "auto" and _on_cpu())
    threads = options.threads or len(os.sched_getaffinity(0))
    command = server_command(served, options.host, options.port, cpu)
    environment = child_environment(os.environ, server_environment(key, cpu, threads, (), served))
    environment.pop(SERVERS_KEY, None)  # the server has it under vLLM's name
    keeper = start_keeper(command, [], environment, None)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs are started deaf to it
        signal.signal(number, lambda *_: stop_keeper(keeper))
    name = f"[{options.host}]" if ":" in options.host else options.host
    _say_when_ready(Server(f"http://{name}:{options.port}", key, 10.0), keeper, options, key)
    return keeper.wait()


def _check_port(host: str, port: int) -> None:
    """Raise ValueError unless one can listen there: vLLM finds out late, and shares the port with another vLLM."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port} must be from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port, or --host") from error


def _say_when_ready(server: "Server", keeper: "subprocess.Popen[bytes]", options: argparse.Namespace, key: str) -> None:
    """Wait until the server answers, and say how to use it; nothing is said of one that ends before."""
    from rollout.sampler import RolloutError
    from rollout.server import SERVERS_KEY

    while keeper.poll() is None:
        try:
            context = server.context()
        except RolloutError:
            time.sleep(1.0)
            continue
        everywhere = options.host in ("0.0.0.0", "::")
        url = f"http://{socket.gethostname()}:{options.port}" if everywhere else server.url
        sync = ", sync: transfer" if options.sync == "transfer" else ""
        print(f"ready on {url} ({options.model}, {context} tokens of context; key in {SERVERS_KEY}). Start the trainer with")
        if not os.environ.get(SERVERS_KEY, "").strip():
            print(f"export {SERVERS_KEY}={key}")  # once more: the log of vLLM came between
        print(f"paretune train ... --rollout.engine='{{type: vllm, urls: {json.dumps([url])}{sync}}}'", flush=True)
        return


def _further(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--args {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'--args {text!r} must be a JSON object, such as {{"quantization": "fp8"}}')
    return found


def _on_cpu() -> bool:
    return told_to_use_cpu(os.environ) or not glob.glob("/dev/nvidia[0-9]*") or sys.platform != "linux"
