"""What runs inside vLLM's own worker processes: weights taken from safetensors files, and a look at what arrived.

A server gets it by `--worker-extension-cls rollout.vllm_worker.WeightsFromFiles` and
`--weight-transfer-config '{"backend": "directory"}'` (`rollout.server` puts the command together).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "directory"
TOLERANCE = 1e-2  # of a layer's output, relative: bfloat16 rounds by 4e-3, stale weights differ by far more


@dataclass
class DirectoryInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class DirectoryUpdate(WeightTransferUpdateInfo):
    """Where one whole set of weights lies.

    Args:
        path: Folder of .safetensors files, with the names of a transformers checkpoint.
    """

    path: str


class DirectoryTransfer(WeightTransferEngine[DirectoryInit, DirectoryUpdate]):
    """Weights from a folder that trainer and worker both see: shared memory, or a shared file system."""

    init_info_cls = DirectoryInit
    update_info_cls = DirectoryUpdate

    def init_transfer_engine(self, init_info: DirectoryInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Nothing yet: a folder that cannot be read must leave the model as it is."""

    def receive_weights(self, update_info: DirectoryUpdate) -> None:
        """Load the whole set. Raises OSError or SafetensorError before anything is touched when a file is not readable."""
        files = tensor_files(update_info.path)
        for _ in (name for file in files for name in _names(file)):
            pass
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(_tensors(files))
        except Exception as error:  # vLLM's says nothing where a shape is wrong
            kind = type(self.model).__name__
            raise ValueError(f"the weights do not fit the {kind} that this server was started with ({error!r})") from error
        finally:  # also after a failure: the next set then starts from a model that is whole
            finalize_layerwise_reload(self.model, self.model_config)
            refresh_tied_heads(self.model)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing to release."""


WeightTransferEngineFactory.register_engine(BACKEND, DirectoryTransfer)


class WeightsFromFiles:
    """vLLM adds this class's methods to its worker; importing it is what makes the `directory` transfer known."""

    def differing_weights(self, path: str) -> list[str]:
        """Names of the weights in a folder that this process does not compute with (see `differing`)."""
        return differing(self.get_model(), path)


def tensor_files(path: str) -> list[Path]:
    """The .safetensors files of a folder. Raises FileNotFoundError when there is none."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .safetensors file")
    return files


def refresh_tied_heads(model: nn.Module) -> None:
    """Pack the output head anew where it shares its weights with the embedding.

    vLLM 0.31 processes shared weights for one of their layers only; on a CPU the head computes from a packed copy of its
    own, which would stay that of the old policy.
    """
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not hasattr(module, "quant_method"):
            continue
        if owners.setdefault(id(weight), module) is not module:
            module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def differing(model: nn.Module, path: str) -> list[str]:
    """Weights in a folder of .safetensors files that a worker's model does not compute with.

    A linear layer is tried on random inputs, since the weights it shows need not be those it computes from; other weights
    are compared. Layers that are split over several devices, or that have no counterpart in the files, are left out.
    """
    tensors = dict(_tensors(tensor_files(path)))
    fused = getattr(model, "packed_modules_mapping", {})
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        parts = [f"{part}.weight" for part in _checkpoint_names(name, fused)]
        if isinstance(module, ParallelLMHead) and parts[0] not in tensors:  # tied
            parts = [part for part in tensors if part.endswith("embed_tokens.weight")]
        if parts and all(part in tensors for part in parts) and "weight" in module._parameters:
            expected = torch.cat([tensors[part] for part in parts])
            if not _computes_with(module, expected):
                found |= dict.fromkeys(parts)
    return list(found)


def _computes_with(module: nn.Module, expected: torch.Tensor) -> bool:
    shown = module.weight
    embeds = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    if not hasattr(module, "quant_method") or embeds:
        shown = shown[: len(expected)]  # without padding
        return shown.shape != expected.shape or torch.allclose(shown, expected.to(shown), rtol=TOLERANCE, atol=1e-6)
    inputs = torch.randn(4, expected.shape[1], generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(expected.dtype if shown.numel() == 0 else shown.dtype).to(shown.device)
    outputs = module.quant_method.apply(module, inputs)[:, : len(expected)]
    wanted = inputs @ expected.to(inputs).T
    return outputs.shape != wanted.shape or bool((outputs - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _checkpoint_names(name: str, fused: dict[str, list[str]]) -> list[str]:
    """Names in a checkpoint of the modules that one module of vLLM holds."""
    parent, _, own = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in fused.get(own, [own])]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                yield name, tensors.get_tensor(name)
