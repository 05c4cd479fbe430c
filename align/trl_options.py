"""The `trl:` table: any option of TRL's GRPOConfig, checked by name and type before TRL (and torch) are imported."""

import ast
import importlib.util
import math
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

_CLASSES = (  # base first, so that TRL's own annotation of a field wins
    ("transformers/training_args.py", "TrainingArguments"),
    ("trl/trainer/base_config.py", "_BaseConfig"),
    ("trl/trainer/grpo_config.py", "GRPOConfig"),
)

OWNED = {  # option of TRL -> the key of ours that decides it
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "full_determinism": "seed",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "model_init_kwargs": "policy",
    "trust_remote_code": "policy.trust_remote_code",
    "shuffle_dataset": "seed",
    "remove_unused_columns": "prompts",
    "chat_template_kwargs": "prompts.chat_template_kwargs",
    "num_generations": "rollout.samples_per_prompt",
    "num_generations_eval": "evaluation.samples_per_prompt",
    "max_completion_length": "rollout.max_tokens",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "min_p": "rollout.min_p",
    "repetition_penalty": "rollout.repetition_penalty",
    "generation_kwargs": "rollout",
    "cache_implementation": "rollout.engine",
    "use_transformers_continuous_batching": "rollout.engine",
    "use_transformers_paged": "rollout.engine",
    "transformers_continuous_batching_config": "rollout.engine",
    "use_vllm": "rollout.engine",
    "generation_batch_size": "rollout.prompts_per_batch",
    "per_device_train_batch_size": "learner.micro_batch_size",
    "gradient_accumulation_steps": "learner.micro_batch_size",
    "steps_per_generation": "learner.updates_per_batch",
    "num_iterations": "learner.iterations_per_batch",
    "auto_find_batch_size": "learner.micro_batch_size",
    "reward_weights": "weighting.weights",
    "scale_rewards": "estimator.scale",
    "multi_objective_aggregation": "combination",
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_delay": "evaluation.every",
    "eval_on_start": "evaluation.every",
    "do_eval": "evaluation.every",
    "per_device_eval_batch_size": "rollout.engine.batch_size",
    "save_strategy": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "checkpoint",
    "save_on_each_node": "checkpoint",
    "load_best_model_at_end": "checkpoint.keep_front",
    "metric_for_best_model": "checkpoint.keep_front",
    "resume_from_checkpoint": "--resume",
    "ignore_data_skip": "--resume",
    "restore_callback_states_from_checkpoint": "--resume",
}
NOT_OFFERED = {  # option of TRL -> why it cannot be set here
    "logging_steps": "every step is logged",
    "logging_strategy": "every step is logged",
    "logging_first_step": "every step is logged",
    "log_completions": "samples/ in the run folder holds every completion, with its rewards and its advantage",
    "sync_ref_model": "the moving reference is not part of a checkpoint yet, so a resumed run would differ",
}

CHOICES = {  # options that TRL itself would refuse only at the first training step
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}


@cache
def option_types() -> dict[str, Any]:
    """Name -> type of every option of the installed GRPOConfig, read from its source; types unknown here are Any."""
    return _types_of(_CLASSES)


@cache
def shared_options() -> frozenset[str]:
    """Names of the options that all trainers of TRL have."""
    return frozenset(_types_of(_CLASSES[:2]))


def _types_of(classes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for file, class_name in classes:
        package, _, rest = file.partition("/")
        source = Path(importlib.util.find_spec(package).origin).parent / rest
        body = next(
            node
            for node in ast.parse(source.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef) and node.name == class_name
        ).body
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types[node.target.id] = _evaluate(ast.unparse(node.annotation))
    return types


def _evaluate(annotation: str) -> Any:
    try:
        return eval(annotation, {"Any": Any, "Literal": Literal})  # annotations of an installed library, not input
    except NameError:  # an enum of transformers, a class of accelerate: left to GRPOConfig itself
        return Any


def may_be_set(name: str) -> bool:
    """Whether an option of TRL's is the user's to set in the `trl:` table."""
    return name not in OWNED and name not in NOT_OFFERED and not name.startswith("vllm_")


def check_trl_options(options: Any) -> Any:
    """The `trl:` table with values converted to their types. Raises ValueError that names every bad key and its cure."""
    if not isinstance(options, dict):
        raise ValueError(f"must be a table of TRL options, for example {{learning_rate: 1.0e-6}}; got {options!r}")
    checked, problems = {}, []
    for name, value in options.items():
        if name in OWNED:
            problems.append(f"trl.{name} is decided by `{OWNED[name]}`: set that instead")
        elif name in NOT_OFFERED:
            problems.append(f"trl.{name} cannot be set: {NOT_OFFERED[name]}")
        elif name.startswith("vllm_"):
            problems.append(f"trl.{name} is decided by `rollout.engine`: set that instead")
        elif name not in option_types():
            near = get_close_matches(str(name), filter(may_be_set, option_types()), 1)
            hint = f"did you mean {near[0]!r}?" if near else "see the options of trl.GRPOConfig"
            problems.append(f"trl.{name} is not an option of TRL's GRPOConfig; {hint}")
        else:
            checked[name], problem = _convert(name, value)
            problems += problem
    if problems:
        raise ValueError("\n".join(problems))
    return checked


def _convert(name: str, value: Any) -> tuple[Any, list[str]]:
    try:
        converted = TypeAdapter(option_types()[name]).validate_python(value)
    except ValidationError as error:
        return value, [f"trl.{name}: {value!r} is not valid ({error.errors()[0]['msg'].lower()})"]
    if converted not in CHOICES.get(name, (converted,)):
        return value, [f"trl.{name}: {value!r} is not one of {', '.join(CHOICES[name])}"]
    if isinstance(converted, float) and not math.isfinite(converted):
        return value, [f"trl.{name}: {value!r} is not a finite number"]
    return converted, []
