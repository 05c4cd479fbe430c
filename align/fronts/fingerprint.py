"""Content hashes: two evaluations are the same exactly when everything that can change a value is the same."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.build import base_model, is_adapter
from align.config import Config
from align.files import replace_text
from rewards.component import BUILT_IN
from rollout.sampler import SamplingParams
from rollout.types import Prompt

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("rewards/*.py", "rollout/*.py", "align/evaluate.py", "align/evaluator.py", "align/sampling.py")  # makes the values
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*", "adapter_config.json")
MODEL = (*WEIGHTS, "config.json", "generation_config.json", "*.py")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder brings its tokenizer along."""
    return any((folder / name).is_file() for name in A_TOKENIZER)


def tokenizer_of(path: str) -> str:
    """Folder or hub name of the tokenizer of a policy: LoRA weights may leave it to the model that they belong to."""
    return base_model(path) if is_adapter(path) and not has_tokenizer(Path(path)) else path


class Hashes:
    """SHA-256 of files; remembered by path, size and time, for weights take long to read.

    Args:
        memory: File that remembers; created with its folder.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        try:
            self._known: dict[str, list[Any]] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it only saves time
            self._known = {}
        self._new = False

    def file(self, path: Path) -> str:
        """Of the content of a file."""
        status = path.stat()
        stamp, name = [status.st_size, status.st_mtime_ns], str(path.resolve())
        known = self._known.get(name)
        if known is None or known[:2] != stamp:
            with path.open("rb") as file:
                known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[name], self._new = known, True
        return known[2]

    def save(self) -> None:
        """Write down what is new."""
        if self._new:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._memory, json.dumps(self._known))

    def files(self, folder: Path, patterns: Iterable[str]) -> dict[str, str]:
        """Hashes, by name, of the files of a folder that match a pattern."""
        found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        return {path.name: self.file(path) for path in sorted(found)}

    def policy(self, path: str, revision: str) -> dict[str, Any]:
        """What makes a policy: weights and tokenizer of a folder or hub name, and the model its LoRA weights belong to."""
        folder = Path(path)
        if not folder.is_dir():
            return {"hub": path, "commit": hub_commit(path, revision)}
        found: dict[str, Any] = self.files(folder, (*MODEL, *TOKENIZER))
        return found | {"base": self.policy(base_model(path), revision)} if is_adapter(path) else found

    def kind(self, path: str, revision: str) -> str:
        """Policies of one kind have one architecture and tokenizer, so that one engine can sample from each in turn."""
        base, tokenizer = base_model(path), tokenizer_of(path)
        parts = [
            self.files(Path(tokenizer), TOKENIZER) if Path(tokenizer).is_dir() else tokenizer,
            self.files(Path(base), ("config.json", "generation_config.json")) if Path(base).is_dir() else base,
            self.files(Path(path), ("generation_config.json",)) if Path(path).is_dir() else "",
        ]
        return digest(parts)


def hub_commit(name: str, revision: str) -> str:
    """Commit of a hub model that is in the local cache; "" where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else ""


def digest(data: Any) -> str:
    """SHA-256 of anything that JSON can hold; what it cannot is taken by its text."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of prompts in their order, with the fields that rewards may read; their tokens are up to the policy's tokenizer."""
    return digest([[p.id, p.text, dict(p.columns)] for p in prompts])


def evaluation_key(
    config: Config, policy: Mapping[str, Any], prompts: str, params: SamplingParams, code: Mapping[str, Any]
) -> str:
    """Names the evaluation of a policy on prompts (their digest) in the cache."""
    engine = config.rollout.engine
    dtype = engine.dtype if engine.type == "vllm" else None
    sampling = asdict(params) | {"engine": engine.type, "dtype": dtype or config.policy.dtype}
    objectives = {name: o.model_dump(mode="json", exclude={"calls", "missing"}) for name, o in config.objectives.items()}
    return digest([dict(policy), prompts, sampling, objectives, list(objectives), dict(code)])


def code_digests(config: Config, hashes: Hashes) -> dict[str, Any]:
    """What computes the values: our own code, the files of the user's rewards, and files that their arguments name."""
    own = {str(path.relative_to(ROOT)): hashes.file(path) for pattern in CODE for path in sorted(ROOT.glob(pattern))}
    found: dict[str, Any] = {"paretune": digest(own)}
    for name, objective in config.objectives.items():
        if objective.reward not in BUILT_IN:
            found[name] = _module(objective.reward, hashes)
        found[f"{name}.args"] = [_stamps(value) for value in _strings(objective.args)]
    return found


def _module(reward: str, hashes: Hashes) -> str:
    try:
        spec = find_spec(reward.partition(":")[0])
    except (ImportError, ValueError):  # it is said where the reward is loaded
        return ""
    origin = Path(spec.origin) if spec and spec.origin else None
    return hashes.file(origin) if origin and origin.is_file() else ""


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in inner for text in _strings(item)]


def _stamps(text: str) -> list[Any]:
    """Size and time of the file that a text names, or of the files in the folder that it names."""
    try:
        path = Path(text).expanduser()
        paths = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths if not os.path.isdir(p)]
    except (OSError, ValueError):  # no path at all
        return []
