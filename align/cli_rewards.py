"""`paretune rewards`: try the rewards of a configuration by hand, or serve them to trainers elsewhere."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from align.config import Config
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

KEY_VARIABLE = "PARETUNE_REWARDS_KEY"
WIDEST = 60  # characters of a text or a reason in the table


def add_rewards_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `paretune rewards`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: Callable[..., int], text: str) -> Callable[..., Any]:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(act=act)
        sub.add_argument("config", metavar="FILE", help="configuration (YAML)")
        return sub.add_argument

    add = command("try", try_rewards, "Score texts by hand and print a table; no policy is loaded.")
    add("--text", action="append", default=[], help="a completion; several are one sample group")
    add("--jsonl", metavar="FILE", default="", help='rows {"text": ...} with an optional "prompt" and fields of the data')
    add("--row", metavar="JSON", default="", help="fields of the data for --text (default: the first training prompt's)")
    add("--json", metavar="FILE", default="", help="write values and reasons to this file")
    add = command("serve", serve_rewards, "Serve the objectives of a file over HTTP, for trainers with the reward `remote`.")
    add("--objectives", default="", help="names, with commas (default: all)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=8200, help="port to listen on (default: %(default)s)")


# --- try --------------------------------------------------------------------------------------------------------------


def try_rewards(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print one line per text: the value of every objective, or why there is none.

    Raises:
        ValueError: There is nothing to score, or the configuration or a row cannot be read.
    """
    from align.build import build_bus, load_prompts, load_tokenizer, locate_policy
    from align.load import load_config

    config = load_config(options.config, overrides)
    if bool(options.text) == bool(options.jsonl):
        raise ValueError("give --text (once or several times) or --jsonl, not both")
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer, context = load_tokenizer(locate_policy(config), config)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text=[text], add_special_tokens=False)["input_ids"][0])

    if options.jsonl:
        groups = [_group(row.pop("prompt", ""), row, [row.pop("text")], encode) for row in _rows(options.jsonl)]
    elif options.row:
        row = _object("--row", options.row)
        groups = [_group(row.pop("prompt", ""), row, options.text, encode)]
    else:
        first = load_prompts(config, tokenizer, context).train[0]
        groups = [_group(first.text, first.columns, options.text, encode)]
        print(f"prompt: {first.text!r:.200}")
    columns = sorted(set.intersection(*(set(group.prompt.columns) for group in groups)))
    with closing(build_bus(config, columns)) as bus:
        matrix = bus.score(groups)
    texts = [sample.text for group in groups for sample in group.samples]
    print("\n".join(table(config, texts, matrix)))
    if options.json:
        Path(options.json).write_text(json.dumps(_figures(texts, matrix), indent=1) + "\n", encoding="utf-8")
    return 0


def _group(
    prompt: str, columns: Mapping[str, Any], texts: Sequence[str], encode: Callable[[str], tuple[int, ...]]
) -> SampleGroup:
    samples = tuple(Sample(encode(text), (), FinishReason.STOP, 0, text) for text in texts)
    return SampleGroup(Prompt("", prompt, encode(prompt), dict(columns)), samples)


def _rows(path: str) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--jsonl {path} cannot be read: {error}") from error
    rows = [_object(f"--jsonl {path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"--jsonl {path} has no rows")
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'--jsonl {path}, row {i}: there is no "text" in it')
    return rows


def _object(what: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'{what} must be a JSON object, such as {{"answer": 3}}')
    return found


def table(config: Config, texts: Sequence[str], matrix: RewardMatrix) -> list[str]:
    """Lines of text: raw values and, in brackets, what the weights meet; then the reasons of missing ones."""
    names = list(config.objectives)
    widths = [max(len(name), 16) for name in names]
    lines = ["  ".join([f"{'text':<{WIDEST}}", *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))])]
    for n, text in enumerate(texts):
        cells = [f"{_shorten(repr(text)):<{WIDEST}}"]
        for k, width in enumerate(widths):
            found = f"{matrix.raw_NK[n, k]:.4g} ({matrix.values_NK[n, k]:.3f})"
            cells.append(f"{'missing' if matrix.missing_NK[n, k] else found:>{width}}")
        lines.append("  ".join(cells))
    reasons = [f"{names[k]}, text {n + 1}: {_shorten(why, 300)}" for (n, k), why in sorted(matrix.errors.items())]
    return [*lines, *([""] if reasons else []), *reasons]


def _shorten(text: str, longest: int = WIDEST) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _figures(texts: Sequence[str], matrix: RewardMatrix) -> list[dict[str, Any]]:
    return [
        {"text": text}
        | {o.name: None if matrix.missing_NK[n, k] else matrix.raw_NK[n, k] for k, o in enumerate(matrix.objectives)}
        | {f"error/{matrix.objectives[k].name}": why for (row, k), why in matrix.errors.items() if row == n}
        for n, text in enumerate(texts)
    ]


# --- serve ------------------------------------------------------------------------------------------------------------


def serve_rewards(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Serve until interrupted.

    Raises:
        ValueError: The file or an argument cannot be used, or others could ask without a key.
    """
    from aiohttp import web

    from align.build import served_buses
    from align.load import load_objectives
    from align.service_key import service_key
    from rewards.server import make_app

    objectives = load_objectives(options.config, overrides)
    chosen = options.objectives.split(",") if options.objectives else list(objectives)
    if unknown := [name for name in chosen if name not in objectives]:
        raise ValueError(f"--objectives: there is no {', '.join(unknown)}; there are {', '.join(objectives)}")
    if not 0 < options.port < 65536:
        raise ValueError(f"--port {options.port} must be from 1 to 65535")
    key = service_key(options.host, KEY_VARIABLE, "whoever reaches it can keep it busy")
    buses = served_buses({name: objectives[name] for name in chosen})
    print(f"serving {', '.join(chosen)} on http://{options.host}:{options.port}", flush=True)
    try:
        web.run_app(make_app(buses, key), host=options.host, port=options.port, print=None)
    finally:
        for _, bus in buses.values():
            bus.close()
    return 0
