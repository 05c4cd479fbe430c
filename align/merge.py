"""`paretune merge`: policies of one origin become one model for every vector of coefficients, tensor by tensor."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from align import __version__
from align.files import MERGE_FILE, replace_text
from align.merge_methods import averaged_change, rewarded_soup, task_singular_vectors
from align.merge_parents import Located, Parent, check_origin, folder_of, locate, read_json, tokenizer_folder, wide_type
from align.packing import packed

SHARD_BYTES = 4 * 2**30  # of weights in memory, of all models that are being written together
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of tokenizers
NOT_A_TOKENIZER = (
    "config.json", "generation_config.json", "adapter_config.json", "trainer_state.json", "paretune.json", MERGE_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how.

    Args:
        method: `soup` or `tsv`.
        parents: The policies.
        base: The policy that they started from, where it is needed.
        vectors: Coefficients, one for each parent; a model is made for every vector.
    """

    method: str
    parents: Sequence[Parent]
    base: Parent | None
    vectors: Sequence[tuple[float, ...]]

    def merged(self, name: str) -> Iterator[torch.Tensor]:
        """One weight of every model, in the order of the vectors."""
        kind = self.parents[0].type(name)
        if kind is None:
            yield from [self._the_same(name)] * len(self.vectors)
        elif self.method == "soup":
            yield from (self._soup(name, vector).to(kind) for vector in self.vectors)
        else:
            yield from (tensor.to(kind) for tensor in self._tsv(name))

    def _the_same(self, name: str) -> torch.Tensor:
        """A weight that holds no floating-point numbers, and cannot be merged."""
        first = self.parents[0].stored(name)
        for other in self.parents[1:]:
            if not torch.equal(first, other.stored(name)):
                raise ValueError(
                    f"{name} is of the type {first.dtype} and differs between {self.parents[0].name} and {other.name}: only "
                    "floating-point weights of 16 bits and more are merged"
                )
        return first

    def _soup(self, name: str, vector: Sequence[float]) -> torch.Tensor:
        """Sum of the parents, or the base and the sum of changes, where the coefficients do not sum to 1."""
        part, coefficients = _taking_part(self.parents, vector)
        if coefficients == [1.0]:
            return part[0].stored(name)  # that policy bit for bit
        if sums_to_one(vector):
            return rewarded_soup((parent.exact(name) for parent in part), coefficients)
        base = self._base(name)
        return base + rewarded_soup((parent.delta(name, base) for parent in part), coefficients)

    def _tsv(self, name: str) -> list[torch.Tensor]:
        """The base and the merged change; vectors in which the same parents take part share the decompositions."""
        base, changes = self._base(name), {}
        for part in dict.fromkeys(_places(vector) for vector in self.vectors):
            vectors = [vector for vector in self.vectors if _places(vector) == part]
            coefficients = [[vector[i] for i in part] for vector in vectors]
            deltas = [self.parents[i].delta(name, base) for i in part]
            if base.dim() == 2:
                found = list(task_singular_vectors(deltas, coefficients))
            else:
                found = [averaged_change(deltas, c) for c in coefficients]
            changes |= dict(zip(vectors, found, strict=True))
        return [base + changes[vector] for vector in self.vectors]

    def _base(self, name: str) -> torch.Tensor:
        return self.base.exact(name).to(wide_type(self.parents[0].type(name)))


def merge(models: Sequence[str], output: str, weights: Sequence[str], grid: int, method: str, base: str) -> int:
    """Write a model folder for every vector of coefficients, and say which. Raises ValueError for bad input."""
    vectors = coefficients_of(weights, grid, len(models), method)
    places = [locate(model) for model in models]
    parents = [Parent(place) for place in places]
    origin = _base_of(places, base) if base or method == "tsv" else None
    for vector in vectors:
        if method == "soup" and origin is None and not sums_to_one(vector):
            raise ValueError(
                f"--weights {_slashed(vector)}: the coefficients sum to {math.fsum(vector):g}, and a soup would not be of "
                "the size of a policy: let them sum to 1, or give --base, and the changes from it are summed up"
            )
    check_origin(parents, origin)
    folders = {vector: Path(output) / "_".join(f"{c:g}" for c in vector) for vector in vectors}
    if len(set(folders.values())) < len(vectors):
        raise ValueError("--weights: two vectors are the same, up to the six digits that the names of folders have")
    missing = [v for v in vectors if not _is_there(folders[v], _record(Recipe(method, parents, origin, [v]), v))]
    write_models(Recipe(method, parents, origin, missing), [folders[vector] for vector in missing])
    for vector in vectors:
        terms = " + ".join(f"{c:g} × {parent.name}" for c, parent in zip(vector, parents, strict=True) if c)
        notes = (
            "" if sums_to_one(vector) or method == "tsv" else f" (of the changes from {origin.name}; they do not sum to 1)"
        )
        print(f"{folders[vector]}  {method}: {terms}{notes}" + ("" if vector in missing else "  (was there already)"))
    return 0


def _base_of(places: Sequence[Located], base: str) -> Parent:
    """The policy that the parents started from: as named, or as all of them know it."""
    if base:
        return Parent(locate(base))
    origins = {place.origin for place in places}
    if len(origins) > 1 or "" in origins:
        raise ValueError("--method tsv merges changes: say by --base from which model the policies were trained")
    configs = [place.config for place in places if place.config]
    origin = next(iter(origins))
    return Parent(Located(origin, folder_of(origin, configs[0].policy.revision if configs else "main"), None, None))


# --- coefficients -----------------------------------------------------------------------------------------------------


def coefficients_of(weights: Sequence[str], grid: int, parents: int, method: str) -> list[tuple[float, ...]]:
    """The vectors asked for: those given, all of a grid on the simplex, or the method's own one. Raises ValueError."""
    if weights and grid:
        raise ValueError("--weights and --grid: give one of them")
    if grid:
        return simplex_grid(parents, grid)
    if not weights:
        return [(1.0 if method == "tsv" else 1 / parents,) * parents]
    vectors = []
    for text in weights:
        try:
            vector = tuple(float(number) for number in text.split("/"))
        except ValueError:
            vector = ()
        if len(vector) != parents or not all(map(math.isfinite, vector)):
            raise ValueError(
                f"--weights {text}: give one number for each of {parents} models, as in {'/'.join(['0.5'] * parents)}"
            )
        if not any(vector):
            raise ValueError(f"--weights {text}: all coefficients are 0, so there is nothing to merge")
        vectors.append(vector)
    return vectors


def simplex_grid(parents: int, divisions: int) -> list[tuple[float, ...]]:
    """All points of the simplex with coordinates k / divisions, the first parent's largest first."""
    if divisions < 1:
        raise ValueError(f"--grid {divisions}: give the number of divisions of each edge, 1 or more")

    def counts(places: int, left: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for count in range(left, -1, -1):
            yield from ((count, *rest) for rest in counts(places - 1, left - count))

    return [tuple(count / divisions for count in point) for point in counts(parents, divisions)]


def sums_to_one(vector: Sequence[float]) -> bool:
    """Up to what decimal fractions are rounded by."""
    return math.isclose(math.fsum(vector), 1.0, abs_tol=1e-6)


def _places(vector: Sequence[float]) -> tuple[int, ...]:
    """Parents that take part: a coefficient of 0 leaves one out."""
    return tuple(i for i, coefficient in enumerate(vector) if coefficient)


def _taking_part(parents: Sequence[Parent], vector: Sequence[float]) -> tuple[list[Parent], list[float]]:
    return [parents[i] for i in _places(vector)], [vector[i] for i in _places(vector)]


def _slashed(vector: Sequence[float]) -> str:
    return "/".join(f"{c:g}" for c in vector)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_models(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Write a complete model folder for every vector, each whole or not at all. Raises ValueError without a tokenizer."""
    if not folders:
        return
    drafts = [folder.with_name(f".{folder.name}.partial") for folder in folders]
    for draft in drafts:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _copy_small_files(recipe.parents, draft)
    _write_weights(recipe, drafts)
    for vector, draft, folder in zip(recipe.vectors, drafts, folders, strict=True):
        replace_text(draft / MERGE_FILE, json.dumps(_record(recipe, vector), indent=2) + "\n")
        draft.rename(folder)


def _write_weights(recipe: Recipe, folders: Sequence[Path]) -> None:
    """Shards of all models in turn, so that no more than a shard of each is in memory."""
    first = recipe.parents[0]
    shards = packed(first.shapes, partial(_bytes, first), SHARD_BYTES // len(folders))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with tqdm(total=sum(map(len, shards)), desc="merging", unit="tensor", disable=None) as bar:
        for file, shard in zip(names, shards, strict=True):
            models: list[dict[str, torch.Tensor]] = [{} for _ in folders]
            for name in shard:
                for model, tensor in zip(models, recipe.merged(name), strict=True):
                    model[name] = tensor.contiguous()
                bar.update()
            for folder, model in zip(folders, models, strict=True):
                save_file(model, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(recipe.parents[0], name) for shard in shards for name in shard)},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        for folder in folders:
            replace_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _bytes(parent: Parent, name: str) -> int:
    kind = parent.type(name)
    return math.prod(parent.shapes[name]) * (8 if kind is None else kind.itemsize)


def _copy_small_files(parents: Sequence[Parent], folder: Path) -> None:
    """The configuration of the model, its own code, and a tokenizer."""
    first = parents[0]
    tokenizer = next(filter(None, map(tokenizer_folder, parents)), None)
    if tokenizer is None:
        raise ValueError(f"{first.name} has no tokenizer (tokenizer_config.json), and nor have the others: put it there")
    for path in [*tokenizer.iterdir()]:
        if path.suffix in SMALL_FILES and path.name not in NOT_A_TOKENIZER and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    for path in [*first.folder.glob("*.py"), *first.folder.glob("generation_config.json")]:
        shutil.copy(path, folder)
    config = read_json(first.folder / "config.json")
    kinds = {str(first.type(name)).removeprefix("torch.") for name in first.shapes if first.type(name) is not None}
    if len(kinds) == 1:
        config["dtype"] = next(iter(kinds))
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _record(recipe: Recipe, vector: Sequence[float]) -> dict[str, Any]:
    """What merge.json says."""
    parents = [
        {
            "model": parent.name,
            "folder": str(parent.located.folder.resolve()),
            "origin": parent.located.origin,
            "step": parent.located.step,
            "samples": parent.located.samples,
        }
        for parent in recipe.parents
    ]
    samples = [parents[i]["samples"] for i in _places(vector)]
    return {
        "format": 1,
        "method": recipe.method,
        "coefficients": list(vector),
        "parents": parents,
        "base": str(recipe.base.folder.resolve()) if recipe.base else None,
        "samples": None if None in samples else sum(samples),
        "paretune": __version__,
    }


def _is_there(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds that model. Raises ValueError when it holds anything else."""
    if not folder.exists():
        return False
    if (folder / MERGE_FILE).is_file() and read_json(folder / MERGE_FILE) == record:
        return True
    raise ValueError(f"{folder} exists and is not this merge: choose another --output, or delete it")
