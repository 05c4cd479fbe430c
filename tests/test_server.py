"""A vLLM server's command, its environment, the guard in front of it, and its log; nothing is started."""

import asyncio
import re
from dataclasses import replace

import pytest

from rollout.server import child_environment, server_command, server_environment
from rollout.server_guard import RequireKey
from rollout.server_log import telling_lines
from rollout.workers import LocalWorkers
from tests.conftest import ROOT, SERVER

OPTIONS = SERVER


def test_the_command_has_no_key_and_says_what_was_asked():
    options = replace(
        OPTIONS, revision="v2", args={"swap-space": 1, "enable_lora": True, "x": False, "rope": {"a": 1}, "l": [1, 2]}
    )
    command = server_command(options, "127.0.0.1", 81, cpu=True)
    joined = " ".join(command)
    for part in ("--revision v2", "--port 81", "--swap-space 1", "--enable-lora", "--no-x", '--rope {"a": 1}', "--l 1 2"):
        assert part in joined
    assert "--no-enable-chunked-prefill --max-num-batched-tokens 4096" in joined
    assert "--gpu-memory-utilization" not in joined
    assert "key" not in joined.replace("RequireKey", "")
    on_gpu = " ".join(server_command(replace(OPTIONS, max_model_len=0), "h", 81, cpu=False))
    assert "--gpu-memory-utilization 0.9" in on_gpu
    assert "eager" not in on_gpu
    assert "--max-model-len" not in on_gpu


@pytest.mark.parametrize("name", ["port", "--middleware", "api-key", "no-trust-remote-code"])
def test_arguments_that_would_break_the_trainer_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be given"):
        replace(OPTIONS, args={name: 1})


def test_the_environment_forgets_the_launcher():
    base = {
        "RANK": "1",
        "MASTER_PORT": "2",
        "ACCELERATE_USE_CPU": "true",
        "TORCHELASTIC_RUN_ID": "x",
        "OMP_NUM_THREADS": "1",
    }
    kept = {"HOME": "/h", "PYTHONPATH": "/p", "CUDA_VISIBLE_DEVICES": "4,5,GPU-6"}
    found = child_environment(base | kept, server_environment("k", False, 1, (0, 2), OPTIONS))
    assert not set(base) & set(found)
    assert found["HOME"] == "/h"
    assert found["PYTHONPATH"] == f"{ROOT}:/p"
    assert found["CUDA_VISIBLE_DEVICES"] == "4,GPU-6"
    assert found["VLLM_API_KEY"] == "k"
    on_cpu = child_environment(base, server_environment("k", True, 3, (), OPTIONS))
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu


def test_the_guard_needs_a_key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", " ")
    with pytest.raises(ValueError, match="VLLM_API_KEY is empty"):
        RequireKey(None)


@pytest.mark.parametrize(
    ("path", "headers", "passed"),
    [
        ("/pause", [(b"authorization", b"Bearer secret")], True),
        ("/pause", [(b"Authorization", b"bearer secret")], True),
        ("/pause", [(b"authorization", b"Bearer secre")], False),
        ("/pause", [(b"authorization", b"Basic secret")], False),
        ("/pause", [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer secret")], False),
        ("/pause", [(b"authorization", b"Bearer ")], False),
        ("/pause", [], False),
        ("/health", [], True),
        ("/health/", [], False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_guard_lets_nobody_past_without_the_key(monkeypatch, kind, path, headers, passed):
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    asyncio.run(RequireKey(app)({"type": kind, "path": path, "headers": headers}, None, send))
    assert reached == [path] * passed
    if not passed:
        assert sent[0].get("status", sent[0].get("code")) == {"http": 401, "websocket": 1008}[kind]


def test_errors_of_a_log_come_first_and_once():
    text = "\n".join(
        [
            "(APIServer pid=1) INFO 11-21 10:56:31 [api.py:3] an error: that is none",
            "(EngineCore pid=2) ERROR 11-21 10:56:31 [core.py:9] Traceback (most recent call last):",
            '(EngineCore pid=2) ERROR 11-21 10:56:31 [core.py:9]   File "x.py", line 3, in f',
            "(EngineCore pid=2) ERROR 11-21 10:56:31 [core.py:9] ValueError: " + "x" * 1000,
            "ValueError: " + "x" * 1000,
            "x.py:3: FutureWarning: not now",
            *[f"line {i}" for i in range(40)],
        ]
    )
    found = telling_lines(text)
    assert found[0] == "ValueError: " + "x" * 288
    assert found[1:] == [f"line {i}" for i in range(35, 40)]


@pytest.mark.parametrize(
    ("count", "gpus", "host", "message"),
    [
        (0, [], "127.0.0.1", "count=0"),
        (2, [[0]], "127.0.0.1", "one entry for each of the 2"),
        (1, [], "203.0.113.1", "host='203.0.113.1' is no address of this machine"),
    ],
)
def test_workers_that_cannot_be_are_refused(tmp_path, count, gpus, host, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LocalWorkers(OPTIONS, count, tmp_path, gpus, host)
