"""Model folders as they come from anywhere, read with suspicion: what is missing or odd is one `InputError` line.

Nothing is filled in. Transformers draws random numbers for weights that a folder lacks, and runs Python that a folder
brings along when it may; here every tensor is accounted for by name, and no folder's code is ever run.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mixpo.data.errors import InputError
from mixpo.data.tokens import check_tokenizer
from mixpo.models.reward_heads import find_classifier_class, find_score_head

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""By their names in safetensors."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Entries of a config that some tensor is at least as long as."""
CAPPED = {
    "attn_logit_softcapping": "caps its attention scores",
    "final_logit_softcapping": "caps its logits",
}
UNSUPPORTED = "expected a decoder of text with plain attention and weights; no other is supported"
NEEDS = "expected a decoder-only language model in a Hugging Face folder"


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose every file was looked at, and no weight read."""

    path: Path
    config: PretrainedConfig
    network: type[PreTrainedModel]
    """The class that its weights belong to."""
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    """Of most of its weights."""
    end_tokens: frozenset[int]
    """The tokens that end a completion by its `generation_config.json`."""


@dataclass(frozen=True)
class TensorHeader:
    """What a weight file says of one tensor."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


@contextmanager
def explain_loading_errors(
    source: Path | str, found: str = "a model that cannot be read", fix: str = NEEDS
) -> Iterator[None]:
    """Turn whatever transformers raises on a damaged `source` into an `InputError`, and keep it silent.

    A lack of memory says nothing of the source, and stays what it is.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # no list of types holds for files that anybody may have written
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise  # the last are RuntimeErrors of PyTorch on a CPU, and ENOMEM
        raise InputError(f"{source}: found {found} ({type(error).__name__}: {first_line(error)}); {fix}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 160 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def read_policy_folder(
    folder: Path, read_tokenizer: Callable[[Path], PreTrainedTokenizerBase] | None = None
) -> ModelFolder:
    """Check a causal language model's folder without reading its weights. Raises `InputError`, one line.

    Checked: that every file parses, the architecture, that a reward model can be made from it, every tensor's name,
    shape and type, the tokenizer (`load_tokenizer`'s, or another), its template and end token, and that the embeddings
    hold all of its tokens.
    """
    config = read_config(folder)
    network = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    _check_architecture(folder, config, () if network is None else (network.__name__,), "a causal language model")
    checked = _checked(folder, config, network, read_tokenizer or load_tokenizer)
    classifier = find_classifier_class(config, folder)
    with explain_loading_errors(folder, "an architecture that no reward model can be made of"), torch.device("meta"):
        find_score_head(classifier(config), folder)
    load_weights(checked, network=classifier, new_head=True, meta=True)
    return checked


def read_reward_folder(folder: Path) -> ModelFolder:
    """Check a reward model's folder without reading its weights: a sequence classifier with one label."""
    config = read_config(folder)
    expected = "a reward model: a sequence classifier with one label, such as the `reward` stage writes"
    network = find_classifier_class(config, folder)
    _check_architecture(folder, config, (network.__name__,), expected)
    if config.num_labels != 1:
        raise InputError(f"{folder}: found a sequence classifier with {config.num_labels} labels; expected {expected}")
    return _checked(folder, config, network, load_tokenizer)


def read_config(folder: Path) -> PretrainedConfig:
    """A folder's `config.json`, after every JSON file beside it was seen to hold an object."""
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder; {NEEDS}")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: found adapters (adapter_config.json); expected a whole model; merge them first with peft's "
            "`merge_and_unload` and save the result"
        )
    contents = {name: _read_object(folder / name) for name in JSON_FILES if (folder / name).exists()}
    if "config.json" not in contents:
        raise InputError(f"{folder}: found no config.json; {NEEDS}")
    raw = contents["config.json"]
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{folder}: found a model that needs Python of its own (auto_map in config.json), which mixpo never runs; "
            "expected an architecture that transformers has"
        )
    if not raw.get("architectures"):
        raise InputError(f"{folder}: found no config.json that names an architecture; {NEEDS}")
    with explain_loading_errors(folder, "a config.json that cannot be read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config.get_text_config()
    return config


def read_context(folder: Path) -> int | None:
    """How many tokens a model's positions reach; None where its config sets no end."""
    context: int | None = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    return context


def load_tokenizer(folder: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of a Hugging Face id at a commit."""
    fix = "expected tokenizer.json beside the weights; save it there with `tokenizer.save_pretrained`"
    local = Path(folder).is_dir()
    if local and not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: found a model without a tokenizer; {fix}")
    with explain_loading_errors(folder, "a tokenizer that cannot be read", fix):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder),
            revision=revision or "main",
            trust_remote_code=False,
            local_files_only=local,
        )
        template = tokenizer.chat_template
        if not isinstance(template, str | dict | None):
            raise InputError(f"{folder}: found a chat_template that is a {type(template).__name__}; expected a text")
        if not tokenizer.get_vocab():
            raise InputError(f"{folder}: found a tokenizer without tokens; {fix}")
    return tokenizer


def load_weights(
    folder: ModelFolder, *, new_head: bool = False, network: type[PreTrainedModel] | None = None, meta: bool = False
) -> PreTrainedModel:
    """The folder's model in float32 with transformers' own attention, every tensor of it from the folder.

    `network` takes the weights into another class; with `new_head` its `score` head alone may be missing. With `meta`
    no weight is read, only names and shapes are compared.
    """
    with explain_loading_errors(folder.path, "weights that cannot be read", "download or save the folder again"):
        model, found = (network or folder.network).from_pretrained(
            folder.path,
            config=folder.config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=False,
            local_files_only=True,
            **({"device_map": "meta"} if meta else {}),
        )
    missing = {name for name in found["missing_keys"] if not (new_head and name.startswith("score."))}
    unexpected = () if new_head else found["unexpected_keys"]
    shapes = [f"{name} {list(file)} (not {list(needed)})" for name, file, needed in found["mismatched_keys"]]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("no tensor", missing),
            ("a tensor that the architecture has not,", unexpected),
            ("another shape:", shapes),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{folder.path}: found {'; '.join(problems)}; expected exactly the weights of a {type(model).__name__} of "
            "config.json's sizes; download or save the folder again"
        )
    loaded: PreTrainedModel = model
    return loaded


def generation_end_tokens(model: PreTrainedModel, folder: Path) -> frozenset[int]:
    """The tokens that end a completion by the model's `generation_config`; none where it has none."""
    named = [folder / name for name in ("generation_config.json", "config.json")]
    if not any("eos_token_id" in _read_object(file) for file in named if file.exists()):
        return frozenset()  # transformers fills in what is usual for the architecture, of any vocabulary
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    vocabulary = model.config.get_text_config().vocab_size
    wrong = [end for end in ends if type(end) is not int or not 0 <= end < vocabulary]
    if wrong:
        raise InputError(
            f"{folder}: found eos_token_id {wrong[0]!r} in generation_config.json or config.json; expected a token of "
            f"the vocabulary, 0 to {vocabulary - 1}"
        )
    return frozenset(ends)


def _checked(
    folder: Path,
    config: PretrainedConfig,
    network: type[PreTrainedModel],
    read_tokenizer: Callable[[Path], PreTrainedTokenizerBase],
) -> ModelFolder:
    tokenizer = read_tokenizer(folder)
    tensors = _read_tensors(folder)
    dtype = _common_dtype(folder, tensors)
    _refuse_absurd_sizes(folder, config, tensors)
    with explain_loading_errors(folder, "a chat template that does not render", "set another as `model.chat_template`"):
        check_tokenizer(tokenizer)
    checked = ModelFolder(folder, config, network, tokenizer, dtype, frozenset())
    model = load_weights(checked, meta=True)
    checked = replace(checked, end_tokens=generation_end_tokens(model, folder))
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise InputError(f"{folder}: found a {type(model).__name__}, whose attention has sinks; {UNSUPPORTED}")
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        text = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"{folder}: found a tokenizer with token {highest} ({text!r}) and embeddings of {rows} rows; expected a "
            "row for every token; use the model's own tokenizer, or `model.resize_token_embeddings(len(tokenizer))`"
        )
    return checked


def _check_architecture(folder: Path, config: PretrainedConfig, networks: tuple[str, ...], expected: str) -> None:
    """Refuse what is known by its config to be another kind of model, or one that mixpo would compute wrongly."""
    named = config.architectures
    if not isinstance(named, list) or named[0] not in networks:
        raise InputError(
            f"{folder}: found {named} of model_type {config.model_type!r}; expected {expected}"
            + (f" ({networks[0]})" if networks else "; transformers has none of that type")
        )
    text = config.get_text_config()
    quantization = getattr(config, "quantization_config", None)
    capped = [words for key, words in CAPPED.items() if getattr(text, key, None) is not None]
    found = (
        "an encoder-decoder"
        if config.is_encoder_decoder
        else f"a model of several parts ({', '.join(config.sub_configs)})"
        if text is not config
        else "quantized weights (quantization_config)"
        if quantization is not None
        else f"a {named[0]}, which {' and '.join(capped)}"
        if capped
        else None
    )
    if found:
        raise InputError(f"{folder}: found {found}; {UNSUPPORTED}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf8"))
    except OSError as error:
        raise InputError(
            f"{file}: found a file that cannot be read ({error.strerror}); expected a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: found something other than JSON ({first_line(error)}); download or save the folder again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: found {str(content)[:40]!r}; expected a JSON object; save the folder again")
    return content


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    """Names, types and shapes of all tensors in a folder's weight files, from their headers."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise InputError(
            f"{folder}: found no weights ({' or '.join(WEIGHT_FILES[::2])}); expected them beside config.json"
        )
    files = [folder / name]
    if name.endswith(".index.json"):
        shards = _read_object(folder / name).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
            raise InputError(f"{folder / name}: found no weight_map of file names; download or save the folder again")
        elsewhere = [file for file in shards.values() if Path(file).name != file]
        if elsewhere:
            raise InputError(f"{folder / name}: found {elsewhere[0]!r}; expected names of files beside it")
        files = [folder / file for file in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(f"{folder}: found no {file.name}, which {name} names; download the folder again")
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        with explain_loading_errors(
            file, "weights that cannot be read", "the file may be torn; download or save the folder again"
        ):
            tensors |= _headers(file)
    if not tensors:
        raise InputError(f"{files[0]}: found no tensors; download or save the folder again")
    return tensors


def _headers(file: Path) -> dict[str, TensorHeader]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(FLOATS.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    state = torch.load(file, map_location="meta", weights_only=True)
    return {
        name: TensorHeader(tensor.dtype if tensor.dtype in FLOATS.values() else str(tensor.dtype), tuple(tensor.shape))
        for name, tensor in state.items()
    }


def _common_dtype(folder: Path, tensors: dict[str, TensorHeader]) -> torch.dtype:
    """The type of most weights. Raises `InputError` where one is no floating-point number, or packed."""
    counts: dict[torch.dtype, int] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor.dtype, torch.dtype):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
        elif len(tensor.shape) in (1, 2, 3) and not name.endswith("position_ids"):  # not an old mask or counter
            raise InputError(
                f"{folder}: found tensor {name} of type {tensor.dtype}; expected weights in float32, bfloat16 or "
                "float16; save the model without quantization"
            )
    if not counts:
        raise InputError(f"{folder}: found no floating-point weights; download or save the folder again")
    return max(counts, key=lambda dtype: counts[dtype])


def _refuse_absurd_sizes(folder: Path, config: PretrainedConfig, tensors: dict[str, TensorHeader]) -> None:
    """Refuse a config of which a model could not even be laid out, before anything is."""
    text = config.get_text_config()
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    bounds = {**dict.fromkeys(SIZES, longest), "num_hidden_layers": len(tensors)}
    for key, bound in bounds.items():
        size = getattr(text, key, None)
        if isinstance(size, int) and not 0 < size <= bound:
            raise InputError(
                f"{folder}: found {key} {size} in config.json, and weights that allow 1 to {bound}; expected the "
                "config that the weights were saved with"
            )
    pad, vocabulary = getattr(text, "pad_token_id", None), text.vocab_size
    if pad is not None and not (isinstance(pad, int) and -vocabulary <= pad < vocabulary):  # -1 is the last row
        raise InputError(
            f"{folder}: found pad_token_id {pad!r} in config.json; expected a token of the vocabulary, 0 to "
            f"{vocabulary - 1}, or none"
        )


def _some(names: Iterable[str], most: int = 3) -> str:
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")
