"""What a vLLM server's log says of why it ended. Pure."""

import re

_LINES, _WIDTH, _CONTEXT = 15, 300, 5  # of an error message: lines, characters, lines beside the errors
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\) ?)?(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] ?)?)?")
_ERROR = re.compile(r"\b\w*(?:Error|Exception)\b|\berror[:,]", re.IGNORECASE)
_NOISE = re.compile(
    r'^\s*(?:File "|Traceback |[\^~]+\s*$|During handling|The above exception|- leaked|nanobind:|non-default args|$)|^    '
    r"|\w+Warning: |warnings\.warn|[▀█]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def telling_lines(text: str) -> list[str]:
    """The lines of a log that say what went wrong: the first errors, then the last others; each once, and cut."""
    errors: dict[str, None] = {}
    others: dict[str, None] = {}
    for raw in text.splitlines():
        line = _COLOUR.sub("", raw)
        head = _PREFIX.match(line)
        line = line[head.end() :].rstrip()
        if _NOISE.search(line):
            continue
        serious = head["level"] not in ("INFO", "DEBUG", "WARNING") and _ERROR.search(line)
        (errors if serious else others)[line[:_WIDTH]] = None
    first = list(errors)[: _LINES - _CONTEXT]
    return first + list(others)[-(_CONTEXT if first else _LINES) :]
