"""How weights come from the learner to vLLM servers: through files, or by vLLM's own transfer between GPUs."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rollout.client import Server
from rollout.sampler import RolloutError

SHARD_BYTES = 2**30
Weights = Iterable[tuple[str, torch.Tensor]]


class Transfer(Protocol):
    """Carries sets of weights from the main learner process to servers."""

    def send(self, weights: Iterator[tuple[str, torch.Tensor]], servers: Sequence[Server]) -> dict[Server, RolloutError]:
        """Send, and say which servers failed and why. Raises RolloutError when nothing could be sent."""
        ...

    def resend(self, server: Server) -> None:
        """Bring the last set to a server that was started again. Raises RolloutError when that cannot be."""
        ...

    def differing(self, server: Server) -> Sequence[str]:
        """Names of the weights of the last set that a server does not compute with, where that can be told."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class DirectoryTransfer:
    """Weights as safetensors files in a folder that this process and the servers share.

    Args:
        folder: Holds one set at a time; removed at the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder  # of the last set
        self._sets = 0

    def send(self, weights: Iterator[tuple[str, torch.Tensor]], servers: Sequence[Server]) -> dict[Server, RolloutError]:
        """Write the set once, then let all servers load it at the same time."""
        self._sets += 1
        try:
            self.write(weights, self.folder / f"{self._sets:06d}")
        except (OSError, SafetensorError) as error:
            raise RolloutError(
                f"the weights cannot be written to {self.folder}: {error}; free some space there, or let "
                "rollout.engine.sync.path name another folder that the servers see"
            ) from error
        return on_all(servers, self.resend)

    def resend(self, server: Server) -> None:
        """Let one server load the set that lies there."""
        server.load({"path": str(self.path)})

    def differing(self, server: Server) -> Sequence[str]:
        """See `Transfer`; each of the server's processes looks at the files itself."""
        try:
            return [name for part in server.call("differing_weights", path=str(self.path)) for name in part]
        except RolloutError:
            return []

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, weights: Iterator[tuple[str, torch.Tensor]], path: Path) -> None:
        """Write a set shard by shard; the one before it goes first, so that there is room for one. Raises OSError."""
        if self.path != self.folder:
            shutil.rmtree(self.path, ignore_errors=True)
        path.mkdir(parents=True)
        self.path = path
        for number, shard in enumerate(shards(weights)):
            save_file(shard, path / f"{number:05d}.safetensors")


class NcclTransfer:
    """vLLM's own weight transfer: packed NCCL broadcasts from the main learner process to every server's GPUs.

    The group is built at the first push, and anew after the set of servers has changed. The learner's other processes take
    part in putting sharded weights together, and not in the group.

    Args:
        address: Of the main learner process, as the servers reach it.
        describe: Gives name, dtype and shape of every weight without putting any together.
    """

    def __init__(self, address: str, describe: Callable[[], Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]):
        self.address = address
        self._describe = describe
        self._members: tuple[Server, ...] = ()
        self._engine: Any = None

    def send(self, weights: Iterator[tuple[str, torch.Tensor]], servers: Sequence[Server]) -> dict[Server, RolloutError]:
        """Broadcast to all servers at once."""
        if not servers:
            return {}
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        client, source = _AllServers(servers), _source(weights, self._describe())
        try:
            if self._members != tuple(servers):
                size = 1 + sum(server.world_size() for server in servers)
                info = NCCLTrainerInitInfo(rank=0, master_address=self.address, master_port=get_open_port(), world_size=size)
                self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
                self._members = tuple(servers)
            self._engine.client, self._engine.source = client, source
            self._engine.send_weights()
        except Exception as error:  # a broken group cannot be told server by server
            self._members = ()
            raise RolloutError(f"the weight transfer over NCCL failed: {type(error).__name__} {error}") from error
        return {}

    def resend(self, server: Server) -> None:
        """A server that was started again is no member of the group until the next push builds it anew."""
        self._members = ()
        raise RolloutError("it joins again at the next push of weights")

    def differing(self, server: Server) -> Sequence[str]:
        """Not known: the weights lie in no file to compare with."""
        return []

    def close(self) -> None:
        """Leave the group."""
        if self._engine is not None:
            self._engine.shutdown()


class _AllServers:
    """The routes of a weight update on all servers at once, in the form that vLLM's trainer side asks for."""

    def __init__(self, servers: Sequence[Server]):
        self._servers = servers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give every server its own ranks in the group."""
        offset, infos = init_info["rank_offset"], {}
        for server in self._servers:
            infos[server] = {**init_info, "rank_offset": offset}
            offset += server.world_size()
        self._all(lambda s: s.post("/init_weight_transfer_engine", {"init_info": infos[s]}))

    def start_weight_update(self) -> None:
        """On every server."""
        self._all(lambda s: s.post("/start_weight_update"))

    def update_weights(self, update_info: Any) -> None:
        """On every server; returns when all have received."""
        self._all(lambda s: s.post("/update_weights", {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """On every server."""
        self._all(lambda s: s.finish_load())

    def _all(self, act: Callable[[Server], Any]) -> None:
        for error in on_all(self._servers, act).values():
            raise error


def _source(weights: Weights, metadata: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, dtype, shape) for name, dtype, shape in metadata]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(weights)

    return Source()


def shards(weights: Iterator[tuple[str, torch.Tensor]], limit: int = SHARD_BYTES) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of weights on the CPU, in parts of at most `limit` bytes (or one weight)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def on_all(servers: Sequence[Server], act: Callable[[Server], Any]) -> dict[Server, RolloutError]:
    """Do something on all servers at the same time; the errors of those that failed."""

    def attempt(server: Server) -> RolloutError | None:
        try:
            act(server)
        except RolloutError as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, len(servers))) as threads:
        outcomes = list(threads.map(attempt, servers))
    return {server: error for server, error in zip(servers, outcomes, strict=True) if error is not None}
