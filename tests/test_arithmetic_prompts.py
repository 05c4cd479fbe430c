"""Prompts of the built-in task, against the rewards' own reading of expressions and against files made by hand."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.arithmetic import evaluate, worked_steps
from rollout.arithmetic import all_expressions, expressions, gsm8k_expressions, held_out, results

# --- made up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_rows_are_complete_right_and_different(split):
    rows = expressions(split, 1200, terms=[2, 3, 4], operators="+-*")
    assert len({row["id"] for row in rows}) == len(rows) == 1200
    for row in rows:
        assert row == {
            "id": row["expression"],
            "prompt": row["expression"] + "=?",
            "expression": row["expression"],
            "answer": evaluate(row["expression"]),
        }


def test_no_expression_is_in_both_splits():
    train, evaluation = expressions("train", 41000), expressions("evaluation", 13000, seed=1)
    assert not {row["id"] for row in train} & {row["id"] for row in evaluation}
    assert all(held_out(row["expression"]) for row in evaluation)


def test_a_quarter_is_held_out():
    train, evaluation = (len(all_expressions(split, 4, "+-")) for split in ("train", "evaluation"))
    assert train + evaluation == 9**4 * 2**3
    assert evaluation / (train + evaluation) == pytest.approx(0.25, abs=0.01)


def test_seed_decides_which_rows_and_their_order():
    assert expressions("train", 50, seed=3) == expressions("train", 50, seed=3)
    assert expressions("train", 50, seed=3) != expressions("train", 50, seed=4)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_numbers_of_terms_share_the_rows(count):
    terms = [len(row["expression"]) // 2 + 1 for row in expressions("train", count)]
    assert len(terms) == count
    assert set(terms) <= {3, 4}
    assert abs(terms.count(3) - terms.count(4)) <= 1


def test_where_short_expressions_run_out_longer_ones_step_in():
    short = len(all_expressions("train", 2, "+-"))
    rows = expressions("train", 1000, terms=[4, 2])
    assert sum(len(row["expression"]) == 3 for row in rows) == short < 500
    assert len({row["id"] for row in rows}) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test", "count": 5}, "split='test' is neither of train, evaluation"),
        ({"split": "train", "count": 0}, "count=0 must be at least 1"),
        ({"split": "train", "count": 5, "terms": []}, r"terms=\[\] must be"),
        ({"split": "train", "count": 5, "terms": [3, 9]}, r"terms=\[3, 9\] must be a list of one or more of 2, 3 and 4"),
        ({"split": "train", "count": 5, "operators": "+/"}, r"operators='\+/' must be one or more of"),
        ({"split": "train", "count": 5, "operators": "++"}, "each once"),
        ({"split": "train", "count": 5, "operators": ""}, "operators='' must be"),
        ({"split": "evaluation", "count": 999, "terms": [2]}, "count=999, but the evaluation split holds 41 .* lower count"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        expressions(**arguments)


# --- evaluation ---------------------------------------------------------------------------------------------------------

numbers = st.integers(0, 200).map(str)
chains = st.lists(st.sampled_from("+-*/").flatmap(lambda operator: numbers.map(operator.__add__)), min_size=1, max_size=5)


@given(numbers, chains)
def test_results_are_those_of_the_worked_answer(first, rest):
    expression = first + "".join(rest)
    try:
        steps = worked_steps(expression)
    except ValueError:  # a division does not come out even
        assert results(expression) == []
    else:
        assert results(expression) == [int(step.rpartition("=")[2]) for step in steps]


# --- out of GSM8K -------------------------------------------------------------------------------------------------------


def write(path: Path, *answers: str) -> str:
    path.write_text("".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in answers), encoding="utf-8")
    return str(path)


def found(path: str, **arguments) -> list[str]:
    return [row["expression"] for row in gsm8k_expressions(path, **arguments)]


def test_annotations_become_rows_once_and_in_order(tmp_path):
    path = write(tmp_path / "a.jsonl", "She has 48/2 = <<48/2=24>>24.\nAltogether <<48+24=72>>72\n#### 72", "<<48/2=24>>24")
    assert gsm8k_expressions(path) == [
        {"id": "48/2", "prompt": "48/2=?", "expression": "48/2", "answer": 24},
        {"id": "48+24", "prompt": "48+24=?", "expression": "48+24", "answer": 72},
    ]


@pytest.mark.parametrize(
    "annotation",
    ["2+2=5", "7/2=3", "1/2*4=2", "6*5/4*2=15", "4/0=0", ".5*8=4", "(1+2)*3=9", "50%*8=4", "5=5", "2+2", "x+1=2", "07+1=8"],
)
def test_what_is_wrong_uneven_or_not_flat_is_left_out(tmp_path, annotation):
    assert found(write(tmp_path / "a.jsonl", f"<<{annotation}>> <<1+1=2>>")) == ["1+1"]


def test_precedence_decides_what_comes_out_even(tmp_path):
    assert found(write(tmp_path / "a.jsonl", "<<4*1/2=2>> <<1+6/2=4>> <<9-2*3=3>> <<2-5=-3>>")) == [
        "4*1/2", "1+6/2", "9-2*3", "2-5",
    ]  # fmt: skip


def test_size_limits_count_every_number_on_the_way(tmp_path):
    path = write(
        tmp_path / "a.jsonl", "<<50*40/2=1000>> <<50*40/4=500>> <<99+1=100>> <<9+9=18>> <<1+2+3+4=10>> <<5-99=-94>>"
    )
    assert found(path) == ["99+1", "9+9", "5-99"]
    assert found(path, max_digits=2) == ["9+9", "5-99"]
    assert found(path, max_digits=4, max_terms=4) == ["50*40/2", "50*40/4", "99+1", "9+9", "1+2+3+4", "5-99"]


def test_what_another_file_has_can_be_left_out(tmp_path):
    train = write(tmp_path / "train.jsonl", "<<1+1=2>> <<2+2=4>>")
    test = write(tmp_path / "test.jsonl", "<<1+1=2>> <<3+3=6>>")
    assert found(test, exclude=train) == ["3+3"]
    with pytest.raises(ValueError, match=r"annotates no expression that is not in .*train.jsonl"):
        gsm8k_expressions(train, exclude=train)


def test_parquet_is_read_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"], "answer": ["<<1+1=2>>"]}), tmp_path / "a.parquet")
    assert found(str(tmp_path / "a.parquet")) == ["1+1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"question": "?"}', "line 2 has no text in a field 'answer'"),
        ('{"answer": 4}', "line 2 has no text in a field 'answer'"),
        ("[1]", "line 2 has no text in a field 'answer'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"answer": "<<1+1=2>>"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        gsm8k_expressions(str(tmp_path / "a.jsonl"))


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file 'nowhere.jsonl'"):
        gsm8k_expressions("nowhere.jsonl")
    with pytest.raises(
        ValueError, match=r"annotates no expression with max_digits=3 and max_terms=3: check that it is GSM8K"
    ):
        gsm8k_expressions(write(tmp_path / "a.jsonl", "no annotations"))
