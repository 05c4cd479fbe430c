"""The second seam to TRL: its SFT, DPO and KTO trainers, with a weight on each sample's loss before anything is averaged.

TRL keeps its forward passes, its metrics, data loading, accelerate and DeepSpeed. A trainer here is given token ids instead
of texts, so that the very tokens are trained on that were sampled, and the reference's log-probabilities along with them,
so that no second model is held. No method body of TRL's is repeated here.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback

from align.guard import hidden

with hidden("vllm"):  # TRL has its own use for it, we have not
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from align.selftrain.losses import kto_losses, preference_losses

Row = Mapping[str, Any]
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class TunedLosses:
    """What a fine-tuning saw, as means over all the samples that it trained on, once for each time.

    Args:
        steps: Optimiser steps.
        weighted: Mean of weight times loss: what was minimised.
        unweighted: Mean of the losses themselves.
    """

    steps: int
    weighted: float
    unweighted: float


class Weighted:
    """Mixed into a trainer of TRL's: the weights travel with the rows, and the losses are noted on the way."""

    def __init__(self, **kwargs: Any):
        self._noted: list[torch.Tensor] = []  # per micro-batch: sums of weighted losses, of losses, and the number
        super().__init__(**kwargs)
        self.data_collator = _with_weights(self.data_collator)

    def losses(self) -> TunedLosses:
        """Over all processes; all call it together."""
        weighted, unweighted, count = reduce(torch.stack(self._noted).sum(dim=0), "sum").tolist()
        return TunedLosses(self.state.global_step, weighted / count, unweighted / count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: a round is one line of metrics.jsonl."""

    def _note(self, losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Mean of weight times loss of a micro-batch."""
        weighted = weights * losses
        count = losses.new_tensor(float(len(losses)))
        self._noted.append(torch.stack([weighted.sum(), losses.sum(), count]).detach().double())
        return weighted.mean()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "weight"]

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # tokens already, and in order

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # they are in it


class WeightedSFT(Weighted, SFTTrainer):
    """Minimises the mean of weight times the sample's mean negative log-likelihood per completion token."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # else transformers would divide by the accumulation once more

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's, of log-probabilities that carry weight / tokens of their sample; it then divides by the samples."""
        weights = inputs.pop("weight")

        def weighted(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            tokens = outputs.label_mask.sum(dim=1).clamp(min=1)
            self._note(-outputs.log_probs.sum(dim=1) / tokens, weights)
            outputs.log_probs = outputs.log_probs * (weights / tokens)[:, None]
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Samples, where transformers counts tokens; every batch is full."""
        samples = sum(len(batch["weight"]) for batch in batch_samples) * self.accelerator.num_processes
        return torch.tensor(samples, device=device)


class _Compared(Weighted):
    """DPO and KTO: let TRL run for all that it does, then put the weighted mean in the place of its plain one."""

    def _compute_loss(self, model, inputs, return_outputs):
        weights, seen = inputs.pop("weight"), []

        def watched(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            seen.append(outputs.log_probs.sum(dim=1))
            return outputs

        super()._compute_loss(watched, inputs, return_outputs)
        return self._note(self.sample_losses(seen[-1], inputs), weights)  # the last call is that of the policy itself

    def sample_losses(self, log_probs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One loss per row of `weight`, from the policy's log-probabilities of whole completions."""
        raise NotImplementedError


class WeightedDPO(_Compared, DPOTrainer):
    """Minimises the mean of weight times the sigmoid loss of a pair."""

    def sample_losses(self, log_probs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Per pair; the first half of the rows are chosen, the second rejected."""
        chosen, rejected = log_probs.chunk(2)
        margin = chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"]
        return preference_losses(margin, self.beta)


class WeightedKTO(_Compared, KTOTrainer):
    """Minimises the mean of weight times the KTO loss of a sample."""

    def sample_losses(self, log_probs: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Per sample; TRL has just measured the divergence that all of them are compared with."""
        divergence = self._metrics["train"]["kl"][-1]
        return kto_losses(log_probs - inputs["ref_logps"], divergence, inputs["label"], self.beta)


TRAINERS = {"sft": (WeightedSFT, SFTConfig), "dpo": (WeightedDPO, DPOConfig), "kto": (WeightedKTO, KTOConfig)}


def tuner_config(method: str, options: Mapping[str, Any]) -> SFTConfig | DPOConfig | KTOConfig:
    """TRL's configuration for a method.

    Each fine-tuning needs one of its own: making it lets accelerate forget the last, and ZeRO-3 share out what is loaded.
    """
    return TRAINERS[method][1](**options)


def fine_tune(
    method: str,
    arguments: SFTConfig | DPOConfig | KTOConfig,
    model: str,
    adapter: str,
    peft_config: LoraConfig | None,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> TunedLosses:
    """Fine-tune a policy on weighted rows in their order, one pass, and write its weights; all processes together.

    Args:
        method: `sft`, `dpo` or `kto`.
        arguments: TRL's; as many steps as the rows make batches.
        model: Folder or hub name of the policy.
        adapter: Folder of LoRA weights to go on with; "" for new ones, or none.
        peft_config: Of the adapters to train, if any.
        rows: As the trainer's collator wants them, with `weight`.
        tokenizer: The policy's.
        folder: Where the weights go.
    """
    trainer = TRAINERS[method][0](
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    if adapter:
        _load_adapter(trainer.model, Path(adapter))
    trainer.train()
    losses = trainer.losses()
    trainer.save_model(str(folder))
    _release(trainer)
    return losses


def _with_weights(collate: Callable[[list[Row]], dict[str, Any]]) -> Callable[[list[Row]], dict[str, Any]]:
    def collated(rows: list[Row]) -> dict[str, Any]:
        return collate(rows) | {"weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32)}

    return collated


def _load_adapter(model: PeftModel, folder: Path) -> None:
    """Put saved LoRA weights in the place of new ones, also where ZeRO-3 has shared these out already."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _gathered(trained):
        set_peft_model_state_dict(model, load_file(folder / ADAPTER))


def _gathered(parameters: list[nn.Parameter]) -> Any:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _release(trainer: Any) -> None:
    """Give memory back: the next round loads what this one wrote."""
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.deepspeed = trainer.optimizer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
