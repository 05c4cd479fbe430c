"""What the gradient probe reads of each sequence: features of its gradient, off a backward pass, by hooks.

B sequences of T tokens go through the model together, and (but for the loss's own averages) do not touch each other. At a
matrix with input x and output o = W x + c, the gradient of sequence i is G_i = sum_t g_it x_it^T with g = dL/do; kept is

    V^T [G_i, sum_t g_it] U  =  sum_t (V^T g_it) (U^T [x_it, 1])^T        (size x size numbers)

with fixed random U (d_in + 1, size) and V (d_out, size), E[U U^T] = 1 and E[V V^T] = 1, so that inner products of features
are unbiased estimates of those of gradients (of matrix and bias). U and V are orthonormal columns times sqrt(d / size),
which spreads less than independent entries; where d <= size they are the unit matrix, and nothing is lost on that side. An
embedding is a matrix whose inputs are one-hot: U^T x is a row of U. A normalisation layer o = gain * xhat + bias gives its
gradient in full, sum_t g_it * xhat_it (and sum_t g_it), whatever its gain is.

Not covered, and absent from the inner products: the output head (TRL's fused loss uses its weight without calling the
module; a tied embedding counts as the input side alone), layers that see all sequences at once (learned positions shared by
the batch), fused experts, anything frozen.

Gradient checkpointing keeps its memory: of a matrix's input only U^T x is held (and shared by matrices with the same
input, such as query, key and value), and a normalisation layer's input is saved through autograd, which recomputes it.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class Notes:
    """What the hooks of one forward and backward pass write down.

    Args:
        rows: B, sequences of the pass.
        tokens: T, tokens of each, padding included.
    """

    def __init__(self, rows: int, tokens: int):
        self.rows = rows
        self.tokens = tokens
        self.in_forward = True  # false in the backward, where gradient checkpointing calls the layers again
        self.roots: list[torch.Tensor] = []  # the backward from the loss to these passes all layers that are read
        self._features: dict[int, torch.Tensor] = {}
        self._newest: tuple[Any, ...] = (None, None, None)

    def write(self, layer: int, features: torch.Tensor) -> None:
        """Add features (B, ...) of a layer; one that is called twice has the sum of both gradients."""
        features = features.flatten(1)
        self._features[layer] = self._features[layer] + features if layer in self._features else features

    def project(self, x: torch.Tensor, projection: "Projection") -> torch.Tensor:
        """U^T [x, 1] (B, T, size), computed once for neighbours with the same input."""
        if self._newest[0] is not x or self._newest[1] is not projection:
            self._newest = (x, projection, projection(self.by_sequence(x)))
        return self._newest[2]

    def fits(self, x: torch.Tensor) -> bool:
        """Whether the tokens of `x` can be told apart by sequence."""
        return x.shape[0] == self.rows if x.dim() > 2 else x.dim() == 2 and x.shape[0] == self.rows * self.tokens

    def by_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """(B, tokens of a sequence, d), without its graph."""
        return x.detach().reshape(self.rows, -1, x.shape[-1])

    def reach(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what the backward must go down to in order to pass by this layer: the first input of all leads to those
        above it; an input without a gradient leads nowhere, and the output must do."""
        if not x.requires_grad:
            self.roots.append(output)
        elif not self.roots:
            self.roots.append(x)

    def scores(self, layers: "Iterable[Layer]") -> torch.Tensor:
        """Features (B, D) of all layers side by side, float32; 0 where no gradient came by."""
        if not self._features:
            raise RuntimeError("the gradient probe saw nothing: the layers that it watches were not called")
        like = next(iter(self._features.values()))
        parts = [self._features.get(i, like.new_zeros(self.rows, layer.width)) for i, layer in enumerate(layers)]
        return torch.cat(parts, dim=1)


class Projection:
    """A fixed random matrix (d, size) with E[U U^T] = 1, and a row more for a bias.

    Args:
        rows: d, the width that it reads.
        size: Numbers that it keeps.
        seed: Of its random numbers; the same on every process.
        bias: Whether it reads one more input, which is always 1.
    """

    def __init__(self, rows: int, size: int, seed: int, bias: bool = False):
        rows, self.size = rows + bias, min(size, rows + bias)
        if rows <= size:
            matrix = torch.eye(rows)
        else:
            noise = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
            matrix = torch.linalg.qr(noise).Q * math.sqrt(rows / size)
        self.matrix = matrix[:-1] if bias else matrix
        self._bias = matrix[-1:] if bias else None
        self._placed: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """U^T [x, 1] (B, T, size) of each row of x (B, T, d)."""
        matrix, bias = self.on(x.device, x.dtype)
        y = torch.mm(matrix.T, x.reshape(-1, x.shape[2]).T)  # this way round it is up to three times as fast on a CPU
        y = y if bias is None else y + bias.T
        return y.view(-1, *x.shape[:2]).permute(1, 2, 0)

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """The matrix (d, size), and the row of the bias or None, at a place and in a type."""
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = tuple(
                None if part is None else part.to(device, dtype).contiguous() for part in (self.matrix, self._bias)
            )
        return self._placed[device, dtype]


@dataclass
class Layer(ABC):
    """A module whose gradient is read.

    Args:
        index: Place among the layers.
        name: Of the module.
        module: The module.
        width: Number of its features.
    """

    index: int
    name: str
    module: nn.Module
    width: int

    @abstractmethod
    def attach(self, notes: Notes) -> list[RemovableHandle]:
        """Put hooks in place that write to the notes."""


@dataclass
class Matrix(Layer):
    """A linear layer: `inputs` is U, `outputs` is V."""

    inputs: Projection
    outputs: Projection

    def attach(self, notes: Notes) -> list[RemovableHandle]:
        """Project the input in the forward, and the gradient of the output in the backward."""

        def forward(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if notes.in_forward and output.requires_grad and args and notes.fits(args[0]):
                notes.reach(args[0], output)
                listen(output, notes.project(args[0], self.inputs), self, notes)

        return [self.module.register_forward_hook(forward)]


@dataclass
class Table(Layer):
    """An embedding: `inputs` is U, one row per entry, `outputs` is V."""

    inputs: Projection
    outputs: Projection

    def attach(self, notes: Notes) -> list[RemovableHandle]:
        """Look the rows of U up in the forward, and project the gradient of the output in the backward."""

        def forward(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if notes.in_forward and output.requires_grad and args and notes.fits(output):
                notes.reach(args[0], output)
                matrix, _ = self.inputs.on(output.device, torch.float32)
                listen(output, functional.embedding(args[0].reshape(notes.rows, -1), matrix), self, notes)

        return [self.module.register_forward_hook(forward)]


def listen(output: torch.Tensor, projected: torch.Tensor, layer: Matrix | Table, notes: Notes) -> None:
    """When the gradient g of an output (B, T, d) comes by, write sum_t (U^T x_t) (V^T g_t)^T (B, size, size)."""

    def read(gradient: torch.Tensor) -> None:
        along = layer.outputs(notes.by_sequence(gradient))
        notes.write(layer.index, torch.bmm(projected.float().transpose(1, 2), along.float()))

    output.register_hook(read)


@dataclass
class Norm(Layer):
    """A normalisation layer; `mean` and `bias` as LayerNorm has them and RMSNorm does not."""

    epsilon: float
    mean: bool
    bias: bool

    def attach(self, notes: Notes) -> list[RemovableHandle]:
        """Save the input through autograd, catch the gradient of the output, and multiply the two in the backward."""
        caught: list[torch.Tensor] = []  # gradients of the newest output

        def read(x: torch.Tensor, gradients: list[torch.Tensor]) -> None:
            for gradient in gradients:
                notes.write(self.index, self.features(notes.by_sequence(x), notes.by_sequence(gradient)))

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal caught
            if not args or not args[0].requires_grad or not notes.fits(args[0]):
                return None
            gradients: list[torch.Tensor] = []
            if notes.in_forward:
                notes.reach(args[0], args[0])
                caught = gradients
            # In the backward, checkpointing calls the layer again: it must save the same tensors, and nothing comes by.
            return (_Tap.apply(args[0], lambda x: read(x, gradients)), *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if not notes.in_forward or not output.requires_grad or not args or not notes.fits(args[0]):
                return
            if args[0].requires_grad:
                output.register_hook(caught.append)
            else:
                notes.reach(args[0], output)
                output.register_hook(lambda gradient: read(args[0], [gradient]))

        return [self.module.register_forward_pre_hook(before), self.module.register_forward_hook(after)]

    def features(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient (B, d) of the gain, and behind it that of the bias, from input and gradient of the output (B, T, d)."""
        x, gradient = x.float(), gradient.float()
        if self.mean:
            variance, mean = torch.var_mean(x, dim=2, correction=0)
        else:
            variance = torch.linalg.vector_norm(x, dim=2).square_().div_(x.shape[2])
        scale = torch.rsqrt(variance + self.epsilon)[:, None, :]  # (B, 1, T)
        gain = torch.bmm(scale, x * gradient)
        if self.mean:
            gain = gain - torch.bmm(scale * mean[:, None, :], gradient)
        return torch.cat([gain[:, 0], gradient.sum(1)], dim=1) if self.bias else gain[:, 0]


class _Tap(torch.autograd.Function):
    """The identity on a layer's input x; once the layer's backward is done, hands x to a reader."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, read: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.read = read
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.read(*ctx.saved_tensors)
        return gradient, None


def norm_layers(model: PreTrainedModel, start: int = 0) -> list[Layer]:
    """Every normalisation layer with a trained gain: torch's LayerNorm and RMSNorm, and the RMSNorms of transformers."""
    layers: list[Layer] = []
    for name, module in model.named_modules():
        known = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        if known and _trained(module) and len(shape := _shape(module.weight)) == 1:
            mean, epsilon = isinstance(module, nn.LayerNorm), getattr(module, "variance_epsilon", None)
            epsilon = getattr(module, "eps", None) if epsilon is None else epsilon
            epsilon = torch.finfo(module.weight.dtype).eps if epsilon is None else epsilon  # as torch's RMSNorm does
            bias = mean and module.bias is not None and module.bias.requires_grad
            layers.append(Norm(start + len(layers), name, module, shape[0] * (1 + bias), epsilon, mean, bias))
    return layers


def sketch_layers(model: PreTrainedModel, size: int, seed: int) -> list[Layer]:
    """Every trained linear layer and plain embedding but the output head, then the normalisation layers.

    Matrices of one block with the same width of input share U, so that those with the same input share its projection.
    """
    shared: dict[tuple[Any, ...], Projection] = {}
    layers: list[Layer] = []
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
        if module is head or not (table or isinstance(module, nn.Linear | Conv1D)) or not _trained(module):
            continue
        wide = _shape(module.weight)
        rows, columns = wide if table or isinstance(module, Conv1D) else wide[::-1]  # of U and of V
        bias = not table and module.bias is not None and module.bias.requires_grad
        key = (name if table else _block(name), rows, bias)
        if key not in shared:
            shared[key] = Projection(rows, size, seed=2 * (seed + 7919 * len(shared)), bias=bias)
        inputs, outputs = shared[key], Projection(columns, size, seed=2 * (seed + 7919 * len(layers)) + 1)
        if table and module.padding_idx is not None:
            inputs.matrix[module.padding_idx] = 0  # its row is never trained
        kind = Table if table else Matrix
        layers.append(kind(len(layers), name, module, inputs.size * outputs.size, inputs, outputs))
    return [*layers, *norm_layers(model, len(layers))]


def _block(name: str) -> str:
    """A module's name up to the number of its block: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else name


def _trained(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None and module.weight.requires_grad


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter: DeepSpeed leaves an empty one where it is sharded, and keeps the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
