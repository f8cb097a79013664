"""Pretrained: the initial model of an experiment, as a plain Hugging Face folder."""

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from transformers import PreTrainedTokenizerBase

from mixpo.data.errors import InputError
from mixpo.data.sources import compute_content_digest, expand_home
from mixpo.data.templates import prepend_template_arguments
from mixpo.data.tokens import SPECIAL_TOKENS_KEY, parses_special_tokens
from mixpo.models.digests import compute_model_digest, list_model_files
from mixpo.models.folders import (
    ModelFolder,
    explain_loading_errors,
    let_others_read,
    load_tokenizer,
    load_weights,
    read_policy_folder,
)
from mixpo.models.sources import (
    initialize_world_model,
    read_gguf_model,
    read_gguf_tokenizer,
    read_hub_model,
    resolve_package_file,
)
from mixpo.settings import Settings
from mixpo.stages.stage import PolicyStage
from mixpo.training.job import StageJob, locate_model_folder
from mixpo.training.record import progress_listener


class PretrainedSettings(Settings):
    """Settings of the initial model: its source, chat template and data type."""

    path: str = "world"
    """`world` (random weights for the embedded world), a folder, a Hugging Face id, a `.gguf` file, or
    `package:NAME/FILE.gguf` inside an installed Python package."""
    revision: str | None = None
    """The commit of a Hugging Face id. Without it a cache knows the model by its name alone."""
    chat_template: str | None = None
    """A Jinja template for prompts that are lists of messages, instead of the tokenizer's own."""
    template_arguments: tuple[tuple[str, bool | int | float | str], ...] = ()
    """Variables that the chat template reads, such as `{enable_thinking: false}`. The template in the model's folder
    sets them itself, so that it renders the same elsewhere."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which this model and all models trained from it are saved; `auto` keeps the model's own. Training always
    uses float32 weights; bfloat16 saves 8 bits of their significand, and so loses the smallest updates."""
    init_seed: int = 0
    """Seed of the random weights; `world` only."""

    @pydantic.field_validator("template_arguments", mode="before")
    @classmethod
    def _sort_arguments(cls, value: Any) -> Any:
        """Validator: a mapping of template arguments becomes sorted pairs, which can be hashed."""
        return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


class Pretrained(PolicyStage, PretrainedSettings):
    """Stage of the initial model in `model/`. Local folders are copied, so that the original may change later."""

    splits_over_processes = False

    special_tokens: Literal["text", "parse"] = "text"
    """The recipe's `data.special_tokens`, saved in the model's folder for all stages."""
    content: str = ""
    """Digest of the files of a local path; computed by the validator."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_content_digest(cls, values: Any) -> Any:
        """Validator: fill in `content`, the digest of a local path's files. Raises `InputError` on unusable ones."""
        if not isinstance(values, dict) or values.get("content"):
            return values
        path = values.get("path", "world")
        if path == "world":
            return values
        if path.startswith("package:"):
            return {**values, "content": compute_content_digest([resolve_package_file(path)])}
        local = expand_home(path)
        if path.endswith(".gguf"):
            return {**values, "content": compute_content_digest([local])}
        if local.is_dir():
            with explain_loading_errors(local):
                digest = compute_model_digest(local)
            names = ("chat_template", "template_arguments")
            _check_folder_once(
                local, digest, PretrainedSettings(**{name: values[name] for name in names if name in values})
            )
            return {**values, "content": digest}
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.is_file():
            raise InputError(f"model.path: found no folder {path!r}; expected a model folder, a .gguf file or a hub id")
        return values

    def list_fields_outside_identity(self) -> list[str]:
        """Names of the fields path and revision if `content` identifies the model; else none."""
        return ["path", "revision"] if self.content else []

    @property
    def local_folder(self) -> Path | None:
        """Path of the local model folder; None if the model has another source."""
        local = expand_home(self.path)
        return local if self.path != "world" and local.is_dir() else None

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        """Write the initial model to `model/`, and verify that policy and reward model can be loaded from it."""
        model = locate_model_folder(job.out)
        local = expand_home(self.path)
        network, tokenizer = self._load_source_model(local)
        if network is None:
            model.mkdir(exist_ok=True)
            for file in list_model_files(local):
                shutil.copy2(file, model)
        else:
            network.to(network.dtype if self.dtype == "auto" else getattr(torch, self.dtype)).save_pretrained(model)
            tokenizer.save_pretrained(model)
            let_others_read(model)
        self._write_template_if_changed(model)
        job.models.check_policy_folder(model)
        job.finish_stage(model=compute_model_digest(model))

    def _write_template_if_changed(self, model_folder: Path) -> None:
        """Save the chat template and the special-tokens setting in the model's folder, if it has others."""
        tokenizer = load_tokenizer(model_folder)
        parse = self.special_tokens == "parse"
        if self.chat_template is not None or self.template_arguments or parse != parses_special_tokens(tokenizer):
            _set_chat_template(tokenizer, self)
            tokenizer.init_kwargs[SPECIAL_TOKENS_KEY] = self.special_tokens
            tokenizer.save_pretrained(model_folder)

    def _load_source_model(self, local_path: Path) -> tuple[Any, Any]:
        """(model, tokenizer) of the source; None for the model if a folder's files can be copied unchanged."""
        if self.path == "world":
            return initialize_world_model(self.init_seed)
        if self.path.startswith("package:"):
            return read_gguf_model(resolve_package_file(self.path))
        if self.path.endswith(".gguf"):
            return read_gguf_model(local_path)
        if self.local_folder is not None:
            if self.dtype == "auto":
                return None, load_tokenizer(local_path)
            return load_weights(_check_folder_with_template(local_path, self)), load_tokenizer(local_path)
        network = read_hub_model(self.path, self.revision)
        if self.revision is None:
            progress_listener.get().on_message(
                f"{self.path} is read as it is today; model.revision=COMMIT keeps to one state of it"
            )
        return network, load_tokenizer(self.path, self.revision)


def read_pretrained_tokenizer(settings: PretrainedSettings, special_tokens: str = "text") -> PreTrainedTokenizerBase:
    """Read the tokenizer that the stages will use, with the template settings applied; no weights are read."""
    path = settings.path
    if path == "world":
        tokenizer = initialize_world_model(settings.init_seed)[1]
    elif path.startswith("package:") or path.endswith(".gguf"):
        file = resolve_package_file(path) if path.startswith("package:") else expand_home(path)
        tokenizer = read_gguf_tokenizer(file)
    else:
        local = expand_home(path)
        tokenizer = load_tokenizer(local if local.is_dir() else path, settings.revision)
    _set_chat_template(tokenizer, settings)
    tokenizer.init_kwargs[SPECIAL_TOKENS_KEY] = special_tokens
    return tokenizer


@lru_cache
def _check_folder_once(folder: Path, digest: str, settings: PretrainedSettings) -> None:
    """Check a model folder with these template settings, once a digest. Raises `InputError` if it is unusable."""
    _check_folder_with_template(folder, settings)


def _check_folder_with_template(folder: Path, settings: PretrainedSettings) -> ModelFolder:
    """Check a model folder with these template settings, without reading its weights. Raises `InputError`."""

    def load_tokenizer_with_template(folder: Path) -> Any:
        """The folder's tokenizer with the template settings applied."""
        tokenizer = load_tokenizer(folder)
        _set_chat_template(tokenizer, settings)
        return tokenizer

    return read_policy_folder(folder, load_tokenizer_with_template)


def _set_chat_template(tokenizer: Any, settings: PretrainedSettings) -> None:
    """Set the chat template of a tokenizer in place, if given, and write the template arguments into it."""
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    if settings.template_arguments:
        tokenizer.chat_template = prepend_template_arguments(tokenizer, dict(settings.template_arguments))
