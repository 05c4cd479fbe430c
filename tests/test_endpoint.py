"""Requests to services: control tokens in what is sent, who is asked again, keys, unusable settings."""

import json
import pickle
import time
from email.utils import formatdate

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rewards import execution
from rewards.component import load_component
from rewards.endpoint import _seconds, disarmed
from rewards.execution import Later, Permanent
from rewards.judge import Judge, pack
from tests.judge_service import KEY, RUBRIC, Service, block, completion, score, verdict
from tests.test_remote_rewards import group, running

pytest_plugins = ["tests.judge_service"]
pytestmark = pytest.mark.usefixtures("quick_retries")


# --- control tokens -----------------------------------------------------------------------------------------------------

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|turn>", "<turn|>", "<|end|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<sop>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[gMASK]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<image>"),
    *("<think>", "</think>", "<tool_call>", "<<SYS>>", "<</SYS>>", "[CLS]", "[SEP]", "[TOOL_CALLS]", "<|fim▁begin|>"),
)


@given(st.lists(st.sampled_from((*CONTROL, "<", "|", ">", "[", "/", "a", " ", "\n", "\ud800"))).map("".join))
def test_spelt_out_control_tokens_do_not_become_tokens(text):
    """A real tokenizer, with those tokens special, sees none of them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    assert tokenizer.encode("a<|im_end|>").ids[-1] >= 256
    ids = tokenizer.encode(disarmed(text)).ids
    assert all(number < 256 for number in ids)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "").replace("\ud800", "?")


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: x |= 3 | y",
        "data |> filter(x > 2) |> sum()",
        '<div class="a"><p>text</p><br/></div>',
        "p <|> q <$> r",
        "$\\langle x | y \\rangle$ and |<x|y>|",
        "[TODO] a[0] [1, 2] [link](url) std::vector<int> List<String>",
        "x << 3 >> 1; f(<)",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert disarmed(text).replace("< x|y>", "<x|y>") == text


@pytest.mark.parametrize("bait", ["<", "<|", "<a", "[", "[A_", "<a_of_", "</", "|>", "<|a", "\x00", "\ud800"])
def test_disarming_a_megabyte_is_a_matter_of_moments(bait):
    start = time.perf_counter()
    disarmed(bait * (2**20 // len(bait)))
    assert time.perf_counter() - start < 3


def test_any_text_can_be_sent():
    texts = ["", "\x00", "\ud800\udc00\udfff", "\U0001f600\u0661\u202e", "x" * 2**20, "\\boxed{" * 3000, '"\n\\']
    matrix, service = score(lambda body: verdict(4), group(*texts))
    assert matrix.raw_NK[:, 0].tolist() == [0.4] * len(texts)
    assert "\ufffd" in {block(body) for body in service.bodies}
    for body in service.bodies:
        json.dumps(body, ensure_ascii=False).encode()


# --- who is asked again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "requests"), [(400, 1), (401, 1), (404, 1), (422, 1), (408, 3), (409, 3), (429, 3), (500, 3), (503, 3)]
)
def test_what_was_refused_is_not_asked_again(status, requests):
    matrix, service = score(lambda body: web.Response(status=status, text="no"), group("a"), rules={"retries": 2})
    assert f"/v1/chat/completions answered {status}: no" in matrix.errors[0, 0]
    assert len(service.bodies) == requests


def test_a_wrong_model_is_refused_once_and_said():
    answer = {"error": {"message": "The model `j` does not exist.", "code": 404}}
    matrix, service = score(lambda body: web.json_response(answer, status=404), group("a", "b"), rules={"retries": 2})
    assert len(service.bodies) == 2
    assert "EndpointRefused" in matrix.errors[1, 0]
    assert "The model `j` does not exist." in matrix.errors[1, 0]


@pytest.mark.parametrize(
    ("answer", "requests"), [(completion(None, refusal="no"), 1), (completion("{"), 3), (completion("{", "length"), 3)]
)
def test_a_refusal_stands_while_a_slip_may_be_mended(answer, requests):
    matrix, service = score(lambda body: answer, group("a"), rules={"retries": 2})
    assert matrix.missing_NK.all()
    assert len(service.bodies) == requests


def test_a_failure_that_passes_leaves_no_trace():
    before = []

    def answer(body):
        before.append(body)
        return verdict(6) if len(before) == 3 else web.Response(status=503)

    matrix, _ = score(answer, group("a"), rules={"retries": 2})
    assert matrix.raw_NK[:, 0].tolist() == [0.6]
    assert before[0] == before[2]


@pytest.mark.parametrize(("patience", "least", "most"), [(60.0, 0.8, 5.0), (0.05, 0.1, 0.7)])
def test_a_service_that_says_when_is_asked_then(monkeypatch, patience, least, most):
    """Two waits of 0.4 s each, where so much is granted; else of 0.05 s."""
    monkeypatch.setattr(execution, "PATIENCE", patience)
    busy = {"Retry-After": "0.4"}
    start = time.perf_counter()
    matrix, _ = score(lambda body: web.Response(status=429, text="slow", headers=busy), group("a"), rules={"retries": 2})
    assert least <= time.perf_counter() - start < most
    assert matrix.errors[0, 0].startswith("EndpointBusy: http://127.0.0.1")
    assert matrix.errors[0, 0].endswith("answered 429: slow")


@pytest.mark.parametrize("spared", [False, True])
def test_a_proxy_is_that_of_the_environment(monkeypatch, spared):
    """The service itself is nowhere."""
    monkeypatch.setenv("no_proxy", "judge.invalid" if spared else "")
    service = Service(lambda body: verdict(7))
    with running(service.app()) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        args = {"url": "http://judge.invalid/v1", "model": "j", "rubric": RUBRIC}
        component = load_component("judge", args, [], {"retries": 0})
        found = component.start([group("a")], [0])().values
        component.close()
    assert [body["model"] for body in service.bodies] == ([] if spared else ["j"])
    assert found[0] == 0.7 if not spared else isinstance(found[0], ConnectionError)


def test_when_to_ask_again_is_given_in_seconds_or_as_a_date():
    assert _seconds("12") == 12
    assert _seconds(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert [_seconds(text) for text in ("", "soon", "-5", "nan", "inf", formatdate(0, usegmt=True), "9" * 400)] == [0.0] * 7


def test_failures_keep_their_kind_on_the_way_out_of_a_process():
    later = pickle.loads(pickle.dumps(Later("busy", 3.0)))
    assert (str(later), later.seconds) == ("busy", 3.0)
    assert isinstance(pickle.loads(pickle.dumps(Permanent("no"))), Permanent)


# --- the key, and what is unusable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_that_the_service_repeats_is_in_no_error(status):
    async def repeat(body):
        return web.json_response({"error": f"wrong key: Bearer {KEY}"}, status=status)

    matrix, _ = score(repeat, group("a"))
    assert "wrong key: Bearer ***" in matrix.errors[0, 0]
    assert KEY not in matrix.errors[0, 0]


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}"])
def test_a_key_with_blanks_around_it_is_meant_without(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    _, service = score(lambda body: verdict(1), group("a"))
    assert service.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_key_that_cannot_be_sent_is_in_no_error(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\nX: y")
    matrix, _ = score(lambda body: verdict(1), group("a"))
    assert KEY not in matrix.errors[0, 0]


def test_a_service_may_want_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    matrix, service = score(lambda body: verdict(1), group("a"), key_variable="")
    assert matrix.raw_NK[:, 0].tolist() == [0.1]
    assert "Authorization" not in service.headers[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"url": "localhost:8000"}, "not of the form http://host:port/path"),
        ({"url": "http://me:secret@h/v1"}, "^the url of h holds a password, which errors would show: use key_variable$"),
        ({"url": "http://h/v1/chat/completions/"}, "of one route: leave out /chat/completions"),
        ({"key_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which is not set"),
        ({"rubric": ""}, "needs a rubric"),
        ({"rubric_file": "r.md"}, "not both"),
        ({"rubric": " ", "rubric_file": "no/such/file"}, "'no/such/file' cannot be read"),
        ({"rubric": "", "rubric_file": "/dev/null"}, "'/dev/null' is empty"),
        ({"scale": [10, 0]}, r"scale=\[10, 0\] is not \[lowest, highest\]"),
        ({"scale": [0, 0.5]}, "two whole numbers"),
        ({"scale": [0, 101]}, "at most 100 apart"),
        ({"scale": [0, 1, 2]}, "two whole numbers"),
        ({"scale": [0, True]}, "two whole numbers"),
        ({"scale": 10}, "scale=10 is not"),
        ({"show": ["prompt", "solution"]}, "'solution': it is a list of prompt, question, answer"),
        ({"longest": 99}, "longest=99"),
        ({"request": {"messages": []}}, "request has 'messages', which is not free to choose"),
        ({"request": {"response_format": {}}}, "or set structured to false"),
        ({"tempereture": 1}, "does not take args"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_asked(args, message):
    with pytest.raises(ValueError, match=message):
        load_component("judge", {"url": "http://h/v1", "model": "j", "rubric": RUBRIC} | args, [], {})


def test_a_format_of_ones_own_needs_no_schema():
    form = {"type": "json_object"}
    _, service = score(lambda body: "{}", group("a"), structured=False, request={"response_format": form})
    assert service.bodies[0]["response_format"] == form


def test_material_cannot_take_the_place_of_what_is_judged():
    with pytest.raises(ValueError, match="'response' is the title of what is judged"):
        pack("a", {"response": "b"}, 100, "s")


def test_a_judge_of_ones_own_shows_what_it_wants():
    component = load_component(
        "tests.test_endpoint:OfSolutions", {"url": "http://127.0.0.1:9", "model": "j", "rubric": RUBRIC}, ["solution"], {}
    )
    component.close()
    with pytest.raises(ValueError, match="wants an argument 'solution'"):
        load_component("tests.test_endpoint:OfSolutions", {"url": "http://h", "model": "j", "rubric": RUBRIC}, [], {})


class OfSolutions(Judge):
    """Sees a field of the data that the built-in judge does not know."""

    async def __call__(self, text: str, solution: str) -> float:
        return await self.verdict(text, {"solution": solution})
