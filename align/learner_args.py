"""What TRL's configurations are given: the user's `trl:` table, and what our own keys decide. Imports no TRL."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainingArguments

from align.config import Config, Signal
from align.launch import told_to_use_cpu
from align.plan import Plan

KEEP_REFERENCE = 1e-12  # a coefficient so small that it does nothing, but TRL then keeps the reference policy at hand


def trl_arguments(config: Config, plan: Plan, checkpoints: Path, evaluate_first: bool) -> dict[str, Any]:
    """Arguments of GRPOConfig for a run. Raises ValueError when the GPUs are not shared among processes."""
    owned = {
        "output_dir": str(checkpoints),
        "seed": config.seed,
        "max_steps": config.steps,
        "model_init_kwargs": {"dtype": config.policy.dtype, "revision": config.policy.revision},
        "trust_remote_code": config.policy.trust_remote_code,
        "shuffle_dataset": False,  # the data set is in its order already
        "num_generations": config.rollout.samples_per_prompt,
        "max_completion_length": config.rollout.max_tokens,
        "temperature": config.rollout.temperature,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_generation": plan.passes_per_batch,
        "num_iterations": config.learner.iterations_per_batch,
        "scale_rewards": "none",
        "logging_steps": 1,
        "save_strategy": "no",  # evaluation and checkpoints follow our own schedule
        "eval_on_start": evaluate_first,
    }
    correction = config.rollout.correction
    if correction.type != "none":
        owned |= {
            "vllm_importance_sampling_mode": f"{correction.level}_{correction.type}",
            "vllm_importance_sampling_clip_max": correction.max,
            "vllm_importance_sampling_clip_min": correction.min or None,
        }
    if (Signal.KL in config.weighting.needs or config.estimator.type == "dpg") and not config.trl.get("beta"):
        owned["beta"] = KEEP_REFERENCE
    return _defaults(config, plan) | dict(config.trl) | owned


def tuner_arguments(config: Config, plan: Plan, checkpoints: Path) -> dict[str, Any]:
    """Arguments of SFTConfig, DPOConfig or KTOConfig for the rounds of a run; each round has its own seed and steps.

    Raises:
        ValueError: As `trl_arguments`.
    """
    owned = {
        "output_dir": str(checkpoints),
        "seed": config.seed,
        "max_steps": 1,
        "model_init_kwargs": {"dtype": config.policy.dtype, "revision": config.policy.revision},
        "trust_remote_code": config.policy.trust_remote_code,
        "learning_rate": config.rounds.learning_rate,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "max_length": None,  # what fits the sampler's context fits here
        "train_sampling_strategy": "sequential",  # the rows are in their order already
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    if config.rounds.method != "sft":
        owned |= {"beta": config.rounds.beta, "precompute_ref_log_probs": True}
    return _defaults(config, plan) | dict(config.trl) | owned


def check_sharding(config: Config, arguments: TrainingArguments) -> None:
    """Raise ValueError when the launcher shares out weights in a way that the run cannot do with."""
    estimator, plugin = config.estimator, arguments.deepspeed_plugin
    fsdp = bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if estimator.type == "dpg" and estimator.proposal == "adaptive" and fsdp:
        raise ValueError("estimator.proposal=adaptive cannot be had under FSDP: take newest, or launch with ZeRO-3")
    if config.rounds is not None and plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise ValueError(
            "rounds go on from the weights that the last one wrote, and ZeRO-3 writes them whole only with "
            "zero3_save_16bit_model: true in deepspeed_config of the accelerate file (in a DeepSpeed file "
            "stage3_gather_16bit_weights_on_model_save): add it"
        )


def _defaults(config: Config, plan: Plan) -> dict[str, Any]:
    """What the machine decides, unless the user does. Raises ValueError when the GPUs are not shared among processes."""
    told = told_to_use_cpu(os.environ) or config.trl.get("use_cpu", False)
    cpu = told or not torch.accelerator.is_available()
    if plan.processes == 1 and not cpu and torch.cuda.device_count() > 1:
        if config.rollout.engine.type == "vllm" and not config.rollout.engine.urls:
            raise ValueError(
                "one learner process on a GPU of its own beside vLLM's: start the server by CUDA_VISIBLE_DEVICES=1 "
                "paretune worker MODEL, the run by CUDA_VISIBLE_DEVICES=0, and name the server in rollout.engine.urls"
            )
        raise ValueError(
            f"one process and {torch.cuda.device_count()} visible GPUs: train on all by `accelerate launch --multi_gpu "
            f"--num_processes {torch.cuda.device_count()} -m align.train ...`, or on one by CUDA_VISIBLE_DEVICES=0"
        )
    return {
        "use_cpu": cpu,
        "bf16": not cpu and not config.trl.get("fp16") and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False,  # a causal language model uses all
        "report_to": "none",
    }


def peft_config(config: Config) -> LoraConfig | None:
    """What TRL is given as `peft_config`."""
    lora = config.policy.lora
    if lora is None:
        return None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
