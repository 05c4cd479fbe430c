"""A round of each of two methods, for `tests/test_rounds.py`: python -m tests.rounds_run OUT [OVERRIDES].

Samples depend on the prompt and the policy's version alone, so that the number of processes makes no difference to them. The
run folders are OUT.sft and OUT.kto.
"""

import json
import sys

from tests import selftrain_run

METHODS = ("sft", "kto")
OBJECTIVES = {"even": {"reward": "tests.selftrain_run:even"}, "told": {"reward": "numeric_answer"}}
CHANGES = (
    f"--objectives={json.dumps(OBJECTIVES)}",
    '--selftrain={"filter": {"at_least": {"even": 0.5}}, "answers": "told", "weights": ["entropy", {"type": "loss"}]}',
    "--rounds.count=1", "--rounds.prompts=4", "--rounds.batch_size=8", "--rounds.learning_rate=0.1",
    "--rollout.samples_per_prompt=4", "--learner.micro_batch_size=4", "--evaluation.every=0",
    "--prompts.train.args.count=16", "--prompts.evaluation.args.count=8", "--trl.optim=sgd", "--trl.max_grad_norm=0",
)  # fmt: skip


def main(out: str, changes: list[str]) -> None:
    """Go through the rounds."""
    from align.rounds import build, build_rounds
    from align.runfolder import open_run
    from rollout.local import LocalSampler
    from tests.test_rounds import CONFIG

    original, LocalSampler.sample = LocalSampler.sample, selftrain_run.sample
    try:
        for method in METHODS:
            run = open_run(CONFIG, "", [*CHANGES, f"--rounds.method={method}", f"--output={out}.{method}", *changes])
            run.folder.mkdir(parents=True, exist_ok=True)
            with build_rounds(run, build(run)) as rounds:
                rounds.run(1)
    finally:
        LocalSampler.sample = original


if __name__ == "__main__":
    from align.launch import relaunch_on_cpu

    relaunch_on_cpu("tests.rounds_run", sys.argv[1:])
    main(sys.argv[1], sys.argv[2:])
    print("went through the rounds", flush=True)
