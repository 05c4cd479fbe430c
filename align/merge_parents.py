"""The policies that are merged: where their weights lie, read one tensor at a time, and whether they are of one origin."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align.build import is_adapter, locate_model
from align.checkpoint import complete_checkpoints, read_state
from align.config import Config
from align.load import load_config
from align.merge_adapter import WEIGHTS as ADAPTER_WEIGHTS
from align.merge_adapter import LowRank, read_adapter
from align.plan import make_plan

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAME_ANYWAY = (  # keys of a model's config.json that change nothing of what its weights compute
    "_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
RELATED = 0.5  # least cosine between weights of one origin: what training moves is a small part of them


@dataclass(frozen=True)
class Located:
    """A policy as the user named it.

    Args:
        name: For messages: as given, with the step of a run's checkpoint.
        folder: Of its weights, or of its LoRA weights.
        config: Of the run that it comes from; None where it is no run's.
        step: Of the checkpoint; None where it is no run's.
    """

    name: str
    folder: Path
    config: Config | None
    step: int | None

    @cached_property
    def adapter(self) -> Mapping[str, Any]:
        """What adapter_config.json says; empty where these are whole weights."""
        return read_json(self.folder / "adapter_config.json") if is_adapter(str(self.folder)) else {}

    @property
    def origin(self) -> str:
        """The policy that training started from, as far as it is known."""
        if self.config is not None:
            return self.config.policy.model
        return self.adapter.get("base_model_name_or_path", "")

    @property
    def samples(self) -> int | None:
        """Samples drawn to train it."""
        if self.config is None:
            return None
        return make_plan(self.config, read_state(self.folder).processes).samples_by(self.step)


def locate(text: str) -> Located:
    """A run folder (its last checkpoint), one of its checkpoints, or a model folder or hub name.

    Raises:
        ValueError: There is none, or a run has no complete checkpoint.
    """
    path = Path(text)
    if (path / "metrics.jsonl").exists() or (path / "environment.json").exists():
        saved = complete_checkpoints(path / "checkpoints")
        if not saved:
            raise ValueError(f"{path} has no complete checkpoint yet")
        step, checkpoint = saved[-1]
        return Located(f"{path}@{step}", checkpoint, load_config(str(path / "config.json")), step)
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (run / "config.json").is_file():
        state = read_state(path)  # which says so where it is not complete
        return Located(f"{path}", path, load_config(str(run / "config.json")), state.step)
    try:
        return Located(text, folder_of(text, "main"), None, None)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("policy.model: ")) from error


def folder_of(model: str, revision: str) -> Path:
    """Folder of a built-in, local or hub model. Raises ValueError when it cannot be had."""
    located = locate_model(model)
    if Path(located).is_dir():
        return Path(located)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
    try:
        return Path(snapshot_download(located, revision=revision, allow_patterns=kinds))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{model!r} cannot be had from the hub: {error}") from error


class Tensors:
    """Tensors of a folder of safetensors files, read when they are asked for. Raises ValueError where there are none."""

    def __init__(self, folder: Path):
        files = sorted(path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
        if not files:
            raise ValueError(f"{folder} has no weights in safetensors files (*.safetensors)")
        self._files = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor; nothing is read."""
        parts = {name: file.get_slice(name) for name, file in self._files.items()}
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


class Parent:
    """A policy with whole weights, or with LoRA weights on those of another one.

    `folder` has the whole weights, `config` is the model's, `shapes` are by the name of the weight.

    Args:
        located: Where it lies.

    Raises:
        ValueError: It cannot be read, or is more than plain LoRA.
    """

    def __init__(self, located: Located):
        self.name, self.located, self.folder = located.name, located, located.folder
        self._changes: dict[str, LowRank] = {}
        self._type: torch.dtype | None = None  # that the weights below an adapter were loaded in
        if located.adapter:
            revision = located.config.policy.revision if located.config else "main"
            self.folder = folder_of(located.adapter["base_model_name_or_path"], revision)
            self._changes = read_adapter(located.folder, located.adapter)
            self._type = getattr(torch, located.config.policy.dtype) if located.config else None
        self.config = read_json(self.folder / "config.json")
        self._weights = Tensors(self.folder)
        tied = tied_names(self.folder, self.config)
        shapes = self._weights.shapes()
        self.shapes = {name: shape for name, (shape, _) in shapes.items() if tied.get(name) not in shapes}
        self._types = {name: FLOATS.get(kind) for name, (_, kind) in shapes.items()}
        for name in self._changes:
            if name not in self.shapes or {name} & set(tied.values()):
                why = "which is tied to another one" if name in shapes else f"which {self.folder} does not have"
                raise ValueError(f"{located.folder} changes {name}, {why}")

    def type(self, name: str) -> torch.dtype | None:
        """Type of a weight; None where it does not hold floating-point numbers of 16 bits or more."""
        return self._types[name] and (self._type or self._types[name])

    def stored(self, name: str) -> torch.Tensor:
        """A weight as the policy has it, LoRA merged in as peft does."""
        weight, kind = self._weights[name], self.type(name)
        weight = weight if kind is None else weight.to(kind)
        return (weight + self._changes[name].delta()).to(kind) if name in self._changes else weight

    def below(self, name: str) -> torch.Tensor:
        """A weight without what LoRA adds to it."""
        return self._weights[name]

    def exact(self, name: str) -> torch.Tensor:
        """A weight in the type that sums are made in; LoRA is not rounded to the type of the weight."""
        wide = wide_type(self.type(name))
        weight = self._weights[name].to(wide)
        return weight + self._changes[name].delta(wide) if name in self._changes else weight

    def delta(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """What training has changed of a weight of the policy that it started from, in the type of `base`."""
        if self.located.adapter:
            return self._changes[name].delta(base.dtype) if name in self._changes else torch.zeros_like(base)
        return self._weights[name].to(base.dtype) - base


def wide_type(kind: torch.dtype) -> torch.dtype:
    """Type that sums of weights are made in."""
    return torch.float64 if kind in (torch.float64, torch.float32) else torch.float32


def tied_names(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Weights of a model that are others' under another name -> those; a checkpoint may have both or one of them."""
    if not config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True)):
        return {}
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).all_tied_weights_keys)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a causal language model that transformers knows: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A table in a JSON file. Raises ValueError when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# --- of one origin? ---------------------------------------------------------------------------------------------------


def check_origin(parents: Sequence[Parent], base: Parent | None) -> None:
    """Raise ValueError that names the first thing in which the policies cannot be of one origin."""
    first = parents[0]
    for other in parents[1:]:
        if first.located.origin and other.located.origin and not _same_model(first.located, other.located):
            raise ValueError(
                f"{first.name} and {other.name} are not of one origin: the one started from {first.located.origin!r}, the "
                f"other from {other.located.origin!r} (policy.model)"
            )
    for other in [*parents[1:], *([base] if base else [])]:
        difference = _difference(first, other, other is not base)
        if difference:
            raise ValueError(f"{first.name} and {other.name} are not of one origin: {difference}")


def _same_model(a: Located, b: Located) -> bool:
    revisions = [located.config.policy.revision for located in (a, b) if located.config]
    return _absolute(a.origin) == _absolute(b.origin) and len(set(revisions)) < 2


def _absolute(model: str) -> str:
    """Two names of one folder become the same; a folder that is gone, and a hub name, stay as they are."""
    try:
        located = locate_model(model)
    except ValueError:
        return model
    return str(Path(located).resolve()) if Path(located).is_dir() else located


def _difference(a: Parent, b: Parent, types: bool) -> str:
    """The first difference between two policies in architecture, shapes, types, tokenizer or weights; "" where none is."""
    for key in [*a.config, *b.config]:
        if key not in SAME_ANYWAY and a.config.get(key) != b.config.get(key):
            return f"{key} of the model is {a.config.get(key)!r} and {b.config.get(key)!r}"
    for name in [*a.shapes, *b.shapes]:
        if name not in a.shapes or name not in b.shapes:
            return f"only {a.name if name in a.shapes else b.name} has the weight {name}"
        if a.shapes[name] != b.shapes[name]:
            return f"{name} has the shapes {list(a.shapes[name])} and {list(b.shapes[name])}"
        if types and a.type(name) != b.type(name):
            return f"{name} has the types {a.type(name)} and {b.type(name)}"
    return _difference_of_tokenizers(a, b) or _unrelated(a, b)


def _difference_of_tokenizers(a: Parent, b: Parent) -> str:
    one, two = (tokenizer_of(parent) for parent in (a, b))
    if one is None or two is None:
        return ""
    tokens = {token for token, number in one.get_vocab().items() ^ two.get_vocab().items()}
    if tokens:
        token = min(tokens)
        return f"token {token!r} of the tokenizer is {one.get_vocab().get(token)} and {two.get_vocab().get(token)}"
    if one.eos_token != two.eos_token:
        return f"eos_token of the tokenizer is {one.eos_token!r} and {two.eos_token!r}"
    return ""


def tokenizer_of(parent: Parent) -> Any:
    """The tokenizer in a policy's folder; None where there is none."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(parent)
    return AutoTokenizer.from_pretrained(folder) if folder else None


def tokenizer_folder(parent: Parent) -> Path | None:
    """The folder that has a policy's tokenizer: its own, or that of the weights below its adapter."""
    folders = [f for f in (parent.located.folder, parent.folder) if (f / "tokenizer_config.json").is_file()]
    return folders[0] if folders else None


def _unrelated(a: Parent, b: Parent) -> str:
    """A matrix in which two policies (without LoRA) have nothing in common, of some eight from all depths; "" if none."""
    matrices = [name for name, shape in a.shapes.items() if len(shape) == 2 and a.type(name) is not None]
    for name in matrices[:: max(len(matrices) // 8, 1)]:
        one, two = (parent.below(name).flatten().float() for parent in (a, b))
        cosine = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        if cosine < RELATED and one.any() and two.any():
            return f"{name} of the one and of the other have a cosine of {cosine:.2f}, and training moves weights by little"
    return ""
