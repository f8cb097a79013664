"""Reading and checking of model folders from any source; every problem is an `InputError` of one line.

Transformers fills missing weights with random numbers and can run Python code from a folder. Here every tensor must
be there by name, and no code from a folder is run.
"""

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mixpo.data.errors import InputError, extract_first_line
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
"""Names of weight files, in the order in which transformers looks for them."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types by their names in safetensors."""
SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Keys of a config whose value cannot exceed the longest axis of a tensor."""
SOFTCAP_KEYS = {
    "attn_logit_softcapping": "caps its attention scores",
    "final_logit_softcapping": "caps its logits",
}
EXPECTED_ARCHITECTURE = "expected a decoder of text with plain attention and weights; no other is supported"
DOWNLOAD_HINT = "download or save the folder again"
EXPECTED_FOLDER = "expected a decoder-only language model in a Hugging Face folder"


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder: its config, model class, tokenizer and end tokens; the weights are not loaded."""

    path: Path
    config: PretrainedConfig
    network: type[PreTrainedModel]
    """Transformers class of the model."""
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    """Type of most of its weights."""
    end_tokens: frozenset[int]
    """End tokens in its `generation_config.json`."""


@dataclass(frozen=True)
class TensorHeader:
    """Data type and shape of one tensor in a weight file."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


@contextmanager
def explain_loading_errors(
    source: Path | str, problem: str = "a model that cannot be read", fix: str = EXPECTED_FOLDER
) -> Iterator[None]:
    """Context manager: `InputError` for any error of loading `source` but lack of memory; transformers is silent."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # damaged files raise errors of any type
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise  # on a CPU, PyTorch raises RuntimeError with this text
        raise InputError(
            f"{source}: found {problem} ({type(error).__name__}: {extract_first_line(error)}); {fix}"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_policy_folder(
    folder: Path, load_folder_tokenizer: Callable[[Path], PreTrainedTokenizerBase] | None = None
) -> ModelFolder:
    """Check a causal language model's folder without reading its weights. Raises `InputError`, one line.

    Checks that every file parses, the architecture, that a reward model can be made from it, every tensor's name, shape
    and type, the tokenizer (from `load_folder_tokenizer` if given), its template and end token, and that the embeddings
    have a row for each token.
    """
    config = read_model_config(folder)
    network = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    _check_architecture(folder, config, () if network is None else (network.__name__,), "a causal language model")
    checked = _read_model_folder(folder, config, network, load_folder_tokenizer or load_tokenizer)
    classifier = find_classifier_class(config, folder)
    with explain_loading_errors(folder, "an architecture that no reward model can be made of"), torch.device("meta"):
        find_score_head(classifier(config), folder)
    load_weights(checked, model_class=classifier, allow_missing_head=True, without_values=True)
    return checked


def read_reward_folder(folder: Path) -> ModelFolder:
    """Check a reward model's folder (a one-label classifier) without reading its weights. Raises `InputError`."""
    config = read_model_config(folder)
    expected = "a reward model: a sequence classifier with one label, such as the `reward` stage writes"
    network = find_classifier_class(config, folder)
    _check_architecture(folder, config, (network.__name__,), expected)
    if config.num_labels != 1:
        raise InputError(f"{folder}: found a sequence classifier with {config.num_labels} labels; expected {expected}")
    return _read_model_folder(folder, config, network, load_tokenizer)


def read_model_config(folder: Path) -> PretrainedConfig:
    """Read a folder's `config.json`. Raises `InputError` if a JSON file of the folder is damaged or it has adapters."""
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder; {EXPECTED_FOLDER}")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: found adapters (adapter_config.json); expected a whole model; merge them first with peft's "
            "`merge_and_unload` and save the result"
        )
    contents = {name: _read_json_object(folder / name) for name in JSON_FILES if (folder / name).exists()}
    if "config.json" not in contents:
        raise InputError(f"{folder}: found no config.json; {EXPECTED_FOLDER}")
    raw = contents["config.json"]
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{folder}: found a model that needs Python of its own (auto_map in config.json), which mixpo never runs; "
            "expected an architecture that transformers has"
        )
    if not raw.get("architectures"):
        raise InputError(f"{folder}: found no config.json that names an architecture; {EXPECTED_FOLDER}")
    with explain_loading_errors(folder, "a config.json that cannot be read"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config.get_text_config()
    return config


def read_context_length(folder: Path) -> int | None:
    """Context length, in tokens, of the model in a folder; None if its config has none."""
    context: int | None = getattr(read_model_config(folder).get_text_config(), "max_position_embeddings", None)
    return context


def load_tokenizer(folder: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, or of a Hugging Face id at a commit. Raises `InputError`."""
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
    folder: ModelFolder,
    *,
    allow_missing_head: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    without_values: bool = False,
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
) -> PreTrainedModel:
    """Load a checked folder's model in a float type. Raises `InputError` unless its tensors are exactly the model's.

    `model_class` loads the weights into another class; with `allow_missing_head` only its `score` head may be missing.
    With `without_values` no weight is read: only names and shapes are compared. With `quantize` the matrices of its
    layers are held in 4 bits (NF4), which needs bitsandbytes.
    """
    options: dict[str, Any] = {"device_map": "meta"} if without_values else {}
    if quantize:
        options["quantization_config"] = _make_quantization_config()
    with explain_loading_errors(folder.path, "weights that cannot be read", DOWNLOAD_HINT):
        model, loading_info = (model_class or folder.network).from_pretrained(
            folder.path,
            config=folder.config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    missing = {name for name in loading_info["missing_keys"] if not (allow_missing_head and name.startswith("score."))}
    unexpected = () if allow_missing_head else loading_info["unexpected_keys"]
    shapes = [f"{name} {list(file)} (not {list(needed)})" for name, file, needed in loading_info["mismatched_keys"]]
    problems = [
        f"{what} {_join_first_names(names)}"
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
            f"config.json's sizes; {DOWNLOAD_HINT}"
        )
    loaded: PreTrainedModel = model
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of bitsandbytes: a layout for inference, without gradients
            module.support_avx512bf16_for_cpu = False
    return loaded


def _make_quantization_config() -> BitsAndBytesConfig:
    """Settings of NF4 with quantized scales, as in QLoRA."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def refuse_non_finite_weights(folder: Path, weights: Mapping[str, Tensor], remedy: str) -> None:
    """Raise `InputError`, with folder and remedy in its text, if one of the weights is infinite or nan."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(
                f"{folder}: found infinite or undefined numbers in {name}; expected finite weights; {remedy}"
            )


def let_others_read(folder: Path) -> None:
    """Give the weight files in a folder the permissions of a new file; safetensors lets nobody but the owner read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def read_end_tokens(model: PreTrainedModel, folder: Path) -> frozenset[int]:
    """Ids of the end tokens in a model's generation config; empty if it has none. Raises `InputError` on a bad id."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    if not any("eos_token_id" in _read_json_object(file) for file in files if file.exists()):
        return frozenset()  # else transformers fills in the architecture's default, from another vocabulary
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


def _read_model_folder(
    folder: Path,
    config: PretrainedConfig,
    model_class: type[PreTrainedModel],
    load_folder_tokenizer: Callable[[Path], PreTrainedTokenizerBase],
) -> ModelFolder:
    """Read a folder's tokenizer, tensor headers and end tokens. Raises `InputError` if they do not fit its config."""
    tokenizer = load_folder_tokenizer(folder)
    tensors = _read_tensor_headers_of_folder(folder)
    dtype = _find_common_dtype(folder, tensors)
    _check_config_sizes(folder, config, tensors)
    with explain_loading_errors(folder, "a chat template that does not render", "set another as `model.chat_template`"):
        check_tokenizer(tokenizer)
    checked = ModelFolder(folder, config, model_class, tokenizer, dtype, frozenset())
    model = load_weights(checked, without_values=True)
    checked = replace(checked, end_tokens=read_end_tokens(model, folder))
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise InputError(
            f"{folder}: found a {type(model).__name__}, whose attention has sinks; {EXPECTED_ARCHITECTURE}"
        )
    rows, highest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        text = tokenizer.convert_ids_to_tokens(highest)
        raise InputError(
            f"{folder}: found a tokenizer with token {highest} ({text!r}) and embeddings of {rows} rows; expected a "
            "row for every token; use the model's own tokenizer, or `model.resize_token_embeddings(len(tokenizer))`"
        )
    return checked


def _check_architecture(folder: Path, config: PretrainedConfig, classes: tuple[str, ...], expected: str) -> None:
    """Raise `InputError` if a config is not of one of these classes, or of a model that mixpo does not support."""
    architectures = config.architectures
    if not isinstance(architectures, list) or architectures[0] not in classes:
        raise InputError(
            f"{folder}: found {architectures} of model_type {config.model_type!r}; expected {expected}"
            + (f" ({classes[0]})" if classes else "; transformers has none of that type")
        )
    text = config.get_text_config()
    quantization = getattr(config, "quantization_config", None)
    softcaps = [effect for key, effect in SOFTCAP_KEYS.items() if getattr(text, key, None) is not None]
    problems = {
        "an encoder-decoder": config.is_encoder_decoder,
        f"a model of several parts ({', '.join(config.sub_configs)})": text is not config,
        "quantized weights (quantization_config)": quantization is not None,
        f"a {architectures[0]}, which {' and '.join(softcaps)}": softcaps,
    }
    for problem in filter(problems.get, problems):
        raise InputError(f"{folder}: found {problem}; {EXPECTED_ARCHITECTURE}")


def _read_json_object(file: Path) -> dict[str, Any]:
    """Content of a JSON file as a dict. Raises `InputError` if it is damaged or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf8"))
    except OSError as error:
        problem = f"found a file that cannot be read ({error.strerror})"
        raise InputError(f"{file}: {problem}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        problem = f"found something other than JSON ({extract_first_line(error)})"
        raise InputError(f"{file}: {problem}; {DOWNLOAD_HINT}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: found {str(content)[:40]!r}; expected a JSON object; save the folder again")
    return content


def _read_tensor_headers_of_folder(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors in a folder's weight files, by tensor name. Raises `InputError` if one is damaged."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise InputError(
            f"{folder}: found no weights ({' or '.join(WEIGHT_FILES[::2])}); expected them beside config.json"
        )
    files = [folder / name]
    if name.endswith(".index.json"):
        shards = _read_json_object(folder / name).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
            raise InputError(f"{folder / name}: found no weight_map of file names; {DOWNLOAD_HINT}")
        elsewhere = [file for file in shards.values() if Path(file).name != file]
        if elsewhere:
            raise InputError(f"{folder / name}: found {elsewhere[0]!r}; expected names of files beside it")
        files = [folder / file for file in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(f"{folder}: found no {file.name}, which {name} names; download the folder again")
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        with explain_loading_errors(file, "weights that cannot be read", f"the file may be torn; {DOWNLOAD_HINT}"):
            tensors |= _read_tensor_headers(file)
    if not tensors:
        raise InputError(f"{files[0]}: found no tensors; {DOWNLOAD_HINT}")
    return tensors


def _read_tensor_headers(file: Path) -> dict[str, TensorHeader]:
    """Headers of the tensors in one weight file, by tensor name; no weights are read."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(FLOAT_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    state = torch.load(file, map_location="meta", weights_only=True)
    return {
        name: TensorHeader(
            tensor.dtype if tensor.dtype in FLOAT_DTYPES.values() else str(tensor.dtype), tuple(tensor.shape)
        )
        for name, tensor in state.items()
    }


def _find_common_dtype(folder: Path, headers: dict[str, TensorHeader]) -> torch.dtype:
    """Data type of most weights. Raises `InputError` if a tensor is not of floating-point numbers."""
    counts = Counter[torch.dtype]()
    for name, tensor in headers.items():
        if isinstance(tensor.dtype, torch.dtype):
            counts[tensor.dtype] += torch.Size(tensor.shape).numel()
        elif len(tensor.shape) in (1, 2, 3) and not name.endswith("position_ids"):  # not an old mask or counter
            raise InputError(
                f"{folder}: found tensor {name} of type {tensor.dtype}; expected weights in float32, bfloat16 or "
                "float16; save the model without quantization"
            )
    if not counts:
        raise InputError(f"{folder}: found no floating-point weights; {DOWNLOAD_HINT}")
    return counts.most_common(1)[0][0]


def _check_config_sizes(folder: Path, config: PretrainedConfig, headers: dict[str, TensorHeader]) -> None:
    """Raise `InputError` if sizes in a config exceed those of the tensors, before memory for a model is reserved."""
    text = config.get_text_config()
    longest = max((size for tensor in headers.values() for size in tensor.shape), default=0)
    bounds = {**dict.fromkeys(SIZE_KEYS, longest), "num_hidden_layers": len(headers)}
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


def _join_first_names(names: Iterable[str], max_names: int = 3) -> str:
    """First `max_names` names in order, joined by commas, and the number of the others, as text."""
    ordered = sorted(names)
    rest = len(ordered) - max_names
    return ", ".join(ordered[:max_names]) + (f" and {rest} more" if rest > 0 else "")
