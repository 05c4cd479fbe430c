"""A server that somebody else starts: waited for while it may come, and refused at once when it is none of ours."""

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rollout import client
from rollout.client import Server, ServerError
from rollout.sampler import RolloutError

ADVICE = "start it"


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Starts HTTP servers whose /health has a status and a body, and whose other paths do not exist; their addresses."""
    started = []

    def start(status: int, body: bytes = b"", port: int = 0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/health" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        started.append(http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_an_address_may_end_as_openais_clients_want_it(answering, tail):
    Server(answering(200) + tail, "", 5.0).wait(0.0)


def test_who_does_not_answer_is_waited_for_aloud_and_not_for_ever(free_port, monkeypatch, capsys):
    """Told at 0 s and after 1.5 s, that is at the look after 2 s; given up at 3 s."""
    monkeypatch.setattr(client, "TELL_SECONDS", 1.5)
    url, start = f"http://127.0.0.1:{free_port}", time.monotonic()
    with pytest.raises(RolloutError, match=rf"rollout\.engine\.start_timeout: {url}: Connection refused; start it$"):
        Server(url, "", 5.0, ADVICE).wait(3.0)
    assert 2.9 < time.monotonic() - start < 20
    lines = capsys.readouterr().out.splitlines()
    what = f"waiting for a vLLM server: {url}: Connection refused; start it; "
    assert lines[0] == f"{what}3 s more (rollout.engine.start_timeout)"
    assert len(lines) in (1, 2)  # a busy machine may sleep through the second
    assert all(line.startswith(what) for line in lines)


def test_who_comes_late_is_found(answering, free_port, capsys):
    timer = threading.Timer(1.5, lambda: answering(200, port=free_port))
    timer.start()
    Server(f"http://127.0.0.1:{free_port}", "", 5.0).wait(60.0)
    timer.join()
    assert "Connection refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"", "wants a key, and PARETUNE_VLLM_KEY is not set"),
        (404, b"", "/health does not exist: give servers that `paretune worker` started, as http://host:port"),
        (405, b"no", "refused (405): no"),
        (200, b"<html>", "does not answer as vLLM does: '<html>'"),
    ],
)
def test_who_is_no_server_of_ours_is_refused_at_once(answering, capsys, status, body, words):
    start = time.monotonic()
    with pytest.raises(RolloutError) as error:
        Server(answering(status, body), "", 5.0, ADVICE).wait(300.0)
    assert words in str(error.value)
    assert time.monotonic() - start < 30
    assert not capsys.readouterr().out


def test_who_has_trouble_is_waited_for(answering):
    with pytest.raises(RolloutError, match=r"start_timeout: http://.*/health failed \(503\): loading"):
        Server(answering(503, b"loading"), "", 5.0).wait(1.0)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://localhost:{port}", "Connection refused"),  # by two addresses
        ("http://no-such-host.invalid:{port}", "ame "),  # Name or service not known; Temporary failure in name resolution
    ],
)
def test_why_nothing_came_is_said_in_words(free_port, url, reason):
    with pytest.raises(ServerError) as error:
        Server(url.format(port=free_port), "", 5.0, ADVICE).version()
    assert reason in str(error.value)
    assert str(error.value).endswith("; start it")
