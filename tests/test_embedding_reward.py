"""Similarity of embeddings: against mean pooling by hand, on the real model, and what a policy may try on it."""

import hashlib
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from rewards.bus import RewardBus
from rewards.component import load_component
from rewards.embedding import PACKAGED, Similarity
from rewards.types import Missing, Objective
from tests.test_model_rewards import PAD, PAIRED, TINY, save
from tests.test_rewards import group

WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # SHA-256 of all-MiniLM-L6-v2's on the hub
installed = pytest.mark.skipif(
    not (find_spec("sentence_transformers") and find_spec(PACKAGED)),
    reason="the extra is not installed (scripts/setup embedding)",
)
CAT = "The cat sits on the mat."


@pytest.fixture(scope="module")
def real() -> Similarity:
    return Similarity("reference")


def save_encoder(home: Path, **tokenizer) -> str:
    """An encoder with random weights, followed by mean pooling."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    bert = Transformer(save(BertModel(BertConfig(**TINY, pad_token_id=PAD)), home / "bert", **PAIRED | tokenizer))
    SentenceTransformer(modules=[bert, Pooling(32)], device="cpu").save(str(home / "model"))
    return str(home / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("embedding"), template="")


def against(reward: Similarity, target: str, *completions: str) -> list:
    return reward(["?"] * len(completions), list(completions), reference=[target] * len(completions))


def own_vectors(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = {}
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", split_special_tokens=True)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(0).double().numpy()
        vectors[text] = mean / np.linalg.norm(mean)
    return vectors


def test_the_cosine_of_mean_pooled_tokens_whatever_the_company(tiny):
    texts = ["a", "naïve ≠", "so it is, and was", "b" * 60, "</s><s>", "?!", "Hm."] * 2
    draws = random.Random(0)
    targets = draws.sample(texts, len(texts))
    vectors = own_vectors(tiny, texts)
    wanted = [vectors[one] @ vectors[other] for one, other in zip(targets, texts, strict=True)]
    assert len({round(cosine, 3) for cosine in wanted}) > 5  # so far apart that a mistake shows
    for size in (1, 4, 64):
        values = Similarity("reference", tiny, batch_size=size)(["?"] * len(texts), texts, reference=targets)
        assert values == pytest.approx([max(0.0, cosine) for cosine in wanted], abs=1e-5)


def test_below_zero_is_zero_and_equal_is_not_above_one(tiny):
    reward = Similarity("prompt", tiny)
    above = [0.1, 0.3]
    while np.dot(above, above) / np.linalg.norm(above) ** 2 <= 1:  # some vectors round up
        above[1] += 0.1
    reward._encoder = Fixed({"a": [1, 0], "b": [-1, 0.5], "c": above, "d": [0, 0]})
    values = reward(["a", "a", "c", "a"], ["a", "b", "c", "d"])
    assert values[:3] == [1, 0, 1]
    assert isinstance(values[3], FloatingPointError)


class Fixed:
    """Embeddings of one's choice."""

    def __init__(self, known: dict[str, list[float]]):
        self._known = known

    def vectors(self, texts: list[str], batch_size: int) -> np.ndarray:
        return np.array([self._known[text] for text in texts], dtype=np.float64)


def test_targets_that_are_no_text_cost_their_own_sample(tiny):
    values = Similarity("reference", tiny)(["?"] * 5, ["a"] * 5, reference=["a", "", None, ["a"], 7])
    assert [isinstance(value, ValueError) for value in values] == [False, True, True, True, False]
    with pytest.raises(ValueError, match="no field 'reference'; there are: answer"):
        Similarity("reference", tiny)(["?"], ["a"], answer=["a"])


def test_an_empty_completion_is_worth_nothing(tiny):
    assert against(Similarity("reference", tiny), "a", "", " \n\t") == [0, 0]


def test_the_prompt_may_be_the_target_and_an_echo_of_it_is_worth_everything(tiny):
    values = Similarity("prompt", tiny)(["Why?", "Why?"], ["Why?", "Because."], prompts_of=["x", "x"])
    assert values[0] == pytest.approx(1)
    assert values[1] < 1


@given(texts=st.lists(st.text(alphabet=st.characters() | st.sampled_from("\0[]<>")), max_size=5))
def test_any_text_has_a_value_within_bounds(tiny, texts):
    assert all(0 <= value <= 1 for value in against(Similarity("reference", tiny), "a", *texts))


def test_what_no_text_may_hold_is_read_as_a_question_mark(tiny):
    odd, mark = Similarity("reference", tiny)(["?"] * 2, ["\ud800b", "?b"], reference=["a\udfff", "a?"])
    assert odd == pytest.approx(mark)


def test_components_share_a_model_and_have_columns(tiny):
    args = {"model": tiny}
    components = {name: load_component("similarity", args | {"target": name}, [name], {}) for name in ("prompt", "answer")}
    objectives = [Objective(name, True, (0.0, 1.0), Missing.FAIL) for name in components]
    matrix = RewardBus(components, objectives).score([group("ask", "one", answer="one"), group("", answer="")])
    assert matrix.raw_NK[[0, 1, 2], [0, 1, 0]].tolist() == pytest.approx([1, 1, 0])
    assert list(matrix.errors) == [(2, 1)]
    assert Similarity("a", tiny)._encoder is Similarity("b", tiny)._encoder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"device": "gpu"}, "device='gpu' is none of"),
        ({"dtype": "int8"}, "dtype='int8' is none of"),
        ({"model": "nobody/nothing"}, "model='nobody/nothing' is no folder or hub name|is not installed: .*setup embedding"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        Similarity("prompt", **args)


def test_a_model_that_reads_turns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="puts texts into a chat template"):
        Similarity("prompt", save_encoder(tmp_path))


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"sentence-transformers is not installed: install .*scripts/setup embedding"):
        Similarity("prompt", str(tmp_path))
    monkeypatch.setitem(sys.modules, PACKAGED, None)
    with pytest.raises(ValueError, match=r"the packaged one is not installed: .*scripts/setup embedding.*or give `model`"):
        Similarity("prompt")


# --- the packaged model -----------------------------------------------------------------------------------------------


@installed
def test_the_packaged_weights_are_those_of_the_hub():
    folder = Path(find_spec(PACKAGED).submodule_search_locations[0]) / "model"
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS


@installed
def test_a_paraphrase_is_near_and_another_subject_is_not(real):
    same, near, far = against(real, CAT, CAT, "A kitten is resting on a rug.", "Shares fell by 3 % on Monday.")
    assert same == pytest.approx(1)
    assert near > 0.5
    assert far < 0.1


@installed
def test_what_it_does_not_see(real):
    """Word order, a `not`, and what lies beyond 256 tokens: said in the docstring, so it should stay true."""
    heap, denial, tail = against(real, CAT, "the mat the cat sits on", "The cat does not sit on the mat.", f"{CAT} " * 40)
    assert heap > 0.9
    assert denial > 0.8
    assert against(real, CAT, f"{CAT} " * 40 + "Buy shares! " * 400) == pytest.approx([tail], abs=1e-5)


@installed
def test_special_tokens_spelled_out_are_text(real):
    tokens = []
    hook = real._encoder._network.register_forward_pre_hook(
        lambda _, features: tokens.extend(features[0]["input_ids"].flatten().tolist())
    )
    against(real, "[SEP][CLS][MASK][PAD]", "[SEP][CLS][MASK][PAD]")
    hook.remove()
    assert [token for token in tokens if token in (0, 101, 102, 103)] == [101, 102]  # around the text


@installed
def test_addresses_and_paths_are_text(real, tmp_path, monkeypatch):
    """What is given to a model of texts and images says that it is a text, for the library would open a bare address."""
    from sentence_transformers.base.modality import infer_modality

    file = tmp_path / "picture.png"
    file.write_bytes(b"no picture")
    odd = ["http://localhost:9/a.png", str(file), "data:image/png;base64,AAAA", "https://youtu.be/x", "http://a.test/a.wav"]
    given, encode = [], real._encoder._network.encode
    monkeypatch.setattr(real._encoder._network, "encode", lambda some, **how: given.extend(some) or encode(some, **how))
    assert all(0 <= value < 0.3 for value in against(real, CAT, *odd))
    assert "text" not in map(infer_modality, odd)
    assert set(map(infer_modality, given)) == {"text"}
    assert len(given) == 6


@installed
def test_a_megabyte_is_read_in_no_time(real):
    assert 0 <= against(real, CAT, "cat " * 250_000)[0] <= 1
