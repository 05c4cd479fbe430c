"""The gradient probe: how near its Gram matrices are to those of full gradients, and what it costs.

    python scripts/bench_probe.py [--batches 20] [--rounds 12] [--only fidelity|cost] [--device-note TEXT]
    python scripts/bench_probe.py --only cost --policies 0.5b          # with a GPU

Fidelity: the quickstart trains the shipped policy; at each batch, inner products of the full gradients of every two samples
(one backward per sample) are compared with those of the features (correlation over all pairs), and so is what the scheme
`gradient` makes of them, the influence of each objective (cosine). Cost: one run takes its steps by turns with fixed
weights and with `gradient` weights, in changing order; its learning rate is 0 and the steps of a round have the same
prompts and seed, so that they differ in nothing else. A step is sampling, scoring, update and log files. The ratio is taken
round by round, of the time on the clock and of processor time, and once more of the fastest quarter of each side's steps,
for machines that have other work to do. Tables are in Markdown; the last line is a JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `paretune` does

# ruff: noqa: E402
import numpy as np
import torch
from transformers import TrainerCallback

import align.rollouts
from align.build import PromptSets
from align.callbacks import ScheduleCallback
from align.config.weighting import FixedWeighting, GradientWeighting, ProbeConfig
from align.plan import Schedule
from align.probe import Pass, build_probe, find_layers
from align.runfolder import open_run
from align.step import advantages_alone
from align.train import build, build_learner
from align.weighting import Scheme, WeightState, build_scheme

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
COMPARED = {"norms": {"features": "norms"}} | {f"sketch {m}": {"features": "sketch", "size": m} for m in (4, 8, 16)}
SIDES = ("fixed", "norms", "sketch", "exact")
WARM_UP = 2  # rounds not counted
SHAPES = {  # hidden size, layers, heads, key-value heads, inner width, vocabulary
    "25m": (512, 8, 8, 8, 1408, 258),
    "0.5b": (896, 24, 14, 2, 4864, 151936),
}


def main() -> None:
    """Measure, and print the tables and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="of the fidelity run")
    parser.add_argument("--rounds", type=int, default=12, help="of each cost run, besides the warm-up")
    parser.add_argument("--only", choices=("fidelity", "cost"))
    parser.add_argument("--objectives", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--sides", nargs="+", choices=SIDES[1:], default=SIDES[1:])
    parser.add_argument(
        "--policies", nargs="+", choices=(*SHAPES, "shipped"), default=("25m", "shipped"), help="of cost runs"
    )
    parser.add_argument("--size", type=int, default=ProbeConfig().size, help="of the sketch in the cost runs")
    parser.add_argument("--device-note", default="", help="what the figures were taken on")
    options = parser.parse_args()
    figures: dict[str, Any] = {"device": options.device_note, "threads": torch.get_num_threads()}
    if options.only != "cost":
        figures["fidelity"] = fidelity(options.batches)
        print_fidelity(figures["fidelity"], options.batches)
    if options.only != "fidelity":
        sides, size = ("fixed", *options.sides), options.size
        figures["cost"] = [cost(p, k, options.rounds, sides, size) for p in options.policies for k in options.objectives]
        print_cost(figures["cost"])
    print(json.dumps(figures))


# --- fidelity ---------------------------------------------------------------------------------------------------------


def fidelity(batches: int) -> dict[str, dict[str, list[float]]]:
    """Per features: correlation of score products, cosine of influence vectors, share of the squared length; by batch."""
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = {"type": "gradient", "probe": {"features": "exact"}}
        learner = start(Path(folder), batches, [f"--weighting={json.dumps(exact)}"], [])
        learner._probe_gradients = lambda batch, _: compare(learner, figures, batch)
        learner.train()
    return figures


def compare(learner: Any, figures: dict[str, dict[str, list[float]]], batch: Mapping[str, Any]) -> None:
    """Compare the features on a batch; the training goes on with equal weights."""
    advantages_NK = advantages_alone(learner.parts.rules, learner._gathered)
    full_NN = score_products(full_scores(learner, batch, len(advantages_NK)))
    pairs = ~np.eye(len(full_NN), dtype=bool)
    influence_K = influence(full_NN, advantages_NK)
    for name, options in COMPARED.items():
        found_NN = score_products(feature_scores(learner, batch, len(advantages_NK), ProbeConfig(**options)))
        found_K = influence(found_NN, advantages_NK)
        values = {
            "correlation": np.corrcoef(found_NN[pairs], full_NN[pairs])[0, 1],
            "influence_cosine": found_K @ influence_K / np.linalg.norm(found_K) / np.linalg.norm(influence_K),
            "squared_length": np.trace(found_NN) / np.trace(full_NN),
        }
        for key, value in values.items():
            figures.setdefault(name, {}).setdefault(key, []).append(float(value))


def full_scores(learner: Any, batch: Mapping[str, Any], count: int) -> torch.Tensor:
    """Gradients (N, parameters) of every sample's part of the loss."""
    loss, parameters = learner._policy_loss(learner.model, batch), list(learner.model.parameters())
    scores = torch.empty(count, sum(p.numel() for p in parameters))
    for i in range(count):
        gradients = torch.autograd.grad(loss(torch.tensor([i]), torch.ones(1)), parameters)
        scores[i] = torch.cat([gradient.flatten() for gradient in gradients]) / count
    return scores


def feature_scores(learner: Any, batch: Mapping[str, Any], count: int, options: ProbeConfig) -> torch.Tensor:
    """Features (N, D) of the same gradients."""
    tokens = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    loss = learner._policy_loss(learner.model, batch)
    this = Pass(find_layers(learner.model, options, learner.parts.config.seed), count, tokens)
    this.advantages_B, this.advantages_BK = torch.ones(count), torch.eye(count)
    torch.autograd.grad(this.forward(lambda: loss(torch.arange(count), torch.ones(count))), this.roots)
    this.finish()
    return this.projected_KD


def score_products(scores_ND: torch.Tensor) -> np.ndarray:
    """Inner products (N, N)."""
    return (scores_ND @ scores_ND.T).double().numpy()


def influence(products_NN: np.ndarray, advantages_NK: np.ndarray) -> np.ndarray:
    """I_k = sum_j gram[k, j]."""
    return (advantages_NK.T @ products_NN @ advantages_NK).sum(axis=1)


def print_fidelity(figures: Mapping[str, Mapping[str, Sequence[float]]], batches: int) -> None:
    """The table."""
    print(f"\n{batches} batches of 16 x 8 samples, shipped policy: median (smallest) over batches\n")
    print("| features | correlation of score products | cosine of influence | share of squared length |")
    print("|---|---|---|---|")
    for name, values in figures.items():
        cells = [f"{statistics.median(values[key]):.3f} ({min(values[key]):.3f})" for key in values]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


# --- cost -------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the ways of training that take turns: its scheme, where it stands, and its probe."""

    scheme: Scheme
    state: WeightState
    probe: Any


class Turns(TrainerCallback):
    """Puts the sides in place by turns, and measures their steps."""

    def __init__(self, names: Sequence[str], size: int):
        self.names = names
        self._size = size
        self.step = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.processor_seconds: dict[str, list[float]] = {name: [] for name in names}
        self.peak_gib: dict[str, float] = dict.fromkeys(names, 0.0)

    def join(self, learner: Any) -> None:
        """Make the sides of a learner."""
        self._learner = learner
        self._sides = {name: self._side(name) for name in self.names}
        original = align.rollouts.training_params
        align.rollouts.training_params = lambda config, _, place: original(config, self.step // len(self.names), place)

    def _side(self, name: str) -> Side:
        config, objectives = self._learner.parts.config, self._learner.parts.rules.objectives
        weights = dict.fromkeys(config.objectives, 1.0)
        features = "exact" if name == "fixed" else name  # fixed weights ask nothing of it
        options = GradientWeighting(type="gradient", weights=weights, probe={"features": features, "size": self._size})
        scheme = build_scheme(FixedWeighting(type="fixed", weights=weights) if name == "fixed" else options)
        of_side = config.model_copy(update={"weighting": options})
        probe = build_probe(of_side, self._learner.model, self._learner.parts.plan.micro_batch_size, aux_loss=False)
        return Side(scheme, scheme.init(objectives), probe)

    def _now(self) -> str:
        """Whose turn it is: the order goes to and fro, and starts elsewhere every second round."""
        turn, place = divmod(self.step, len(self.names))
        order = [*self.names[turn // 2 % len(self.names) :], *self.names[: turn // 2 % len(self.names)]]
        return order[place if turn % 2 == 0 else -1 - place]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Put the side in place."""
        side, learner = self._sides[self._now()], self._learner
        learner.parts = replace(learner.parts, rules=replace(learner.parts.rules, scheme=side.scheme))
        learner.weight_state, learner._probe = side.state, side.probe
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter(), time.process_time()

    def on_log(self, *args: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Take the time."""
        if "loss" not in logs:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        name = self._now()
        if self.step >= WARM_UP * len(self.names):
            self.seconds[name].append(time.perf_counter() - self._start[0])
            self.processor_seconds[name].append(time.process_time() - self._start[1])
            if torch.cuda.is_available():
                self.peak_gib[name] = max(self.peak_gib[name], torch.cuda.max_memory_allocated() / 2**30)
        self._sides[name].state = self._learner.weight_state
        self.step += 1


def cost(policy: str, objectives: int, rounds: int, names: Sequence[str], size: int) -> dict[str, Any]:
    """Step times of the sides, and their ratios to fixed weights."""
    turns = Turns(names, size)
    PromptSets.order = lambda prompts, total, _: np.arange(total) % len(prompts.train)  # the same at every step
    with tempfile.TemporaryDirectory() as folder:
        steps = (rounds + WARM_UP) * len(names)
        shares = {f"share_{i}": {"reward": "scripts.bench_probe:share", "args": {"remainder": i}} for i in range(objectives)}
        changes = [f"--objectives={json.dumps(shares)}", *(random_policy(Path(folder), policy) if policy in SHAPES else [])]
        fixed = {"type": "gradient", "weights": dict.fromkeys(shares, 1.0)}
        trl = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "disable_tqdm": True}
        trl["gradient_checkpointing"] = policy == "0.5b"
        changes += [f"--weighting={json.dumps(fixed)}", f"--trl={json.dumps(trl)}", "--prompts.train.args.count=16"]
        learner = start(Path(folder), steps, changes, [turns])
        turns.join(learner)
        learner.train()
        parameters = sum(p.numel() for p in learner.model.parameters())
    print(f"{policy}, {objectives} objectives: done", file=sys.stderr, flush=True)
    return {
        "policy": policy,
        "parameters": parameters,
        "objectives": objectives,
        "rounds": rounds,
        "sketch_size": size,
        "step_s": {name: statistics.median(seconds) for name, seconds in turns.seconds.items()},
        "ratio": ratios(turns.seconds),
        "processor_ratio": ratios(turns.processor_seconds),
        "quiet_ratio": {name: quiet(turns.seconds[name]) / quiet(turns.seconds["fixed"]) for name in names[1:]},
        "peak_gib": turns.peak_gib if torch.cuda.is_available() else {},
    }


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Per side but `fixed`: median, smallest and largest ratio to it within a round."""
    pairs = {name: [a / b for a, b in zip(seconds[name], seconds["fixed"], strict=True)] for name in seconds}
    return {n: [statistics.median(values), min(values), max(values)] for n, values in pairs.items() if n != "fixed"}


def quiet(seconds: Sequence[float]) -> float:
    """Mean of the fastest quarter of the steps: other work on the machine only ever makes a step longer."""
    return statistics.mean(sorted(seconds)[: max(1, len(seconds) // 4)])


def share(token_ids: Sequence[int], remainder: int) -> float:
    """A reward that says something of random text too: the share of tokens whose number leaves a remainder modulo 8."""
    return sum(token % 8 == remainder for token in token_ids) / len(token_ids)


def random_policy(folder: Path, size: str) -> list[str]:
    """Make a policy of random weights; the overrides that train it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from align.build import locate_model

    tokenizer = AutoTokenizer.from_pretrained(locate_model("builtin:arithmetic"))
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=size == "0.5b",
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    if size == "0.5b":
        batch = ("--rollout.prompts_per_batch=8", "--rollout.max_tokens=1024", "--learner.micro_batch_size=16")
        return [f"--policy.model={folder / 'policy'}", "--policy.dtype=bfloat16", "--rollout.samples_per_prompt=8", *batch]
    return [f"--policy.model={folder / 'policy'}", "--rollout.prompts_per_batch=4"]


def print_cost(figures: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    print("\nStep time against fixed weights: median ratio (range over rounds)\n")
    columns = "policy", "parameters", "objectives", "fixed", "features", "by the clock", "processor time", "fastest quarter"
    print(f"| {' | '.join(columns)} | peak GPU memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in figures:
        peak = row["peak_gib"]
        policy = f"{row['policy']} | {row['parameters'] / 1e6:.1f} M | {row['objectives']} | {row['step_s']['fixed']:.3f} s"
        for name in row["ratio"]:
            label = f"sketch {row['sketch_size']}" if name == "sketch" else name
            cells = ["{:.3f} ({:.3f} to {:.3f})".format(*row[key][name]) for key in ("ratio", "processor_ratio")]
            cells.append(f"{row['quiet_ratio'][name]:.3f}")
            cells.append(f"{peak[name]:.2f} GiB, fixed {peak['fixed']:.2f}" if peak else "-")
            print(f"| {policy} | {label} | {' | '.join(cells)} |")


def start(folder: Path, steps: int, changes: Sequence[str], callbacks: Sequence[TrainerCallback]) -> Any:
    """A learner of the quickstart, with changes, that neither evaluates nor saves on the way."""
    run = open_run(QUICKSTART, "", [f"--output={folder / 'run'}", f"--steps={steps}", "--evaluation.every=0", *changes])
    run.folder.mkdir()
    schedule = Schedule(steps + 1, 0, steps + 1)
    return build_learner(run, build(run), schedule, [ScheduleCallback(schedule, lambda: False), *callbacks])


if __name__ == "__main__":
    main()
