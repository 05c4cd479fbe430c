"""Step time and peak memory of a run against plain trl.GRPOTrainer with the same model, rewards and settings.

    python scripts/bench_overhead.py [--rounds 7] [--steps 40]

Both sides run in turn, each time in a fresh process and in the order A B, B A, ...; the ratio is taken pair by pair. A
step is the time between the ends of two optimiser steps, samples and log files included. The last line is a JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps not counted
SETTINGS = {
    "learning_rate": 1e-6,  # so small that both sides keep sampling completions of the same length
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


def main() -> None:
    """Run the rounds and print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.steps)))
        return
    pairs = []
    for i in range(options.rounds):
        order = ("ours", "plain") if i % 2 == 0 else ("plain", "ours")
        pair = {side: run_side(side, options.steps) for side in order}
        pairs.append(pair)
        shown = [f"{side} {p['step_s'] * 1e3:.1f} ms/step, {p['peak_mib']:.0f} MiB" for side, p in sorted(pair.items())]
        print(f"round {i + 1}: " + "  ".join(shown), flush=True)
    time_ratios = [pair["ours"]["step_s"] / pair["plain"]["step_s"] for pair in pairs]
    memory_ratios = [pair["ours"]["peak_mib"] / pair["plain"]["peak_mib"] for pair in pairs]
    figures = {
        "rounds": options.rounds,
        "steps": options.steps,
        "plain_step_ms": 1e3 * statistics.median(pair["plain"]["step_s"] for pair in pairs),
        "ours_step_ms": 1e3 * statistics.median(pair["ours"]["step_s"] for pair in pairs),
        "step_time_ratio": statistics.median(time_ratios),
        "step_time_ratio_range": [min(time_ratios), max(time_ratios)],
        "peak_memory_ratio": statistics.median(memory_ratios),
        "peak_memory_ratio_range": [min(memory_ratios), max(memory_ratios)],
    }
    print(json.dumps(figures))


def run_side(side: str, steps: int) -> dict[str, float]:
    """One side in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, "--side", side, "--steps", str(steps)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},  # as `paretune`
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{side} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(side: str, steps: int) -> dict[str, float]:
    """Median step time (seconds) and peak resident memory (MiB) of this process."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, *args, logs, **kwargs) -> None:
            if "loss" in logs:
                ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = (ours if side == "ours" else plain)(Path(folder), steps)
        trainer.add_callback(Clock())
        trainer.train()
    durations = [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    return {
        "step_s": statistics.median(durations),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def ours(folder: Path, steps: int):
    """The quickstart, without evaluation and checkpoints, which plain TRL would not make either."""
    from align.callbacks import ProgressCallback, ScheduleCallback
    from align.plan import Schedule
    from align.runfolder import open_run
    from align.train import build, build_learner

    overrides = [f"--output={folder / 'run'}", f"--steps={steps}", "--evaluation.every=0", f"--trl={json.dumps(SETTINGS)}"]
    run = open_run(str(ROOT / "configs" / "quickstart.yaml"), "", overrides)
    run.folder.mkdir()
    schedule = Schedule(steps + 1, 0, steps + 1)
    callbacks = [ScheduleCallback(schedule, lambda: False), ProgressCallback(list(run.config.objectives), steps, {})]
    return build_learner(run, build(run), schedule, callbacks)


def plain(folder: Path, steps: int):
    """trl.GRPOTrainer with the same prompts, rewards, weights and settings."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from align.build import locate_model
    from align.load import load_config
    from rewards.arithmetic import arithmetic_accuracy, arithmetic_clarity
    from rewards.text import brevity
    from rollout.arithmetic import expressions

    config = load_config(str(ROOT / "configs" / "quickstart.yaml"))
    model = locate_model(config.policy.model)

    def accuracy_reward(completions, answer, **kwargs):
        return [arithmetic_accuracy(text, a) for text, a in zip(completions, answer, strict=True)]

    def brevity_reward(completions, completion_ids, **kwargs):
        return [brevity(ids, config.rollout.max_tokens) for ids in completion_ids]

    def clarity_reward(completions, expression, **kwargs):
        return [arithmetic_clarity(text, e) for text, e in zip(completions, expression, strict=True)]

    group, batch = config.rollout.samples_per_prompt, config.rollout.prompts_per_batch * config.rollout.samples_per_prompt
    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        num_generations=group,
        per_device_train_batch_size=batch,
        max_completion_length=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        reward_weights=list(config.weighting.weights.values()),
        scale_rewards=config.estimator.scale,
        model_init_kwargs={"dtype": config.policy.dtype},
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        **SETTINGS,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy_reward, brevity_reward, clarity_reward],
        args=args,
        train_dataset=Dataset.from_list(list(expressions(**config.prompts.train.args))),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
