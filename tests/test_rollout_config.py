"""Keys of the rollout: defaults that follow the engine, contradictions, and what a resumed run may change."""

import argparse
from dataclasses import asdict

import pytest

from align.advice import advise
from align.cli_worker import add_worker_arguments
from align.config import describe_sampling
from align.engine import check_engine, server_options
from align.load import ConfigError, load_config
from tests.conftest import QUICKSTART


def config(*overrides: str):
    return load_config(QUICKSTART, [f"--rollout.{override}" for override in overrides])


def test_the_default_samples_with_the_learners_own_weights():
    rollout = config().rollout
    assert (rollout.engine.type, rollout.lookahead, rollout.correction.type) == ("transformers", 0, "none")


@pytest.mark.parametrize("override", ["engine=vllm", "engine.type=vllm", "engine={type: vllm}"])
def test_vllm_brings_the_correction_with_it(override):
    rollout = config(override).rollout
    assert rollout.engine.workers == 1
    assert (rollout.correction.type, rollout.correction.level, rollout.correction.max) == ("truncate", "token", 3.0)
    assert config(override, "correction=none").rollout.correction.type == "none"
    assert config(override, "correction=mask", "correction.max=2").rollout.correction.max == 2


def test_options_without_a_type_are_those_of_the_default_engine():
    assert config("engine.batch_size=7").rollout.engine.batch_size == 7


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lookahead=1"], ["rollout.lookahead=1", "rollout.engine.type=vllm"]),
        (["lookahead=2", "engine=vllm"], ["rollout.lookahead", "2"]),
        (["engine=vllm", "engine.urls=[http://a:1]", "engine.workers=2"], ["urls", "workers"]),
        (["engine=vllm", "engine.urls=[a:1]"], ["rollout.engine.urls", "'a:1'", "http://host:port"]),
        (["engine=vllm", "engine.urls=[http://node7:8100]"], ["http://node7:8100", "/dev/shm", "rollout.engine.sync.path"]),
        (["engine=vllm", "engine.gpus=[0,1,2]", "engine.workers=2"], ["rollout.engine.gpus", "3", "need 2"]),
        (["engine=vllm", "engine.args={max_num_seqs: 3}"], ["max_num_seqs", "rollout.engine.max_concurrent"]),
        (["engine=vllm", "engine.args={--api-key: x}"], ["--api-key", "random key"]),
        (["engine=vllm", "engine.sync=rdma"], ["rollout.engine.sync.type", "'rdma'", "directory"]),
        (["engine=sglang"], ["rollout.engine.type", "'sglang'", "vllm"]),
        (["engine=vllm", "engine.worker=2"], ["'worker'", "'workers'"]),
        (["correction=mask", "correction.min=4"], ["min 4.0", "max 3.0"]),
    ],
)
def test_what_cannot_be_run_is_said_with_a_way_out(overrides, words):
    with pytest.raises(ConfigError) as error:
        config(*overrides)
    for word in words:
        assert word in str(error.value)


def test_servers_on_this_machine_may_share_its_memory():
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert config("engine=vllm", f"engine.urls=['http://{host}:8100']").rollout.engine.urls
    assert config("engine=vllm", "engine.urls=[http://node7:8100]", "engine.sync={type: directory, path: /tmp}")


def test_a_sequence_correction_contradicts_vespo():
    with pytest.raises(ConfigError, match="vespo"):
        load_config(QUICKSTART, ["--rollout.correction={type: mask, level: sequence}", "--trl.loss_type=vespo"])


def test_a_folder_that_is_not_there_and_a_vllm_that_is_not_installed(monkeypatch):
    urls = "engine.urls=['http://127.0.0.1:8100']"
    with pytest.raises(ValueError, match=r"rollout\.engine\.sync\.path: '/nowhere'"):
        check_engine(config("engine=vllm", urls, "engine.sync={type: directory, path: /nowhere}"))
    monkeypatch.setattr("align.engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scripts/setup vllm"):
        check_engine(config("engine=vllm"))
    check_engine(config("engine=vllm", urls))  # servers elsewhere need no vLLM here
    check_engine(config())


def test_where_servers_run_may_change_on_resume_and_what_is_learned_may_not():
    base = config("engine=vllm").fingerprint()
    assert config("engine=vllm", "engine.workers=3").fingerprint() == base
    assert config("engine=vllm", "engine.urls=['http://127.0.0.1:8100']").fingerprint() == base
    assert config("engine=vllm", "lookahead=1").fingerprint() != base
    assert config("engine=vllm", "correction=none").fingerprint() != base
    assert config().fingerprint() != base


def test_uncorrected_samples_are_warned_of():
    assert not [line for line in advise(config("engine=vllm")) if "correction" in line]
    assert [line for line in advise(config("engine=vllm", "correction=none")) if "rollout.correction none" in line]
    lines = advise(config("engine=vllm", "lookahead=1", "correction=none"))
    assert [line for line in lines if "rollout.lookahead=1" in line]


def test_one_url_needs_no_list():
    assert config("engine=vllm", "engine.urls=http://127.0.0.1:8100").rollout.engine.urls == ["http://127.0.0.1:8100"]


def test_a_server_on_every_address_of_this_machine_sees_its_shared_memory():
    assert config("engine=vllm", "engine.urls=[http://0.0.0.0:8100]").rollout.engine.sync.path == "/dev/shm"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["transformers", "itself"]),
        (
            ["engine=vllm", "engine.workers=2"],
            ["vLLM, 2 server(s) of this run", "/dev/shm", "on-policy", "truncate"],
        ),
        (
            ["engine=vllm", "engine.urls=http://127.0.0.1:8100", "lookahead=1"],
            ["at http://127.0.0.1:8100", "before"],
        ),
        (["engine=vllm", "engine.sync=transfer", "correction=none"], ["weights by transfer,", "correction none"]),
    ],
)
def test_sampling_in_a_line(overrides, words):
    line = describe_sampling(config(*overrides).rollout)
    assert all(word in line for word in words)
    assert "\n" not in line


def test_a_key_of_another_type_says_whose_it_is():
    with pytest.raises(ConfigError, match=r"unknown key 'workers'; .* \('workers' belongs to type vllm\)"):
        config("engine.workers=2")


def test_a_worker_has_the_defaults_of_a_server_that_a_run_starts():
    parser = argparse.ArgumentParser()
    add_worker_arguments(parser)
    worker = vars(parser.parse_args(["builtin:arithmetic"]))
    started = asdict(server_options(config("engine=vllm"), "builtin:arithmetic", context=0))
    del started["revision"], started["args"]  # a run names them in its configuration
    assert {name: worker[name] for name in started} == started
