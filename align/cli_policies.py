"""`paretune replay`, `merge` and `sweep`: what is done with runs and policies that are there, or to be made in numbers."""

import argparse
from collections.abc import Sequence
from pathlib import Path


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


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune sweep`; `--key=value` changes a key of every run."""
    parser.add_argument("config", metavar="FILE", help="configuration (YAML) that all runs start from")
    parser.add_argument(
        "--grid",
        metavar="KEY=VALUE,VALUE",
        action="append",
        default=[],
        help="values of a key, separated by commas or bars; several of these are multiplied",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every point for each (default: 0)")
    parser.add_argument("--output", metavar="DIR", required=True, help="the run folders are made in it")
    parser.add_argument("--processes", type=int, default=1, help="learner processes of a run (default: 1)")
    parser.add_argument(
        "--launch", metavar="COMMAND", default="", help="launcher, as in 'accelerate launch --config_file FILE'"
    )
    parser.add_argument("--print", action="store_true", help="print one command per line for a scheduler, and run nothing")
    parser.add_argument("--no-front", action="store_true", help="do not end with `paretune front`")


def sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run a grid. Raises ValueError for what the user can mend."""
    from align.sweep import Sweep, sweep

    asked = Sweep(
        options.config, options.grid, options.seeds, Path(options.output), options.processes, options.launch,
        prints=options.print, front=not options.no_front,
    )  # fmt: skip
    return sweep(asked, overrides)
