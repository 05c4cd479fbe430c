"""A report page as tests read it."""

import json
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
