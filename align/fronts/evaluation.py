"""Evaluates many policies on the same prompts and seeds, each once: what was evaluated before is read from the cache."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from align.build import PromptSets, load_prompts, load_tokenizer
from align.check import quick_tokenizer
from align.config import Config
from align.fronts.cache import Cache
from align.fronts.fingerprint import Hashes, code_digests, digest, evaluation_key, prompts_digest, tokenizer_of
from align.sampling import Place, evaluation_params
from rewards.types import NO_VALUE
from rollout.sampler import SamplingParams
from rollout.types import Prompt

if TYPE_CHECKING:
    from align.evaluator import Evaluator

EXAMPLES = 3  # completions of each policy that are shown
PART = 256  # samples that are cached together: as many as the built-in sampler draws at once


@dataclass(frozen=True)
class Wanted:
    """How policies are evaluated.

    Args:
        config: Objectives, prompts, engine, numbers.
        seeds: Of the sampling; values are averaged over them.
        validation: Prompts to choose on; 0 for half of them.
        test: Prompts to measure on; 0 for all others.
    """

    config: Config
    seeds: Sequence[int]
    validation: int
    test: int

    @property
    def prompts_per_part(self) -> int:
        """Prompts whose samples are drawn, scored and cached together."""
        return max(1, PART // self.config.evaluation.samples_per_prompt)

    def params(self, seed: int, start: int) -> SamplingParams:
        """Sampling parameters of one seed, for the prompts from place `start` on; equal for all policies."""
        config = self.config.model_copy(update={"seed": seed})
        return replace(evaluation_params(config, Place(), start), log_probs=False)


@dataclass(frozen=True)
class Evaluated:
    """What is known of one policy.

    Args:
        validation_PK: Mean raw value of every validation prompt, over seeds and samples; NaN where missing.
        test_PK: The same of every test prompt.
        missing: Share of values that could not be had, by part (`validation`, `test`), in the order of the objectives.
        examples: Some completions for test prompts.
    """

    validation_PK: np.ndarray
    test_PK: np.ndarray
    missing: Mapping[str, Sequence[float]]
    examples: Sequence[Mapping[str, Any]]


@dataclass
class Evaluations:
    """All policies, by path, and what is to be said about how they were evaluated."""

    by_path: dict[str, Evaluated] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    made: int = 0  # evaluations that were not, or not wholly, in the cache


class _Plain:
    """Takes the place of a tokenizer: prompts as they are, before the chat template of any policy."""

    def __call__(self, text: Sequence[str], **_) -> dict[str, Any]:
        return {"input_ids": [(0,)] * len(text)}

    def apply_chat_template(self, content: Any, **_) -> str:
        return digest(content)


def plain_prompts(config: Config) -> Sequence[Prompt]:
    """The held-out prompts, with texts that are the same for all policies."""
    return load_prompts(config, _Plain(), sys.maxsize).evaluation


def split_prompts(prompts: Sequence[Prompt], validation: int, test: int) -> tuple[list[int], list[int]]:
    """Places of the validation and of the test prompts among all.

    Prompts are put in the order of the SHA-256 of their text, whatever order the source has; the first `validation` of
    them are for validation, the next `test` for test. A test prompt whose text is among the validation prompts is left
    out. 0 means half of all prompts for validation, all others for test.

    Raises:
        ValueError: There are not so many prompts, or one part would be empty.
    """
    order = sorted(range(len(prompts)), key=lambda i: (digest(prompts[i].text), i))
    validation = validation or (len(prompts) - test if test else len(prompts) // 2)
    seen = {prompts[i].text for i in order[: max(validation, 0)]}
    others = [i for i in order[max(validation, 0) :] if prompts[i].text not in seen]
    if validation < 1 or len(others) < max(test, 1):
        there = f"prompts.evaluation has {len(prompts)} prompts ({len({p.text for p in prompts})} different ones)"
        raise ValueError(
            f"--validation {validation} --test {test or 1}: {there}; give smaller numbers, or a source with more prompts"
        )
    return order[:validation], others[: test or None]


def evaluate_all(paths: Sequence[str], wanted: Wanted, cache_folder: Path) -> Evaluations:
    """Evaluate every policy once, and keep each part of an evaluation as soon as it is made.

    A command that was stopped goes on where it was: what a part of the prompts gets depends on no other part. Policies of
    one kind (tokenizer, architecture) share an engine. All have the same prompts for validation, and the same for test,
    which each reads as its own tokenizer renders them.

    Args:
        paths: Folders or hub names of policies.
        wanted: How.
        cache_folder: Of evaluations made before.

    Raises:
        ValueError: A policy, prompt or reward cannot be had.
    """
    config = for_evaluation(wanted.config)
    wanted = replace(wanted, config=config)
    cache = Cache(cache_folder, list(config.objectives))
    hashes = Hashes(cache_folder / "hashes.json")
    code, found = code_digests(config, hashes), Evaluations()
    kinds: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        kinds.setdefault(hashes.kind(path, config.policy.revision), []).append(path)
    parts = split_prompts(plain_prompts(config), wanted.validation, wanted.test)
    groups = [_Group(members, wanted, parts, cache, hashes, code) for members in kinds.values()]
    hashes.save()
    total, owed = sum(group.samples(group.counts) for group in groups), sum(group.samples(group.owed) for group in groups)
    with tqdm(
        total=total, initial=total - owed, desc="evaluate", unit="sample", dynamic_ncols=True, disable=not owed
    ) as bar:
        for group in groups:
            found.made += group.incomplete
            for note in group.make(bar):
                found.notes.append(note)
    for group in groups:
        found.by_path |= {path: group.read(path) for path in group.paths}
    found.prompts = {"validation": len(parts[0]), "test": len(parts[1])}
    found.by_path = {path: found.by_path[path] for path in dict.fromkeys(paths)}
    return found


def for_evaluation(config: Config) -> Config:
    """The configuration without what evaluation does not need: training prompts. Raises ValueError without held-out ones."""
    if config.prompts.evaluation is None:
        raise ValueError("prompts.evaluation is missing: a front needs held-out prompts; name their source")
    prompts = config.prompts.model_copy(update={"train": config.prompts.evaluation})
    evaluation = config.evaluation.model_copy(update={"every": max(1, config.evaluation.every)})
    return config.model_copy(update={"prompts": prompts, "evaluation": evaluation})


class _Group:
    """Policies of one kind, and which parts of their evaluations are not in the cache."""

    def __init__(
        self,
        paths: Sequence[str],
        wanted: Wanted,
        parts: tuple[Sequence[int], Sequence[int]],
        cache: Cache,
        hashes: Hashes,
        code: Mapping[str, Any],
    ):
        config = wanted.config
        self.paths, self._wanted, self._cache = paths, wanted, cache
        self._cut, self._places = len(parts[0]), (*parts[0], *parts[1])
        self._samples = config.evaluation.samples_per_prompt
        everything = load_prompts(config, *quick_tokenizer(tokenizer_of(paths[0]), config)).evaluation
        prompts = [everything[i] for i in self._places]
        self._starts = range(0, len(prompts), wanted.prompts_per_part)
        some = {start: prompts[start : start + wanted.prompts_per_part] for start in self._starts}
        digests = {start: prompts_digest(part) for start, part in some.items()}
        self._spent: dict[str, pa.Table] = {}  # made just now, and not to be kept
        self.counts: dict[str, int] = {}  # prompts of every key
        self.keys: dict[tuple[str, int], list[str]] = {}  # of the parts, in their order
        for path in paths:
            policy = hashes.policy(path, config.policy.revision)
            for seed in wanted.seeds:
                keys = [evaluation_key(config, policy, digests[s], wanted.params(seed, s), code) for s in self._starts]
                self.keys[path, seed] = keys
                self.counts |= {key: len(some[start]) for key, start in zip(keys, self._starts, strict=True)}
        self.owed = {key for key in self.counts if self._stored(key) is None}
        self.incomplete = len({tuple(keys) for keys in self.keys.values() if self.owed.intersection(keys)})

    def samples(self, keys: Iterable[str]) -> int:
        """How many samples some parts have."""
        return sum(self.counts[key] for key in keys) * self._samples

    def _stored(self, key: str) -> pa.Table | None:
        return self._cache.get(key, self.counts[key], self._samples)

    def make(self, bar: tqdm) -> Iterator[str]:
        """Make what is owed, one policy after another; sentences about what cannot be kept."""
        if not self.owed:
            return
        from align.evaluator import open_evaluator
        from align.launch import quiet

        quiet()
        config = self._wanted.config
        tokenizer, context = load_tokenizer(tokenizer_of(self.paths[0]), config)
        everything = load_prompts(config, tokenizer, context).evaluation
        sets = PromptSets(everything, [everything[i] for i in self._places], shares={})
        first = next(path for (path, _), keys in self.keys.items() if self.owed.intersection(keys))
        with (
            TemporaryDirectory(prefix="paretune-front-") as folder,
            open_evaluator(config, sets, tokenizer, first, Path(folder)) as evaluator,
        ):
            for version, path in enumerate(self.paths):
                if self.owed.intersection(*(self.keys[path, seed] for seed in self._wanted.seeds)):
                    evaluator.take(path, version)
                for seed in self._wanted.seeds:
                    yield from self._make_one(evaluator, sets.evaluation, path, seed, bar)

    def _make_one(self, evaluator: "Evaluator", prompts: Sequence[Prompt], path: str, seed: int, bar: tqdm) -> Iterator[str]:
        """The parts of one evaluation that are owed."""
        lost: list[Mapping[str, Any]] = []
        for start, key in zip(self._starts, self.keys[path, seed], strict=True):
            if key in self.owed:
                part = prompts[start : start + self._wanted.prompts_per_part]
                rows = evaluator.evaluate(part, self._wanted.params(seed, start), seed).rows
                lost += [] if self._keep(key, rows) else rows
                self.owed.discard(key)
                bar.update(len(rows))
        if lost:
            shares = ", ".join(f"{o} on {share:.0%} of the samples" for o, share in self._failed(lost).items() if share)
            what = "this evaluation is" if len(lost) == len(prompts) * self._samples else f"{len(lost)} samples are"
            yield f"{path}, seed {seed}: a reward failed ({shares}); {what} not kept and will be made again"

    def _keep(self, key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Cache a part of an evaluation, unless a reward failed so often that the next try may well do better."""
        self._cache.put(key, rows)
        keep = max(self._failed(rows).values()) <= self._wanted.config.scoring.max_failed
        if not keep:
            self._spent[key] = self._stored(key)
            self._cache.path(key).unlink()
        return keep

    def _failed(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Share of the samples for which a reward failed, by objective."""
        names = self._wanted.config.objectives
        return {o: sum(row[f"error/{o}"] not in (None, NO_VALUE) for row in rows) / len(rows) for o in names}

    def read(self, path: str) -> Evaluated:
        """The evaluations of a policy, averaged over seeds and samples."""
        tables = [
            pa.concat_tables(
                [self._spent[key] if key in self._spent else self._stored(key) for key in self.keys[path, seed]]
            )
            for seed in self._wanted.seeds
        ]
        raw_PNK = np.concatenate([self._cache.values(table, self._samples) for table in tables], axis=1)
        present_PNK = np.isfinite(raw_PNK)
        counts_PK = present_PNK.sum(axis=1)
        sums_PK = np.where(present_PNK, raw_PNK, 0.0).sum(axis=1)
        means_PK = np.divide(sums_PK, counts_PK, out=np.full(sums_PK.shape, np.nan), where=counts_PK > 0)
        cut = self._cut
        parts = {"validation": slice(None, cut), "test": slice(cut, None)}
        missing = {name: (~present_PNK[part]).mean(axis=(0, 1)).tolist() for name, part in parts.items()}
        return Evaluated(means_PK[:cut], means_PK[cut:], missing, self._examples(tables[0], cut))

    def _examples(self, table: pa.Table, cut: int) -> list[dict[str, Any]]:
        """The first sample of the first test prompts."""
        start, stop = cut * self._samples, (cut + EXAMPLES) * self._samples
        rows = table.slice(start, stop - start).to_pylist()[:: self._samples]
        names = list(self._wanted.config.objectives)
        return [
            {"prompt": row["prompt"], "text": row["text"], "values": {name: row[f"value/{name}"] for name in names}}
            for row in rows
        ]
