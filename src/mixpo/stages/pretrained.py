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
from mixpo.data.sources import compute_content_digest, expand_path
from mixpo.data.templates import write_arguments_into_template
from mixpo.data.tokens import SPECIAL_TOKENS_KEY, parses_special_tokens
from mixpo.models.digests import compute_model_digest, list_model_files
from mixpo.models.folders import ModelFolder, explain_loading_errors, load_tokenizer, load_weights, read_policy_folder
from mixpo.models.sources import (
    initialize_world_model,
    read_gguf,
    read_gguf_tokenizer,
    read_hub_model,
    resolve_package_file,
)
from mixpo.settings import Settings
from mixpo.stages.stage import PolicyStage
from mixpo.training.job import Job, model_folder
from mixpo.training.record import progress_listener


class PretrainedSettings(Settings):
    """Settings of the initial model."""

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
        return _sort_template_arguments(value)


def _sort_template_arguments(arguments: Any) -> Any:
    """Convert a mapping of template arguments to sorted pairs, which can be hashed."""
    return tuple(sorted(arguments.items())) if isinstance(arguments, Mapping) else arguments


class Pretrained(PolicyStage, PretrainedSettings):
    """The initial model in `model/`. Local folders are copied, so that the original may change later."""

    special_tokens: Literal["text", "parse"] = "text"
    """The recipe's `data.special_tokens`, saved in the model's folder for all stages."""
    content: str = ""
    """Digest of the files of a local path; computed by the validator."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_content(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("content"):
            return values
        path = values.get("path", "world")
        if path == "world":
            return values
        if path.startswith("package:"):
            return {**values, "content": compute_content_digest([resolve_package_file(path)])}
        local = expand_path(path)
        if path.endswith(".gguf"):
            return {**values, "content": compute_content_digest([local])}
        if local.is_dir():
            with explain_loading_errors(local):
                digest = compute_model_digest(local)
            _check_folder(
                local,
                digest,
                values.get("chat_template"),
                _sort_template_arguments(values.get("template_arguments") or ()),
            )
            return {**values, "content": digest}
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or local.is_file():
            raise InputError(f"model.path: found no folder {path!r}; expected a model folder, a .gguf file or a hub id")
        return values

    def fields_outside_identity(self) -> list[str]:
        """Return the path and revision if the digest of the files is a field."""
        return ["path", "revision"] if self.content else []

    @property
    def local_folder(self) -> Path | None:
        """The local model folder; None if the model has another source."""
        local = expand_path(self.path)
        return local if self.path != "world" and local.is_dir() else None

    def compute(self, inputs: Mapping[str, Path], job: Job) -> None:
        """Write `model/`, and verify that policy and reward models can be loaded from it."""
        model = model_folder(job.out)
        local = expand_path(self.path)
        network, tokenizer = self._load_source(local)
        if network is None:
            model.mkdir(exist_ok=True)
            for file in list_model_files(local):
                shutil.copy2(file, model)
        else:
            network.to(network.dtype if self.dtype == "auto" else getattr(torch, self.dtype)).save_pretrained(model)
            tokenizer.save_pretrained(model)
        self._write_template(model)
        job.load_policy(job.out)
        job.initialize_reward_model(job.out, seed=0)
        job.finish(model=compute_model_digest(model))

    def _write_template(self, model: Path) -> None:
        """Write the chat template and the special-tokens setting into the model's folder, if they differ from it."""
        tokenizer = load_tokenizer(model)
        parse = self.special_tokens == "parse"
        if self.chat_template is not None or self.template_arguments or parse != parses_special_tokens(tokenizer):
            _set_template(tokenizer, self.chat_template, self.template_arguments)
            tokenizer.init_kwargs[SPECIAL_TOKENS_KEY] = self.special_tokens
            tokenizer.save_pretrained(model)

    def _load_source(self, local: Path) -> tuple[Any, Any]:
        """Load the model and its tokenizer; None for the model if a folder's files can be copied unchanged."""
        if self.path == "world":
            return initialize_world_model(self.init_seed)
        if self.path.startswith("package:"):
            return read_gguf(resolve_package_file(self.path))
        if self.path.endswith(".gguf"):
            return read_gguf(local)
        if self.local_folder is not None:
            if self.dtype == "auto":
                return None, load_tokenizer(local)
            return load_weights(_read_folder(local, self.chat_template, self.template_arguments)), load_tokenizer(local)
        network = read_hub_model(self.path, self.revision)
        if self.revision is None:
            progress_listener.get().on_message(
                f"{self.path} is read as it is today; model.revision=COMMIT keeps to one state of it"
            )
        return network, load_tokenizer(self.path, self.revision)


def read_tokenizer(settings: PretrainedSettings, special_tokens: str = "text") -> PreTrainedTokenizerBase:
    """Read the tokenizer that the stages will use, with the template settings applied; no weights are read."""
    path = settings.path
    if path == "world":
        tokenizer = initialize_world_model(settings.init_seed)[1]
    elif path.startswith("package:") or path.endswith(".gguf"):
        file = resolve_package_file(path) if path.startswith("package:") else expand_path(path)
        tokenizer = read_gguf_tokenizer(file)
    else:
        local = expand_path(path)
        tokenizer = load_tokenizer(local if local.is_dir() else path, settings.revision)
    _set_template(tokenizer, settings.chat_template, settings.template_arguments)
    tokenizer.init_kwargs[SPECIAL_TOKENS_KEY] = special_tokens
    return tokenizer


@lru_cache
def _check_folder(
    folder: Path, digest: str, chat_template: str | None, template_arguments: tuple[tuple[str, Any], ...]
) -> None:
    """Check a folder by `_read_folder`, once for each digest; the result is not cached, since callers may modify it."""
    _read_folder(folder, chat_template, template_arguments)


def _read_folder(
    folder: Path, chat_template: str | None, template_arguments: tuple[tuple[str, Any], ...]
) -> ModelFolder:
    """Read and check a model folder with these template settings, without reading its weights."""

    def read_tokenizer(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        _set_template(tokenizer, chat_template, template_arguments)
        return tokenizer

    return read_policy_folder(folder, read_tokenizer)


def _set_template(tokenizer: Any, chat_template: str | None, arguments: tuple[tuple[str, Any], ...]) -> None:
    """Set the chat template of a tokenizer, and write the template arguments into it."""
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if arguments:
        tokenizer.chat_template = write_arguments_into_template(tokenizer, dict(arguments))
