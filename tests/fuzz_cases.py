"""What the built-in rewards are given when hostile texts are put to them: arguments, tiny models, services that answer."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewards.confine import landlock_version
from rewards.server import make_app
from rewards.types import Missing, Objective
from tests.judge_service import Service, block, verdict
from tests.test_embedding_reward import save_encoder
from tests.test_model_rewards import LABELS, PAD, PAIRED, POLICY, TINY, save
from tests.test_pooling import Server
from tests.test_remote_rewards import bus_of, running

LATE = "TimeoutError: no answer within"


@dataclass(frozen=True)
class Case:
    """How a built-in reward is put to the test.

    Args:
        args: Of the reward.
        rules: Of its calls.
        every: Of this many groups of texts it scores one.
        bounds: Of its values.
        undecided: Beginnings of the reasons for which a value may be missing.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    undecided: tuple[str, ...] = (LATE,)


JSON = {"type": "object", "properties": {"answer": {"$ref": "#"}}, "patternProperties": {"^(a|b)": {"uniqueItems": True}}}
CASES = {
    "arithmetic_accuracy": Case(),
    "arithmetic_clarity": Case(),
    "brevity": Case({"max_tokens": 64}),
    "code_tests": Case({"seconds": 1.0, "memory_mib": 256}, every=100),
    "exact_match": Case({"ignore_case": True}),
    "json_schema": Case({"schema": JSON}, {"timeout": 5.0}, undecided=(LATE, "RuntimeError: pattern")),
    "length_target": Case({"target": 40, "tolerance": 8}),
    "math_answer": Case(rules={"timeout": 10.0}, undecided=(LATE, "RuntimeError: math-verify did not")),
    "numeric_answer": Case(),
    "overlong": Case({"max_tokens": 64, "buffer": 16}),
    "regex_match": Case(
        {"pattern": "(?:a|aa)+b|.*,72", "whole": False, "seconds": 0.05}, undecided=("RuntimeError: pattern",)
    ),
    "repetition": Case(),
    "step_lines": Case(),
    "worked_steps": Case(),
}
NO_TOKEN = "ValueError: the completion has no token that follows another"


@contextmanager
def all_cases(folder: Path) -> Iterator[dict[str, Case]]:
    """The cases that this machine can run, with models in that folder and services for as long as this lasts."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    labels = dict(enumerate(LABELS))
    bert = AutoModelForSequenceClassification.from_config(BertConfig(**TINY, pad_token_id=PAD, id2label=labels))
    cases = {name: case for name, case in CASES.items() if name != "code_tests" or landlock_version()}
    cases |= {
        "classifier": Case({"model": save(bert, folder / "classifier", **PAIRED), "activation": "softmax", "form": "pair"}),
        "fluency": Case({"model": POLICY}, undecided=(NO_TOKEN,)),
        "kl_to_reference": Case({"model": POLICY}, bounds=(-1e4, 1e4)),
    }
    if find_spec("sentence_transformers"):
        model = save_encoder(folder, template="")
        cases["similarity"] = Case({"target": "prompt", "model": model})
    with ExitStack() as stack:
        judge = stack.enter_context(running(Service(lambda body: verdict(len(block(body)) % 11)).app()))
        pooling = stack.enter_context(running(Server(lambda given: [len(str(given)) % 2]).app()))
        far = stack.enter_context(closing(bus_of("repetition")))
        objective = Objective("far", True, (0.0, 1.0), Missing.NEUTRAL)
        remote = stack.enter_context(running(make_app({"far": (objective, far)}, "")))
        asked = {"model": "m", "key_variable": ""}
        cases["judge"] = Case({"url": f"{judge}/v1", "rubric": "Is it?", **asked}, {"retries": 0})
        cases["pooling"] = Case({"url": pooling, **asked}, {"retries": 0})
        cases["remote"] = Case({"url": remote, "objective": "far", "key_variable": ""}, {"retries": 0})
        yield cases
