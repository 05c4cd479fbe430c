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


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune merge`."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="run folder (last checkpoint), checkpoint, or model folder"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="a model folder for every vector is made in it")
    parser.add_argument(
        "--weights", metavar="C/C", nargs="+", default=[], help="coefficients in the order of the models, as in 0.5/0.5 1/0"
    )
    parser.add_argument("--grid", metavar="N", type=int, default=0, help="all coefficients k/N that sum to 1")
    parser.add_argument("--method", choices=["soup", "tsv"], default="soup", help="weighted sum, or task singular vectors")
    parser.add_argument("--base", metavar="MODEL", default="", help="what the models were trained from")


def merge(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Merge policies. Raises ValueError for what the user can mend."""
    from align.merge import merge

    return merge(options.models, options.output, options.weights, options.grid, options.method, options.base)
