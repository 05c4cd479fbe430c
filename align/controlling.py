"""What the learner does for `estimator: dpg`: fits its target, compares densities, samples a proposal. Imports no TRL."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import nn
from tqdm.auto import tqdm

from align.checkpoint import checkpoint_name
from align.control import fit_control, unreached
from align.sampling import Place, fit_params
from align.step import raw_rewards
from rollout.types import SampleGroup

PROPOSAL_FILE = "proposal.pt"


class Controlling:
    """Mixed into a trainer of TRL's; does nothing under other estimators. All processes call each of these together."""

    _proposal: Mapping[str, torch.Tensor] = {}  # trained parameters of the policy that draws the samples, once it is another
    _proposes = False  # while samples of it are drawn
    _resumed_from = ""

    def _generate_and_score_completions(self, inputs):
        """TRL's; before the first batch the target is fitted, and before every one the proposal is brought up to date."""
        if self.parts.config.estimator.type == "dpg":
            if not self.weight_state.control:
                self._fit_control()
            if self._adaptive:
                self._renew_proposal()
        return super()._generate_and_score_completions(inputs)

    def _draw(self, indices: Sequence[int]) -> list[SampleGroup]:
        """This process's part of a batch, from the policy or from the proposal."""
        step = self.state.global_step
        if not self._adaptive:
            return self.rollouts.batch(indices, step, step)
        self._proposes = True
        try:
            return self.rollouts.batch(indices, step, self.weight_state.control["proposal"])
        finally:
            self._proposes = False

    @contextmanager
    def _proposed(self, model: nn.Module) -> Iterator[None]:
        """The model with the proposal's parameters while samples of it are drawn, else as it is."""
        if not self._proposes:
            yield
            return
        current = _trained(model)
        _put(model, self._proposal)
        try:
            yield
        finally:
            _put(model, current)

    def _sample_log_probs(self, batch: Mapping[str, Any]) -> np.ndarray:
        """log-probabilities (3, P, G) of the samples of all processes under policy, sampler and reference, nats."""
        mask, config = batch["completion_mask"], self.parts.config
        reference = (batch["ref_per_token_logps"] * mask).sum(dim=1)
        drawn = [sum(sample.log_probs) for group in self._groups for sample in group.samples]
        sampler = torch.tensor(drawn, dtype=reference.dtype, device=reference.device)
        policy = sampler  # it has drawn them itself
        if self._adaptive or config.rollout.engine.type != "transformers":
            policy = (self.batch_log_probs(batch) * mask).sum(dim=1)
        log_probs_N3 = gather(torch.stack([policy, sampler, reference], dim=1)).double().cpu().numpy()
        return log_probs_N3.T.reshape(3, -1, config.rollout.samples_per_prompt)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, and the proposal where it is not the policy itself."""
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        if self._adaptive and self.accelerator.is_main_process and self.weight_state.control["proposal"] != step:
            torch.save(self._proposal, Path(self.args.output_dir) / checkpoint_name(step) / PROPOSAL_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """TRL's; the proposal is read when it is needed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint or ""

    @property
    def _adaptive(self) -> bool:
        estimator = self.parts.config.estimator
        return estimator.type == "dpg" and estimator.proposal == "adaptive"

    def _fit_control(self) -> None:
        """Sample the reference policy, which the policy still is, and fit the target to what its samples are worth."""
        parts, start = self.parts, time.perf_counter()
        estimator, place = parts.config.estimator, Place(self.accelerator.process_index, parts.plan.processes)
        count = -(-estimator.fit.prompts // place.processes) * place.processes
        order = parts.prompts.order(count, parts.config.seed)
        groups = self.rollouts.draw(order[place.process :: place.processes].tolist(), fit_params(parts.config, place))
        _, gathered = self._score(groups, self.save_unless_saved)
        raw_PGK = raw_rewards(parts.rules, gathered, estimator.fit.samples_per_prompt)
        state, figures = fit_control(estimator, parts.rules.objectives, raw_PGK)
        self.weight_state = replace(self.weight_state, control=state.to_json())
        self._add_metrics({f"dpg/{name}": value for name, value in figures.items()})
        self._metrics["train"]["time/fit"].append(time.perf_counter() - start)
        if self.accelerator.is_main_process:
            lines = [f"{name} {value:.3g}" for name, value in figures.items()]
            tqdm.write(f"dpg: target fitted on {raw_PGK.shape[0]} x {raw_PGK.shape[1]} samples: {', '.join(lines)}")
            if missed := unreached(estimator, figures):
                tqdm.write(
                    f"dpg: the target has {', '.join(missed)}, further off than estimator.fit.tolerance="
                    f"{estimator.fit.tolerance:g}: more samples per prompt (estimator.fit.samples_per_prompt) help"
                )

    def _renew_proposal(self) -> None:
        """Note the policy's parameters when it becomes the proposal; after resuming read them, unless it does just now."""
        if self.weight_state.control["proposal"] == self.state.global_step:
            with self.policy() as model:
                self._proposal = _trained(model)
        elif not self._proposal:
            self._proposal = torch.load(Path(self._resumed_from) / PROPOSAL_FILE, weights_only=True)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters, in main memory."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _put(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name])
