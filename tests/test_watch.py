"""`paretune watch`: pages that follow their files, for this machine alone."""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from align.cli import main
from align.watch import make_server
from tests.browser import Tab, chromium
from tests.page import chunk_of
from tests.test_front_page import made_up
from tests.test_report import make_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, a front, and the address of the server of both."""
    folder = tmp_path_factory.mktemp("watch")
    make_run(folder / "run", planned=20)
    (folder / "front").mkdir()
    (folder / "front" / "front.json").write_text(json.dumps(made_up(runs=1, steps=2, methods=1)))
    with make_server([folder / "run", folder / "front"], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def ask(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def add_step(folder: Path, step: int) -> None:
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 0.5}) + "\n")


def test_pages_follow_their_files(world):
    folder, address = world
    assert '<a href="/0/">run</a>' in ask(address)[1]
    assert "<dd>12 of 20</dd>" in ask(address + "0/")[1]
    before = ask(address + "0/version")[1]
    assert ask(address + "0/version")[1] == before
    add_step(folder, 13)
    assert ask(address + "0/version")[1] != before
    status, page = ask(address + "0/")
    assert status == 200
    assert "<dd>13 of 20</dd>" in page
    assert f'data-version="{ask(address + "0/version")[1]}"' in page
    assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
    assert "Front of 2 policies" in ask(address + "1/")[1]
    assert not (folder / "run" / "report.html").exists()


def test_a_file_that_cannot_be_read_leaves_the_page_as_it_was(world):
    folder, address = world
    page, file = ask(address + "1/")[1], folder / "front" / "front.json"
    whole = file.read_text()
    file.write_text(whole[:100])
    assert ask(address + "1/") == (200, page)
    with make_server([folder / "front"], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        status, text = ask(f"http://127.0.0.1:{server.server_port}/0/")
        assert (status, "<" in text) == (503, False)
        server.shutdown()
    file.write_text(whole)


@pytest.mark.parametrize(
    "path",
    [
        "2/",
        "0",
        "0/config.json",
        "../0/",
        "0/../../etc/passwd",
        "-1/",
        "%2e%2e/",
        "0/version/",
        "٣/",
        "0/report-samples/",
        "0/report-samples/training-0-1.js",
        "0/report-samples/training-0-0",
        "1/report-samples/training-0-0.js",
        "0/report-samples/..%2f..%2fconfig.json",
        "0/samples/shard-000000.rank0.parquet",
    ],
)
def test_nothing_else_is_served(world, path):
    assert ask(world[1] + urllib.request.quote(path, safe="/%."))[0] == 404


def test_only_this_machine_may_ask(world):
    assert ask(world[1], Host="evil.example")[0] == 403
    assert ask(world[1], Host=world[1].split("/")[2].replace("127.0.0.1", "localhost"))[0] == 200


def test_samples_are_for_the_page_alone(world):
    """A page elsewhere could otherwise load a chunk as a script of its own, and read it."""
    script = world[1] + "0/report-samples/training-0-0.js"
    status, text = ask(script, **{"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors"})
    assert (status, len(chunk_of(text)["step"])) == (200, 384)
    assert not (world[0] / "run" / "report-samples").exists()
    for site in ("cross-site", "same-site"):
        assert ask(script, **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"})[0] == 403
    assert ask(world[1], **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})[0] == 200  # a link


def test_what_cannot_be_watched_is_said(world, tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "is no run folder and no folder of a front" in capsys.readouterr().err
    taken = world[1].split(":")[2].strip("/")
    assert main(["watch", str(world[0] / "run"), "--port", taken]) == 2
    assert f"--port {taken} cannot be had" in capsys.readouterr().err


def test_a_page_loads_itself_until_it_is_touched(world):
    folder, address = world
    with chromium() as browser:
        tab = Tab(browser, address + "0/")
        add_step(folder, 14)
        tab.page.wait_for_selector("dd:text-is('14 of 20')")
        tab.page.wait_for_load_state()
        tab.page.locator("h1").click()
        add_step(folder, 15)
        tab.page.wait_for_selector("#news:visible")
        assert tab.page.locator("dd:text-is('14 of 20')").count() == 1
        tab.page.locator("#news button").click()
        tab.page.wait_for_selector("dd:text-is('15 of 20')")
        tab.wait_until("document.getElementById('position').textContent === '1 to 20 of 384'")
        tab.wait_until("document.querySelector('.main-svg') !== null", seconds=60)
        assert tab.errors == []
        assert all(url.startswith(address) for url in tab.requests)
