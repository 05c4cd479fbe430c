"""Evaluates many policies on the same prompts and seeds, each once: what was evaluated before is read from the cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

EXAMPLES = 3  # completions of each policy that are shown


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

    def params(self, seed: int) -> SamplingParams:
        """Sampling parameters of one seed; equal for all policies."""
        config = self.config.model_copy(update={"seed": seed})
        return replace(evaluation_params(config, Place()), log_probs=False)


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
    made: int = 0  # evaluations that were not in the cache


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
    """Evaluate every policy once, and keep each evaluation as soon as it is made.

    A command that was stopped goes on where it was. Policies of one kind (tokenizer, architecture) share an engine.

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
    groups = [_Group(members, wanted, cache, hashes, code) for members in kinds.values()]
    hashes.save()
    total, owed = sum(len(group.keys) for group in groups), sum(len(group.owed) for group in groups)
    with tqdm(
        total=total, initial=total - owed, desc="evaluate", unit="policy", dynamic_ncols=True, disable=not owed
    ) as bar:
        for group in groups:
            for note in group.make(bar):
                found.notes.append(note)
            found.made += len(group.owed)
    for group in groups:
        found.prompts = {"validation": len(group.validation), "test": len(group.test)}
        found.by_path |= {path: group.read(path) for path in group.paths}
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
    """Policies of one kind, and which of their evaluations are not in the cache."""

    def __init__(self, paths: Sequence[str], wanted: Wanted, cache: Cache, hashes: Hashes, code: Mapping[str, Any]):
        config = wanted.config
        self.paths, self._wanted, self._cache = paths, wanted, cache
        everything = load_prompts(config, *quick_tokenizer(tokenizer_of(paths[0]), config)).evaluation
        self.validation, self.test = split_prompts(everything, wanted.validation, wanted.test)
        self._places = (*self.validation, *self.test)
        self._prompts = [everything[i] for i in self._places]
        self._samples = config.evaluation.samples_per_prompt
        prompts = prompts_digest(self._prompts)
        self._spent: dict[str, pa.Table] = {}  # made just now, and not to be kept
        self.keys: dict[tuple[str, int], str] = {}
        for path in paths:
            policy = hashes.policy(path, config.policy.revision)
            for seed in wanted.seeds:
                self.keys[path, seed] = evaluation_key(config, policy, prompts, wanted.params(seed), code)
        self.owed = list(dict.fromkeys(key for key in self.keys.values() if self._stored(key) is None))

    def _stored(self, key: str) -> pa.Table | None:
        return self._cache.get(key, len(self._prompts), self._samples)

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
        owed, version = set(self.owed), 0
        first = next(path for (path, _), key in self.keys.items() if key in owed)
        with (
            TemporaryDirectory(prefix="paretune-front-") as folder,
            open_evaluator(config, sets, tokenizer, first, Path(folder)) as evaluator,
        ):
            for path in self.paths:
                due = {s: self.keys[path, s] for s in self._wanted.seeds if self.keys[path, s] in owed}
                if due:
                    evaluator.take(path, version)
                    version += 1
                for seed, key in due.items():
                    rows = evaluator.evaluate(self._wanted.params(seed), seed).rows
                    yield from self._keep(key, rows, f"{path}, seed {seed}")
                    owed.discard(key)
                    bar.update()

    def _keep(self, key: str, rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
        """Cache an evaluation, unless a reward failed so often that the next try may well do better."""
        config = self._wanted.config
        failed = {o: sum(row[f"error/{o}"] not in (None, NO_VALUE) for row in rows) / len(rows) for o in config.objectives}
        self._cache.put(key, rows)
        too_often = {o: share for o, share in failed.items() if share > config.scoring.max_failed}
        if too_often:
            self._spent[key] = self._stored(key)
            self._cache.path(key).unlink()
            shares = ", ".join(f"{o} on {share:.0%} of the samples" for o, share in too_often.items())
            yield f"{name}: a reward failed ({shares}); this evaluation is not kept and will be made again"

    def read(self, path: str) -> Evaluated:
        """The evaluations of a policy, averaged over seeds and samples."""
        keys = [self.keys[path, seed] for seed in self._wanted.seeds]
        tables = [self._spent.get(key) or self._stored(key) for key in keys]
        raw_PNK = np.concatenate([self._cache.values(table, self._samples) for table in tables], axis=1)
        present_PNK = np.isfinite(raw_PNK)
        counts_PK = present_PNK.sum(axis=1)
        sums_PK = np.where(present_PNK, raw_PNK, 0.0).sum(axis=1)
        means_PK = np.divide(sums_PK, counts_PK, out=np.full(sums_PK.shape, np.nan), where=counts_PK > 0)
        cut = len(self.validation)
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
