"""Sampler on transformers' own generation, in the learner's process: the embedded default."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rollout.sampler import SamplingParams
from rollout.types import FinishReason, Prompt, Sample, SampleGroup


class LocalSampler:
    """Samples with a model that lives in this process.

    Args:
        policy: Gives the model, ready to generate, for the time of one call (a sharded learner gathers it there).
        tokenizer: Decodes completions; its padding token pads prompts.
        stop_token_ids: Tokens that end a completion.
        batch_size: Samples generated at once.
    """

    def __init__(
        self,
        policy: Callable[[], AbstractContextManager[PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int,
    ):
        self._policy = policy
        self._tokenizer = tokenizer
        self._stop = list(stop_token_ids)
        self._batch_size = batch_size
        self._version = 0

    def sync(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Note the policy's version; the weights are shared already."""
        self._version = version

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[SampleGroup]:
        """See `Sampler.sample`. Random numbers come from `params.seed` alone and leave the global state untouched."""
        repeated = [prompt for prompt in prompts for _ in range(params.samples_per_prompt)]
        samples: list[Sample] = []
        with self._policy() as model, torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(params.seed)
            with _without_dropout(model), _no_generation_defaults(model):
                for start in range(0, len(repeated), self._batch_size):
                    samples += self._generate(model, repeated[start : start + self._batch_size], params)
        size = params.samples_per_prompt
        return [SampleGroup(p, tuple(samples[i * size : (i + 1) * size])) for i, p in enumerate(prompts)]

    def close(self) -> None:
        """Nothing to release."""

    def _generate(self, model: PreTrainedModel, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        width = max(len(prompt.token_ids) for prompt in prompts)
        pad = self._tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=self._generation_config(params),
        )
        completions = [self._cut(ids) for ids in output[:, width:].tolist()]
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [
            Sample(tuple(ids), (), self._finish_reason(ids), self._version, text)
            for ids, text in zip(completions, texts, strict=True)
        ]

    def _cut(self, ids: list[int]) -> list[int]:
        """Everything up to and including the first stop token."""
        for i, token in enumerate(ids):
            if token in self._stop:
                return ids[: i + 1]
        return ids

    def _finish_reason(self, ids: Sequence[int]) -> FinishReason:
        return FinishReason.STOP if ids and ids[-1] in self._stop else FinishReason.LENGTH

    def _generation_config(self, params: SamplingParams) -> GenerationConfig:
        sampling = (
            {}
            if params.temperature == 0
            else {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "min_p": params.min_p or None,
            }
        )
        return GenerationConfig(
            do_sample=params.temperature > 0,
            max_new_tokens=params.max_tokens,
            eos_token_id=self._stop,
            pad_token_id=self._tokenizer.pad_token_id,
            repetition_penalty=params.repetition_penalty,
            **sampling,
        )


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode: the policy is the model without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _no_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the generation settings that came with the model: transformers merges them into everything not set."""
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
