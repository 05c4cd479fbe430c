"""The `paretune` command. Every subcommand imports what it needs when it runs, so that --help answers at once."""

import argparse
import json
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from align import __version__
from align.cli_fronts import add_front_arguments, add_pick_arguments, front, pick
from align.cli_policies import add_merge_arguments, add_replay_arguments, add_sweep_arguments, merge, replay, sweep
from align.cli_rewards import add_rewards_arguments
from align.cli_worker import add_worker_arguments, run_worker
from align.guard import check_imports
from align.launch import add_train_arguments, share_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the console script; returns the exit status: 0 done, 2 for a problem that the user can mend.

    It is 1, without a word, when nobody reads what is printed any more, as in `paretune check FILE | head -1`.
    """
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # what is printed later fails where nobody can catch it
    except BrokenPipeError:
        if not _unread(sys.stdout.fileno()):
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the interpreter
        return 1


def _unread(pipe: int) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    share_cores()
    sys.path.insert(0, "")  # rewards and prompt functions of the user live in the current folder
    try:
        check_imports()
        return options.run(options, overrides)
    except ValueError as error:
        if options.run in (_train, _rounds):  # it says itself what a user can mend; the rest is a defect, to be shown whole
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paretune", description="Align language models to several rewards at once, online.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"paretune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    anything = "Any key of the configuration can be overridden: --steps=50 --trl.learning_rate=1e-4"

    def command(name: str, run, text: str, takes_overrides: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=anything if takes_overrides else None, allow_abbrev=False
        )
        sub.set_defaults(run=run, takes_overrides=takes_overrides)
        return sub

    train = command("train", _train, "Train a policy (one process; `accelerate launch -m align.train` for more).", True)
    add_train_arguments(train)
    rounds = command("rounds", _rounds, "Rounds of self-training: sample, filter, weight, fine-tune, repeat.", True)
    add_train_arguments(rounds)
    check = command("check", _check, "Say what a configuration would do, and what is wrong with it; loads no model.", True)
    check.add_argument("config", metavar="FILE")
    check.add_argument("--print", action="store_true", help="print the whole configuration as well, with all defaults")
    check.add_argument("--processes", type=int, default=1, help="learner processes to plan for (default: 1)")
    evaluate = command("eval", _evaluate, "Evaluate checkpoints of a run, or any model, on the held-out prompts.", True)
    evaluate.add_argument("target", metavar="RUN|MODEL", help="run folder, model folder, or hub name")
    evaluate.add_argument("--config", metavar="FILE", default="", help="configuration; needed unless it is a run folder")
    evaluate.add_argument("--checkpoints", default="last", help="of a run: last (default), all, or steps such as 0,40,160")
    evaluate.add_argument("--json", metavar="FILE", default="", help="write the figures to this file")
    report = command("report", _report, "Write report.html and front.png of a run, or one page that compares several.")
    report.add_argument("folders", metavar="RUN", nargs="+", help="run folder; one has its report written into it")
    text = "page of several runs (default: %(default)s)"
    report.add_argument("--output", metavar="FILE", default="comparison.html", help=text)
    watch = command("watch", _watch, "Serve the pages of runs in progress on this machine, made anew as their files grow.")
    watch.add_argument(
        "folders", metavar="RUN|FRONT", nargs="+", help="run folder, or folder that paretune front has written"
    )
    watch.add_argument(
        "--port", type=int, default=8377, help="of 127.0.0.1 (default: %(default)s; 0 takes one that is free)"
    )
    add_replay_arguments(command("replay", replay, "Replay what a run logged through another weighting scheme.", True))
    add_merge_arguments(command("merge", merge, "Merge policies of one origin into models between them."))
    add_sweep_arguments(command("sweep", sweep, "Train a grid of keys and seeds, one run after another.", True))
    add_front_arguments(command("front", front, "Compare policies on a Pareto front.", True))
    add_pick_arguments(command("pick", pick, "Choose a policy from a front, and export it.", True))
    rewards = command("rewards", _rewards, "Try rewards by hand, or serve them to trainers elsewhere.", True)
    add_rewards_arguments(rewards)
    worker = command("worker", _worker, "Run one vLLM server here, for a trainer that names it in rollout.engine.urls.")
    add_worker_arguments(worker)
    command("schema", _schema, "Print the JSON schema of the configuration, for editors.")
    return parser


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.train import train

    return train(options.config, options.resume, overrides)


def _rounds(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.rounds import rounds

    return rounds(options.config, options.resume, overrides)


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.check import check

    return check(options.config, options.processes, overrides, options.print)


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.evaluate_policies import evaluate_policies

    return evaluate_policies(options.target, options.config, options.checkpoints, options.json, overrides)


def _watch(options: argparse.Namespace, _) -> int:
    from align.watch import watch

    return watch(options.folders, options.port)


def _report(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.report import write_report
    from align.report_compare import write_comparison

    first, *others = map(Path, options.folders)
    if others and Path(options.output).suffix != ".html":
        raise ValueError(f"--output {options.output}: name the page of a comparison, as in {options.output}.html")
    print(write_comparison([first, *others], Path(options.output)) if others else write_report(first))
    return 0


def _rewards(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return options.act(options, overrides)


def _worker(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    return run_worker(options)


def _schema(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from align.load import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
