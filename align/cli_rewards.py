"""`paretune rewards`: try the rewards of a configuration by hand, or serve them to trainers elsewhere."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

KEY_VARIABLE = "PARETUNE_REWARDS_KEY"


def add_rewards_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `paretune rewards`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: Callable[..., int], text: str) -> Callable[..., Any]:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(act=act)
        sub.add_argument("config", metavar="FILE", help="YAML: a configuration, or `objectives` alone")
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


def try_rewards(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Score texts and print a table. Raises ValueError for what the user can mend."""
    from align.try_rewards import try_rewards  # after the command line has seen to it that these are ours

    return try_rewards(options.config, overrides, options.text, options.jsonl, options.row, options.json)


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
    line = f"serving {', '.join(chosen)} on http://{options.host}:{options.port}"
    try:
        web.run_app(make_app(buses, key), host=options.host, port=options.port, print=lambda *_: print(line, flush=True))
    except OSError as error:
        raise ValueError(f"cannot listen on {options.host}:{options.port}: {error.strerror}; give another --port") from error
    finally:
        for _, bus in buses.values():
            bus.close()
    return 0
