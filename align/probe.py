"""The gradient probe: inner products of the objectives' policy gradients, at a cost that does not grow with them.

The policy loss is linear in the advantages while the policy is the one that sampled, so with A[i, k] the advantage that
objective k alone would give sequence i, and s_i the gradient of the loss with an advantage of 1 for sequence i and 0 for the
others,

    g_k = sum_i A[i, k] s_i,      gram_KK = (A^T S) (A^T S)^T,      S (N, D) the scores s_i, or D features of them.

S is had in one of two ways, both through hooks on activations (`align.probe_features`), which see no parameter and so do not
care how parameters are sharded:

* from the backward of the training step itself, in which sequence i carries its applied advantage a_i: s_i = u_i / a_i. Its
  Gram matrix comes after the update, so weights made of it act on the next batch. Where a_i is 0 and A[i, k] is not (the
  objectives cancel), s_i is not there to be read: such sequences are left out, and their share is logged.
* from a backward of its own before the update, down to the lowest layer that is read and into no parameter, over a part of
  each process's samples, every nth one, as if they were all: g_k is then an estimate, and the lengths on the diagonal come
  out longer by its spread.

`exact` takes full gradients, one backward for each objective, of all samples: what the other two are measured against.

A^T S is averaged over processes as DDP averages gradients, so the Gram matrix is that of the global batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, reduce
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from align.config import Config
from align.config.probe_rules import probe_key, probed, why_not_ordinary
from align.config.weighting import ProbeConfig
from align.probe_features import Layer, Notes, norm_layers, sketch_layers

OBJECTIVE_ADVANTAGES = "objective_advantages"  # key of A (B, K) in a batch of TRL's
NEGLIGIBLE = 1e-6  # of the largest applied advantage: below, a sequence's score cannot be told from rounding
NO_GRAM = np.zeros((0, 0))

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Policy loss of some rows of a process's batch under advantages (one per row), with the mean over these rows."""


class ProbeError(ValueError):
    """The policy at hand does not have what the probe is to read."""


class Probe:
    """Measures Gram matrices, and holds one until the scheme asks for it.

    Args:
        options: Which features, and how to come by them.
        layers: Whose features are read; none for `exact`.
        ordinary: Read the training step's own backward.
        objectives: Names of the K objectives, or of whatever else has advantages of its own (domains).
        micro_batch_size: Sequences of one pass.
    """

    def __init__(
        self, options: ProbeConfig, layers: Sequence[Layer], ordinary: bool, objectives: Sequence[str], micro_batch_size: int
    ):
        self.ordinary = ordinary
        self.exact = options.features == "exact"
        self.waiting_KK = NO_GRAM  # of size 0 when there is none
        self._options = options
        self._layers = layers
        self._objectives = objectives
        self._micro_batch_size = micro_batch_size
        self._heard: list[Pass] = []  # passes of the training step that is being listened to

    # --- the training step's own backward -----------------------------------------------------------------------------

    def listen(self, loss: Callable[[], torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The training loss of a micro-batch, with hooks in place that read its backward; then call `hear`."""
        this = Pass(self._layers, len(batch["prompt_ids"]), batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])
        value = this.forward(loss)
        this.advantages_B, this.advantages_BK = batch["advantages"], batch[OBJECTIVE_ADVANTAGES]
        self._heard.append(this)
        return value

    @property
    def listening(self) -> bool:
        """Whether hooks are in place, or have been in this step."""
        return bool(self._heard)

    def hear(self, last: bool) -> Mapping[str, float]:
        """After the backward of a micro-batch: take its gradients in; after the `last` one of a step, metrics of all."""
        self._heard[-1].finish()
        if not last:
            return {}
        heard, self._heard = self._heard, []
        return self._conclude(sum(p.projected_KD for p in heard), sum(p.lost for p in heard) / sum(p.rows for p in heard))

    # --- a backward of its own ----------------------------------------------------------------------------------------

    def measure(self, loss: Loss, tokens: int, advantages_NK: torch.Tensor) -> Mapping[str, float]:
        """Gram matrix from an extra pass over a part of this process's N samples of `tokens` tokens; metrics."""
        rows = torch.arange(len(advantages_NK), device=advantages_NK.device)
        if len(rows) > self._options.samples:  # spread evenly, so that every prompt has a say
            rows = rows[(torch.arange(self._options.samples, device=rows.device) * len(rows)) // self._options.samples]
        projected_KD = torch.zeros(1, device=rows.device)
        for part in rows.split(self._micro_batch_size):
            this = Pass(self._layers, len(part), tokens)
            this.advantages_B = torch.ones(len(part), device=part.device)
            this.advantages_BK = advantages_NK[part]
            value = this.forward(lambda part=part, ones=this.advantages_B: loss(part, ones))
            torch.autograd.grad(value, this.roots)
            this.finish()
            projected_KD = projected_KD + this.projected_KD * (len(part) / len(rows))
        return self._conclude(projected_KD, lost=torch.zeros((), device=rows.device))

    def measure_exactly(
        self, loss: Loss, parameters: Sequence[torch.nn.Parameter], advantages_NK: torch.Tensor
    ) -> Mapping[str, float]:
        """Gram matrix of the full gradients of all samples, one backward for each objective; metrics."""
        count, objectives = advantages_NK.shape
        gradients = [torch.zeros(objectives, p.numel(), device=p.device) for p in parameters]
        for part in torch.arange(count, device=advantages_NK.device).split(self._micro_batch_size):
            for k in range(objectives):
                found = torch.autograd.grad(loss(part, advantages_NK[part, k]), parameters, allow_unused=True)
                for total_K, gradient in zip(gradients, found, strict=True):
                    if gradient is not None:
                        total_K[k] += gradient.float().flatten() * (len(part) / count)
        reduced = [reduce(total_K, "mean") for total_K in gradients]
        return self._keep(sum(_products(total_K) for total_K in reduced))

    # --- Gram matrices ------------------------------------------------------------------------------------------------

    def _conclude(self, projected_KD: torch.Tensor, lost: torch.Tensor) -> Mapping[str, float]:
        both = reduce(torch.cat([projected_KD.flatten(), lost[None]]), "mean")
        metrics = self._keep(_products(both[:-1].view(len(self._objectives), -1)))
        return {**metrics, "probe/lost": float(both[-1])}

    def _keep(self, gram_KK: torch.Tensor) -> Mapping[str, float]:
        """Hold a Gram matrix for the scheme, the same on every process to the last bit; its metrics."""
        gram_KK = np.array(broadcast_object_list([gram_KK.tolist()])[0])
        finite = np.isfinite(gram_KK).all()  # it is not when half precision overflows; the update is then skipped too
        self.waiting_KK = gram_KK if finite else NO_GRAM
        return dict(gram_metrics(gram_KK, self._objectives)) if finite else {}


class Pass:
    """One forward and backward of B sequences with hooks in place.

    `advantages_B` are those that the loss was given, `advantages_BK` those of each objective alone. Once finished,
    `projected_KD` is A^T S, in the units of the loss, and `lost` the number of sequences whose score could not be read.
    """

    advantages_B: torch.Tensor
    advantages_BK: torch.Tensor
    projected_KD: torch.Tensor
    lost: torch.Tensor

    def __init__(self, layers: Sequence[Layer], rows: int, tokens: int):
        self.rows = rows
        self._layers = layers
        self._notes = Notes(rows, tokens)
        self._scale: list[torch.Tensor] = []  # what the loss is multiplied by before its backward (half precision)
        self._hooks: list[RemovableHandle] = []

    @property
    def roots(self) -> Sequence[torch.Tensor]:
        """A backward from the loss to these passes by every layer."""
        return self._notes.roots

    def forward(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The loss, its backward wired."""
        self._hooks = [hook for layer in self._layers for hook in layer.attach(self._notes)]
        value = loss()
        self._notes.in_forward = False
        value.register_hook(self._scale.append)
        return value

    def finish(self) -> None:
        """Take the hooks away, and turn what they wrote into A^T S."""
        for hook in self._hooks:
            hook.remove()
        scores_BD = self._notes.scores(self._layers)
        size_B = self.advantages_B.abs()
        readable_B = (size_B > NEGLIGIBLE * size_B.max()) & (size_B > torch.finfo(torch.float32).tiny)
        divisor_B = torch.where(readable_B, self.advantages_B, 1.0) * self._scale[-1].float()
        share_BK = torch.where(readable_B[:, None], self.advantages_BK / divisor_B[:, None], 0.0)
        self.projected_KD = share_BK.T @ scores_BD
        self.lost = (~readable_B & (self.advantages_BK != 0).any(dim=1)).float().sum()
        del self._notes, self._hooks


def build_probe(config: Config, model: PreTrainedModel, micro_batch_size: int, aux_loss: bool) -> Probe:
    """The probe of a run whose scheme or domains want Gram matrices.

    Args:
        config: Of the run.
        model: The policy, adapters included.
        micro_batch_size: Sequences of one pass.
        aux_loss: Whether the loss holds a load-balancing term.

    Raises:
        ProbeError: Nothing that is trained has such features, or the ordinary backward is asked for where it does not do.
    """
    options = config.probe
    if options.backward == "ordinary" and aux_loss:
        raise ProbeError(
            f"{probe_key(config)}.backward=ordinary: the ordinary backward holds the gradient of this model's "
            "load-balancing loss too; take extra or auto, or set trl.router_aux_loss_coef to 0"
        )
    ordinary = options.backward != "extra" and not aux_loss and not why_not_ordinary(config)
    layers = find_layers(model, options, config.seed, probe_key(config))
    return Probe(options, layers, ordinary, probed(config), micro_batch_size)


def find_layers(model: PreTrainedModel, options: ProbeConfig, seed: int, key: str = "weighting.probe") -> list[Layer]:
    """Layers whose features are read. Raises ProbeError where there are none."""
    if options.features == "exact":
        return []
    layers = norm_layers(model) if options.features == "norms" else sketch_layers(model, options.size, seed)
    if not layers:
        what = "normalisation layer with weights" if options.features == "norms" else "linear or normalisation layer"
        other = "sketch or exact" if options.features == "norms" else "exact"
        raise ProbeError(
            f"{key}.features={options.features}: this policy trains no {what} (they are frozen, quantised or of "
            f"an unknown kind); take {key}.features={other}"
        )
    return layers


def gram_metrics(gram_KK: np.ndarray, objectives: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Length of each objective's gradient, and the cosine between each two that have a length; below 0 they conflict."""
    length_K = np.sqrt(np.maximum(np.diag(gram_KK), 0.0))
    for k, name in enumerate(objectives):
        yield f"probe/norm/{name}", float(length_K[k])
        for other in range(k + 1, len(objectives)):
            if length_K[k] * length_K[other] > 0:
                cosine = gram_KK[k, other] / (length_K[k] * length_K[other])
                yield f"probe/cosine/{name}/{objectives[other]}", float(np.clip(cosine, -1.0, 1.0))


def _products(rows_KD: torch.Tensor) -> torch.Tensor:
    """Inner products (K, K) of rows, summed up in double precision."""
    rows_KD = rows_KD.cpu().double()
    return rows_KD @ rows_KD.T


def select(batch: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of a batch of TRL's; what is not one per sample stays as it is."""
    count = len(batch["prompt_ids"])
    return {
        key: value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == count else value
        for key, value in batch.items()
    }


@contextmanager
def replaced(thing: Any, **values: Any) -> Iterator[None]:
    """Gives some attributes of an object other values for a while."""
    before = {name: getattr(thing, name) for name in values}
    try:
        vars(thing).update(values)
        yield
    finally:
        vars(thing).update(before)
