"""`paretune check`: what a configuration would do, and what is wrong with it. Loads no weights, downloads nothing."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from align.advice import advise, advise_on_prompts
from align.build import (
    PromptSets,
    base_model,
    build_bus,
    check_shares,
    context_length,
    load_prompts,
    load_tokenizer,
    locate_policy,
    objectives_of,
)
from align.config import Config, describe, describe_domains, describe_sampling, describe_selftrain
from align.engine import check_engine
from align.load import load_config
from align.plan import Plan, make_plan
from align.selftrain.sources import load_sources
from rewards.component import find_reward
from rewards.types import OUTSIDE, Missing
from rollout.prompts import Tokenizer
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

SAMPLE_TEXTS = ("", "The answer is 42.")


def check(path: str, processes: int, overrides: Sequence[str], whole: bool = False) -> int:
    """Print the batch arithmetic, every reward on sample texts, and warnings; the `whole` resolved configuration first.

    Raises:
        ValueError: Something is wrong with it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    config = load_config(path, overrides)
    plan = make_plan(config, processes)
    check_engine(config)
    if whole:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110))
    print(_describe(config, plan))
    warnings = advise(config)
    model = locate_policy(config)
    try:
        tokenizer, context = quick_tokenizer(model, config)
        prompts = load_prompts(config, tokenizer, context)
    except ValueError as error:
        if not _is_remote(model, config):
            raise
        reason = str(error).partition("\n")[0]
        warnings.append(f"prompts and rewards were not tried: training will download what is not here ({reason})")
        for objective in config.objectives.values():
            find_reward(objective.reward)
    else:
        check_shares(prompts, processes)
        load_sources(config, tokenizer, 0, context)
        warnings += advise_on_prompts(config, prompts)
        _print_prompts(prompts, context)
        _try_rewards(config, prompts, tokenizer)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{path}: ok")
    return 0


def _describe(config: Config, plan: Plan) -> str:
    """The arithmetic, the sampling, and what decides what is learned."""
    rollout, rounds = config.rollout, config.rounds
    sampling = f"sampling:  {describe_sampling(rollout)}"
    selftrain = "".join(f"\nselftrain: {line}" for line in describe_selftrain(config))
    if rounds is not None:
        return (
            f"rounds: {rounds.count}, each of {rounds.prompts} prompts x {rollout.samples_per_prompt} samples = "
            f"{plan.samples_per_batch}; {rounds.method}, {plan.processes} process(es) x {plan.accumulation} pass(es) of "
            f"{plan.micro_batch_size} per update\n{sampling}{selftrain}"
        )
    domains = "".join(f"\ndomains: {line}" for line in describe_domains(config))
    return (
        f"batch: {rollout.prompts_per_batch} prompts x {rollout.samples_per_prompt} samples = {plan.samples_per_batch}; "
        f"{plan.samples_per_process} per process, in {plan.passes_per_batch} pass(es) of {plan.micro_batch_size}; "
        f"{plan.accumulation} pass(es) per update\n"
        f"run:   {config.steps} steps = {plan.batches} batches, {plan.prompts} prompts, "
        f"{plan.samples_by(config.steps)} samples\n"
        f"{sampling}\n"
        f"weighting: {describe(config)}{domains}{selftrain}"
    )


def _is_remote(model: str, config: Config) -> bool:
    """Whether the policy or a data set comes from the hub and may not be on this machine."""
    given = [config.prompts.train, *filter(None, [config.prompts.evaluation])]
    sources = [part for s in given for part in (s.sources.values() if s.type == "mixture" else [s])]
    return not Path(model).is_dir() or any(source.type == "hub" for source in sources)


class QuickTokenizer:
    """A local tokenizer.json without transformers (which takes seconds to import), as long as nobody wants a template.

    Args:
        folder: Where tokenizer.json lies.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Backend

        self._folder = folder
        self._backend = Backend.from_file(str(folder / "tokenizer.json"))

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]:
        """Token ids of every text."""
        encoded = self._backend.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The text of chat messages, by transformers."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder).apply_chat_template(conversation, **kwargs)


def quick_tokenizer(model: str, config: Config) -> tuple[Tokenizer, int]:
    """What `align.build.load_tokenizer` gives, without an import of transformers where that can be."""
    file = Path(base_model(model)) / "config.json"
    if (Path(model) / "tokenizer.json").is_file() and file.is_file() and not config.prompts.chat:
        model_config = json.loads(file.read_text(encoding="utf-8"))
        return QuickTokenizer(Path(model)), context_length(model_config)
    return load_tokenizer(model, config)


def _print_prompts(prompts: PromptSets, context: int) -> None:
    for name, some in (("train", prompts.train), ("held out", prompts.evaluation)):
        longest = max((len(prompt.token_ids) for prompt in some), default=0)
        print(f"{name + ':':<9} {len(some)} prompts, at most {longest} tokens (the context holds {context})")
    print(f"the first: {prompts.train[0].text!r:.200}")


def _try_rewards(config: Config, prompts: PromptSets, tokenizer: Tokenizer) -> None:
    """Score sample texts as completions of the first prompt, and print the values."""
    token_ids = tokenizer(text=list(SAMPLE_TEXTS), add_special_tokens=False)["input_ids"]
    group = _sample_group(prompts.train[0], token_ids)
    with closing(build_bus(config, prompts.columns)) as bus:
        matrix = bus.score([group])
    width = max(len(name) for name in config.objectives)
    print(f"\n{'reward of':<{width}}  " + "  ".join(f"{text!r:>20}" for text in SAMPLE_TEXTS))
    for k, objective in enumerate(objectives_of(config)):
        cells = [f"{v:20.4g}" if math.isfinite(v) else f"{'missing':>20}" for v in matrix.raw_NK[:, k]]
        print(f"{objective.name:<{width}}  " + "  ".join(cells))
        reasons = {reason for (_, column), reason in matrix.errors.items() if column == k}
        for reason in sorted(reasons):
            print(f"{'':<{width}}  missing: {reason}")
        if reasons and objective.missing is Missing.FAIL:
            key = f"objectives.{objective.name}"
            way_out = f"widen {key}.bounds, or" if all(OUTSIDE in reason for reason in reasons) else "mend the reward, or"
            raise ValueError(
                f"{key}: the reward gave no value for a sample text, and a missing value stops the run: {way_out} set "
                f"{key}.missing"
            )


def _sample_group(prompt: Prompt, token_ids: Sequence[Sequence[int]]) -> SampleGroup:
    samples = [Sample(tuple(ids), (), FinishReason.STOP, 0, text) for text, ids in zip(SAMPLE_TEXTS, token_ids, strict=True)]
    return SampleGroup(prompt, tuple(samples))
