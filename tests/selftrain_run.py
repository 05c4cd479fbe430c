"""Training on the pool alone, for `tests/test_selftrain_runs.py`: python -m tests.selftrain_run OUT [OVERRIDES].

Samples depend on the prompt and the policy's version alone, and the one objective with a share is constant, so that the term
is all of the gradient and the number of processes makes no difference. Plain gradient descent; the weights are in
OUT.run/checkpoints, and OUT.RANK has what every update drew.
"""

import json
import random
import sys
from pathlib import Path

TRL = {
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}
SELFTRAIN = {
    "filter": {"at_least": {"even": 0.5}},
    "answers": "told",
    "weights": [
        {"type": "entropy", "power": 0.5},
        {"type": "feasible", "threshold": 8.0, "rate": 0.2, "leak": 0.1},
        {"type": "importance", "trusted": "TRUSTED", "share": 0.8},
    ],
    "pool": {"per_prompt": 3},
    "term": {"coefficient": 0.5, "samples": 11},  # is no multiple of the passes
}
CHANGES = (
    "--steps=2", "--evaluation.every=0", f"--trl={json.dumps(TRL)}", "--checkpoint.every=2", "--learner.micro_batch_size=4",
    "--weighting={type: fixed, weights: {same: 1, even: 0, told: 0}}",
)  # fmt: skip
OBJECTIVES = {"same": "tests.selftrain_run:same", "even": "tests.selftrain_run:even", "told": "numeric_answer"}
TRUSTED = [{"prompt": "1+2=?", "completion": "1+2=3;#3"}, {"prompt": "2+2=?", "completion": "#4"}]


def sample(sampler, prompts, params):
    """Takes the place of `LocalSampler.sample`: digits drawn by the name of the prompt and the version of the policy."""
    from rollout.types import FinishReason, Sample, SampleGroup

    groups = []
    for prompt in prompts:
        draw = random.Random(f"{prompt.text} {sampler._version}")
        ids = [(*draw.choices(range(48, 58), k=draw.randint(1, 3)), 256) for _ in range(params.samples_per_prompt)]
        texts = ["".join(map(chr, i[:-1])) for i in ids]
        samples = [Sample(i, (), FinishReason.STOP, sampler._version, t) for i, t in zip(ids, texts, strict=True)]
        groups.append(SampleGroup(prompt, tuple(samples)))
    return groups


def same(token_ids) -> float:
    """A reward that tells nothing."""
    return 0.5


def even(token_ids) -> float:
    """A reward of such samples."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def main(out: str, changes: list[str], selftrain: dict = SELFTRAIN):
    """Train for two steps; the learner, and what every update drew."""
    from align.callbacks import ScheduleCallback
    from align.plan import Schedule
    from align.runfolder import open_run
    from align.selftrain.training import SelfTraining
    from align.train import build, build_learner
    from rollout.local import LocalSampler
    from tests.conftest import QUICKSTART, SMALL

    trusted = Path(f"{out}.trusted.jsonl")
    trusted.write_text("".join(json.dumps(row) + "\n" for row in TRUSTED))
    section = json.dumps(selftrain).replace("TRUSTED", str(trusted))
    objectives = {name: {"reward": reward} for name, reward in OBJECTIVES.items()}
    given = [*SMALL, *CHANGES, f"--objectives={json.dumps(objectives)}", f"--selftrain={section}", f"--output={out}.run"]
    run = open_run(QUICKSTART, "", [*given, *changes])
    run.folder.mkdir(parents=True, exist_ok=True)
    draws, weigh, original = [], SelfTraining._draw_and_weigh, LocalSampler.sample
    SelfTraining._draw_and_weigh = lambda self: (draws.append(weigh(self)), draws[-1])[1]
    LocalSampler.sample = sample
    try:
        schedule = Schedule(run.config.steps, 0, run.config.checkpoint.every)
        learner = build_learner(run, build(run), schedule, [ScheduleCallback(schedule, lambda: False)])
        learner.train()
    finally:
        SelfTraining._draw_and_weigh, LocalSampler.sample = weigh, original
    told = [{"pairs": draw.pairs, "factors": draw.factors_n.tolist(), "plain": draw.plain_n.tolist()} for draw in draws]
    Path(f"{out}.{learner.accelerator.process_index}").write_text(json.dumps(told))
    return learner, draws


if __name__ == "__main__":
    from align.launch import relaunch_on_cpu

    relaunch_on_cpu("tests.selftrain_run", sys.argv[1:])
    main(sys.argv[1], sys.argv[2:])
    print("trained on the pool", flush=True)
