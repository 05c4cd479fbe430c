"""Prompt sources, rendering, lengths and order."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.prompts import (
    Rendering,
    check_lengths,
    prompt_order,
    render_prompts,
    rows_of_file,
    rows_of_function,
    rows_of_hub,
)


class Characters:
    """A tokenizer of code points, with one special token in front and a chat template like any other."""

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[0] * add_special_tokens + [ord(c) for c in t] for t in text]}

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt, **kwargs):
        assert (tokenize, add_generation_prompt) == (False, True)
        turns = "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        return f"{turns}<assistant>" + "".join(f"[{k}={v}]" for k, v in kwargs.items())


def render(rows, limit=None, **rendering):
    return render_prompts(rows, Rendering(**rendering), Characters(), limit)


def test_plain_text_gets_the_special_tokens_of_the_tokenizer():
    prompts = render([{"prompt": "ab", "answer": 3}])
    assert (prompts[0].id, prompts[0].text, prompts[0].token_ids) == ("1", "ab", (0, 97, 98))
    assert prompts[0].columns == {"prompt": "ab", "answer": 3}


def test_chat_brings_its_own():
    prompt = render(
        [{"question": "ab"}], prompt="question", chat=True, system="Be brief.", template_kwargs={"thinking": False}
    )[0]
    assert prompt.text == "<system>Be brief.<user>ab<assistant>[thinking=False]"
    assert prompt.token_ids[0] == ord("<")


def test_messages_are_always_chat():
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "id": "x"}]
    assert render(rows)[0].text == "<user>hi<assistant>"
    assert render(rows)[0].id == "x"
    assert render(rows)[0].token_ids[0] == ord("<")


def test_limit_reads_no_further():
    def rows():
        yield {"prompt": "a"}
        yield {"prompt": "b"}
        raise AssertionError("read too far")

    assert len(render(rows(), limit=2)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"prompt": "a"}, {"text": "b"}], r"row 2 has no field 'prompt' \(it has text\)"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 2: field 'prompt' must hold text"),
        ([{"prompt": "a"}, {"prompt": None}], "row 2: field 'prompt' must hold text"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], "row 2: field 'prompt' must hold text"),
        ([{"prompt": 7}], "row 1: field 'prompt' must hold text"),
        ([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 1}], r"row 2 and row 1 differ in their fields \(x, y\)"),
        (["a"], "row 1 is a str; rows are dictionaries"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        render(rows)


def test_a_prompt_that_leaves_no_room_is_named():
    prompts = render([{"prompt": "a"}, {"prompt": "abcdef"}])
    check_lengths(prompts, max_tokens=3, context=10)
    with pytest.raises(ValueError, match=r"prompt '2' has 7 tokens; with rollout.max_tokens=4 that is 11.*context holds 10"):
        check_lengths(prompts, max_tokens=4, context=10)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_jsonl_and_parquet_hold_the_same(tmp_path: Path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "é\u2028", "n": 2}]
    jsonl, parquet, packed = (tmp_path / f"rows.{kind}" for kind in ("jsonl", "parquet", "jsonl.gz"))
    jsonl.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), parquet)
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert list(rows_of_file(str(jsonl))) == list(rows_of_file(str(parquet))) == list(rows_of_file(str(packed))) == rows


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file '.*absent.jsonl'"):
        list(rows_of_file(str(tmp_path / "absent.jsonl")))
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"none of .jsonl, .jsonl.gz, .parquet"):
        list(rows_of_file(str(tmp_path / "rows.csv")))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(rows_of_file(str(tmp_path / "rows.jsonl")))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}')[:-4])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz cannot be read"):
        list(rows_of_file(str(tmp_path / "rows.jsonl.gz")))
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read"):
        list(rows_of_file(str(tmp_path / "rows.parquet")))


def make_rows(count: int):
    return [{"prompt": str(i)} for i in range(count)]


def test_function_sources():
    assert list(rows_of_function("tests.test_prompts:make_rows", {"count": 2})) == make_rows(2)
    with pytest.raises(ValueError, match="cannot be imported"):
        rows_of_function("tests.test_prompts:absent", {})
    with pytest.raises(ValueError, match="does not take args"):
        rows_of_function("tests.test_prompts:make_rows", {"number": 2})


def test_a_hub_data_set_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"data set 'nobody/nothing'.*cannot be loaded"):
        rows_of_hub("nobody/nothing", None, "train")


# --- order ------------------------------------------------------------------------------------------------------------


@given(num=st.integers(1, 20), total=st.integers(1, 70), seed=st.integers(0, 5))
def test_every_pass_is_a_permutation_and_a_longer_run_begins_the_same(num, total, seed):
    order = prompt_order(num, total, seed)
    assert len(order) == total
    for start in range(0, total - num + 1, num):
        assert sorted(order[start : start + num]) == list(range(num))
    np.testing.assert_array_equal(prompt_order(num, total + 13, seed)[:total], order)


def test_passes_and_seeds_differ():
    order = prompt_order(50, 100, 0)
    assert order[:50].tolist() != order[50:].tolist()
    assert order.tolist() != prompt_order(50, 100, 1).tolist()
