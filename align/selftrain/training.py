"""Self-training inside online RL: a pool of samples that passed, a weighted term of the loss, weights of prompts.

After a batch is scored, its samples that pass join the pool, which every process holds whole. Before every update samples
are drawn from it and weighed, all processes together; each pass of the update then adds its share of the term to TRL's
loss. Imports no TRL.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from tqdm.auto import tqdm

from align.config.selftrain import SelftrainConfig
from align.missing import left_out
from align.sampling import pool_seed
from align.selftrain.choose import Answers
from align.selftrain.filters import passing
from align.selftrain.pool import Entry, Pool, PoolFile, seed_entry
from align.selftrain.rows import Pair
from align.selftrain.weigh import Material, next_duals, weigh, weigh_prompts
from align.selftrain.weights import Weights, WeightsError, answer_entropy
from align.together import from_main
from rollout.types import SampleGroup

_DRAW, _WEIGHTS, _PROMPTS = range(3)  # what is drawn at random


@dataclass(frozen=True)
class Draw:
    """What one update learns from, the same in every process.

    Args:
        pairs: Tokens of n samples.
        factors_n: What the summed loss of each over its tokens, in nats, is multiplied by: the coefficient is not in it.
        plain_n: The same without weights.
    """

    pairs: Sequence[Pair] = ()
    factors_n: np.ndarray = field(default_factory=lambda: np.empty(0))
    plain_n: np.ndarray = field(default_factory=lambda: np.empty(0))


class SelfTraining:
    """Mixed into a trainer of TRL's, before what listens to TRL's own loss; all processes call each method together.

    Where the configuration has no section `selftrain`, nothing is done.
    """

    def begin_selftraining(self) -> None:
        """At the start of a run."""
        parts = self.parts
        self._selftrain: SelftrainConfig | None = parts.config.selftrain
        self._said: set[str] = set()
        self.pooled = 0  # samples that have joined the file of the pool
        self._drawn = Draw()
        self._term_sums = torch.zeros(2)
        if self._learns_from_pool:
            self._pool = self._empty_pool()
            self._pool_file = PoolFile(parts.files.pool, parts.config)

    def _empty_pool(self) -> Pool:
        """With nothing but seeds in it."""
        sources, rules = self.parts.sources, self.parts.rules
        return Pool(self._selftrain.pool, [seed_entry(trusted, len(rules.objectives)) for trusted in sources.seeds])

    def resume_selftraining(self, duals: Sequence[float], pooled: int) -> None:
        """From the file of the pool, cut back already, and what a checkpoint keeps besides."""
        if self._learns_from_pool:
            self._pool.add(from_main(self._pool_of_file))
            self.pooled = pooled
            if duals:
                self._pool.set_duals(self._pool.entries, duals)

    def _pool_of_file(self) -> list[Entry]:
        pool = self._empty_pool()
        pool.add(self._pool_file.read())
        return pool.made

    def cut_down_pool(self, step: int) -> None:
        """Bound the file of the pool, after a checkpoint; `step` is that of the oldest that a run may go on from."""
        if self._learns_from_pool:
            self._pool_file.cut_down(self._empty_pool(), step)

    def selftraining_duals(self) -> list[float]:
        """What a checkpoint has to keep besides the file of the pool."""
        return self._pool.all_duals() if self._learns_from_pool else []

    @property
    def _learns_from_pool(self) -> bool:
        return self._selftrain is not None and self._selftrain.term is not None

    # --- after a batch is scored --------------------------------------------------------------------------------------

    def take_in(self, advantages_PG: np.ndarray) -> np.ndarray:
        """Let what passes join the pool; the advantages of all processes, weighed by prompt."""
        if self._selftrain is None:
            return advantages_PG
        rules = self.parts.rules
        raw_PGK = self._scored.raw_NK.reshape(len(self._groups), rules.group_size, len(rules.objectives))
        left_out_PG = left_out(raw_PGK, rules.objectives)
        answers_PG, entropies_P = self._answers(left_out_PG)
        if self._learns_from_pool:
            self._fill_pool(raw_PGK, left_out_PG, answers_PG, entropies_P)
        if self._selftrain.prompts:
            entropies_P = np.array(gather_object(entropies_P))
            seed = pool_seed(self.parts.config, self.state.global_step, _PROMPTS)
            weights = weigh_prompts(self._selftrain, entropies_P, seed)
            self._log_weights("prompts_", weights, entropies_P, "selftrain.prompts")
            advantages_PG = advantages_PG * weights.values_n[:, None]
        return advantages_PG

    def _answers(self, left_out_PG: np.ndarray) -> tuple[Answers, Sequence[float]]:
        """What each sample of this process answers, and the entropies of the groups, in bits.

        A sample that is left out answers nothing, and counts nowhere. None and NaN where nothing looks at answers.
        """
        reader = self.parts.sources.reader
        if reader is None:
            return [[None] * len(group.samples) for group in self._groups], [np.nan] * len(self._groups)
        answers_PG, entropies_P = [], []
        for group, left_out_G in zip(self._groups, left_out_PG, strict=True):
            answers_G = [None if out else reader(sample.text) for sample, out in zip(group.samples, left_out_G, strict=True)]
            kept = [answer for answer, out in zip(answers_G, left_out_G, strict=True) if not out]
            answers_PG.append(answers_G)
            entropies_P.append(answer_entropy(kept) if kept else 0.0)
        return answers_PG, entropies_P

    def _fill_pool(
        self, raw_PGK: np.ndarray, left_out_PG: np.ndarray, answers_PG: Answers, entropies_P: Sequence[float]
    ) -> None:
        rules = self.parts.rules
        tokens_PG = np.array([[len(sample.token_ids) for sample in group.samples] for group in self._groups])
        passed = passing(self._selftrain.filter, rules.objectives, raw_PGK, left_out_PG, answers_PG, tokens_PG)
        step = self.state.global_step + 1
        entries = [
            _entry(group, g, step, raw_PGK[p], answers_PG[p], entropies_P[p])
            for p, group in enumerate(self._groups)
            for g in np.flatnonzero(passed.right_PG[p])
        ]
        everywhere = gather_object([(entries, passed.failed)])
        entries = [entry for part, _ in everywhere for entry in part]
        self._pool.add(entries)
        self.pooled += len(entries)
        if self.accelerator.is_main_process:
            self._pool_file.append(entries)
        kept = len(entries) / self.parts.plan.samples_per_batch
        self._add_metrics({"selftrain/pool": float(len(self._pool)), "selftrain/kept": kept})
        if not entries:
            failed = {name: sum(counts[name] for _, counts in everywhere) for name in passed.failed}
            why = ", ".join(f"{name} by {count}" for name, count in failed.items() if count)
            self._say_once(f"no sample of {self.parts.plan.samples_per_batch} passes selftrain.filter; not met: {why}")
        elif kept == 1 and self._selftrain.filter.asks:
            self._say_once("all samples pass selftrain.filter: it chooses nothing here")

    # --- before an update ---------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, which samples where a batch is due; then, at the start of an update, what it learns from the pool."""
        inputs = super()._prepare_inputs(generation_batch)
        if self._learns_from_pool and self._pass_of_update == 0:
            start = time.perf_counter()
            self._drawn = self._draw_and_weigh()
            self._add_metrics({"time/selftrain": time.perf_counter() - start})
        return inputs

    @property
    def _pass_of_update(self) -> int:
        return self._step % self.args.gradient_accumulation_steps

    def _draw_and_weigh(self) -> Draw:
        term, step = self._selftrain.term, self.state.global_step
        places_n = self._pool.draw(term.samples, pool_seed(self.parts.config, step, _DRAW))
        if not len(places_n):
            return Draw()
        everything = self._pool.entries
        drawn = [everything[place] for place in places_n]
        material = Material(
            self.parts.rules.objectives,
            np.array([entry.values_K for entry in everything]),
            places_n,
            self._pool.duals(drawn),
            np.array([entry.entropy for entry in drawn]),
            self._losses,
            [entry.pair for entry in drawn],
            self.parts.sources.trusted,
        )
        weights = self._weigh(material, step, drawn)
        self._log_weights("", weights, material.entropies_n, "selftrain.weights")
        lengths_n = np.array([len(entry.completion_ids) for entry in drawn], float)
        plain_n = np.ones_like(lengths_n) / lengths_n.sum() if term.normaliser == "tokens" else 1 / lengths_n / len(drawn)
        return Draw(material.pairs, weights.values_n * plain_n, plain_n)

    def _weigh(self, material: Material, step: int, drawn: Sequence[Entry]) -> Weights:
        """Equal weights where those that are wanted cannot be had from the pool by now; no multiplier moves then."""
        try:
            weighed = weigh(self._selftrain, material, step + 1, pool_seed(self.parts.config, step, _WEIGHTS))
        except WeightsError as error:
            self._say_once(f"{error}: weights are equal until they can be had", key="no weights")
            return Weights(np.ones(len(material.places_n)), np.nan, collapsed=True)
        for entry in self._selftrain.weights:
            if entry.type == "feasible":
                self._pool.set_duals(drawn, next_duals(entry, material))
        self._add_metrics({f"selftrain/tilt/{name}": mean for name, mean in weighed.reached.items()})
        for name, line in weighed.missed.items():
            self._say_once(line, key=f"tilt {name}")
        return weighed.weights

    def _losses(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Mean nats per completion token (S,) under the policy as it is; every process scores its share."""
        processes, size = self.accelerator.num_processes, -(-len(pairs) // self.accelerator.num_processes)
        share = [pairs[min(i, len(pairs) - 1)] for i in range(size * self.accelerator.process_index, size * processes)][
            :size
        ]
        tokens, mask, kept = self._padded(share)
        with self.at_temperature_one():
            log_probs = self._log_probs(tokens, mask, kept.shape[1])
        sums = (log_probs * kept).sum(dim=1).double().cpu().numpy()
        values = np.concatenate(gather_object([-sums / kept.sum(dim=1).cpu().numpy()]))
        return values[: len(pairs)]

    def _padded(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B, T), what of them counts as context (B, T), and what of the last ones is a completion (B, C).

        As in TRL's own batches prompts end, and completions begin, in one place; the fill is masked, whatever it is.
        """
        before, after = (max(len(pair[part]) for pair in pairs) for part in (0, 1))
        tokens = torch.zeros(len(pairs), before + after, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (prompt, completion) in enumerate(pairs):
            tokens[row, before - len(prompt) : before + len(completion)] = torch.tensor([*prompt, *completion])
            mask[row, before - len(prompt) : before + len(completion)] = 1
        device = self.accelerator.device
        return tokens.to(device), mask.to(device), mask[:, before:].to(device)

    # --- in every pass of an update -----------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """TRL's loss, and this pass's share of the term.

        Losses of the passes are added up, and gradients of the processes averaged: hence the factor.
        """
        loss = super()._compute_loss(model, inputs)
        if not len(self._drawn.pairs):
            return loss
        rows, real = self._share_of_pass()
        tokens, mask, kept = self._padded([self._drawn.pairs[row] for row in rows])
        with self.at_temperature_one():
            log_probs, *_ = self._get_per_token_logps_and_entropies(model, tokens, mask, kept.shape[1])
        nats_B = -(log_probs.float() * kept).sum(dim=1)
        factors = np.stack([self._drawn.factors_n[rows], self._drawn.plain_n[rows]]) * real
        terms = torch.tensor(factors, dtype=torch.float32, device=nats_B.device) @ nats_B
        self._keep_sums(terms.detach())
        return loss + self._selftrain.term.coefficient * self.accelerator.num_processes * terms[0]

    def _share_of_pass(self) -> tuple[np.ndarray, np.ndarray]:
        """Which samples this process takes in this pass, and 1 or 0: every pass of every process takes as many, so that all
        go through the policy equally often, and those that are left over are filled up with some that do not count."""
        count, processes = len(self._drawn.pairs), self.accelerator.num_processes
        passes = processes * self.args.gradient_accumulation_steps
        place = self._pass_of_update * processes + self.accelerator.process_index
        rows = np.arange(-(-count // passes)) * passes + place
        return np.minimum(rows, count - 1), (rows < count).astype(float)

    def _keep_sums(self, terms: torch.Tensor) -> None:
        """Add up, and log with the last pass of an update, what all processes together have learned from."""
        self._term_sums = terms if self._pass_of_update == 0 else self._term_sums + terms
        if self._pass_of_update == self.args.gradient_accumulation_steps - 1:
            weighted, plain = reduce(self._term_sums, "sum").tolist()
            self._add_metrics({"selftrain/term": weighted, "selftrain/nll": plain})

    # --- what is told -------------------------------------------------------------------------------------------------

    def _log_weights(self, prefix: str, weights: Weights, entropies_n: np.ndarray, key: str) -> None:
        figures = {"ess": weights.ess, "weight_max": weights.values_n.max(), "collapsed": float(weights.collapsed)}
        if not np.isnan(entropies_n).all():
            figures["entropy"] = np.nanmean(entropies_n)
        self._add_metrics({f"selftrain/{prefix}{name}": float(value) for name, value in figures.items()})
        if weights.collapsed and not np.isnan(weights.ess):  # else something else was said
            self._say_once(
                f"{key} collapsed (effective share {weights.ess:.3f}, selftrain.least_ess={self._selftrain.least_ess:g}): "
                "they are equal wherever that happens; selftrain/collapsed tells how often",
                key=f"{key} collapsed",
            )

    def _say_once(self, line: str, key: str = "") -> None:
        kind = key or line.split(" ")[0]
        if kind not in self._said and self.accelerator.is_main_process:
            tqdm.write(f"step {self.state.global_step + 1:>5}  self-training: {line}")
        self._said.add(kind)


def _entry(
    group: SampleGroup, g: int, step: int, raw_GK: np.ndarray, answers_G: Sequence[str | None], entropy: float
) -> Entry:
    """One sample of a group."""
    sample = group.samples[g]
    means_K = np.ma.filled(np.ma.masked_invalid(raw_GK).mean(axis=0), np.nan)
    return Entry(
        group.prompt.id,
        tuple(group.prompt.token_ids),
        tuple(sample.token_ids),
        sample.text,
        step,
        sample.policy_version,
        tuple(map(float, raw_GK[g])),
        float(sum(sample.log_probs)) if sample.log_probs else float("nan"),
        answers_G[g],
        float(entropy),
        tuple(map(float, means_K)),
    )
