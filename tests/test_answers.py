"""Canonical answers: equal ones are right or wrong together under the reward that they are read for."""

import itertools
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards.answers
from rewards.answers import answer_reader
from rewards.arithmetic import arithmetic_accuracy
from rewards.component import BUILT_IN
from rewards.verify import exact_match, math_answer, numeric_answer
from tests.conftest import refused_in_a_thread
from tests.hostile import hostile_text

ACCURACIES = {"arithmetic_accuracy": arithmetic_accuracy, "exact_match": exact_match, "numeric_answer": numeric_answer}


def read(reward: str, text: str, **args) -> str | None:
    return answer_reader(reward, args)(text)


def clusters(reward: str, texts: list[str], **args) -> list[list[str]]:
    """Texts by canonical answer; those without one are left out."""
    read_one = answer_reader(reward, args)
    pairs = sorted(((answer, text) for text in texts if (answer := read_one(text)) is not None), key=lambda pair: pair[0])
    return [[text for _, text in group] for _, group in itertools.groupby(pairs, key=lambda pair: pair[0])]


# --- which rewards ----------------------------------------------------------------------------------------------------


def test_rewards_without_a_stated_answer_have_no_reader():
    with_one = {"arithmetic_accuracy", "exact_match", "math_answer", "numeric_answer"}
    assert {name for name in BUILT_IN if answer_reader(name, {}) is not None} == with_one
    assert answer_reader("my.module:accuracy", {}) is None


def test_a_reward_may_go_by_its_path():
    assert answer_reader("rewards.verify:numeric_answer", {})("it is 7") == "7"


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "text", "answer"),
    [
        ("arithmetic_accuracy", "7+5=12;12-3=9;#9", "9"),
        ("arithmetic_accuracy", "#1#-007", "-7"),
        ("arithmetic_accuracy", "#-0", "0"),
        ("arithmetic_accuracy", "9", None),
        ("arithmetic_accuracy", "#9.", None),
        ("arithmetic_accuracy", "", None),
        ("numeric_answer", "1 or $1,200.50", "1200.5"),
        ("numeric_answer", "-.0", "0"),
        ("numeric_answer", "100", "100"),
        ("numeric_answer", "no idea", None),
        ("numeric_answer", "1" * 31 + "." + "0" * 29 + "1", "1" * 31 + "." + "0" * 29 + "1"),  # every digit counts
        ("exact_match", " Yes\n", "Yes"),
        ("exact_match", " \n", None),
    ],
)
def test_canonical_answer(reward, text, answer):
    assert read(reward, text) == answer


def test_exact_match_reads_by_its_args():
    assert read("exact_match", " Straße ", strip=False) == " Straße "
    assert read("exact_match", " Straße ", ignore_case=True) == "strasse"
    assert read("exact_match", " ", strip=False) == " "
    assert read("exact_match", "", strip=False) is None


ONE_EACH = [  # texts that answer the same, in the eyes of math-verify
    ["1/2", "\\boxed{0.5}", "\\boxed{\\frac12}", "so it is .50", "\\boxed{x = \\frac{1}{2}}", "\\boxed{50.0\\%}"],
    [
        "72",
        "#### 72.",
        "\\boxed{72 clips}",
        "\\boxed{72.0}",
        "\\boxed{7.2\\times 10^1}",
        "\\boxed{48+24=72}",
        "\\boxed{\\$72}",
    ],
    ["1,200", "\\boxed{1{,}200}", "\\boxed{1.2e3}"],
    ["\\boxed{0}", "\\boxed{-0}", "\\boxed{0.0}"],
    ["\\boxed{1 1/2}", "\\boxed{1\\frac{1}{2}}", "\\boxed{1.5}"],
    ["\\boxed{50\\%}", "\\boxed{50 \\%}"],
    ["\\boxed{-50\\%}", "\\boxed{-0.5}"],
    ["\\boxed{3\\sqrt{2}}", "\\boxed{\\sqrt{18}}", "\\boxed{\\sqrt{8}+\\sqrt{2}}"],
    ["\\boxed{4.242641}"],  # a number, and worked out
    ["\\boxed{48/2+47}", "\\boxed{35.5\\cdot 2}"],
    ["\\boxed{71}"],
    ["\\boxed{142/2}", "\\boxed{\\frac{142}{2}}"],  # an integer is not to be a fraction
    ["\\boxed{2x+3}", "\\boxed{3+2x}", "\\boxed{2(x+1.5)}", "\\boxed{\\frac{4x^2-9}{2x-3}}", "\\boxed{f(x)=2x+3}"],
    ["\\boxed{(1,2)}", "\\boxed{(1, 2.0)}"],
    ["\\boxed{[1,2]}", "\\boxed{x\\in [1,2]}"],
    ["\\boxed{(1,\\infty)}", "\\boxed{(1, +\\infty)}"],
    ["\\boxed{\\{1,2\\}}", "\\boxed{2, 1}", "\\boxed{1 \\text{ or } 2}"],
    ["\\boxed{x=2,y=3}", "\\boxed{y=3, x=2}"],
    ["\\boxed{x=3,y=2}"],
    ["\\boxed{x>1}", "\\boxed{1<x}"],
    ["\\boxed{x\\ge 1}"],
    ["\\boxed{x+y=1}"],
    ["\\boxed{x-y=1}"],
    ["\\boxed{even}", "\\boxed{\\text{even}}"],
    ["\\boxed{\\text{odd}}"],
    ["\\boxed{\\text{(C)}}", "\\boxed{C}"],
    ["\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\boxed{\\begin{pmatrix}1.0\\\\\\frac{4}{2}\\end{pmatrix}}"],
    ["\\boxed{10^{10000000000}}"],
    ["\\boxed{5000!}"],
    ["\\boxed{50}"],  # right where 50% is stated, and wrong where 0.5 is, unlike 50%
    ["\\boxed{0.123457}", "\\boxed{0.12345651}"],
    ["\\boxed{0.123456}"],
]


def test_answers_of_mathematics_are_clustered_by_what_they_say():
    found = clusters("math_answer", [text for one in ONE_EACH for text in one])
    assert sorted(map(sorted, found)) == sorted(map(sorted, ONE_EACH))


@pytest.mark.parametrize("text", ["no idea", "", "\\boxed{}", "\\boxed{" + "(" * 9 + "1" + ")" * 9 + "}"])
def test_what_math_verify_does_not_read_is_no_answer(text):
    assert read("math_answer", text) is None


def test_without_worked_out_what_is_to_be_worked_out_counts_as_its_value():
    texts = ["\\boxed{48/2+48}", "\\boxed{72}", "\\boxed{144/2}"]
    assert clusters("math_answer", texts, worked_out=False) == [texts]
    assert len(clusters("math_answer", texts)) == 3


# --- right or wrong together ------------------------------------------------------------------------------------------

KINDS = {  # stated answers, each with the places in ONE_EACH of texts to compare with it
    ("0.5", "1/2", "50", "50\\%", "\\frac13"): (0, 5, 6, 29),
    ("72", "71", "1,200", "0"): (1, 2, 3, 9, 10, 11),
    ("3\\sqrt{2}", "4.242641"): (7, 8),
    ("2x+3", "\\{1,2\\}", "x>1"): (12, 16, 17, 19),
    ("(1,2)", "[1,2]", "(1,\\infty)"): (13, 14, 15),
    ("even", "\\text{odd}", "C"): (23, 24, 25),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}",): (26,),
}


@pytest.mark.parametrize("worked_out", [True, False])
def test_equal_answers_of_mathematics_are_right_or_wrong_together(worked_out):
    for stated, places in KINDS.items():
        together = clusters("math_answer", [text for place in places for text in ONE_EACH[place]], worked_out=worked_out)
        right = 0
        for answer, texts in itertools.product(stated, together):
            values = {math_answer(text, answer, worked_out) for text in texts}
            assert len(values) == 1, (answer, texts)
            right += values == {1.0}
        assert right >= min(len(stated), 2)  # it was not of wrong ones only


@pytest.mark.parametrize(
    ("texts", "stated"),
    [
        (("1/2", "0.5"), "\\frac{5000001}{10000000}"),  # another exact number, and the same to six decimals
        (("\\boxed{1,2}", "\\boxed{2,1}"), "(1,2)"),
        (("\\boxed{x=5}", "\\boxed{y=5}"), "x=5"),
    ],
)
def test_exceptions_that_are_stated_are_some(texts, stated):
    assert len({read("math_answer", text) for text in texts}) == 1
    assert {math_answer(text, stated) for text in texts} == {0.0, 1.0}


NUMBERS = st.one_of(
    st.integers(-30, 30).map(str),
    st.decimals(-3, 3, places=2).map(str),
    st.tuples(st.integers(-6, 6), st.integers(1, 6)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.tuples(st.integers(-6, 6), st.integers(1, 6)).map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.integers(0, 300).map(lambda percent: f"{percent}\\%"),
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: f"{pair[0]}+{pair[1]}"),
)


@settings(max_examples=25)
@given(texts=st.lists(NUMBERS, min_size=3, max_size=3), worked_out=st.booleans())
def test_numbers_are_right_or_wrong_together(texts, worked_out):
    boxed = [f"\\boxed{{{text}}}" for text in texts] + [f"\\boxed{{x={texts[0]}}}", texts[1]]
    for answer, together in itertools.product(texts, clusters("math_answer", boxed, worked_out=worked_out)):
        assert len({math_answer(text, answer, worked_out) for text in together}) == 1


CHARACTERS = st.text(alphabet="0123456789-.,# sS\nß٣", max_size=8)


@settings(max_examples=300)
@given(texts=st.lists(CHARACTERS, min_size=2, max_size=6), number=st.integers(-99, 99))
@pytest.mark.parametrize("reward", ACCURACIES)
def test_texts_are_right_or_wrong_together(reward, texts, number):
    texts = [*texts, f"#{number}", f"# {number}.0", f"#0{abs(number)}"]
    answers = {read(reward, text) for text in texts} - {None}
    stated = [number, *(answers if reward != "arithmetic_accuracy" else map(int, answers))]
    for answer, together in itertools.product(stated, clusters(reward, texts)):
        assert len({ACCURACIES[reward](text, answer) for text in together}) == 1
    for answer, text in itertools.product(stated, texts):
        if read(reward, text) is None:
            assert ACCURACIES[reward](text, answer) == 0  # nothing stated is never right


@given(whole=st.integers(0, 10**31 - 1), fraction=st.text("0123456789", min_size=1, max_size=30))
def test_numbers_lose_no_digit(whole, fraction):
    assert Decimal(read("numeric_answer", f"It is -{whole}.{fraction}")) == Decimal(f"-{whole}.{fraction}")


# --- against those who would hold it up -------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [*ACCURACIES, "math_answer"])
def test_no_text_holds_it_up(reward):
    reader = answer_reader(reward, {})
    for text in hostile_text(20260, 120 if reward != "math_answer" else 40):
        start = time.process_time()
        assert reader(text) is None or isinstance(reader(text), str)
        assert time.process_time() - start < 8  # 3 s to parse, 3 s to work out


@pytest.mark.parametrize(
    "text", ["9^{9^{9^9}}", "10^{10^{10}}", "7^{10^9}", "100000000!", "((10^{64})^{64})^{64}", "\\binom{10^9}{10^8}",
             "2^{-10^{12}}", "\\sum_{n=1}^{10^{12}} n^n", "\\frac{1}{0}", "\\frac{0}{0}", "\\infty-\\infty", "\\log 0",
             "e^{e^{e^{e^9}}}", "x^{x^{x^{64}}}", "9" * 900]
)  # fmt: skip
def test_what_never_ends_counts_as_written(text):
    read("math_answer", "\\boxed{\\frac12}")  # sympy's import is not what is timed
    start = time.process_time()
    assert isinstance(read("math_answer", f"\\boxed{{{text}}}", worked_out=False), str)
    assert time.process_time() - start < 2


def test_what_takes_too_long_counts_as_written(monkeypatch):
    monkeypatch.setattr(rewards.answers, "MATH_SECONDS", 1)
    slow = "((x+y+z+w)^{64}+1)^{64}"
    assert read("math_answer", f"\\boxed{{{slow}}}") == f"written: {slow}"


def test_a_thread_is_refused_as_by_the_reward():
    reasons = refused_in_a_thread(lambda: read("math_answer", "72"))
    assert len(reasons) == 1
