"""Models that run here, and how texts become their tokens; for the rewards of `rewards.model` and `rewards.reference`."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
UNLIMITED = 10**9  # tokens; tokenizers that know no limit state a larger number
_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d+))?")
_PROMPT, _COMPLETION = "@@prompt@@", "@@completion@@"  # stand for the texts while a chat template is taken apart


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one text.

    Args:
        ids: All of them.
        start: Place of the completion's first one.
        stop: Place after its last one.
        second: Place from which they belong to the second text of a pair.
    """

    ids: list[int]
    start: int
    stop: int
    second: int


@dataclass(frozen=True, slots=True)
class Frame:
    """Tokens around a prompt and a completion: head, prompt, between, completion, tail."""

    head: Sequence[int]
    between: Sequence[int]
    tail: Sequence[int]
    pair: bool = False

    def __len__(self) -> int:
        return len(self.head) + len(self.between) + len(self.tail)

    def fit(self, prompt: Sequence[int], completion: Sequence[int], longest: int) -> Row:
        """A row of at most `longest` tokens: the beginning of the prompt goes first, then the end of the completion."""
        room = longest - len(self)
        completion = completion[:room]
        prompt = prompt[max(0, len(prompt) - room + len(completion)) :]
        before = [*self.head, *prompt, *self.between]
        ids = [*before, *completion, *self.tail]
        stop = len(before) + len(completion)
        return Row(ids, len(before), stop, len(before) if self.pair else len(ids))


@dataclass(frozen=True)
class Texts:
    """What turns texts into the tokens of a model.

    Args:
        model: Its name, for errors.
        config: The model's.
        tokenizer: A fast one.
    """

    model: str
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"

    def tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Token ids of each text alone; only with `special` does one that spells a special token become it."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        return self.tokenizer([clean(text) for text in texts], **options).input_ids

    def frame(self, pair: bool) -> Frame:
        """The special tokens that the tokenizer puts around a text, or around and between two."""
        probe = self.tokenizer("a", "a") if pair else self.tokenizer("a")
        ids, belongs = probe.input_ids, probe.sequence_ids(0)
        first, last = belongs.index(0), len(ids) - belongs[::-1].index(int(pair))
        between = [token for token, text in list(zip(ids, belongs, strict=True))[first:last] if text is None]
        return Frame(ids[:first], between, ids[last:], pair)

    def chat_frame(self) -> Frame:
        """What the chat template puts around a user's and an assistant's turn. Raises ValueError when it cannot be told."""
        from jinja2 import TemplateError

        turns = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _COMPLETION}]
        try:
            head, rest = self.tokenizer.apply_chat_template(turns, tokenize=False).split(_PROMPT)
            between, tail = rest.split(_COMPLETION)
        except (ValueError, TemplateError) as error:
            why = f"form='chat', but {self.model!r} has no chat template of a user's and an assistant's turn"
            raise ValueError(f"{why}: use another form ({error})") from error
        return Frame(*self.tokens([head, between, tail], special=True))

    def longest(self, asked: int, frame: Frame) -> int:
        """Tokens that a row may have; `asked` 0 for the model's own limit. Raises ValueError when that cannot be."""
        known = self.config.get_text_config().to_dict()
        stated = (self.tokenizer.model_max_length, known.get("max_position_embeddings"), known.get("n_positions"))
        own = min((number for number in stated if number and 0 < number < UNLIMITED), default=UNLIMITED)
        if asked > own:
            raise ValueError(f"max_length={asked}, but {self.model!r} reads at most {own} tokens")
        if not asked and own == UNLIMITED:
            raise ValueError(f"{self.model!r} does not say how many tokens it can read: give max_length")
        longest = asked or own
        if longest <= len(frame):
            raise ValueError(f"max_length={longest} leaves nothing to the text: {len(frame)} tokens are put around it")
        return longest


def clean(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold (lone surrogates), which tokenizers refuse."""
    return text.encode(errors="replace").decode()


def field_of(name: str, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """The prompts, or a field of the data by name. Raises ValueError when the data have no such field."""
    if name == "prompt":
        return prompts
    if name not in columns:
        there = ", ".join(sorted(columns.keys() - {"completion_ids"})) or "none"
        raise ValueError(f"the data have no field {name!r}; there are: {there}")
    return columns[name]


def each(rows: Sequence[Any], compute: Callable[[Sequence[Any]], Any]) -> list[Any]:
    """What `compute` makes of the rows, in their order; an exception in the place of a row stays there."""
    values = list(rows)
    good = [n for n, row in enumerate(rows) if not isinstance(row, Exception)]
    for n, value in zip(good, compute([rows[n] for n in good]), strict=True):
        values[n] = value
    return values


class LocalModel:
    """A model in memory, shared by the components that use it; whoever calls it holds `lock`.

    Args:
        network: In evaluation mode, on its device.
        texts: Makes its tokens.
    """

    def __init__(self, network: "PreTrainedModel", texts: Texts):
        self.network = network
        self.texts = texts
        self.lock = Lock()
        self._latest: tuple[Sequence[Row], list[torch.Tensor]] = ([], [])

    def logits(self, rows: Sequence[Row], batch_size: int) -> "list[torch.Tensor]":
        """The outputs (K,) of each row, float64 on the CPU; those of the latest rows are remembered."""
        if rows != self._latest[0]:
            if self.network.config.get_text_config().pad_token_id is None:
                batch_size = 1  # nothing tells the model where a padded text ends
            self._latest = (rows, self.batched(rows, batch_size, self._outputs))
        return self._latest[1]

    def batched(self, rows: Sequence[Row], size: int, forward: Callable[[Sequence[Row]], Sequence[Any]]) -> list[Any]:
        """`forward` of all rows, by `size` of like length at a time, in the order of the rows."""
        import torch

        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].ids))  # the longest first: memory runs out at once
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with torch.inference_mode():
            values = list(chain.from_iterable(forward([rows[n] for n in batch]) for batch in batches))
        return [value for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]

    def inputs(self, rows: Sequence[Row]) -> "dict[str, torch.Tensor]":
        """Rows as a batch, padded on the right; parts of pairs are told apart where the model knows such."""
        import torch

        pad, width = self.network.config.get_text_config().pad_token_id or 0, max(len(row.ids) for row in rows)
        arrays = {
            "input_ids": [row.ids + [pad] * (width - len(row.ids)) for row in rows],
            "attention_mask": [[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows],
        }
        if "token_type_ids" in self.texts.tokenizer.model_input_names and any(row.second < len(row.ids) for row in rows):
            arrays["token_type_ids"] = [[int(row.second <= n < len(row.ids)) for n in range(width)] for row in rows]
        return {name: torch.tensor(array, device=self.network.device) for name, array in arrays.items()}

    def _outputs(self, rows: Sequence[Row]) -> "Sequence[torch.Tensor]":
        return self.network(**self.inputs(rows)).logits.double().cpu()


@cache
def load_texts(model: str, revision: str) -> Texts:
    """The tokenizer and configuration of a model. Raises ValueError when there is none, or no fast tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    options = {"revision": revision or "main", "trust_remote_code": False}
    try:
        texts = Texts(model, AutoConfig.from_pretrained(model, **options), AutoTokenizer.from_pretrained(model, **options))
    except Exception as error:  # a dozen kinds of network, file and naming errors, none of ours
        raise ValueError(f"model={model!r} is no folder or hub name of a model that can be loaded: {error}") from error
    if not texts.tokenizer.is_fast:
        raise ValueError(f"model={model!r} has no tokenizer.json; save it with a fast tokenizer")
    return texts


@cache
def load_model(loader: str, model: str, revision: str, device: str, dtype: str) -> LocalModel:
    """A model, loaded once in a process. Raises ValueError when some of its weights would be made up."""
    import transformers

    options = {"revision": revision or "main", "trust_remote_code": False, "dtype": dtype}
    try:
        network, found = getattr(transformers, loader).from_pretrained(model, output_loading_info=True, **options)
    except Exception as error:  # a dozen kinds of network, file and naming errors, none of ours
        raise ValueError(f"model={model!r} cannot be loaded by {loader}: {error}") from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ValueError(f"model={model!r} has no weights for {missing:.200}: it was not trained for {loader}")
    return LocalModel(network.eval().to(device), load_texts(model, revision))


def check_run(max_length: int, batch_size: int, device: str, dtype: str) -> str:
    """The device of torch that is meant; without a number the GPU of this process. Raises ValueError for what cannot be."""
    import torch

    check("max_length", max_length, 0)
    check("batch_size", batch_size, 1)
    check("dtype", dtype, DTYPES)
    if not (match := _DEVICE.fullmatch(str(device))):
        raise ValueError(f"device={device!r} is none of auto, cpu, cuda and cuda:N")
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    number = int(match[1] or int(os.environ.get("LOCAL_RANK", "0")) % max(1, count))
    if number >= count:
        raise ValueError(f"device={device!r}, but {count} GPUs are found: use auto or cpu")
    return f"cuda:{number}"


def check(name: str, value: Any, allowed: Sequence[str] | int) -> None:
    """Raise ValueError unless a value is one of those allowed, or a whole number of at least so much."""
    if isinstance(allowed, int):
        if type(value) is not int or value < allowed:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {allowed}")
    elif value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
