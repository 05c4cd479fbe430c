"""`paretune replay`, `merge` and `sweep`: what is done with runs and policies that are there, or to be made in numbers."""

import argparse
from collections.abc import Sequence


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune replay`; `--weighting...` says what to replay."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder, of a run that is complete, stopped or going on")
    parser.add_argument("--json", metavar="FILE", default="", help="write the whole series to this file")
    parser.add_argument("--png", metavar="FILE", default="", help="draw real and replayed weights into this file")


def replay(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Replay a run. Raises ValueError for what the user can mend."""
    from align.replay import replay_run

    return replay_run(options.run_folder, overrides, options.json, options.png)
