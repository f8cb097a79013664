"""Digests of model folders."""

import hashlib
import json
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.data.sources import compute_file_digest


def list_model_files(folder: Path) -> list[Path]:
    """Paths of the files in a model folder that can change the model's outputs, sorted by name."""
    kinds = (".safetensors", ".bin", ".model", ".json", ".txt", ".jinja")
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in kinds)


def compute_model_digest(folder: Path) -> str:
    """Digest of a model folder, 16 hex digits: SHA-256 of the names and contents of `list_model_files`."""
    digest = hashlib.sha256()
    for file in list_model_files(folder):
        digest.update(file.name.encode())
        digest.update(_hash_adapter_config(file) if file.name == "adapter_config.json" else compute_file_digest(file))
    return digest.hexdigest()[:16]


def _hash_adapter_config(file: Path) -> bytes:
    """SHA-256 of a configuration of adapters without the path of their base, which a moved cache changes."""
    try:
        content = json.loads(file.read_text(encoding="utf8"))
        del content["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return compute_file_digest(file)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def refuse_model_changed_since_stage(folder: Path) -> None:
    """Raise `InputError` if a stage's model folder has another digest than the stage's `summary.json` says.

    Every file is hashed once a process (`compute_file_digest`), about 10 seconds for 14 GB. Sizes and headers would not
    show replaced weights, and file times change when a cache is copied.
    """
    try:
        summary = json.loads((folder.parent / "summary.json").read_text(encoding="utf8"))
        expected, _ = summary["model"], summary["cost"]["seconds"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # not a finished stage's
    if folder.name == "model" and expected != (digest := compute_model_digest(folder)):
        raise InputError(
            f"{folder}: found files with digest {digest}; expected {expected}, as in the summary.json of the stage "
            f"that wrote them: they were damaged or replaced; delete {folder.parent} to compute the stage again"
        )
