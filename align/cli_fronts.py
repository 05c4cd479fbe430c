"""`paretune front` and `paretune pick`: fronts of trained policies, and a choice from them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def default_cache() -> Path:
    """Where evaluations are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretune" / "evaluations"


def add_front_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune front`; anything else of the form --key=value overrides a key of the configuration."""
    text = "run folder, checkpoint, model folder, folder of model folders, or hub name; LABEL=... names its method"
    parser.add_argument("targets", metavar="RUN|MODEL", nargs="+", help=text)
    _add_evaluation(parser)


def add_pick_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `paretune pick`."""
    add = parser.add_argument
    add("targets", metavar="RUN|FRONT", nargs="+", help="what `paretune front` takes, or the folder that it has written")
    add("--prefer", metavar="NAME=W,...", default="", help="weights of objectives, scaled to [0, 1] by their bounds")
    add("--at-least", metavar="NAME=X,...", default="", help="bounds, in the units of the objectives")
    add("--at-most", metavar="NAME=X,...", default="", help="the same from above")
    add("--maximize", metavar="NAME", default="", help="objective to have the best of, within the bounds")
    add("--minimize", metavar="NAME", default="", help="the same, where smaller is better")
    add("--export", metavar="DIR", default="", help="write the policy there, with tokenizer and model card")
    add("--json", metavar="FILE", default="", help="write the figures to this file")
    _add_evaluation(parser)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", default="", help="objectives and prompts; by default those of the first run")
    add("--checkpoints", default="last", help="of run folders: last (default), all, or steps such as 0,40,160")
    add("--output", metavar="DIR", default="front", help="folder of what is written (default: %(default)s)")
    add("--seeds", metavar="N", type=int, nargs="+", default=[0], help="seeds of the sampling (default: 0)")
    add("--validation", metavar="N", type=int, default=0, help="prompts to choose on (default: half of them)")
    add("--test", metavar="N", type=int, default=0, help="prompts to measure on (default: the others)")
    add("--cache", metavar="DIR", default="", help=f"evaluations made before (default: {default_cache()})")


def front(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Make a front. Raises ValueError for what the user can mend."""
    from align.fronts.front import front

    return front(_asked(options, options.targets, overrides))


def pick(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Choose from a front. Raises ValueError for what the user can mend."""
    from align.fronts.pick import pick

    wishes = (options.prefer, options.at_least, options.at_most, options.maximize, options.minimize)
    return pick(_asked(options, options.targets, overrides), wishes, options.export, options.json)


def _asked(options: argparse.Namespace, targets: Sequence[str], overrides: Sequence[str]):
    from align.fronts.front import Asked

    for name in ("validation", "test"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be 1 or more, or 0 for the default")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(f"--seeds {' '.join(map(str, options.seeds))}: give different numbers, 0 or more")
    return Asked(
        targets=targets,
        config=options.config,
        checkpoints=options.checkpoints,
        output=Path(options.output),
        cache=Path(options.cache) if options.cache else default_cache(),
        seeds=options.seeds,
        validation=options.validation,
        test=options.test,
        overrides=overrides,
    )
