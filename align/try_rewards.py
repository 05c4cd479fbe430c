"""`paretune rewards try`: the rewards of a file on texts given by hand."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from align.build import build_bus, load_prompts, load_tokenizer, locate_policy
from align.config import Config, Served
from align.load import load_trial
from rewards.component import open_arguments
from rewards.types import RewardMatrix
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

WIDEST = 60  # characters of a text in the table
TOKENS = ("token_ids", "completion_ids")  # arguments


def try_rewards(path: str, overrides: Sequence[str], given: Sequence[str], jsonl: str, row: str, output: str) -> int:
    """Print one line per text: the value of every objective, or why there is none.

    Args:
        path: Configuration; or a file with objectives alone, and perhaps a policy.
        overrides: Of its keys.
        given: Completions, which are one sample group.
        jsonl: File of rows in their place, each a group of its own.
        row: Fields of the data for `given`, as JSON; by default those of the first training prompt, if there are prompts.
        output: File to write values and reasons to; empty for none.

    Raises:
        ValueError: There is nothing to score, or the configuration or a row cannot be read.
    """
    config = load_trial(path, overrides)
    if bool(given) == bool(jsonl):
        raise ValueError("give --text (once or several times) or --jsonl, not both")
    tokenizer, context = load_tokenizer(locate_policy(config), config) if config.policy else (None, 0)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text=[text], add_special_tokens=False)["input_ids"][0]) if tokenizer else ()

    if jsonl:
        groups = [_group(fields.pop("prompt", ""), fields, [fields.pop("text")], encode) for fields in _rows(jsonl)]
    elif row or isinstance(config, Served):
        fields = _object("--row", row or "{}")
        groups = [_group(fields.pop("prompt", ""), fields, given, encode)]
    else:
        first = load_prompts(config, tokenizer, context).train[0]
        groups = [_group(first.text, first.columns, given, encode)]
        print(f"prompt: {first.text!r:.200}")
    columns = sorted(set.intersection(*(set(group.prompt.columns) for group in groups)))
    if isinstance(config, Served):
        fields = ", ".join(columns) or "none"
        print(f"fields of the data, from --row or --jsonl: {fields}" + ("" if tokenizer else "; no policy, so no tokens"))
    with closing(build_bus(config, columns)) as bus:
        if not tokenizer:
            _refuse_tokens(config)
        matrix = bus.score(groups)
    texts = [sample.text for group in groups for sample in group.samples]
    print("\n".join(table(config, texts, matrix)))
    if output:
        Path(output).write_text(json.dumps(_figures(texts, matrix), indent=1) + "\n", encoding="utf-8")
    return 0


def _refuse_tokens(config: Served) -> None:
    """Raise ValueError when a reward wants tokens, without a policy whose tokens they would be."""
    for name, objective in config.objectives.items():
        if wanted := {*TOKENS} & {*open_arguments(objective.reward, objective.args)}:
            raise ValueError(
                f"objectives.{name}: reward {objective.reward!r} wants {', '.join(wanted)}, and no policy is named whose "
                "tokens they would be: add --policy.model=..."
            )


def _group(
    prompt: str, columns: Mapping[str, Any], texts: Sequence[str], encode: Callable[[str], tuple[int, ...]]
) -> SampleGroup:
    samples = tuple(Sample(encode(text), (), FinishReason.STOP, 0, text) for text in texts)
    return SampleGroup(Prompt("", prompt, encode(prompt), dict(columns)), samples)


def _rows(path: str) -> list[dict[str, Any]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--jsonl {path} cannot be read: {error}") from error
    rows = [_object(f"--jsonl {path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"--jsonl {path} has no rows")
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'--jsonl {path}, row {i}: there is no "text" in it')
    return rows


def _object(what: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'{what} must be a JSON object, such as {{"answer": 3}}')
    return found


def table(config: Config | Served, texts: Sequence[str], matrix: RewardMatrix) -> list[str]:
    """Lines of text: raw values and, in brackets, what the weights meet; then the reasons of missing ones."""
    names = list(config.objectives)
    widths = [max(len(name), 16) for name in names]
    lines = ["  ".join([f"{'text':<{WIDEST}}", *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))])]
    for n, text in enumerate(texts):
        cells = [f"{_shorten(repr(text)):<{WIDEST}}"]
        for k, width in enumerate(widths):
            found = f"{matrix.raw_NK[n, k]:.4g} ({matrix.values_NK[n, k]:.3f})"
            cells.append(f"{'missing' if matrix.missing_NK[n, k] else found:>{width}}")
        lines.append("  ".join(cells))
    reasons = [f"{names[k]}, text {n + 1}: {_shorten(why, 300)}" for (n, k), why in sorted(matrix.errors.items())]
    return [*lines, *([""] if reasons else []), *reasons]


def _shorten(text: str, longest: int = WIDEST) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _figures(texts: Sequence[str], matrix: RewardMatrix) -> list[dict[str, Any]]:
    return [
        {"text": text}
        | {o.name: None if matrix.missing_NK[n, k] else matrix.raw_NK[n, k] for k, o in enumerate(matrix.objectives)}
        | {f"error/{matrix.objectives[k].name}": why for (row, k), why in matrix.errors.items() if row == n}
        for n, text in enumerate(texts)
    ]
