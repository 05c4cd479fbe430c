"""Dialogues of HH-RLHF's format: turns, splits, and what becomes a prompt."""

import gzip
import json
import os
from pathlib import Path

import pytest

from rollout.dialogues import SPLITS, Pair, arguments, exchanges, pairs, questions, sentence

REAL = Path(os.environ.get("HH_RLHF", "data/hh-rlhf")) / "harmless-base-test.jsonl.gz"
BEFORE = "\n\nHuman: first?\n\nAssistant: Yes.\n\nHuman: and  now?\n\nAssistant:"


def dialogues(folder: Path, *rows: dict) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_of(source, path: str) -> list:
    return [row for split in SPLITS for row in source(path, split)]


def test_a_pair_is_the_last_exchange_with_two_answers(tmp_path: Path):
    path = dialogues(tmp_path, {"chosen": f"{BEFORE} No.  ", "rejected": f"{BEFORE} So what? I say\n\nno."})
    assert all_of(pairs, path) == [Pair("Human: and  now?\n\nAssistant:", " No.", " So what? I say\n\nno.")]
    assert all_of(questions, path) == [{"prompt": "Human: and  now?\n\nAssistant:", "question": "and  now?"}]
    assert all_of(exchanges, path) == [
        ("Human: first?\n\nAssistant:", " Yes."),
        ("Human: and  now?\n\nAssistant:", " No."),
        ("Human: and  now?\n\nAssistant:", " So what? I say\n\nno."),
    ]


def test_arguments_are_first_sentences_of_rejected_answers(tmp_path: Path):
    texts = ("You are\n all wrong. Really.", "Why? Me")
    rows = [{"chosen": f"{BEFORE} No.", "rejected": f"{BEFORE} {text}"} for text in texts]
    assert all_of(arguments, dialogues(tmp_path, *rows)) == [  # "Why?" has fewer than four words
        {"prompt": "Argument: You are all wrong.\n\nRewritten:", "argument": "You are all wrong."}
    ]
    assert sentence("It costs 3.50 a day! No.") == "It costs 3.50 a day!"


def test_turns_of_one_speaker_are_joined_and_equal_answers_are_no_pair(tmp_path: Path):
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant:\n\nAssistant: c"
    path = dialogues(tmp_path, {"chosen": text, "rejected": text})
    assert all_of(pairs, path) == []
    assert all_of(questions, path) == [{"prompt": "Human: a\n\nb\n\nAssistant:", "question": "a\n\nb"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": BEFORE}, "line 2 has no text 'rejected'"),
        ({"chosen": 3, "rejected": BEFORE}, "line 2 has no text 'chosen'"),
        ([], "line 2 has no text 'chosen'"),
        ({"chosen": "\n\nHuman: a", "rejected": BEFORE}, "line 2: 'chosen' is no dialogue"),
        ({"chosen": BEFORE, "rejected": "before\n\nHuman: a\n\nAssistant: b"}, "line 2: 'rejected' is no dialogue"),
    ],
)
def test_a_line_of_another_format_is_named(tmp_path: Path, row, said: str):
    path = dialogues(tmp_path, {"chosen": f"{BEFORE} a", "rejected": f"{BEFORE} b"}, row)
    with pytest.raises(ValueError, match=said):
        all_of(pairs, path)


def test_another_split_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="split='test' is none of train, evaluation"):
        pairs(dialogues(tmp_path), "test")


@pytest.mark.skipif(not REAL.exists(), reason="HH-RLHF is not there (HH_RLHF names its folder)")
def test_real_dialogues_fall_into_two_splits_that_share_no_beginning():
    first = {split: {prompt for prompt, _ in exchanges(str(REAL), split)} for split in SPLITS}
    counts = {split: len(pairs(str(REAL), split)) for split in SPLITS}
    with gzip.open(REAL, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert sum(counts.values()) == sum(row["chosen"].strip() != row["rejected"].strip() for row in rows)
    assert 0.15 < counts["evaluation"] / len(rows) < 0.25
    beginnings = {
        split: {row["chosen"].split("\n\nAssistant:")[0].strip() + "\n\nAssistant:" for row in rows} & first[split]
        for split in SPLITS
    }
    assert not beginnings["train"] & beginnings["evaluation"]
