"""Pretrained: the model that everything starts from, as a plain Hugging Face folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from mixpo.data.errors import InputError
from mixpo.data.sources import content_digest
from mixpo.data.templates import bake_arguments
from mixpo.data.tokens import SPECIAL_TOKENS, check_tokenizer, parses_special_tokens
from mixpo.models.loading import (
    load_tokenizer,
    model_digest,
    model_files,
    new_world_model,
    read_architectures,
    read_gguf,
    resolve_package_file,
)
from mixpo.settings import Settings
from mixpo.stages.stage import Stage, finish, model_in
from mixpo.training.record import Cost, watcher
from mixpo.training.runtime import Runtime


class PretrainedSettings(Settings):
    """Which model to start from."""

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
    init_seed: int = 0
    """Seed of the random weights; `world` only."""

    @pydantic.field_validator("template_arguments", mode="before")
    @classmethod
    def _as_pairs(cls, value: Any) -> Any:
        return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


class Pretrained(Stage, PretrainedSettings):
    """A model folder to start from. A local folder is copied, so that it can be moved or trained further."""

    special_tokens: Literal["text", "parse"] = "text"
    """The recipe's `data.special_tokens`, which the model's folder hands on to every stage."""
    content: str = ""
    """Digest of the files behind a local path; found out here."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_content(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("content"):
            return values
        path = values.get("path", "world")
        if path == "world":
            return values
        if path.startswith("package:"):
            return {**values, "content": content_digest([resolve_package_file(path)])}
        local = Path(path).expanduser()
        if path.endswith(".gguf"):
            return {**values, "content": content_digest([local])}
        if local.is_dir():
            _check_folder(local)
            return {**values, "content": model_digest(local)}
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise InputError(f"model.path: found no folder {path!r}; expected a model folder, a .gguf file or a hub id")
        return values

    def _exclude_from_cls_uid(self) -> list[str]:
        return ["path", "revision"] if self.content else []

    def work(self, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write `model/`."""
        cost, model = Cost(), model_in(out)
        local = Path(self.path).expanduser()
        if self.path != "world" and local.is_dir():
            model.mkdir(exist_ok=True)
            for file in model_files(local):
                shutil.copy2(file, model)
        else:
            network, tokenizer = self._load(local)
            network.save_pretrained(model)
            tokenizer.save_pretrained(model)
        self._settle_template(model)
        finish(out, cost, model=model_digest(model))

    def _settle_template(self, model: Path) -> None:
        """Write the settings of template and special tokens into the model's folder, and check what it holds."""
        tokenizer = load_tokenizer(model)
        parse = self.special_tokens == "parse"
        if self.chat_template is not None or self.template_arguments or parse != parses_special_tokens(tokenizer):
            if self.chat_template is not None:
                tokenizer.chat_template = self.chat_template
            if self.template_arguments:
                tokenizer.chat_template = bake_arguments(tokenizer, dict(self.template_arguments))
            tokenizer.init_kwargs[SPECIAL_TOKENS] = self.special_tokens
            tokenizer.save_pretrained(model)
        check_tokenizer(load_tokenizer(model))

    def _load(self, local: Path) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        if self.path == "world":
            return new_world_model(self.init_seed)
        if self.path.startswith("package:"):
            return read_gguf(resolve_package_file(self.path))
        if self.path.endswith(".gguf"):
            return read_gguf(local)
        try:
            network = AutoModelForCausalLM.from_pretrained(self.path, revision=self.revision)
        except OSError as error:
            raise InputError(
                f"model.path: found neither a folder nor a reachable Hugging Face model {self.path!r} "
                f"({str(error).splitlines()[0][:120]}); check the name, the network, or give a local folder"
            ) from error
        if self.revision is None:
            watcher.get().note(f"{self.path} is read as it is today; model.revision=COMMIT keeps to one state of it")
        return network, load_tokenizer(self.path, self.revision)


def _check_folder(folder: Path) -> None:
    if not read_architectures(folder):
        raise InputError(
            f"{folder}: found no config.json that names an architecture; expected a Hugging Face model folder"
        )
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise InputError(
            f"{folder}: found a model without a tokenizer; expected tokenizer.json beside the weights; "
            "save it there with `tokenizer.save_pretrained`"
        )
