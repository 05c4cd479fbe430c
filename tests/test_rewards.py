"""Built-in rewards by hand and under attack; components and the bus on functions that misbehave."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.arithmetic import arithmetic_accuracy, arithmetic_clarity, evaluate, parse, worked_steps
from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.text import brevity, step_lines
from rewards.types import Missing, Objective, stack
from rewards.verify import math_answer, numeric_answer, stated_answer
from rollout.types import FinishReason, Prompt, Sample, SampleGroup

EXPRESSIONS = st.builds(
    lambda first, rest: str(first) + "".join(f"{o}{n}" for o, n in rest),
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=4),
)
ANY_TEXT = st.text(max_size=60) | st.text(alphabet="0123456789+-*/=;#", max_size=40)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(EXPRESSIONS)
def test_evaluate_agrees_with_python(expression):
    assert evaluate(expression) == eval("".join(map(str, parse(expression))))  # through parse: no leading zeros


def test_division_must_come_out_even():
    assert evaluate("8/2*3") == 12
    with pytest.raises(ValueError, match="7/2 does not come out even"):
        evaluate("7/2")
    with pytest.raises(ValueError, match="does not come out even"):
        evaluate("7/0")
    with pytest.raises(ValueError, match="not a flat integer expression"):
        evaluate("(1+2)*3")


@given(EXPRESSIONS)
def test_the_standard_worked_answer_is_perfect(expression):
    text = ";".join([*worked_steps(expression), f"#{evaluate(expression)}"])
    assert arithmetic_accuracy(text, evaluate(expression)) == 1
    assert arithmetic_clarity(text, expression) == 1


@pytest.mark.parametrize(
    ("text", "accuracy", "clarity"),
    [
        ("7+5=12;12-3=9;#9", 1, 1),
        ("#9", 1, 0),  # terse
        ("7+5=12;#9", 1, 0.5),  # one of two steps
        ("7+5=12;12-3=8;#8", 0, 0),  # one right, one wrong: (1 - 1) / 2
        ("7+5=12;12-3=9;#8", 0, 0.5),  # the answer contradicts the steps: (2 - 1) / 2
        ("7+5=12;7+5=12;12-3=9;#9", 1, 0.5),  # repetition: (2 - 1) / 2
        ("1+1=2;2+2=4;3+3=6;#9", 1, 0),  # right sums of something else
        ("7+5=12;12-3=9;", 0, 0),  # no answer
        ("5-3=2;7+2=9;#9", 1, 0),  # not what can be worked out next
        ("well; 7+5=12;12-3=9;#9", 1, 0),  # ' 7+5=12' is malformed, so are its followers
        ("7+5=12;12-3=9;#9 or #8", 0, 0),
        ("7+5=12;12-3=9;#٩", 0, 0),  # digits are ASCII
        ("#" + "9" * 5000, 0, 0),
        ("", 0, 0),
    ],
)
def test_accuracy_and_clarity_by_hand(text, accuracy, clarity):
    assert arithmetic_accuracy(text, 9) == accuracy
    assert arithmetic_clarity(text, "7+5-3") == clarity


@given(ANY_TEXT, EXPRESSIONS)
def test_any_text_has_a_value_within_bounds(text, expression):
    assert arithmetic_accuracy(text, evaluate(expression)) in (0.0, 1.0)
    assert 0 <= arithmetic_clarity(text, expression) <= 1


@given(st.lists(st.sampled_from(["7+5=12", "12-3=9", "1+1=2", "x", "", "9=9"]), max_size=12))
def test_only_the_required_steps_reach_full_clarity(steps):
    text = ";".join([*steps, "#9"])
    assert (arithmetic_clarity(text, "7+5-3") == 1) == (steps == ["7+5=12", "12-3=9"])


# --- text and answers -------------------------------------------------------------------------------------------------


def test_brevity_by_hand():
    assert brevity([1] * 8, max_tokens=32) == 0.75
    assert brevity([], max_tokens=32) == 1
    assert brevity([1] * 40, max_tokens=32) == 0


def test_step_lines_counts_distinct_calculations():
    assert step_lines("Half of 48 is 48/2 = 24.\nTogether 48 + 24 = 72\nso #72", target=2) == 1
    assert step_lines("48/2=24\n48/2=24\n", target=2) == 0.5
    assert step_lines("first, then, therefore", target=2) == 0


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("so the answer is 72", "Natalia sold ...\n#### 72", 1),
        ("1,000 in all", 1000, 1),
        ("it is 72.0", "72", 1),
        ("72 or 73", "72", 0),
        ("-3", "-3", 1),
        ("no idea", "72", 0),
    ],
)
def test_numeric_answer(text, answer, value):
    assert numeric_answer(text, answer) == value


def test_answers_that_cannot_be_compared_with_are_errors_not_zero():
    with pytest.raises(ValueError, match="holds no number"):
        numeric_answer("72", "#### none")
    with pytest.raises(ValueError, match="the stated answer '' cannot be read"):
        math_answer("72", "")


def test_math_answer_sees_through_notation():
    assert math_answer("Therefore $\\boxed{\\frac{1}{2}}$", "0.5") == 1
    assert math_answer("Therefore \\boxed{3}", "0.5") == 0
    assert stated_answer("a #### b #### 7 ") == "7"


@given(ANY_TEXT)
def test_numeric_answer_takes_any_text(text):
    assert numeric_answer(text, "7") in (0.0, 1.0)
    assert 0 <= step_lines(text) <= 1


# --- components -------------------------------------------------------------------------------------------------------


def group(*texts: str, **columns) -> SampleGroup:
    samples = tuple(Sample((1,) * len(text), (), FinishReason.STOP, 0, text) for text in texts)
    return SampleGroup(Prompt("p", "ask", (1, 2), columns), samples)


def scored(component, groups: list[SampleGroup]) -> list:
    return list(component.start(groups, range(sum(len(group.samples) for group in groups)))().values)


def test_a_reward_gets_what_it_names():
    import tests.test_rewards as here

    here.seen = []

    component = load_component("tests.test_rewards:nosy", {"extra": 5}, ["answer"], {})
    assert scored(component, [group("ab", "c", answer=3)]) == [1.0, 1.0]
    assert here.seen == [
        ("ab", "ask", (1, 1), ["ab", "c"], 3, 5, "default"),
        ("c", "ask", (1,), ["ab", "c"], 3, 5, "default"),
    ]


seen: list = []


def nosy(text, prompt, token_ids, group, answer, extra, other="default") -> float:
    import tests.test_rewards as here

    here.seen.append((text, prompt, token_ids, group, answer, extra, other))
    return 1.0


def in_trl_form(prompts, completions, completion_ids, answer, **kwargs):
    return [float(len(c) == a) for c, a in zip(completions, answer, strict=True)]


def how_many_have_it(completions, extra, **kwargs):
    return [float(sum(value is not None for value in extra))] * len(completions)


def one_short(prompts, completions, **kwargs):
    return [0.0] * (len(completions) - 1)


class Threshold:
    def __init__(self, least: int):
        self.least = least

    def __call__(self, text: str) -> float:
        return float(len(text) >= self.least)


def misbehaving(text: str):
    return {"nan": math.nan, "inf": math.inf, "big": 2, "text": "0.5", "none": None, "ok": 0.5}[text]


def test_a_trl_reward_works_as_it_is():
    component = load_component("tests.test_rewards:in_trl_form", {}, ["answer"], {})
    assert scored(component, [group("ab", "c", answer=2), group("d", answer=1)]) == [1.0, 0.0, 1.0]


def test_a_field_that_a_row_has_not_is_none_in_trl_form():
    component = load_component("tests.test_rewards:how_many_have_it", {}, [], {})
    assert scored(component, [group("a"), group("b", extra=1), group("c", extra=2)]) == [2.0, 2.0, 2.0]


def test_a_class_is_made_with_its_args():
    component = load_component("tests.test_rewards:Threshold", {"least": 2}, [], {})
    assert scored(component, [group("ab", "c")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("reward", "args", "message"),
    [
        ("brevit", {}, r"no built-in reward 'brevit'; did you mean 'brevity'\? Your own is `module:function`$"),
        ("politeness", {}, "no built-in reward 'politeness'; there are: arithmetic_accuracy, .*worked_steps"),
        ("no.such:thing", {}, "cannot be imported"),
        ("tests.test_rewards:zzz", {}, "cannot be imported.*has no attribute 'zzz'$"),
        ("tests.test_rewards:misbehavin", {}, r"cannot be imported.*'misbehavin'; did you mean 'misbehaving'\?$"),
        ("tests.test_rewards:seen", {}, "is a list, not a function"),
        ("tests.test_rewards:Threshold", {"most": 2}, "does not take args"),
        ("brevity", {"max_token": 2}, "does not take args.*; it has token_ids, max_tokens"),
        ("brevity", {"max_tokens": 0}, "'brevity' cannot use args {'max_tokens': 0}: "),
        ("regex_match", {"pattern": "("}, r"cannot use args .*: pattern '\(' is not a regular expression: missing \)"),
        ("json_schema", {"schema": {"type": "nope"}}, "cannot use args .* is not a JSON Schema"),
        ("length_target", {"target": 5, "tolerance": 5}, "0 <= tolerance < target"),
        ("repetition", {"n": 0}, "at least one word"),
        ("tests.test_rewards:nosy", {}, r"wants an argument 'extra'.*field of the data \(answer\)"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused(reward, args, message):
    with pytest.raises(ValueError, match=message):
        load_component(reward, args, ["answer"], {})


# --- the bus ----------------------------------------------------------------------------------------------------------


def bus(reward: str, bounds=(0.0, 1.0)) -> RewardBus:
    objective = Objective("o", True, bounds, Missing.FAIL)
    return RewardBus({"o": load_component(reward, {}, [], {})}, [objective])


def test_unusable_values_are_missing_with_a_reason_never_zero():
    matrix = bus("tests.test_rewards:misbehaving").score([group("ok", "nan", "inf", "big", "text", "none", "boom")])
    assert matrix.raw_NK[0, 0] == 0.5
    assert matrix.missing_NK[:, 0].tolist() == [False] + [True] * 6
    reasons = [matrix.errors[n, 0] for n in range(1, 7)]
    assert reasons == [
        "not finite: nan",
        "not finite: inf",
        "2 is outside its bounds [0, 1]",
        "not a number: '0.5'",
        "no value",
        f"KeyError: 'boom' (test_rewards.py:{misbehaving.__code__.co_firstlineno + 1})",
    ]


def test_a_reward_of_the_wrong_length_has_no_values_at_all():
    matrix = bus("tests.test_rewards:one_short").score([group("a", "b", "c")])
    assert matrix.missing_NK.all()
    assert matrix.errors[0, 0] == "ValueError: returned 2 values for 3 samples"


@pytest.mark.parametrize("reward", ["returns_nothing", "returns_a_number"])
def test_a_reward_without_a_list_has_no_values_at_all(reward):
    matrix = bus(f"tests.test_rewards:{reward}").score([group("a", "b")])
    assert matrix.missing_NK.all()
    assert matrix.errors[1, 0].startswith("TypeError: ")


def returns_nothing(completions, **kwargs):
    return None


def returns_a_number(completions, **kwargs):
    return 1.0


def test_a_number_beyond_floats_is_missing():
    matrix = bus("tests.test_rewards:astronomical").score([group("a")])
    assert matrix.missing_NK.all()


def astronomical(text):
    return 10**400


def test_matrices_are_stacked_with_their_reasons():
    one = bus("tests.test_rewards:misbehaving").score([group("ok", "none")])
    two = bus("tests.test_rewards:misbehaving").score([group("nan", "ok")])
    both = stack([one, two])
    assert both.missing_NK[:, 0].tolist() == [False, True, True, False]
    assert both.errors == {(1, 0): "no value", (2, 0): "not finite: nan"}


def test_a_process_without_samples_has_no_rows():
    assert bus("tests.test_rewards:one_short").score([]).raw_NK.shape == (0, 1)


def test_one_sample_that_fails_costs_only_its_own_value():
    matrix = bus("tests.test_rewards:misbehaving").score([group("ok"), group("boom", "ok")])
    assert matrix.missing_NK[:, 0].tolist() == [False, True, False]


def test_values_are_scaled_by_bounds_and_turned():
    objectives = [Objective("a", True, (0.0, 4.0), Missing.FAIL), Objective("b", False, (0.0, 4.0), Missing.FAIL)]
    length = load_component("tests.test_rewards:length", {}, [], {})
    matrix = RewardBus({"a": length, "b": length}, objectives).score([group("abc")])
    assert matrix.values_NK.tolist() == [[0.75, 0.25]]


def length(text: str) -> int:
    return len(text)
