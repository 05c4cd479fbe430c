"""What self-training needs besides the run itself: a reader of answers, and files of trusted samples. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.config import Config
from align.selftrain.rows import Pair
from rewards.answers import Reader, answer_reader
from rollout.prompts import Rendering, Tokenizer, render_prompts, rows_of_file


@dataclass(frozen=True)
class Trusted:
    """One trusted sample: names of its prompt, the text of its completion, and tokens of both."""

    prompt: str
    text: str
    pair: Pair


@dataclass(frozen=True)
class Sources:
    """What self-training needs besides the run itself; empty without.

    Args:
        reader: Finds the answer of a completion; None where nothing looks at answers.
        trusted: Tokens of trusted samples, by the file that weights name.
        seeds: Trusted samples that are in the pool from the start.
    """

    reader: Reader | None = None
    trusted: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    seeds: Sequence[Trusted] = ()


def load_sources(config: Config, tokenizer: Tokenizer, end: int, context: int) -> Sources:
    """What the section `selftrain` needs, checked.

    Args:
        config: May have no such section.
        tokenizer: The policy's.
        end: Its end token, with which trusted completions end.
        context: Tokens that the policy's context holds.

    Raises:
        ValueError: A key needs answers and no reward reads any, or as `load_trusted`.
    """
    section = config.selftrain
    if section is None:
        return Sources()
    reader = reader_of(config) if section.reads_answers else None
    trusted = load_trusted(config, tokenizer, end, context)
    if not section.pool.seeds:
        return Sources(reader, trusted)
    return Sources(reader, trusted, _samples("selftrain.pool.seeds", section.pool.seeds, config, tokenizer, end, context))


def reader_of(config: Config) -> Reader | None:
    """What finds the answer of a completion.

    Raises:
        ValueError: `selftrain.answers` names a reward that reads none, or a key needs answers and no reward reads any.
    """
    section = config.selftrain
    named = {section.answers: config.objectives[section.answers]} if section.answers else config.objectives
    for objective in named.values():
        reader = answer_reader(objective.reward, objective.args)
        if reader is not None:
            return reader
    readers = "arithmetic_accuracy, exact_match, math_answer and numeric_answer do"
    if section.answers:
        raise ValueError(f"selftrain.answers: the reward of {section.answers!r} reads no answers; {readers}")
    needs = ["selftrain.filter.majority"] if section.filter.majority else []
    for key, entries in (("weights", section.weights), ("prompts", section.prompts)):
        needs += [f"selftrain.{key}: entropy" for weights in entries if weights.type == "entropy"]
    if needs:
        raise ValueError(f"{needs[0]} looks at answers, and no objective's reward reads them; {readers}")
    return None


def load_trusted(config: Config, tokenizer: Tokenizer, end: int, context: int) -> dict[str, list[Pair]]:
    """Tokens of every trusted sample that weights name, completions with their end token, by file.

    Raises:
        ValueError: A file is missing or empty, a row has no prompt or completion, or a sample is longer than the context.
    """
    files = dict.fromkeys(weights.trusted for weights in config.selftrain.weights if weights.type == "importance")
    return {
        path: [sample.pair for sample in _samples("selftrain.weights", path, config, tokenizer, end, context)]
        for path in files
    }


def _samples(key: str, path: str, config: Config, tokenizer: Tokenizer, end: int, context: int) -> list[Trusted]:
    prompts = config.prompts
    rendering = Rendering("prompt", prompts.chat, prompts.system, prompts.chat_template_kwargs)
    try:
        rendered = render_prompts(rows_of_file(path), rendering, tokenizer)
        texts = [prompt.columns.get("completion") for prompt in rendered]
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text:
                raise ValueError(f"row {number} has no text in its field 'completion'")
        completions = [[*ids, end] for ids in tokenizer(text=texts, add_special_tokens=False)["input_ids"]]
        lengths = [len(prompt.token_ids) + len(ids) for prompt, ids in zip(rendered, completions, strict=True)]
        if max(lengths) > context:
            number = int(np.argmax(lengths))
            raise ValueError(
                f"row {number + 1} has {lengths[number]} tokens, and the context of the policy {context}: leave it out"
            )
    except ValueError as error:
        raise ValueError(f"{key}: trusted samples of {path!r}: {error}") from error
    return [
        Trusted(f"seed {prompt.id}", text, (prompt.token_ids, tuple(ids)))
        for prompt, text, ids in zip(rendered, texts, completions, strict=True)
    ]
