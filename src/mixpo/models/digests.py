"""The identity of a model folder by its content."""

import hashlib
import json
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.data.sources import file_digest


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that may change what it computes."""
    kinds = (".safetensors", ".bin", ".model", ".json", ".txt", ".jinja")
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in kinds)


def model_digest(folder: Path) -> str:
    """Identity of a model by content: of its `model_files`; 16 hex digits."""
    digest = hashlib.sha256()
    for file in model_files(folder):
        digest.update(file.name.encode())
        digest.update(file_digest(file))
    return digest.hexdigest()[:16]


def refuse_changed_model(folder: Path) -> None:
    """Refuse a stage's model that is not the one whose digest stands in the stage's `summary.json`.

    Every file is hashed, once a process (`file_digest`): some 10 seconds for 14 GB, which are read anyway, before hours
    of training. Sizes and headers are the same where weights were replaced, and times change where a cache is copied.
    """
    try:
        summary = json.loads((folder.parent / "summary.json").read_text(encoding="utf8"))
        expected, _ = summary["model"], summary["cost"]["seconds"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # not a finished stage's
    if folder.name == "model" and expected != (found := model_digest(folder)):
        raise InputError(
            f"{folder}: found files of the digest {found}; expected {expected}, by the summary.json of the stage that "
            f"wrote them: they are damaged or were replaced; delete {folder.parent} to compute the stage again"
        )
