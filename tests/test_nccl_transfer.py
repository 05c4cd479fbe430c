"""Weights over NCCL, as far as it goes without a GPU: vLLM's real trainer engine and our part of the conversation with the
servers. The servers only take notes, and in the place of the broadcast the weights are kept."""

import http.server
import json
import threading

import pytest
import torch

from rollout.client import Server
from rollout.publish import Leader
from rollout.sampler import NO_CHECK, RolloutError
from rollout.transfer import NcclTransfer

nccl = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine", reason="vLLM is not installed")

WEIGHTS = {"model.embed.weight": torch.arange(6.0).view(3, 2), "model.norm.weight": torch.ones(2, dtype=torch.bfloat16)}
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]


class Notes(http.server.ThreadingHTTPServer):
    """A vLLM server of so many GPUs, in routes only; notes what it is told, and refuses the routes in `failing`."""

    def __init__(self, gpus: int):
        notes = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"world_size": gpus, "weight_version": "run-0"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                notes.told.append((self.path, body))
                self.reply(*((500, "no memory") if self.path in notes.failing else (200, {"success": True})))

            def reply(self, status, body):
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.told, self.failing = [], set()
        self.server = Server(f"http://127.0.0.1:{self.server_port}", "", 10.0)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def routes(self) -> list[str]:
        return [route for route, _ in self.told]


@pytest.fixture
def two():
    servers = [Notes(2), Notes(1)]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sent(monkeypatch):
    """Groups that were opened (the trainer's side), and what was broadcast to each."""
    groups = []

    def opened(info):
        groups.append({"info": info, "weights": []})
        return groups[-1]

    def broadcast(iterator, group, **_):
        group["weights"].append({name: tensor.clone() for name, tensor in iterator})

    monkeypatch.setattr(
        nccl, "open_trainer_endpoint", lambda info: groups.append({"info": info, "weights": []}) or groups[-1]
    )
    monkeypatch.setattr(nccl, "packed_nccl_broadcast_producer", broadcast)
    return groups


def described():
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WEIGHTS.items()]


def transfer() -> NcclTransfer:
    return NcclTransfer("10.0.0.1", described)


def test_every_gpu_has_a_rank_of_its_own(two, sent):
    """The trainer is rank 0; two GPUs are ranks 1 and 2, so the next server begins at 3; 1 + 2 + 1 = 4 in all."""
    assert transfer().send(iter(WEIGHTS.items()), [notes.server for notes in two]) == {}
    infos = [dict(notes.told)["/init_weight_transfer_engine"]["init_info"] for notes in two]
    assert [info["rank_offset"] for info in infos] == [1, 3]
    for info in infos:
        assert (info["master_address"], info["world_size"]) == ("10.0.0.1", 4)
        assert info["master_port"] == sent[0]["info"].master_port
    assert sent[0]["info"].world_size == 4


def test_servers_are_told_what_comes_and_forget_prefixes_afterwards(two, sent):
    transfer().send(iter(WEIGHTS.items()), [notes.server for notes in two])
    for notes in two:
        assert notes.routes() == ["/init_weight_transfer_engine", *UPDATE]
        assert dict(notes.told)["/update_weights"] == {
            "update_info": {"names": list(WEIGHTS), "dtype_names": ["float32", "bfloat16"], "shapes": [[3, 2], [2]]}
        }
    assert sent[0]["weights"][0].keys() == WEIGHTS.keys()
    assert all(torch.equal(sent[0]["weights"][0][name], tensor) for name, tensor in WEIGHTS.items())


def test_the_group_stays_until_the_servers_change(two, sent):
    nccl_transfer, servers = transfer(), [notes.server for notes in two]
    for there in (servers, servers, servers[1:], servers):
        nccl_transfer.send(iter(WEIGHTS.items()), there)
    assert [group["info"].world_size for group in sent] == [4, 2, 4]
    assert [len(group["weights"]) for group in sent] == [2, 1, 1]


def test_a_server_that_came_back_joins_at_the_next_push(two, sent):
    nccl_transfer, servers = transfer(), [notes.server for notes in two]
    nccl_transfer.send(iter(WEIGHTS.items()), servers)
    with pytest.raises(RolloutError, match="next push"):
        nccl_transfer.resend(servers[0])
    nccl_transfer.send(iter(WEIGHTS.items()), servers)
    assert [len(group["weights"]) for group in sent] == [1, 1]


@pytest.mark.parametrize("route", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"])
def test_a_failure_names_its_cause_and_the_next_push_begins_anew(two, sent, route):
    nccl_transfer, servers = transfer(), [notes.server for notes in two]
    two[1].failing.add(route)
    with pytest.raises(RolloutError, match=rf"over NCCL.*{route}.*no memory"):
        nccl_transfer.send(iter(WEIGHTS.items()), servers)
    two[1].failing.clear()
    assert nccl_transfer.send(iter(WEIGHTS.items()), servers) == {}
    assert [group["info"].world_size for group in sent] == [4, 4]


def test_weights_other_than_described_are_an_error_and_not_a_hang(two, sent):
    nccl_transfer = NcclTransfer("10.0.0.1", lambda: described()[::-1])
    with pytest.raises(RolloutError, match=r"model\.norm\.weight"):
        nccl_transfer.send(iter(WEIGHTS.items()), [notes.server for notes in two])


def test_after_a_failure_the_rest_of_the_weights_is_gone_through_for_the_other_processes(two, sent):
    seen = []

    def weights():
        for name, tensor in WEIGHTS.items():
            seen.append(name)
            yield name, tensor

    two[0].failing.add("/start_weight_update")
    leader = Leader([notes.server for notes in two], transfer(), lambda *_: None, 1.0)
    with pytest.raises(RolloutError, match="over NCCL"):
        leader.publish(weights(), "run-1", NO_CHECK)
    assert seen == list(WEIGHTS)


def test_without_servers_nothing_is_sent(sent):
    assert transfer().send(iter(WEIGHTS.items()), []) == {}
    assert sent == []
