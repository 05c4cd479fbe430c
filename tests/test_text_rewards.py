"""Rewards about the text itself: by hand, by properties, and what must not pay."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.component import load_component
from rewards.steps import worked_steps
from rewards.text import length_target, overlong, repetition, step_lines

PROMPT = "Natalia sold 48 clips in April, and half as many in May, for $1,200 less 20% to 5 friends. How many in all?"
LENGTHS = st.integers(0, 300)


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (100, 1),
        (90, 1),
        (110, 1),
        (45, 0.5),  # |45 - 100| - 10 = 45 outside, of 100 - 10 = 90
        (155, 0.5),
        (0, 0),
        (200, 0),
        (5000, 0),
    ],
)
def test_length_target_by_hand(tokens, value):
    assert length_target([1] * tokens, target=100, tolerance=10) == pytest.approx(value)


@given(LENGTHS, LENGTHS, st.integers(1, 100), st.integers(0, 99))
def test_nearer_to_the_target_is_no_worse(one, other, target, tolerance):
    tolerance = min(tolerance, target - 1)
    near, far = sorted((one, other), key=lambda tokens: abs(tokens - target))
    assert 0 <= length_target([1] * far, target, tolerance) <= length_target([1] * near, target, tolerance) <= 1


@pytest.mark.parametrize(("target", "tolerance"), [(0, 0), (10, 10), (10, -1), (float("nan"), 1), (float("inf"), 1)])
def test_a_target_without_a_slope_is_an_error(target, tolerance):
    with pytest.raises(ValueError, match="0 <= tolerance < target"):
        length_target([], target, tolerance)


@pytest.mark.parametrize(
    ("tokens", "truncated", "value"),
    [
        (0, False, 1),
        (80, False, 1),  # 100 - 20
        (85, False, 0.75),  # 1 + (80 - 85) / 20
        (100, False, 0),  # 1 + (80 - 100) / 20
        (130, False, 0),  # 1 - 1
        (10, True, 0),
    ],
)
def test_overlong_by_hand(tokens, truncated, value):
    assert overlong([1] * tokens, max_tokens=100, buffer=20, truncated=truncated) == value


@given(LENGTHS, st.integers(1, 200), st.integers(1, 200))
def test_overlong_is_one_plus_the_punishment_of_dapo(tokens, most, cache):
    """The three cases of the paper's formula, written out."""
    cache = min(cache, most)
    if tokens <= most - cache:
        punishment = Fraction(0)
    elif tokens <= most:
        punishment = Fraction((most - cache) - tokens, cache)
    else:
        punishment = Fraction(-1)
    assert overlong([1] * tokens, most, cache, truncated=False) == pytest.approx(float(1 + punishment))


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_does_not_fit_is_an_error(buffer):
    with pytest.raises(ValueError, match="0 < buffer <= max_tokens"):
        overlong([], 100, buffer, truncated=False)


# --- repetition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [
        ("a b a b", 2, 2 / 3),  # ab ba ab: two of three are distinct
        ("a b c d", 2, 1),
        ("A b a B", 2, 2 / 3),  # case does not count
        ("a a a a a", 1, 1 / 5),
        ("a b a b", 4, 1),  # a single one
        ("a b c", 4, 1),  # none
        ("", 4, 1),
        ("你好你好", 2, 2 / 3),  # a character of such a script is a word
    ],
)
def test_repetition_by_hand(text, n, value):
    assert repetition(text, n) == pytest.approx(value)


SPAM = [
    "a",
    "a ",
    "\n",
    " ",
    "!",
    "=-",
    "\u200b",
    "🙂",
    "哈",
    "\ud800",
    "abc",
    "Yes. ",
    "no, NO, No! ",
    "0",
    "x\u0301",
    "\0",
]


@pytest.mark.parametrize("spam", SPAM)
def test_spam_of_any_kind_is_repetition(spam):
    assert repetition(spam * 500) < 0.1


def test_an_ordinary_text_is_not():
    text = "Natalia sold 48 clips in April. In May she sold half as many, which is 24; so in all she sold 72 of them."
    assert repetition(text) == 1


@given(st.text(max_size=60), st.integers(1, 5))
def test_saying_all_again_is_never_better(text, n):
    once, thrice = repetition(text, n), repetition(f"{text}\n{text}\n{text}", n)
    assert 0 <= thrice <= 1
    assert thrice <= once


def test_ngrams_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="at least one word"):
        repetition("a", n=0)


# --- steps ------------------------------------------------------------------------------------------------------------


def counted(text: str, prompt: str = PROMPT) -> float:
    """How many steps count, of up to eight."""
    return 8 * worked_steps(text, prompt, target=8)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("In May she sold 48/2 = 24.\nTogether 48 + 24 = 72", 2),
        ("48 / 2 = <<48/2=24>>24 clips, then 48+24 = 72 clips.", 2),
        ("24 = 48/2", 1),
        ("a=48/2=24; b=48+24=72", 2),
        ("48/2 = 24 = 24.0", 1),
        ("1. 48/2 = 24\n2) 48 + 24 = 72\n- 48 + 5 = 53\n* 48 - 5 = 43\nStep 5 - 48 * 5 = 240", 5),
        ("**Step 1:** **48/2 = 24** (half of 48)", 1),
        ("(48/2 = 24)", 1),
        ("$48 \\times 5 = 240$ and \\(48 \\div 2 = 24\\)", 2),
        ("48 x 5 = 240, 48 ÷ 2 = 24, 48 · 2 = 96, 48 − 5 = 43", 4),
        ("$1,200 * 20% = $240\n$1,200 - $240 = $960", 2),
        ("1200 * 0.2 = 240", 1),  # 20% of the prompt is 0.2
        ("100% - 20% = 80%\n1200 * 80% = 960", 2),  # a percent sign implies the 100
        ("48/5 = 9.6", 1),
        ("5/48 = 0.104", 1),  # 0.10416...
        ("-5 + 48 = 43", 1),
        ("5 - 48 = -43", 1),
        ("48 + 5 + 2 - 20 = 35", 1),
        ("48 + 5 * 2 = 58", 1),  # the product first
    ],
)
def test_true_steps_from_the_prompt_count(text, steps):
    assert counted(text) == pytest.approx(steps)


@pytest.mark.parametrize(
    "text",
    [
        "48=48\n72\n#72",
        "48+0=48\n0+48=48\n48*1=48\n48/1=48\n48-48=0\n48/48=1\n48*0=0",  # trivial
        "48+5-5=48\n48*5/5=48",  # also in disguise
        "7+6=13\n13+7=20\n3*3=9",  # invented
        "one step = another step = 2",
        "first, then, therefore, so, hence",
        "48/2 ≈ 24",
        "٤٨/٢=٢٤",
    ],
)
def test_filler_is_no_step(text):
    assert counted(text) == 0
    assert counted(f"{text}\n48/2=24") == pytest.approx(1)  # nor is it false


@pytest.mark.parametrize(
    "again",
    [
        "48/2=24",
        "48 ÷ 2 = 24.00",
        "$48/2=$24",
        "24=48/2",
        "24*2=48",
        "2*24=48",
        "48/24=2",
        "48/2+0=24",
        "48*2/2/2=24",
        "48/2 = 24 = 24",
    ],
)
def test_the_same_step_turned_around_is_the_same(again):
    assert counted(f"48/2=24\n{again}\n{again}") == pytest.approx(1)


@pytest.mark.parametrize("again", ["5+48=53", "53-48=5", "53-5=48", "48+5+2-2=53", "5=53-48", "-5+53=48"])
def test_the_same_sum_turned_around_is_the_same(again):
    assert counted(f"48+5=53\n{again}") == pytest.approx(1)


def test_false_steps_cost_what_right_ones_are_worth():
    right = "48/2=24\n48+24=72\n48+5=53"
    assert worked_steps(right, PROMPT, target=3) == 1
    assert worked_steps(right + "\n48+2=51", PROMPT, target=3) == pytest.approx(2 / 3)
    assert worked_steps(right + "\n48*5=240\n48+2=51", PROMPT, target=3) == pytest.approx(2 / 3)  # four right, one false
    assert worked_steps(right + "\n7+7=15\n7+7=15\n1/0=7\n3=2+2", PROMPT, target=3) == 0


def test_a_running_total_with_equals_signs_is_false():
    assert counted("48/2=24\n48 + 24 = 72 / 2 = 36") == 0  # (1 - 1)


def test_results_count_as_operands_only_once_they_are_there():
    assert counted("24+48=72\n48/2=24") == pytest.approx(1)
    assert counted("48/2=24\n24+48=72") == pytest.approx(2)
    assert counted("48+2=51\n51+5=56") == 0  # false results are none


def test_what_the_text_itself_says_is_not_given():
    assert counted("Let us say the prompt has 7 and 9.\n7+9=16\n16*7=112") == 0


@pytest.mark.parametrize(
    "text",
    [
        "x + 5 = 10",
        "2x - 5 = 11",
        "y_1 + 3 = 5",
        "(48+2)/5 = 11",
        "2*(48+2) = 100",
        "36 = (48+24)/2",
        "24 (3 + 4) = 168",
        "2(3+4) = 14",
        "|3-5| + 1 = 3",
        "3^2 + 1 = 10",
        "2 ^ 3 + 1 = 9",
        "2**3 + 1 = 9",
        "2 ** 3 + 1 = 9",
        "5² + 1 = 26",
        "5! + 1 = 121",
        "122 = 2 + 5! * 1",
        "10^-2 + 1 = 1.01",
        "\\frac{1}{2} + 3 = 3.5",
        "\\sqrt{16} + 3 = 7",
        "2 1/2 + 3 = 5.5",
        "7:30 + 2 = 9:30",
        "1,5 + 2 = 3,5",
        "48 clips + 24 clips = 72 clips",
        "3.5.2 + 1 = 9",
        "48//5 = 9",
        "24 = 20 + x",
        "48 <= 5+1",
        "48 != 5+1",
        "48/2 => 25",
        "f(2)=48+5 if x else 1",
        "<div width=100/2=50px>",
        "1" * 16 + " + 1 = 3",
        "1+" * 40 + "1 = 3",
    ],
)
def test_what_is_more_than_numbers_is_not_judged(text):
    """None of these is taken in part, and so for false."""
    assert counted(f"{text}\n48/2=24") == pytest.approx(1)


def test_numbers_in_words_are_numbers_of_the_prompt():
    assert counted("25*3=75", "Each of twenty-five boys has three.") == pytest.approx(1)
    assert counted("5*12=60\n60/2=30", "Half of five dozens") == pytest.approx(2)
    assert counted("3*60=180", "3 hours") == pytest.approx(1)
    assert counted("3*60=180", "3 apples") == 0


def test_a_step_needs_a_prompt_with_numbers():
    assert counted("48/2=24", "How many?") == 0


RIGHT, WRONG, FILLER = ["48/2=24", "48+24=72", "48*5=240"], ["48+2=51"], ["1=1", "x", "7+7=14", "\ud800", "=", "48+0=48"]


@given(st.lists(st.sampled_from(RIGHT + WRONG + FILLER), max_size=9))
def test_filler_never_raises_the_value(lines):
    """With and without the lines that are neither true steps from the prompt nor false."""
    steps = [line for line in lines if line not in FILLER]
    assert worked_steps("\n".join(lines), PROMPT) == worked_steps("\n".join(steps), PROMPT)


@given(st.text(max_size=80) | st.text(alphabet="0123456789+-*/=.,%$() x", max_size=60))
def test_any_text_has_a_value_within_bounds(text):
    for reward in (worked_steps(text, PROMPT), worked_steps(text, text), repetition(text), step_lines(text)):
        assert 0 <= reward <= 1


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from("+-*/"), st.integers(-3, 3))
def test_truth_is_that_of_arithmetic(a, b, operator, error):
    """Against Python's: a true statement never costs what another is worth, a false one always does."""
    undefined = operator == "/" and (b == 0 or a % b != 0)
    stated = error if undefined else error + {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[operator]
    value = worked_steps(f"48/2=24\n{a} {operator} {b} = {stated}", PROMPT)
    assert (value == 0) == (undefined or error != 0)


@pytest.mark.parametrize("piece", ["1=1+", "1+", "48+5=53\n", "=", "1,111", "(", "\\", "**", "9.9%*", "a.a:", "1" * 99])
def test_time_grows_with_the_text_alone(piece):
    start = time.process_time()
    text = piece * (300_000 // len(piece))
    worked_steps(text, PROMPT)
    worked_steps("48/2=24", text)
    step_lines(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("target", [0, -1])
def test_no_steps_at_all_are_no_target(target):
    with pytest.raises(ValueError, match="at least one step"):
        worked_steps("", PROMPT, target)


def test_they_are_built_in():
    for name, args in {
        "length_target": {"target": 5, "tolerance": 1},
        "overlong": {"max_tokens": 5, "buffer": 1},
        "repetition": {},
        "worked_steps": {},
    }.items():
        load_component(name, args, [], {}).close()
