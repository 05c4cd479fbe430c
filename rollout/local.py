"""Sampler on transformers' own generation, in the learner's process: the embedded default."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rollout.sampler import NO_CHECK, Check, Gap, SamplingParams
from rollout.types import FinishReason, Prompt, Sample, SampleGroup


class LocalSampler:
    """Samples with a model that lives in this process.

    Args:
        policy: Gives the model, ready to generate, for the time of one call (a sharded learner gathers it there).
        tokenizer: Decodes completions; its padding token pads prompts.
        stop_token_ids: Tokens that end a completion.
        batch_size: Samples generated at once.
    """

    shares_weights = True

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

    def sync(self, weights: Iterable[tuple[str, Any]], version: int, check: Check = NO_CHECK) -> Gap:
        """Note the policy's version; the weights are shared already."""
        self._version = version
        return Gap()

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

    def differing(self) -> Sequence[str]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing to release."""

    def _generate(self, model: PreTrainedModel, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        width = max(len(prompt.token_ids) for prompt in prompts)
        pad = self._tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        recorder = _Recorder(width)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=self._generation_config(params),
            logits_processor=LogitsProcessorList([*_warpers(params), *([recorder] if params.log_probs else [])]),
        )
        completions = [self._cut(ids) for ids in output[:, width:].tolist()]
        log_probs = recorder.log_probs(output) if params.log_probs else [[]] * len(completions)
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [
            Sample(tuple(ids), tuple(values[: len(ids)]), self._finish_reason(ids), self._version, text)
            for ids, values, text in zip(completions, log_probs, texts, strict=True)
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
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if params.temperature > 0 else {}  # `_warpers` do it
        return GenerationConfig(
            do_sample=params.temperature > 0,
            max_new_tokens=params.max_tokens,
            eos_token_id=self._stop,
            pad_token_id=self._tokenizer.pad_token_id,
            repetition_penalty=params.repetition_penalty,
            **sampling,
        )


class _Recorder(LogitsProcessor):
    """Notes the log-probability of every token drawn; last among the processors, it sees what is drawn from.

    A step's token is known at the next one, so a step's log-probabilities (N, vocabulary) are kept until then.
    """

    def __init__(self, width: int):
        self._width = width
        self._waiting: torch.Tensor
        self._drawn: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self._width:
            self._drawn.append(self._waiting.gather(1, input_ids[:, -1:]))
        self._waiting = scores.float().log_softmax(dim=1)
        return scores

    def log_probs(self, output: torch.LongTensor) -> list[list[float]]:
        """Of the completions in `output` (N, width + T), padding included."""
        return torch.cat([*self._drawn, self._waiting.gather(1, output[:, -1:])], dim=1).tolist()


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    """The sampling settings in vLLM's order; transformers' own has min_p last, and would keep more under top_p."""
    if params.temperature == 0:
        return []
    return [
        *([TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []),
        *([MinPLogitsWarper(params.min_p)] if params.min_p else []),
        *([TopKLogitsWarper(params.top_k)] if params.top_k else []),
        *([TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []),
    ]


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
