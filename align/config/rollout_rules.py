"""What the keys of the rollout ask of each other."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from align.config.rollout import RolloutConfig, VllmEngine
from align.config.sections import Keys
from rollout.server import RESERVED

OWNED = {  # argument of vLLM's server -> the key of ours that decides it
    "model": "policy.model",
    "revision": "policy.revision",
    "trust_remote_code": "policy.trust_remote_code",
    "dtype": "rollout.engine.dtype",
    "seed": "seed",
    "max_num_seqs": "rollout.engine.max_concurrent",
    "tensor_parallel_size": "rollout.engine.tensor_parallel",
    "gpu_memory_utilization": "rollout.engine.gpu_memory",
}
FIXED = {  # argument of vLLM's server -> why it cannot be set
    "host": "servers started here listen on loopback; start others by `paretune worker` and name their rollout.engine.urls",
    "port": "free ports are chosen",
    "api_key": "a random key is chosen",
    "logprobs_mode": "the correction needs the log-probabilities that samples were drawn from",
    "generation_config": "the sampling settings are those of `rollout`",
    "served_model_name": "it has one name for all",
    "worker_extension_cls": "it carries the weights",
    "weight_transfer_config": "rollout.engine.sync decides it",
    "middleware": "it guards the server",
}


def rollout_problems(config: Keys) -> list[str]:
    """Everything about sampling that cannot be run as it stands."""
    rollout, problems = config.rollout, []
    if rollout.lookahead and rollout.engine.type != "vllm":
        problems.append(
            f"rollout.lookahead={rollout.lookahead} needs rollout.engine.type=vllm: the other engine "
            "samples with the very weights that are being trained"
        )
    if rollout.correction.level == "sequence" and config.trl.get("loss_type") == "vespo":
        problems.append("rollout.correction.level=sequence: trl.loss_type=vespo needs level token")
    if rollout.engine.type == "vllm":
        problems += _servers(rollout.engine)
    return problems


def _servers(engine: VllmEngine) -> list[str]:
    problems = []
    if engine.urls and engine.workers != 1:
        problems.append("rollout.engine: urls are servers that run already, workers are started: give one of the two")
    needed = engine.workers * engine.tensor_parallel
    if engine.gpus and len(engine.gpus) != needed:
        problems.append(
            f"rollout.engine.gpus names {len(engine.gpus)} GPUs; workers={engine.workers} times "
            f"tensor_parallel={engine.tensor_parallel} need {needed}"
        )
    for url in engine.urls:
        parts = urlsplit(url)
        here = is_loopback(parts.hostname or "") or parts.hostname == "0.0.0.0"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            problems.append(f"rollout.engine.urls: {url!r} is not of the form http://host:port")
        elif engine.sync.type == "directory" and engine.sync.path == "/dev/shm" and not here:
            problems.append(
                f"rollout.engine.urls: {url!r} is on another machine, which cannot see /dev/shm of this one: set "
                "rollout.engine.sync.path to a folder of a file system that both share"
            )
        elif engine.sync.type == "transfer" and is_loopback(engine.sync.address) and not here:
            problems.append(
                f"rollout.engine.sync.address: {engine.sync.address} means another machine to {url!r}: give the address of "
                "this one"
            )
    for name in engine.args:
        plain = str(name).lstrip("-").replace("-", "_").removeprefix("no_")
        if plain in OWNED:
            problems.append(f"rollout.engine.args.{name} is decided by `{OWNED[plain]}`: set that instead")
        elif plain in FIXED:
            problems.append(f"rollout.engine.args.{name} cannot be set: {FIXED[plain]}")
        elif plain in RESERVED:
            problems.append(f"rollout.engine.args.{name} cannot be set: the run decides it")
    return problems


def describe_sampling(rollout: RolloutConfig) -> str:
    """How samples are made, in one line."""
    engine, correction = rollout.engine, rollout.correction
    if engine.type == "transformers":
        return "transformers, by the learner itself"
    servers = f"servers at {', '.join(engine.urls)}" if engine.urls else f"{engine.workers} server(s) of this run"
    weights = f"{engine.sync.type} {engine.sync.path}" if engine.sync.type == "directory" else engine.sync.type
    age = "while the batch before is trained on" if rollout.lookahead else "on-policy"
    return f"vLLM, {servers}, weights by {weights}, {age}, correction {correction.type}"


def is_loopback(host: str) -> bool:
    """Whether a host name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
