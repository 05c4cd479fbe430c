"""The weights of the policy as a checkpoint has them, gathered a few at a time from wherever training has put them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from align.packing import packed

GATHER_BYTES = 256 * 2**20
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # of activation checkpointing and torch.compile, in names


@dataclass(frozen=True)
class Piece:
    """One weight of the policy.

    Args:
        name: In the model, without what wrappers add.
        stored: Names and shapes in a checkpoint; several where the model fuses what a checkpoint keeps apart.
        parameters: What has to be gathered to know its value: itself, and its adapters.
        value: The weight, adapters merged in; to be called while the parameters are gathered.
    """

    name: str
    stored: dict[str, torch.Size]
    parameters: tuple[torch.Tensor, ...]
    value: Callable[[], torch.Tensor]


def named_weights(
    model: PreTrainedModel | PeftModel,
    accelerator: Accelerator,
    dtype: torch.dtype | None = None,
    gather_bytes: int = GATHER_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of the policy under the names of a transformers checkpoint, LoRA merged in; the model stays as it is.

    Every process must iterate to the end, for gathering is collective. The main process gets the weights: detached,
    contiguous, to be used before the next is asked for. The others get the same names with empty tensors (0,).

    Args:
        model: The policy without DDP's or DeepSpeed's wrapper; plain, or under ZeRO-2, ZeRO-3 or FSDP2.
        accelerator: What it was prepared by.
        dtype: Of the floating-point weights that come out; None leaves each as it is.
        gather_bytes: ZeRO-3 gathers weights together up to this size; a larger one is gathered alone.

    Raises:
        ValueError: When the policy cannot be told as a checkpoint of its base architecture (see `pieces_of`), or FSDP1
            shards it. Before the first weight, on every process.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("weights are not gathered from FSDP1; set fsdp_version: 2 in the accelerate file")
    plugin = accelerator.state.deepspeed_plugin
    sharded = plugin is not None and plugin.zero_stage == 3
    pieces = pieces_of(model)
    base = base_of(model)
    groups = grouped(pieces, gather_bytes) if sharded else [[piece] for piece in pieces]
    for group in groups:
        with _gathered([parameter for piece in group for parameter in piece.parameters], sharded):
            for piece in group:
                yield from _named(piece, base, accelerator, dtype)


def describe_weights(
    model: PreTrainedModel | PeftModel, dtype: torch.dtype | None = None
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of all that `named_weights` gives, in its order, without gathering. Raises the same errors."""
    described = []
    for piece in pieces_of(model):
        kept = piece.parameters[0].dtype
        type_ = dtype if dtype is not None and kept.is_floating_point else kept
        described += [(name, type_, tuple(shape)) for name, shape in piece.stored.items()]
    return described


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model below its adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def pieces_of(model: PreTrainedModel | PeftModel) -> list[Piece]:
    """The weights of a policy, tied ones once, and the persistent buffers.

    Raises:
        ValueError: When peft trains something else than plain LoRA (DoRA, modules_to_save, biases), when LoRA changes one
            of two tied weights, or when a checkpoint fuses weights that the model keeps apart.
    """
    base = base_of(model)
    adapted = {id(module.get_base_layer().weight): module for module in _lora_layers(base)}
    inside = {id(parameter) for module in adapted.values() for parameter in adapters_of(module)}
    tensors, values, needed = {}, {}, {}
    for name, tensor in _unique(base).items():
        if id(tensor) in inside:
            continue
        name = checkpoint_name(name)
        tensors[name] = tensor
        values[name], needed[name] = partial(_detached, tensor), (tensor,)
        if module := adapted.get(id(tensor)):
            values[name], needed[name] = partial(_merged, tensor, module), (tensor, *adapters_of(module))
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    stored = stored_names(base, shapes)
    return [Piece(name, stored[name], needed[name], values[name]) for name in tensors]


def checkpoint_name(name: str) -> str:
    """The name of a parameter without what peft and other wrappers of modules add to it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.replace(".base_layer.", ".")


def stored_names(base: PreTrainedModel, shapes: dict[str, torch.Size]) -> dict[str, dict[str, torch.Size]]:
    """Names and shapes in a checkpoint, for each name in the model. Raises ValueError when a checkpoint fuses several."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    together = _shapes(revert_weight_conversion(base, empty))
    if together == shapes:
        return {name: {name: shape} for name, shape in shapes.items()}
    alone = {name: _shapes(revert_weight_conversion(base, {name: tensor})) for name, tensor in empty.items()}
    if {stored: shape for part in alone.values() for stored, shape in part.items()} != together:
        raise ValueError(
            f"a checkpoint of {type(base).__name__} fuses weights that the model keeps apart; it cannot be sent piece by "
            "piece. Train it with rollout.engine.type: transformers"
        )
    return alone


def adapters_of(module: LoraLayer) -> list[nn.Parameter]:
    """The parameters that LoRA adds to a layer, of all its adapters."""
    return [parameter for name in module.adapter_layer_names for parameter in getattr(module, name).parameters()]


def grouped(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    """Neighbouring pieces together while they stay within `limit` bytes; a larger piece is alone."""
    return packed(pieces, _bytes, limit)


def _bytes(piece: Piece) -> int:
    return sum(_shape(parameter).numel() * parameter.element_size() for parameter in piece.parameters)


def _named(
    piece: Piece, base: PreTrainedModel, accelerator: Accelerator, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """A piece as a checkpoint has it, cut up where a checkpoint keeps apart what the model fuses."""
    tensor = _whole(piece, accelerator)
    if not accelerator.is_main_process:
        yield from ((name, torch.empty(0)) for name in piece.stored)
        return
    if piece.stored.keys() == {piece.name}:
        yield piece.name, _cast(tensor, dtype)
        return
    for name, part in revert_weight_conversion(base, {piece.name: tensor}).items():
        yield name, _cast(part, dtype)


@torch.no_grad()  # around functions, not around a yield: there it would reach into the caller
def _whole(piece: Piece, accelerator: Accelerator) -> torch.Tensor:
    """The value of a piece on the main process; elsewhere whatever taking part in the gathering leaves."""
    if not any(isinstance(parameter, DTensor) for parameter in piece.parameters):
        return piece.value() if accelerator.is_main_process else torch.empty(0)
    tensor = piece.value()
    if tensor.device.type != accelerator.device.type:  # offloaded; the collectives know the device only
        tensor = tensor.to(accelerator.device)
    return tensor.full_tensor()


@torch.no_grad()
def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def _merged(weight: torch.Tensor, module: LoraLayer) -> torch.Tensor:
    """W + sum of scale * B @ A over the active adapters, in the type of W, as peft would merge it."""
    active = [name for name in module.active_adapters if name in module.scaling and name not in module.merged_adapters]
    for name in active:
        weight = (weight + module.get_delta_weight(name)).to(weight.dtype)
    return weight.detach()


def _gathered(parameters: Sequence[torch.Tensor], sharded: bool) -> AbstractContextManager:
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter for parameter in parameters if isinstance(parameter, nn.Parameter)])


def _lora_layers(base: PreTrainedModel) -> list[LoraLayer]:
    """Layers with LoRA. Raises ValueError where peft has put something that plain LoRA does not merge."""
    layers = []
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and not _plain(module)):
            raise ValueError(
                f"{name} ({type(module).__name__}) has trained parameters that are neither weights of "
                f"{type(base).__name__} nor plain LoRA; only plain LoRA on the weights of layers is merged for a sampler"
            )
        if isinstance(module, LoraLayer):
            layers.append(module)
    return layers


def _plain(module: BaseTunerLayer) -> bool:
    """Whether the layer computes (W + scale * B @ A) x and nothing else."""
    if not isinstance(module, LoraLayer):
        return False
    return not module.lora_variant and not any(module.lora_bias.values()) and "weight" in module.get_base_layer()._parameters


def _unique(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; of tied ones the name that a checkpoint has.

    Raises:
        ValueError: When LoRA changes one of two tied weights, for then they are two.
    """
    names: dict[int, list[str]] = {}
    tensors = dict(base.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    chosen = {}
    for same in names.values():
        if len(same) > 1 and any(".base_layer." in name for name in same):
            raise ValueError(f"LoRA on one of tied weights ({', '.join(same)}): take it out of policy.lora.target_modules")
        kept = [name for name in same if checkpoint_name(name) not in base.all_tied_weights_keys] or same
        chosen[kept[0]] = tensors[kept[0]]
    for prefix, module in base.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                chosen[f"{prefix}.{own}".removeprefix(".")] = buffer
    return {name: tensor for name, tensor in chosen.items() if name not in (base._keys_to_ignore_on_save or ())}


def _shape(tensor: torch.Tensor) -> torch.Size:
    """Of the whole tensor; ZeRO-3 leaves an empty one in its place and keeps the shape beside it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
