"""Several probes by turns on one and the same batch, for `tests/test_probe.py`: python -m tests.probe_run OUT [OVERRIDES].

Writes OUT.RANK, the Gram matrices in the order of PROBES, of three objectives and two domains, and OUT.RANK.domains, the
weights of these in the end. Samples depend on the prompt alone, the learning rate is 0, and
there is one batch of prompts, so that the number of processes makes no difference.
"""

import json
import random
import sys
from pathlib import Path

PROBES = (
    {"features": "exact"},
    {"features": "sketch", "size": 16, "backward": "extra", "samples": 16},
    {"features": "norms", "backward": "extra", "samples": 16},
    {"features": "sketch", "size": 16},
    {"features": "norms"},
    {"features": "exact"},
)
WEIGHTING = {"type": "gradient", "probe": {"features": "exact"}}
TRL = {"learning_rate": 0.0, "gradient_checkpointing": False}
ARGS = {"split": "train", "count": 2}
SOURCES = {
    name: {"type": "function", "function": "rollout.arithmetic:expressions", "args": ARGS | {"terms": [terms]}}
    for name, terms in (("short", 3), ("long", 4))
}
CHANGES = (
    f"--steps={len(PROBES)}", "--evaluation.every=0", f"--weighting={json.dumps(WEIGHTING)}", f"--trl={json.dumps(TRL)}",
    f"--prompts.train={json.dumps({'type': 'mixture', 'sources': SOURCES})}", f"--checkpoint.every={len(PROBES)}",
    "--domains=alignment",
)  # fmt: skip


def sample(sampler, prompts, params):
    """Takes the place of `LocalSampler.sample`: digits drawn by the name of the prompt."""
    from rollout.types import FinishReason, Sample, SampleGroup

    groups = []
    for prompt in prompts:
        draw = random.Random(prompt.text)
        ids = [tuple(draw.choices(range(40, 70), k=draw.randint(4, 12))) for _ in range(params.samples_per_prompt)]
        texts = ["".join(map(chr, i)) for i in ids]
        samples = [Sample(i, (), FinishReason.LENGTH, sampler._version, t) for i, t in zip(ids, texts, strict=True)]
        groups.append(SampleGroup(prompt, tuple(samples)))
    return groups


def even(token_ids) -> float:
    """A reward of such samples."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def low(token_ids) -> float:
    """Another."""
    return sum(token < 50 for token in token_ids) / len(token_ids)


def main(out: str, changes: list[str]) -> list[list[list[float]]]:
    """Train for one step per probe; the Gram matrices."""
    from transformers import TrainerCallback

    from align.callbacks import ScheduleCallback
    from align.plan import Schedule
    from align.probe import NO_GRAM, Probe, build_probe
    from align.runfolder import open_run
    from align.train import build, build_learner
    from rollout.local import LocalSampler
    from tests.conftest import QUICKSTART, SMALL

    objectives = {name: {"reward": f"tests.probe_run:{name}"} for name in ("even", "low")}
    objectives["brevity"] = {"reward": "brevity", "args": {"max_tokens": 32}}
    run = open_run(
        QUICKSTART, "", [*SMALL, *CHANGES, f"--objectives={json.dumps(objectives)}", f"--output={out}.run", *changes]
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    grams = []

    class Swap(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            probe = PROBES[state.global_step]
            weighting = run.config.weighting.model_copy(
                update={"probe": type(run.config.weighting.probe).model_validate(probe)}
            )
            config = run.config.model_copy(update={"weighting": weighting})
            plan = learner.parts.plan
            learner._probe = build_probe(config, learner.model, plan.micro_batch_size, learner.aux_loss_enabled)

    keep, original = Probe._keep, LocalSampler.sample
    Probe._keep = lambda self, gram: (keep(self, gram), grams.append(self.waiting_KK.tolist()))[0]
    LocalSampler.sample = sample
    try:
        schedule = Schedule(run.config.steps, 0, 999)
        learner = build_learner(run, build(run), schedule, [ScheduleCallback(schedule, lambda: False), Swap()])
        learner.train()
    finally:
        Probe._keep, LocalSampler.sample = keep, original
    assert learner._probe.waiting_KK is NO_GRAM or learner._probe.ordinary
    Path(f"{out}.{learner.accelerator.process_index}").write_text(json.dumps(grams))
    Path(f"{out}.{learner.accelerator.process_index}.domains").write_text(json.dumps(learner.weight_state.domains))
    return grams


if __name__ == "__main__":
    from align.launch import relaunch_on_cpu

    relaunch_on_cpu("tests.probe_run", sys.argv[1:])
    main(sys.argv[1], sys.argv[2:])
    print("probes done", flush=True)
