"""`paretune watch`: the pages of runs and fronts, made anew as their files grow, on this machine alone. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from align.report import render_report
from align.report_samples import FOLDER, chunk_script
from align.web import templates

HOST = "127.0.0.1"
LOGS = ("config.json", "metrics.jsonl", "timings.jsonl", "archive.jsonl", "front.json")
NOTHING = "there is no such page"
PARTS = ("samples/shard-*.parquet", "evaluation/step-*.parquet")


@dataclass
class Watched:
    """A folder and its page, made when it is asked for and files have changed since."""

    folder: Path
    made: str = ""  # version of the page
    page: str = ""
    lock: Lock = field(default_factory=Lock)

    @property
    def version(self) -> str:
        """Changes whenever a file does that the page is made of."""
        files = [self.folder / name for name in LOGS]
        files += [file for pattern in PARTS for file in sorted(self.folder.glob(pattern))]
        stamps = []
        for file in files:
            try:
                found = file.stat()
            except OSError:  # not there yet, or replaced just now
                continue
            stamps.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
        return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]

    def render(self) -> str:
        """The page, as new as the files.

        Raises:
            ValueError, OSError: There has been none, and a file cannot be read.
        """
        with self.lock:
            version = self.version  # before reading: what comes meanwhile makes the next one
            if version != self.made:
                try:
                    self.page, self.made = self._make(version), version
                except (ValueError, OSError):
                    if not self.page:
                        raise
            return self.page

    def _make(self, version: str) -> str:
        if (self.folder / "config.json").is_file() or not (self.folder / "front.json").is_file():
            return render_report(self.folder, version)
        from align.fronts.page import render

        file = self.folder / "front.json"
        try:
            return render(json.loads(file.read_text(encoding="utf-8")), version)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a front that paretune front has written: {error!r}") from error


def make_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the pages; port 0 takes a free one.

    Raises:
        ValueError: A folder is neither a run nor a front, or the port is taken.
    """
    watched = [Watched(folder) for folder in folders]
    for one in watched:
        if not any((one.folder / name).is_file() for name in ("config.json", "front.json")):
            raise ValueError(
                f"{one.folder} is no run folder and no folder of a front: it has neither config.json nor front.json"
            )
    handler = type("Pages", (_Handler,), {"watched": watched})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port} cannot be had ({error}): name another, or 0 for any that is free") from error
    server.daemon_threads = True
    return server


def watch(folders: Sequence[str], port: int) -> int:
    """Serve until interrupted."""
    with make_server([Path(folder) for folder in folders], port) as server:
        print(f"http://{HOST}:{server.server_port}/ (stop it with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


class _Handler(BaseHTTPRequestHandler):
    """`/` lists the folders, `/N/` is a page, `/N/version` tells it whether there is a newer one, `/N/report-samples/...`
    gives it samples, made when they are asked for; no file is served."""

    watched: Sequence[Watched] = ()

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        here = self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")  # else a page elsewhere asks for a script
        asked = here or self.headers.get("Sec-Fetch-Mode") == "navigate"
        if not asked or self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):  # a name that leads here
            self._answer(403, "ask by the address 127.0.0.1", "text/plain")
            return
        parts = self.path.split("?")[0].split("/")[1:]
        number = int(parts[0]) if parts[0].isascii() and parts[0].isdigit() and len(parts[0]) < 9 else -1
        if parts == [""]:
            names = [one.folder.resolve().name for one in self.watched]
            self._answer(200, templates().get_template("watch.html").render(names=names))
        elif not 0 <= number < len(self.watched):
            self._answer(404, NOTHING, "text/plain")
        else:
            try:
                self._answer(*_answer_of(self.watched[number], parts[1:]))
            except (ValueError, OSError) as error:
                self._answer(503, f"{error}", "text/plain")

    def _answer(self, status: int, text: str, kind: str = "text/html") -> None:
        content = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        headers |= {
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Questions every few seconds are not worth a line each."""


def _answer_of(watched: Watched, parts: Sequence[str]) -> tuple[int, str, str]:
    """Status, text and kind of the answer to what is asked of a folder."""
    if parts == [""]:
        return 200, watched.render(), "text/html"
    if parts == ["version"]:
        return 200, watched.version, "text/plain"
    asked_for_samples = len(parts) == 2 and parts[0] == FOLDER and parts[1].endswith(".js")
    script = chunk_script(watched.folder, parts[1].removesuffix(".js")) if asked_for_samples else None
    return (404, NOTHING, "text/plain") if script is None else (200, script, "text/javascript")
