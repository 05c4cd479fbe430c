"""From a configuration to the parts of a run that need no model weights. Shared by train, check and eval."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.config import Config, ObjectiveConfig, PlainSource, Served
from rewards.bus import RewardBus
from rewards.component import load_component, wanted_columns
from rewards.types import Missing, Objective
from rollout.prompts import (
    Rendering,
    Tokenizer,
    check_lengths,
    mix,
    mixed_order,
    prompt_order,
    render_prompts,
    rows_of_file,
    rows_of_function,
    rows_of_hub,
)
from rollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN_POLICIES = ("arithmetic",)


def locate_model(model: str) -> str:
    """Folder of a built-in or local policy, or the hub name unchanged.

    Raises:
        ValueError: There is no such built-in policy or folder, or the folder holds no model.
    """
    if model.startswith("builtin:"):
        name = model.removeprefix("builtin:")
        if name not in BUILT_IN_POLICIES:
            raise ValueError(f"policy.model: no built-in policy {name!r}; there is {', '.join(BUILT_IN_POLICIES)}")
        return str(files("align") / "policies" / name)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).exists()
    if not looks_local:
        return model
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file() and not is_adapter(str(folder)):
        raise ValueError(
            f"policy.model: {model!r} is not a folder with a config.json, nor a hub name such as Qwen/Qwen3-0.6B"
        )
    return str(folder)


def locate_policy(config: Config | Served) -> str:
    """Folder or hub name of the policy to train. Raises ValueError when there is none, or none that can be trained."""
    model = locate_model(config.policy.model)
    if is_adapter(model):
        raise ValueError(
            f"policy.model: {model!r} holds LoRA weights only; training starts from a whole model: merge them first (peft's "
            "merge_and_unload), or go on with the run that made them by --resume"
        )
    return model


def is_adapter(model: str) -> bool:
    """Whether a located model is a folder of LoRA weights, which belong to another model."""
    return (Path(model) / "adapter_config.json").is_file()


def base_model(model: str) -> str:
    """The located model itself, or the one that its LoRA weights belong to."""
    if not is_adapter(model):
        return model
    return json.loads((Path(model) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def objectives_of(config: Config | Served) -> list[Objective]:
    """The objectives in the order of the configuration, which is the order of the columns."""
    return [
        Objective(name, o.direction == "maximize", o.bounds, Missing(o.missing)) for name, o in config.objectives.items()
    ]


def build_bus(config: Config | Served, columns: Sequence[str]) -> RewardBus:
    """Every reward found, checked against the fields of the data, and ready. Raises ValueError that names the objective."""
    components = {}
    for name, objective in config.objectives.items():
        try:
            rules = objective.calls.model_dump(exclude_none=True)
            components[name] = load_component(objective.reward, objective.args, columns, rules)
            components[name].ready()
        except ValueError as error:
            raise ValueError(f"objectives.{name}: {error}") from error
    return RewardBus(components, objectives_of(config))


def served_buses(objectives: Mapping[str, ObjectiveConfig]) -> dict[str, tuple[Objective, RewardBus]]:
    """A bus for each objective alone; what fields the data have is not known. Raises ValueError that names the objective."""
    buses = {}
    for name, config in objectives.items():
        objective = Objective(name, config.direction == "maximize", config.bounds, Missing.NEUTRAL)
        try:
            columns = wanted_columns(config.reward, config.args)
            component = load_component(config.reward, config.args, columns, config.calls.model_dump(exclude_none=True))
        except ValueError as error:
            raise ValueError(f"objectives.{name}: {error}") from error
        buses[name] = (objective, RewardBus({name: component}, [objective]))
    return buses


@dataclass(frozen=True)
class PromptSets:
    """Prompts to train on, and held-out ones (none when evaluation is off).

    `shares` has the domains of a mixture to train on, and how often each is sampled; empty where there is one source.
    """

    train: Sequence[Prompt]
    evaluation: Sequence[Prompt]
    shares: Mapping[str, float]

    def order(self, total: int, seed: int) -> np.ndarray:
        """Indices (total,) of the training prompts, a pure function: a longer run begins as a shorter one."""
        if not self.shares:
            return prompt_order(len(self.train), total, seed)
        return mixed_order([prompt.domain for prompt in self.train], self.shares, total, seed)

    @property
    def columns(self) -> list[str]:
        """Fields that every row of both sets has."""
        shared = set(self.train[0].columns)
        return sorted(shared & set(self.evaluation[0].columns) if self.evaluation else shared)


def check_shares(prompts: PromptSets, processes: int) -> None:
    """Raise ValueError unless every process gets a held-out prompt; sharded models are gathered by all together."""
    if 0 < len(prompts.evaluation) < processes:
        raise ValueError(
            f"prompts.evaluation: {len(prompts.evaluation)} prompts cannot be shared by {processes} processes: give "
            f"at least {processes}, or set evaluation.every to 0"
        )


def load_prompts(config: Config, tokenizer: Tokenizer, context: int) -> PromptSets:
    """Read, render and check both prompt sets.

    Args:
        config: Names the sources.
        tokenizer: The policy's.
        context: Tokens that the policy's context holds.

    Raises:
        ValueError: A source is missing, empty, or has a row that cannot be used; names source and row.
    """
    prompts = config.prompts
    sources = {"train": prompts.train}
    if config.evaluation.every and prompts.evaluation is not None:
        sources["evaluation"] = prompts.evaluation
    loaded: dict[str, list[Prompt]] = {"evaluation": []}
    for name, source in sources.items():
        if source.type == "mixture":
            key = f"prompts.{name}.sources"
            domains = {d: _load(config, f"{key}.{d}", s, tokenizer, context) for d, s in source.sources.items()}
            _check_fields(config, key, domains)
            loaded[name] = mix(domains)
        else:
            loaded[name] = _load(config, f"prompts.{name}", source, tokenizer, context)
    return PromptSets(**loaded, shares=config.train_domains)


def _load(config: Config, key: str, source: PlainSource, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """Prompts of one source, which stands at `key`. Raises ValueError that names it."""
    prompts = config.prompts
    rendering = Rendering(source.prompt, prompts.chat, prompts.system, prompts.chat_template_kwargs)
    try:
        loaded = render_prompts(_rows(source), rendering, tokenizer, source.limit)
        check_lengths(loaded, config.rollout.max_tokens, context)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return loaded


def _check_fields(config: Config, key: str, domains: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise ValueError when a reward reads a field that some domains have and others have not."""
    fields = {domain: set(prompts[0].columns) for domain, prompts in domains.items()}
    for name, objective in config.objectives.items():
        try:
            reads = wanted_columns(objective.reward, objective.args)
        except ValueError as error:
            raise ValueError(f"objectives.{name}: {error}") from error
        for wanted in reads:
            lacking = [domain for domain, own in fields.items() if wanted not in own]
            if 0 < len(lacking) < len(fields):
                raise ValueError(
                    f"objectives.{name}: reward {objective.reward!r} reads the field {wanted!r}, which {', '.join(lacking)} "
                    f"of {key} does not have; rewards need the same fields in all domains, and these have in common "
                    f"{', '.join(sorted(set.intersection(*fields.values()))) or 'none'}: rename fields, by a function source"
                )


def _rows(source: PlainSource) -> Any:
    if source.type == "hub":
        return rows_of_hub(source.name, source.subset, source.split)
    if source.type == "file":
        return rows_of_file(source.path)
    return rows_of_function(source.function, source.args)


def load_tokenizer(model: str, config: Config | Served) -> tuple["PreTrainedTokenizerBase", int]:
    """The policy's tokenizer, and the tokens that its context holds. Raises ValueError when they cannot be had."""
    from transformers import AutoConfig, AutoTokenizer

    options = {"revision": config.policy.revision, "trust_remote_code": config.policy.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **options)
        model_config = AutoConfig.from_pretrained(base_model(model), **options).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"policy.model: {model!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, context_length(model_config)


def context_length(model_config: Mapping[str, Any]) -> int:
    """Tokens that a model's context holds, from its config.json."""
    text_config = model_config.get("text_config", model_config)
    for key in ("max_position_embeddings", "n_positions"):
        if key in text_config:
            return int(text_config[key])
    return sys.maxsize  # the configuration does not say
