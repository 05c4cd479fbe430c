"""Weights on their way to real vLLM servers: they arrive, what does not arrive is noticed, and what fails is made good."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.build import locate_model
from rollout.client import Server, ServerError
from rollout.publish import Leader, carries
from rollout.sampler import Check, Gap, RolloutError, SamplingParams
from rollout.transfer import DirectoryTransfer, shards
from rollout.types import Prompt
from rollout.vllm import Limits, VllmSampler
from tests.conftest import serve

MODEL = locate_model("builtin:arithmetic")
SEQUENCES = [[50, 43, 51, 61, 9, 200, 100, 7], [0, 1, 2, 3, 4, 5, 256, 257]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def original():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture
def changed(original):
    """The policy with other weights everywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return original


def expected(model) -> np.ndarray:
    """Log-probabilities (S, T - 1) of SEQUENCES by the model itself."""
    tokens = torch.tensor(SEQUENCES)
    with torch.no_grad():
        log_probs = model(tokens).logits.double().log_softmax(-1)
    return log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].numpy()


def weights_of(model):
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


BAND = Gap(1e-5, 1e-4)


def check_by(model) -> Check:
    return Check(SEQUENCES, expected(model), BAND)


def gap_to(server: Server, model) -> float:
    """Largest difference between a server's log-probabilities and a model's."""
    return float(np.abs(server.score(SEQUENCES) - expected(model)).max())


def sampler_on(workers, folder: Path, tokenizer, restart=None, timeout: float = 60.0, patience: float = 60.0):
    servers = [Server(url, workers.key, timeout, "start it again") for url in workers.urls]
    leader = Leader(servers, DirectoryTransfer(folder), restart or (lambda index, hangs: None), patience)
    decode = lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)  # noqa: E731
    return VllmSampler(servers, leader, decode, [tokenizer.eos_token_id], Limits(64, patience), "test")


@pytest.fixture
def sampler(vllm_workers, tmp_path, tokenizer):
    sampler = sampler_on(vllm_workers, tmp_path / "weights", tokenizer)
    yield sampler
    original = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert sampler.sync(weights_of(original), 0, check_by(original)).max < 1e-4
    sampler.close()


def prompts(tokenizer, count: int) -> list[Prompt]:
    return [Prompt(str(i), text := f"{i}+{i + 1}=?", tuple(tokenizer(text)["input_ids"]), {}) for i in range(count)]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_pushed_weights_arrive_and_samples_say_whose_they_are(sampler, changed, tokenizer):
    assert gap_to(sampler.servers[0], changed) > 0.1  # the server has the old ones
    gap = sampler.sync(weights_of(changed), 7, check_by(changed))
    assert gap.mean <= gap.max < 1e-4
    assert gap.max == pytest.approx(gap_to(sampler.servers[0], changed), rel=0.5)
    assert sampler.differing() == ()
    assert sampler.servers[0].version() == "test-7"
    params = SamplingParams(samples_per_prompt=2, max_tokens=4, seed=0)
    groups = sampler.sample(prompts(tokenizer, 2), params)
    assert {sample.policy_version for group in groups for sample in group.samples} == {7}


def test_cached_prefixes_of_the_old_policy_are_forgotten(sampler, changed, tokenizer):
    """A prompt of many cache blocks, sampled greedily before and after a push: the second answer is the new policy's."""
    prompt = Prompt("long", "", tuple([50, 43, 51, 61] * 20), {})
    greedy = SamplingParams(samples_per_prompt=1, max_tokens=1, seed=0, temperature=0.0, log_probs=True)
    old = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    sampler.sync(weights_of(old), 0, check_by(old))
    sampler.sample([prompt], greedy)
    sampler.sync(weights_of(changed), 1, check_by(changed))
    sample = sampler.sample([prompt], greedy)[0].samples[0]
    logits = changed(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    assert sample.token_ids == (logits.argmax().item(),)
    assert sample.log_probs[0] == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_only_one_set_of_weights_lies_there_and_none_afterwards(vllm_workers, original, tokenizer, tmp_path):
    sampler = sampler_on(vllm_workers, tmp_path / "weights", tokenizer)
    for version in (1, 2):
        sampler.sync(weights_of(original), version, check_by(original))
        assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"{version:06d}"]
    sampler.close()
    assert not (tmp_path / "weights").exists()


def test_a_server_that_fails_the_check_is_not_sampled_from(vllm_workers, changed, tokenizer, tmp_path):
    """One layer's old weights: the gap shows it, the layer is named, and the version is not carried."""
    sampler = sampler_on(vllm_workers, tmp_path / "weights", tokenizer, patience=2.0)
    name = "model.layers.2.mlp.down_proj.weight"
    stale = AutoModelForCausalLM.from_pretrained(MODEL).get_parameter(name).detach()
    gap = sampler.sync(((n, stale if n == name else w) for n, w in weights_of(changed)), 1, check_by(changed))
    assert gap.max > 0.01
    assert sampler.servers[0].version() != "test-1"
    with pytest.raises(RolloutError, match="no vLLM server could be used for 2 s"):
        sampler.sample(prompts(tokenizer, 2), SamplingParams(samples_per_prompt=2, max_tokens=4, seed=0))
    save_file({n: w.clone() for n, w in weights_of(changed)}, sampler.publisher.transfer.path / "00000.safetensors")
    assert sampler.differing() == (name,)
    assert sampler.sync(weights_of(changed), 1, check_by(changed)).max < 1e-4  # pushed once more
    sampler.sample(prompts(tokenizer, 2), SamplingParams(samples_per_prompt=2, max_tokens=4, seed=0))
    sampler.close()


def test_norms_embeddings_and_fused_layers_are_named_too(sampler, changed):
    sampler.sync(weights_of(changed), 1, check_by(changed))
    file = sampler.publisher.transfer.path / "00000.safetensors"
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    tensors = load_file(file)
    save_file({n: w + 0.5 if n in names else w for n, w in tensors.items()}, file)
    assert set(sampler.differing()) == set(names)
    fused = "model.layers.0.self_attn.k_proj.weight"
    save_file({n: w + 0.5 if n == fused else w for n, w in tensors.items()}, file)
    assert set(sampler.differing()) == {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}


def test_weights_of_another_size_are_refused_long_before_patience_ends(sampler, original):
    wider = ((name, torch.cat([weight, weight])) for name, weight in weights_of(original))
    start = time.monotonic()
    with pytest.raises(RolloutError, match="do not fit the LlamaForCausalLM that this server was started with"):
        sampler.sync(wider, 1, check_by(original))
    assert time.monotonic() - start < 30  # of 60
    assert sampler.sync(weights_of(original), 2, check_by(original)).max < 1e-4  # it takes what fits


@pytest.mark.parametrize("fault", ["missing", "cut off", "empty"])
def test_a_set_that_cannot_be_read_leaves_the_server_as_it_was(sampler, original, fault):
    sampler.sync(weights_of(original), 1, check_by(original))
    server, path = sampler.servers[0], sampler.publisher.transfer.path
    if fault == "missing":
        shutil.rmtree(path)
    for file in path.glob("*.safetensors") if path.exists() else ():
        file.write_bytes(file.read_bytes()[:5000] if fault == "cut off" else b"")
    with pytest.raises(RolloutError):
        server.load({"path": str(path)})
    assert gap_to(server, original) < 1e-4
    sampler.sync(weights_of(original), 3, check_by(original))  # and takes the next one
    assert server.version() == "test-3"


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(vllm_workers, original, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sampler = sampler_on(vllm_workers, tmp_path / "file" / "weights", tokenizer)
    asked = []
    weights = ((asked.append(name), (name, weight))[1] for name, weight in weights_of(original))
    with pytest.raises(RolloutError, match=r"rollout\.engine\.sync\.path"):
        sampler.sync(weights, 1, check_by(original))
    assert len(asked) == len(list(original.named_parameters()))  # gone through all the same: other processes take part


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a file system")
def test_a_full_disk_is_an_error_with_a_way_out(vllm_workers, original, tokenizer, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.raises(RolloutError, match=r"cannot be written.*(No space|space)"):
            sampler_on(vllm_workers, disk / "weights", tokenizer).sync(weights_of(original), 1, check_by(original))
    finally:
        os.system(f"umount {disk}")


def test_shards_are_small_and_keep_their_values():
    weights = [(str(i), torch.full((10,), float(i))) for i in range(5)]  # 40 bytes each
    parts = list(shards(iter(weights), limit=100))
    assert [list(part) for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
    weights[0][1].zero_()
    weights[1][1].zero_()
    assert parts[0]["1"].tolist() == [1.0] * 10  # copies: what is gathered piece by piece is gone by then
    assert [list(part) for part in shards(iter(weights), limit=1)] == [["0"], ["1"], ["2"], ["3"], ["4"]]


def test_tied_heads_follow_and_without_the_cure_the_check_catches_them(tmp_path, tokenizer, changed):
    """vLLM's own reload leaves the head of a tied model on a CPU as it was, without an error; ours does not."""
    torch.manual_seed(1)
    changed.config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(changed.config).eval()
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with serve(str(tmp_path / "tied"), tmp_path / "logs") as workers:
        sampler = sampler_on(workers, tmp_path / "weights", tokenizer)
        transfer, server = sampler.publisher.transfer, sampler.servers[0]
        transfer.write(weights_of(tied), tmp_path / "weights" / "by hand")
        shutil.copy(tmp_path / "tied" / "config.json", transfer.path)
        server.call("reload_weights", weights_path=str(transfer.path))
        assert gap_to(server, tied) > 0.1
        assert sampler.differing() == ("model.embed_tokens.weight",)
        assert sampler.sync(weights_of(tied), 1, check_by(tied)).max < 1e-4
        assert sampler.differing() == ()
        sampler.close()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with serve(MODEL, tmp_path_factory.mktemp("two"), count=2) as workers:
        yield workers


def caring(workers, timeout: float, tmp_path, tokenizer, patience: float = 120.0) -> VllmSampler:
    """A sampler whose watch starts workers again, as a run's main process does."""

    def restart(index: int, hangs: bool) -> None:
        if hangs:
            workers.kill(index)
        workers.restart(index)

    return sampler_on(workers, tmp_path / "weights", tokenizer, restart, timeout, patience)


def sample_and(harm, sampler, tokenizer):
    """Sample a batch, do harm while it is on its way, and sample it again in peace."""
    params = SamplingParams(samples_per_prompt=8, max_tokens=60, seed=3, log_probs=True)
    batch = prompts(tokenizer, 32)
    sampler.sample(batch, params)  # warm
    timer = threading.Timer(0.3, harm)
    timer.start()
    harmed = sampler.sample(batch, params)
    timer.join()
    return harmed, sampler.sample(batch, params)


def token_ids(groups):
    return [sample.token_ids for group in groups for sample in group.samples]


@pytest.mark.parametrize("harm", ["server", "engine", "hang"])
def test_a_worker_that_dies_or_hangs_costs_no_sample(two, tmp_path, tokenizer, changed, harm):
    """Its requests go to the other one; started again, it has the weights of the others, not those it began with."""
    sampler = caring(two, 20.0 if harm == "hang" else 60.0, tmp_path, tokenizer)
    sampler.sync(weights_of(changed), 5, check_by(changed))
    processes = [psutil.Process(pid) for pid in two.pids(1)]
    engines = [process for process in processes if "EngineCore" in "".join(process.cmdline())]
    victims = {"server": processes[:1], "engine": engines, "hang": processes}[harm]
    assert victims

    def do_harm() -> None:
        for process in victims:
            process.send_signal(signal.SIGSTOP if harm == "hang" else signal.SIGKILL)

    harmed, peaceful = sample_and(do_harm, sampler, tokenizer)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in victims)
    assert len(token_ids(harmed)) == 32 * 8
    assert np.mean([a == b for a, b in zip(token_ids(harmed), token_ids(peaceful), strict=True)]) > 0.98
    deadline = time.monotonic() + 200
    while not carries(sampler.servers[1], "test-5") and time.monotonic() < deadline:
        time.sleep(0.5)
    for server in sampler.servers:
        assert server.version() == "test-5"
        assert gap_to(server, changed) < 1e-4
    sampler.close()


def test_when_all_are_gone_it_says_so_in_time(two, tmp_path, tokenizer, original, capsys):
    """At once when none may be started again; after some patience when somebody else might start one."""
    params = SamplingParams(samples_per_prompt=8, max_tokens=100, seed=0)

    def refuse(index: int, hangs: bool) -> None:
        raise RolloutError("no more restarts")

    workers = SimpleNamespace(urls=two.urls[:1], key=two.key)
    final = sampler_on(workers, tmp_path / "a", tokenizer, refuse, patience=300.0)
    final.sync(weights_of(original), 1, check_by(original))
    timer = threading.Timer(0.5, lambda: two.kill(0))
    timer.start()
    start = time.monotonic()
    with pytest.raises(RolloutError, match="no vLLM server is left: no more restarts"):
        final.sample(prompts(tokenizer, 500), params)
    assert time.monotonic() - start < 60
    final.close()
    patient = sampler_on(workers, tmp_path / "b", tokenizer, patience=3.0)
    gone = f"{workers.urls[0]}: Connection refused; start it again$"
    with pytest.raises(RolloutError, match=f"no vLLM server took the weights: {gone}"):
        patient.sync(weights_of(original), 1, check_by(original))
    with pytest.raises(RolloutError, match=f"no vLLM server could be used for 3 s: {gone}"):
        patient.sample(prompts(tokenizer, 2), params)
    patient.close()
    assert f"vLLM server {gone[:-1]}" in capsys.readouterr().out  # as soon as the watch has seen it


def test_a_batch_on_its_way_can_be_given_up(vllm_workers, tmp_path, tokenizer):
    sampler = sampler_on(vllm_workers, tmp_path / "weights", tokenizer)
    sampler.servers[0].carry("test-0")
    ended = threading.Event()

    def draw() -> None:
        try:
            sampler.sample(prompts(tokenizer, 400), SamplingParams(samples_per_prompt=8, max_tokens=100, seed=0))
        except BaseException:
            ended.set()

    thread = threading.Thread(target=draw)
    thread.start()
    time.sleep(1.0)
    sampler.close()
    assert ended.wait(10)
    thread.join()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_wrong_key_and_a_wrong_address_are_told_apart(vllm_workers):
    url = vllm_workers.urls[0]
    with pytest.raises(RolloutError, match="PARETUNE_VLLM_KEY"):
        Server(url, "wrong", 10).version()
    with pytest.raises(ServerError, match="Connection refused"):
        Server("http://127.0.0.1:9", "", 10).version()
    with pytest.raises(RolloutError, match="refused"):
        Server(url, vllm_workers.key, 10).score([[5, 10**6]])


def test_no_proxy_of_the_environment_comes_between(vllm_workers, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Server(vllm_workers.urls[0], vllm_workers.key, 10).healthy()
