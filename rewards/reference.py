"""Closeness to a reference policy as an objective of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewards.local_model import Row, check_run, each, load_model
from rollout.types import SampleGroup

if TYPE_CHECKING:
    import torch


class KlToReference:
    """How much likelier the policy finds its sample than the reference does: log pi(y|x) - log pi_ref(y|x), in nats.

    Summed over the completion's tokens. Its mean over samples is KL(pi || pi_ref) (the estimator k1 of Schulman's note on
    approximating KL); one sample's value may be negative. An objective gives it `direction: minimize` and bounds. pi is the
    distribution that the sample was drawn from: at a temperature of 1 and without top-p, top-k or min-p it is the policy.
    Beyond a gradient: this is a reward, so it acts on whole samples, as the KL term in the reward of PPO does.

    Args:
        model: Folder or hub name of the reference, whose tokens must be those of the policy.
        revision: Branch, tag or commit on the hub.
        batch_size: Samples per forward pass.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights; `auto` as they were saved.

    Raises:
        ValueError: An argument is unusable, or the model cannot be loaded.
    """

    def __init__(self, model: str, revision: str = "", batch_size: int = 8, device: str = "auto", dtype: str = "auto"):
        where = check_run(0, batch_size, device, dtype)
        self._batch_size = batch_size
        self._model = load_model("AutoModelForCausalLM", model, revision, where, dtype)

    def __call__(self, groups: Sequence[SampleGroup]) -> list[float | Exception]:
        """One value per sample; ValueError in the place of one whose own log-probabilities were not recorded."""
        samples = [(group.prompt.token_ids, sample) for group in groups for sample in group.samples]
        vocabulary = self._model.network.config.get_text_config().vocab_size
        rows: list[Row | Exception] = []
        for prompt, sample in samples:
            ids = [*prompt, *sample.token_ids]
            if len(sample.log_probs) != len(sample.token_ids):
                rows.append(ValueError("log-probabilities are not recorded: set rollout.correction to truncate or mask"))
            elif not prompt:
                rows.append(ValueError("there is no prompt, so the first token has no likelihood"))
            elif max(ids) >= vocabulary:
                rows.append(ValueError(f"token {max(ids)} is none of the reference's {vocabulary}"))
            else:
                rows.append(Row(ids, len(prompt), len(ids), len(ids)))
        with self._model.lock:
            there = each(rows, lambda some: self._model.batched(some, self._batch_size, self._log_likelihoods))
        return [
            value if isinstance(value, Exception) else float(sum(sample.log_probs) - value)
            for value, (_, sample) in zip(there, samples, strict=True)
        ]

    def _log_likelihoods(self, rows: Sequence[Row]) -> list[float]:
        logits_BTV: torch.Tensor = self._model.network(**self._model.inputs(rows)).logits
        values = []
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            log_probs_TV = logits_TV[row.start - 1 : row.stop - 1].float().log_softmax(-1)
            tokens_T1 = log_probs_TV.new_tensor(row.ids[row.start : row.stop]).long()[:, None]
            values.append(float(log_probs_TV.gather(1, tokens_T1).double().sum()))
        return values
