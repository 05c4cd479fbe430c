"""Writes a policy as a folder that is ready to load: weights, tokenizer, model card."""

import os
import shutil
from pathlib import Path

from align.build import is_adapter
from align.config import Config
from align.fronts.fingerprint import MODEL, TOKENIZER, tokenizer_of

ALSO = ("*.jinja", "preprocessor_config.json", "LICENSE*", "NOTICE*")


def check_free(folder: Path) -> None:
    """Raise ValueError unless a folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export: {folder} exists and is not an empty folder: choose another")


def export_policy(path: str, folder: Path, card: str, config: Config) -> None:
    """Write a policy, whole or not at all. LoRA weights are merged into the model that they belong to.

    Args:
        path: Folder or hub name of the policy.
        folder: New or empty.
        card: Text of its README.md.
        config: Says in which type a model is loaded to be merged, and which revision of a hub model.

    Raises:
        ValueError: The folder is in use.
    """
    check_free(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if is_adapter(path):
        from align.loaded import load_model

        load_model(path, config).merge_and_unload().save_pretrained(partial)
    else:
        _copy(_folder_of(path, config.policy.revision), (*MODEL, *ALSO), partial)
    _copy(_folder_of(tokenizer_of(path), config.policy.revision), (*TOKENIZER, *ALSO), partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)


def _folder_of(path: str, revision: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision))


def _copy(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
