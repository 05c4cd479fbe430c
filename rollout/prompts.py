"""Prompt sources: rows of a hub data set, a file or a function -> rendered, tokenised prompts in a seeded order."""

import gzip
import inspect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np

from rollout.types import Prompt

Row = Mapping[str, Any]


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of_function(function: str, args: Mapping[str, Any]) -> Iterable[Row]:
    """Rows that `module:function` returns. Raises ValueError when it cannot be imported or called so."""
    try:
        found = resolve_name(function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"prompt function {function!r} cannot be imported from the current folder or environment: {error}"
        ) from error
    try:
        inspect.signature(found).bind(**args)
    except TypeError as error:
        raise ValueError(f"prompt function {function!r} does not take args {dict(args)}: {error}") from error
    return found(**args)


def rows_of_file(path: str) -> Iterator[Row]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file. Raises ValueError that names the file, and the line where it can."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no file {path!r} (looked in {Path.cwd()})")
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix == ".jsonl" or file.name.endswith(".jsonl.gz"):
        yield from _json_lines(file)
    else:
        raise ValueError(f"{path!r} is none of .jsonl, .jsonl.gz, .parquet; convert it, or read it with a function source")


def _parquet_rows(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json_lines(file: Path) -> Iterator[Row]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json(line, f"{file}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json(line: str, where: str) -> Row:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def rows_of_hub(name: str, subset: str | None, split: str) -> Iterable[Row]:
    """Rows of a data set on the Hugging Face hub (downloaded once, then read from the local cache)."""
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split)
    except Exception as error:  # a dozen kinds of network and naming errors, none of ours
        raise ValueError(f"data set {name!r} (subset {subset!r}, split {split!r}) cannot be loaded: {error}") from error


# --- rendering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendering:
    """How a row becomes text.

    Args:
        prompt: Field that holds the prompt, a string or a list of chat messages.
        chat: Put strings into the chat template as a user message.
        system: System message in front of those; none when empty.
        template_kwargs: Passed to the chat template.
    """

    prompt: str = "prompt"
    chat: bool = False
    system: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def render_prompts(
    rows: Iterable[Row], rendering: Rendering, tokenizer: Tokenizer, limit: int | None = None
) -> list[Prompt]:
    """Render and tokenise rows; chat templates bring their own special tokens, plain text gets the tokenizer's.

    Raises:
        ValueError: There is no row, or a row (counted from 1) lacks the prompt field, has no text in it, or has other
            fields than the first one.
    """
    rows = list(itertools.islice(rows, limit))
    if not rows:
        raise ValueError("the source holds no rows")
    texts = []
    for number, row in enumerate(rows, 1):
        _check_row(row, number, rendering.prompt, rows[0])
        texts.append(_render(row[rendering.prompt], rendering, tokenizer))
    templated = rendering.chat or not isinstance(rows[0][rendering.prompt], str)
    token_ids = tokenizer(text=texts, add_special_tokens=not templated)["input_ids"]
    return [
        Prompt(str(row.get("id", number)), text, tuple(ids), dict(row))
        for number, (row, text, ids) in enumerate(zip(rows, texts, token_ids, strict=True), 1)
    ]


def _check_row(row: Row, number: int, prompt: str, first: Row) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is a {type(row).__name__}; rows are dictionaries with a field {prompt!r}")
    if prompt not in row:
        raise ValueError(
            f"row {number} has no field {prompt!r} (it has {', '.join(row) or 'none'}): set `prompt` to the right one"
        )
    if not row[prompt] or not isinstance(row[prompt], (str, list)) or type(row[prompt]) is not type(first[prompt]):
        raise ValueError(
            f"row {number}: field {prompt!r} must hold text (or, in all rows, chat messages); got {row[prompt]!r:.80}"
        )
    if row.keys() != first.keys():
        difference = ", ".join(sorted(row.keys() ^ first.keys()))
        raise ValueError(f"row {number} and row 1 differ in their fields ({difference}); rewards need the same in all rows")


def _render(content: str | list[Mapping[str, str]], rendering: Rendering, tokenizer: Tokenizer) -> str:
    if isinstance(content, str):
        if not rendering.chat:
            return content
        system = [{"role": "system", "content": rendering.system}] if rendering.system else []
        content = [*system, {"role": "user", "content": content}]
    return tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True, **rendering.template_kwargs)


def mix(domains: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """The prompts of several sources, each with its domain, which its id then begins with, and the fields that all have."""
    shared = set.intersection(*(set(prompts[0].columns) for prompts in domains.values()))
    return [
        replace(
            prompt,
            id=f"{domain}/{prompt.id}",
            columns={name: value for name, value in prompt.columns.items() if name in shared},
            domain=domain,
        )
        for domain, prompts in domains.items()
        for prompt in prompts
    ]


def check_lengths(prompts: Sequence[Prompt], max_tokens: int, context: int) -> None:
    """Raise ValueError that names the first prompt which leaves no room for `max_tokens` in a context of that size."""
    for prompt in prompts:
        needed = len(prompt.token_ids) + max_tokens
        if needed > context:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with rollout.max_tokens={max_tokens} that is "
                f"{needed}, but the model's context holds {context}: shorten or drop the prompt, or lower rollout.max_tokens"
            )


# --- order ------------------------------------------------------------------------------------------------------------


def prompt_order(num_prompts: int, total: int, seed: int, *stream: int) -> np.ndarray:
    """Indices (total,) of the prompts in training order: pass after pass, each a fresh permutation.

    A pure function of its arguments, so that a resumed run finds its place by counting. Orders of different streams are
    independent of each other.
    """
    passes = -(-total // num_prompts)
    orders = [np.random.default_rng([seed, epoch, *stream]).permutation(num_prompts) for epoch in range(passes)]
    return np.concatenate(orders)[:total]


def mixed_order(domains: Sequence[str], shares: Mapping[str, float], total: int, seed: int) -> np.ndarray:
    """Indices (total,) of the prompts in training order, of every domain its share, whatever its size.

    The j-th prompt of a domain (from 0) comes at the time (j + 1/2) / share: the first T prompts hold of a domain
    share * T to within (1 + share * number of domains) / 2. Which ones, says `prompt_order`, domain by domain. Like that
    it is a pure function, and a longer run begins as a shorter one.

    Args:
        domains: Of every prompt.
        shares: Of every domain, above 0; divided by their sum.
        total: Length of the order.
        seed: Decides the prompts, not the order of domains.
    """
    times, indices = [], []
    for stream, (domain, share) in enumerate(shares.items(), 1):
        share = share / sum(shares.values())
        own = np.flatnonzero([domain == other for other in domains])
        count = int(np.ceil(share * (total + len(shares)))) + 1  # at least as many as can be among the first `total`
        times.append((np.arange(count) + 0.5) / share)
        indices.append(own[prompt_order(len(own), count, seed, stream)])
    order = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(indices)[order][:total]
