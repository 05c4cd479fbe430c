"""Rewards by models that run here: sequence classifiers (reward models), and fluency under a reference language model.

What a policy writes is hostile: its text never becomes special tokens, so `<|im_end|>` in it is ten characters and ends
no turn. Texts too long for a model lose the beginning of the prompt first, then the end of the completion, which goes
unread: keep `rollout.max_tokens` below what the model can read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.local_model import Row, check, check_run, each, field_of, load_model, load_texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FORMS = ("text", "completion", "pair", "chat")
ACTIVATIONS = ("none", "sigmoid", "softmax")


class Classifier:
    """One output of a sequence-classification model; in [0, 1] but for activation `none`, which needs `bounds`.

    It sees what it was trained to see: a policy finds texts unlike those of its training that it likes for no reason.
    Components on the same model share it, and each batch runs through it once for all of them.

    Args:
        model: Local folder or hub name.
        activation: `sigmoid` (of a score or one of several labels), `softmax` (of exclusive labels), or `none` (the logit).
        head: Number or label of the output.
        form: What the model reads: `text` (prompt and completion as one text), `completion` (that alone), `pair` (two
            texts with the tokenizer's separator), or `chat` (a user's and an assistant's turn by the tokenizer's template).
        prompt_field: `prompt`, what the policy read, or the data field that holds the question without chat template.
        revision: Branch, tag or commit on the hub.
        max_length: Tokens read; 0 for all that the model can.
        batch_size: Texts per forward pass.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights; `auto` as they were saved.

    Raises:
        ValueError: An argument does not fit the model, the model cannot be loaded, or some of its weights are missing.
    """

    def __init__(
        self,
        model: str,
        activation: str,
        head: int | str = 0,
        form: str = "text",
        prompt_field: str = "prompt",
        revision: str = "",
        max_length: int = 0,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
    ):
        check("activation", activation, ACTIVATIONS)
        check("form", form, FORMS)
        where = check_run(max_length, batch_size, device, dtype)
        texts = load_texts(model, revision)
        self._head = _output(model, texts.config, head)
        if activation == "softmax" and texts.config.num_labels == 1:
            raise ValueError(f"activation='softmax', but {model!r} has one output, whose softmax is always 1: use sigmoid")
        self._activation, self._form, self._prompt_field = activation, form, prompt_field
        self._batch_size = batch_size
        self._frame = texts.chat_frame() if form == "chat" else texts.frame(pair=form == "pair")
        self._longest = texts.longest(max_length, self._frame)
        self._model = load_model("AutoModelForSequenceClassification", model, revision, where, dtype)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | Exception]:
        """One value per sample; an exception where the model gives no number, or there is nothing to read."""
        given = field_of(self._prompt_field, prompts, columns)
        with self._model.lock:
            rows = self._rows(given, completions)
            return each(rows, lambda some: map(self._value, self._model.logits(some, self._batch_size)))

    def _rows(self, prompts: Sequence[Any], completions: Sequence[str]) -> "list[Row | Exception]":
        texts = self._model.texts
        if self._form == "completion":
            prompts = [""] * len(completions)
        known = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
        # In a turn or a text of its own the prompt is a text like any other; before the completion it is what was rendered.
        before = texts.tokens(known, special=self._form == "text")
        after = texts.tokens(completions, special=False)
        rows = [self._frame.fit(*tokens, self._longest) for tokens in zip(before, after, strict=True)]
        unread = ValueError(f"the field {self._prompt_field!r} holds no text, or the texts together no token")
        pairs = zip(prompts, rows, strict=True)
        return [row if isinstance(prompt, str) and row.ids else unread for prompt, row in pairs]

    def _value(self, logits_K: "torch.Tensor") -> float | Exception:
        used = logits_K if self._activation == "softmax" else logits_K[self._head]
        if not used.isfinite().all():
            return FloatingPointError(f"the model's output is {used.tolist()}")
        if self._activation == "softmax":
            return float(logits_K.softmax(0)[self._head])
        return float(used.sigmoid() if self._activation == "sigmoid" else used)


class Fluency:
    """Likelihood of the completion after its prompt under a reference language model, per token; in [0, 1].

    exp(1/T sum_t log p(y_t | x, y_<t)), the geometric mean of the T tokens' probabilities, or 1 / perplexity. An empty
    completion has none. Right or wrong is not seen, and high values are cheap: stock phrases, copies of the prompt and
    repetition are likely, and a text that breaks off costs nothing. It is a counterweight, not an aim.

    Args:
        model: Local folder or hub name of a causal language model.
        max_length: Tokens read; 0 for all that the model can. Tokens beyond count for nothing.
        batch_size: Texts per forward pass; with T tokens and a vocabulary of V it holds batch_size * T * V logits.
        revision, device, dtype: As for `Classifier`.

    Raises:
        ValueError: An argument does not fit the model, the model cannot be loaded, or some of its weights are missing.
    """

    def __init__(
        self,
        model: str,
        revision: str = "",
        max_length: int = 0,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str = "auto",
    ):
        where = check_run(max_length, batch_size, device, dtype)
        texts = load_texts(model, revision)
        self._batch_size = batch_size
        self._frame = texts.frame(pair=False)
        self._longest = texts.longest(max_length, self._frame)
        self._model = load_model("AutoModelForCausalLM", model, revision, where, dtype)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | Exception]:
        """One value per sample; ValueError in the place of one without a token that follows another."""
        texts = self._model.texts
        with self._model.lock:
            before, after = texts.tokens(prompts, special=True), texts.tokens(completions, special=False)
            fitted = [self._frame.fit(*tokens, self._longest) for tokens in zip(before, after, strict=True)]
            nothing = ValueError("the completion has no token that follows another, so it has no likelihood")
            rows = [row if max(1, row.start) < row.stop else nothing for row in fitted]
            return each(rows, lambda some: self._model.batched(some, self._batch_size, self._likelihoods))

    def _likelihoods(self, rows: "Sequence[Row]") -> list[float | Exception]:
        logits_BTV = self._model.network(**self._model.inputs(rows)).logits
        values: list[float | Exception] = []
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            start = max(1, row.start)
            log_probs_TV = logits_TV[start - 1 : row.stop - 1].float().log_softmax(-1)
            tokens_T1 = log_probs_TV.new_tensor(row.ids[start : row.stop]).long()[:, None]
            mean = log_probs_TV.gather(1, tokens_T1).double().mean()
            finite = not mean.isnan()  # -inf is a probability of 0
            values.append(min(1.0, float(mean.exp())) if finite else FloatingPointError("the model's output is nan"))
        return values


def _output(model: str, config: "PreTrainedConfig", head: int | str) -> int:
    labels = [str(config.id2label[n]) for n in range(config.num_labels)]
    if type(head) is int and 0 <= head < len(labels):
        return head
    if isinstance(head, str) and labels.count(head) == 1:
        return labels.index(head)
    raise ValueError(f"head={head!r}, but the outputs of {model!r} are 0 to {len(labels) - 1}: {', '.join(labels):.200}")
