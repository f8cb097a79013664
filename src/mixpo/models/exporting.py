"""Exporting of models as plain Hugging Face folders, with adapters merged into the weights."""

import shutil
from pathlib import Path

import torch

from mixpo.data.errors import InputError
from mixpo.models.adapter_folders import holds_adapters
from mixpo.models.digests import list_model_files
from mixpo.models.loading import ModelLoader
from mixpo.models.saving import save_model


def export_model(folder: Path, out: Path) -> None:
    """Write the model in a stage's folder to a new folder as a whole, in the data type of the initial model.

    Raises `InputError` if the new folder exists and holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: found something there; expected a new or an empty folder; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    if holds_adapters(folder):
        save_model(ModelLoader(torch.device("cpu")).load_merged_model(folder), out)
        return
    for file in list_model_files(folder):
        shutil.copy2(file, out)
