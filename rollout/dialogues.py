"""Prompts and preference pairs from dialogues in the format of HH-RLHF (Bai et al., 2204.05862).

A line of such a file holds two dialogues, `chosen` and `rejected`, that part ways at the assistant's last turn; turns
begin with `Human:` and `Assistant:` after an empty line. A checksum of the first turn puts every dialogue, with all of its
variants, into one of two splits, `train` (four fifths) and `evaluation`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from zlib import crc32

from rollout.prompts import rows_of_file

SPLITS = ("train", "evaluation")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Pair:
    """Two answers to the same dialogue.

    Args:
        prompt: What precedes them: `Human: ...` and `Assistant:` of the last exchange.
        chosen: The answer that was preferred; begins with a space where it is not empty.
        rejected: The other one.
    """

    prompt: str
    chosen: str
    rejected: str


def pairs(path: str, split: str) -> list[Pair]:
    """The preference pairs of a split, in the order of the file; those with two equal answers are left out.

    Raises:
        ValueError: The file cannot be read, the split is none of `SPLITS`, or a line (counted from 1) is not of that format.
    """
    found = []
    for question, *answers in _lines(path, split):
        chosen, rejected = (f" {turns[-1].strip()}".rstrip() for turns in answers)
        if chosen != rejected:
            found.append(Pair(_prompt(question), chosen, rejected))
    return found


def exchanges(path: str, split: str) -> list[tuple[str, str]]:
    """Every question and answer within the dialogues of a split, preferred or not, each once; as prompt and completion."""
    found = {}
    for _, *dialogues in _lines(path, split):
        for turns in dialogues:
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                found[_prompt(question), f" {answer.strip()}".rstrip()] = None
    return list(found)


def questions(path: str, split: str, longest: int = 200) -> list[dict[str, str]]:
    """A person's last turns, each once, as rows for `prompts`: fields `prompt` (ready for the policy) and `question`.

    Args:
        path: A .jsonl or .jsonl.gz file.
        split: `train` or `evaluation`.
        longest: Characters; longer ones are left out.
    """
    asked = dict.fromkeys(line[0].strip() for line in _lines(path, split))
    return [{"prompt": _prompt(turn), "question": turn} for turn in asked if 0 < len(turn) <= longest]


def arguments(path: str, split: str, longest: int = 120) -> list[dict[str, str]]:
    """The first sentences of rejected answers, each once, as rows for `prompts`: `prompt` asks to rewrite the `argument`.

    Args:
        path, split: As for `questions`.
        longest: Characters; longer ones are left out, and so are those of fewer than four words.
    """
    found = dict.fromkeys(sentence(pair.rejected) for pair in pairs(path, split))
    fitting = [text for text in found if len(text) <= longest and len(text.split()) >= 4]
    return [{"prompt": rewriting(text), "argument": text} for text in fitting]


def sentence(text: str) -> str:
    """The first sentence, its white space made single spaces."""
    return re.split(r"(?<=[.!?]) ", " ".join(text.split()), maxsplit=1)[0]


def rewriting(text: str) -> str:
    """The prompt that asks for a text to be rewritten."""
    return f"Argument: {text}\n\nRewritten:"


def _prompt(question: str) -> str:
    return f"Human: {question.strip()}\n\nAssistant:"


def _lines(path: str, split: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The last question, the turns of the chosen and those of the rejected dialogue, of each line of a split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
    for number, row in enumerate(rows_of_file(path), 1):
        chosen, rejected = (_turns(row, name, f"{path}, line {number}") for name in ("chosen", "rejected"))
        held_out = crc32(chosen[0].strip().encode()) % 5 == 0
        if held_out == (split == "evaluation"):
            yield chosen[-2], chosen, rejected


def _turns(row: object, name: str, where: str) -> Sequence[str]:
    """What was said: a person, the assistant, the person, ..., the assistant; turns of one speaker in a row are joined."""
    text = row.get(name) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text {name!r}: the fields chosen and rejected hold whole dialogues")
    before, *parts = _TURN.split(text)
    runs = [(who, list(turns)) for who, turns in groupby(zip(parts[::2], parts[1::2], strict=True), key=itemgetter(0))]
    if before.strip() or not runs or (runs[0][0], runs[-1][0]) != ("Human", "Assistant"):
        raise ValueError(f"{where}: {name!r} is no dialogue that begins with Human: and ends with Assistant:")
    return ["\n\n".join(turn.strip() for _, turn in turns) for _, turns in runs]
