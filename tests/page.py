"""A report page as tests read it."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags in order, attributes, the text that is seen, and the JSON islands by the first part of their id."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text, self.islands, self._open = [], [], "", {}, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._is_island = ("type", "application/json") in attrs
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text = f"{self.text} {data.strip()}".strip()
        elif self._is_island:
            assert not set(data) & set("<>&\u2028\u2029")
            self.islands[self.attributes[-1][1].removesuffix("-data")] = json.loads(data)


def chunk_of(script: str) -> dict[str, list]:
    """The columns that a script hands to the page; nothing else may be in it."""
    packed = re.fullmatch(r'samplesArrived\("[a-z0-9_-]+","([A-Za-z0-9+/=]+)"\);\n', script)
    assert packed, script[:100]
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def samples_beside(path: Path, kind: str) -> dict[str, list]:
    """The columns of all samples of a kind that the page can load, prompts in full."""
    listed = Page(path).islands["samples"]
    found: dict[str, list] = {}
    for name, rows, first, last in listed["chunks"][kind]:
        columns = chunk_of((path.parent / listed["folder"] / f"{name}.js").read_text(encoding="ascii"))
        prompts = columns.pop("prompts")
        columns["prompt"] = [prompts[i] for i in columns["prompt"]]
        assert {len(column) for column in columns.values()} == {rows}
        assert (columns["step"][0], columns["step"][-1], rows <= listed["most"]) == (first, last, True)
        for column, values in columns.items():
            found.setdefault(column, []).extend(values)
    return found
