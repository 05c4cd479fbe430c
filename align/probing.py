"""What the learner does for its probe: it listens to the training step, or takes passes of its own. Imports no TRL."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from align.domains import domain_columns
from align.probe import OBJECTIVE_ADVANTAGES, replaced, select
from align.step import advantages_alone, advantages_in_force
from align.weighting import Signal, WeightState


class Probing:
    """Mixed into a trainer of TRL's that has a `_probe` where its scheme needs one; all processes call it together."""

    def training_step(self, model, inputs, num_items_in_batch):
        """TRL's, and the probe takes in what its backward showed."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.parts.rules.probes and self._probe.listening:
            self._add_metrics(self._probe.hear(last=self._step % self.args.gradient_accumulation_steps == 0))
        return loss

    def _compute_loss(self, model, inputs):
        """TRL's, and the probe listens during the first update of a batch: from the second on the policy is another."""
        first = self._step % (self.args.steps_per_generation * self.num_iterations) < self.args.gradient_accumulation_steps
        if OBJECTIVE_ADVANTAGES not in inputs or not first:
            return super()._compute_loss(model, inputs)
        compute = super()._compute_loss
        return self._probe.listen(lambda: compute(model, inputs), inputs)

    def _probe_due(self, state: WeightState, step: int) -> bool:
        """Whether weights of the batch at `step` may move by gradients; those of domains always do."""
        rules = self.parts.rules
        return rules.domains.config.type == "alignment" or rules.scheme.due(state, step)

    def _gradient_signals(self) -> dict[Signal, np.ndarray]:
        """The Gram matrix that waits, if any: that of the objectives, where these are measured, and that of the domains."""
        gram_KK, rules = self._probe.waiting_KK, self.parts.rules
        if not gram_KK.size:
            return {}
        count = len(rules.objectives) if Signal.GRAM in rules.scheme.needs else 0
        signals = {Signal.GRAM: gram_KK[:count, :count], Signal.DOMAIN_GRAM: gram_KK[count:, count:]}
        return {signal: gram for signal, gram in signals.items() if gram.size}

    def _advantages_alone(self, state: WeightState, signals: Mapping[Signal, np.ndarray]) -> torch.Tensor:
        """Advantages of this process's samples (N, K) whose gradients are wanted: under each objective alone; and of each
        domain alone, by the weights of a state."""
        rules, columns = self.parts.rules, []
        if Signal.GRAM in rules.scheme.needs:
            columns.append(advantages_alone(rules, self._gathered))
        if rules.domains.config.type == "alignment":
            advantages_PG = advantages_in_force(rules, state, self._gathered, signals)
            of_domains_PGJ = domain_columns(advantages_PG, signals[Signal.DOMAINS], len(rules.domains.names))
            columns.append(of_domains_PGJ.reshape(-1, len(rules.domains.names)))
        count = self.parts.plan.samples_per_process
        first = count * self.accelerator.process_index
        local_NK = np.concatenate(columns, axis=1)[first : first + count]
        return torch.tensor(local_NK, dtype=torch.float32, device=self.accelerator.device)

    def _probe_gradients(self, batch: Mapping[str, Any], signals: Mapping[Signal, np.ndarray]) -> None:
        """Measure with backward passes of the probe's own, before the update of a batch."""
        start, probe, advantages_NK = time.perf_counter(), self._probe, self._advantages_alone(self.weight_state, signals)
        if probe.exact:
            with self.policy() as model:
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self._add_metrics(probe.measure_exactly(self._policy_loss(model, batch), trained, advantages_NK))
        else:
            tokens = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
            self._add_metrics(probe.measure(self._policy_loss(self.model, batch), tokens, advantages_NK))
        self._metrics["train"]["time/probe"].append(time.perf_counter() - start)

    def _policy_loss(self, model: Any, batch: Mapping[str, Any]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """TRL's loss of some rows of a batch, as the mean over them, without penalty and bonus, and leaving no metrics."""
        compute = super()._compute_loss

        def loss(rows: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
            share = len(rows) / self.args.per_device_train_batch_size
            items = batch["num_items_in_batch"] * share
            part = select(batch, rows) | {"advantages": advantages, "num_items_in_batch": items}
            metrics = {mode: defaultdict(list) for mode in self._metrics}
            with replaced(self, beta=0.0, _entropy_bonus_enabled=False, aux_loss_enabled=False, _metrics=metrics):
                return compute(model, part) * self.current_gradient_accumulation_steps

        return loss
