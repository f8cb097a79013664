"""Tiny models in the shapes of today's families: real tokenizers with each family's added tokens and chat template.

Nothing is downloaded: the tokenizers are trained on a few sentences, the weights are random. What the models share with
their big siblings is what goes wrong: which tokens are special, which are named, what ends a turn, what is prepended to
text, whether ids reach beyond the tokenizer.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

SENTENCES = (
    "Hello world. The world is round, and the answer is short.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps in the sun.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system model Human Assistant User Instruction Response",
    "I would like to know how to bake bread; it takes flour, water, salt and yeast.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    "No, that is not right: 2 + 2 = 4, and 10 / 4 = 2.5!",
    "Größe, naïve, café, 東京, 指示 応答.",
)


@dataclass(frozen=True)
class ModelFamily:
    """What a family's folder holds."""

    model_type: str
    tokenizer: Callable[[], Tokenizer]
    names: dict[str, str]
    """Named special tokens: bos_token, eos_token, ..."""
    template: str | None
    special: tuple[str, ...] = ()
    """Added tokens that are flagged special, beyond those of the vocabulary."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not flagged special."""
    swallow: bool = False
    """Whether special added tokens take the whitespace behind them (`rstrip`)."""
    named: tuple[str, ...] = ()
    """Special tokens that the tokenizer names beside bos, eos, unk and pad."""
    start: str | None = None
    """What the post-processor puts before plain text."""
    generation_ends: tuple[str, ...] = ()
    """`eos_token_id` of generation_config; eos alone if empty."""
    padding: int = 0
    """Ids of the model beyond the tokenizer's."""
    config: dict[str, Any] = field(default_factory=dict)


def byte_level(*first: str, whitespace: bool = False, nfc: bool = False) -> Tokenizer:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; `first` are the special tokens with the lowest ids."""
    tokenizer = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if nfc:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420 + len(first),
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if whitespace:
        tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(12, 1, -1)])
    return tokenizer


BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _pieces(lines: list[str]) -> list[tuple[str, float]]:
    """Pieces of words with their log-frequencies (the library's own trainer draws another vocabulary every time)."""
    words = [f"▁{word}" for line in lines for word in line.split()]
    pieces = Counter(
        word[start:end] for word in words for start in range(len(word)) for end in range(start + 1, start + 7)
    )
    frequent = [(piece, count) for piece, count in pieces.items() if count > 2 or len(piece) == 1]
    return [*((piece, log(count / len(words))) for piece, count in frequent), *((byte, -30.0) for byte in BYTES)]


def sentencepiece(*first: str, scheme: str, unigram: bool = False) -> Tokenizer:
    """BPE or Unigram over words marked by `▁`, with byte fallback, as converted from SentencePiece.

    `scheme`: `prepend` (a normalizer writes the mark, as Llama 2), `first` or `always` (Metaspace before the first word
    or before every piece between added tokens), `never` (as Gemma).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme in ("prepend", "never"):
        before = [normalizers.Prepend("▁")] if scheme == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    lines = [line.replace("\n", " ") for line in SENTENCES[:-1]]  # what these do not hold falls back to bytes
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*first, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    if unigram:
        tokenizer.model = models.Unigram([(piece, 0.0) for piece in first] + _pieces(lines), 0, byte_fallback=True)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in first]
    content["pre_tokenizer"] = content["pre_tokenizer"] if scheme in ("first", "always") else None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])])
    return tokenizer


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'assistant' %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GRANITE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + "
    "'<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
FALCON = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}"
    "{% elif message['role'] == 'assistant' %}{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLM_JP = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\n\n### 指示:\n' + message['content'] }}{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\n### 応答:\n' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}{% endfor %}"
)

_SP = ("<unk>", "<s>", "</s>")
_SP_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

_QWEN2 = ModelFamily(
    "qwen2",
    lambda: byte_level(nfc=True),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    CHATML_WITH_SYSTEM,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    named=("<|im_start|>", "<|im_end|>"),
    generation_ends=("<|im_end|>", "<|endoftext|>"),
    padding=27,
)
_FIRST_GEMMA = ModelFamily(
    "gemma",
    lambda: sentencepiece("<pad>", "<eos>", "<bos>", "<unk>", scheme="never"),
    {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    GEMMA,
    special=("<start_of_turn>", "<end_of_turn>"),
    named=("<start_of_turn>", "<end_of_turn>"),
    plain=("\n\n", "▁▁", "<table>"),
    start="<bos>",
    config={"head_dim": 8},
)

_FAMILIES = {
    "llama2": ModelFamily(
        "llama",
        lambda: sentencepiece(*_SP, scheme="prepend"),
        _SP_NAMES,
        LLAMA2,
        start="<s>",
        config={"pad_token_id": None},
    ),
    # A base model with a template: its eos is not what ends a turn.
    "llama3": ModelFamily(
        "llama",
        lambda: byte_level(nfc=True),
        {"bos_token": _LLAMA3[0], "eos_token": _LLAMA3[1]},
        LLAMA3,
        special=_LLAMA3,
        start=_LLAMA3[0],
        generation_ends=(_LLAMA3[1], _LLAMA3[4]),
    ),
    "mistral": ModelFamily(
        "mistral",
        lambda: sentencepiece(*_SP, "[INST]", "[/INST]", scheme="first"),
        _SP_NAMES,
        MISTRAL,
        start="<s>",
        config={"sliding_window": 64},
    ),
    # A fine-tune whose turn markers are plain added tokens, and whose eos is still the old one.
    "chatml-mistral": ModelFamily(
        "mistral",
        lambda: sentencepiece(*_SP, scheme="always"),
        _SP_NAMES,
        CHATML,
        plain=("<|im_end|>", "<|im_start|>"),
        start="<s>",
    ),
    "qwen2": _QWEN2,
    "qwen3": replace(
        _QWEN2,
        model_type="qwen3",
        template=QWEN3,
        named=(),
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        config={"head_dim": 8},
    ),
    "gemma": _FIRST_GEMMA,
    "gemma2": replace(_FIRST_GEMMA, model_type="gemma2", config={"head_dim": 8, "sliding_window": 64}),
    "gemma3": replace(
        _FIRST_GEMMA,
        model_type="gemma3_text",
        template=GEMMA3,
        special=("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        named=(),
        generation_ends=("<eos>", "<end_of_turn>"),
        padding=16,
        config={"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ModelFamily(
        "phi3",
        lambda: sentencepiece(*_SP, scheme="prepend"),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        PHI3,
        special=_PHI3,
        swallow=True,
        generation_ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        padding=21,
    ),
    "gpt2": ModelFamily("gpt2", lambda: byte_level("<|endoftext|>"), _END, None),
    "pythia": ModelFamily(
        "gpt_neox", lambda: byte_level("<|endoftext|>", "<|padding|>", whitespace=True), _END, None, padding=16
    ),
    "olmo2": ModelFamily(
        "olmo2",
        lambda: byte_level(nfc=True),
        {**_END, "pad_token": "<|pad|>"},
        OLMO2,
        special=("<|endoftext|>", "<|pad|>"),
        padding=30,
    ),
    "granite": ModelFamily(
        "granite",
        lambda: byte_level("<|end_of_text|>"),
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
        GRANITE,
        special=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        named=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        config={"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
    ),
    "opt": ModelFamily(
        "opt",
        lambda: byte_level("<s>", "<pad>", "</s>", "<unk>"),
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
        None,
        start="</s>",
        config={"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    # Its template ends a turn with nothing.
    "falcon": ModelFamily(
        "falcon",
        lambda: byte_level(">>TITLE<<", ">>ABSTRACT<<", ">>QUESTION<<", "<|endoftext|>"),
        {"eos_token": "<|endoftext|>"},
        FALCON,
        named=(">>TITLE<<", ">>ABSTRACT<<", ">>QUESTION<<"),
    ),
    "bloom": ModelFamily(
        "bloom",
        lambda: byte_level("<unk>", "<s>", "</s>", "<pad>"),
        {**_SP_NAMES, "pad_token": "<pad>"},
        None,
        padding=40,
    ),
    "deepseek": ModelFamily(
        "llama",
        lambda: byte_level(nfc=True),
        {"bos_token": _DEEPSEEK[0], "eos_token": _DEEPSEEK[1], "pad_token": _DEEPSEEK[1]},
        DEEPSEEK,
        special=_DEEPSEEK,
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        start=_DEEPSEEK[0],
        padding=19,
    ),
    # Its turn markers are plain text, and its pad token ends the turns.
    "zephyr": ModelFamily(
        "llama",
        lambda: sentencepiece(*_SP, scheme="prepend"),
        {**_SP_NAMES, "pad_token": "</s>"},
        ZEPHYR,
        start="<s>",
    ),
    "smollm2": ModelFamily(
        "llama",
        lambda: byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {**_END, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        CHATML_WITH_SYSTEM,
        named=("<|im_start|>", "<|im_end|>"),
        config={"tie_word_embeddings": True},
    ),
    "llm-jp": ModelFamily(
        "llama",
        lambda: sentencepiece(*_SP, "<pad>", scheme="first", unigram=True),
        {**_SP_NAMES, "pad_token": "<pad>"},
        LLM_JP,
        start="<s>",
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Names that `make_family` and `family_tokenizer` take."""


@lru_cache
def _base_tokenizer(name: str) -> str:
    return _FAMILIES[name].tokenizer().to_str()


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its chat template."""
    family = _FAMILIES[name]
    tokenizer = Tokenizer.from_str(_base_tokenizer(name))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=family.swallow) for text in family.special]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    if family.start is not None:
        first = (family.start, tokenizer.token_to_id(family.start))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.start} $A", pair=f"{family.start} $A {family.start} $B", special_tokens=[first]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(family.named),
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        **family.names,
    )
    wrapped.chat_template = family.template
    return wrapped


def make_family(name: str, folder: Path) -> Path:
    """Write a complete Hugging Face folder of a two-layer model of a family, and return it."""
    family, tokenizer = _FAMILIES[name], family_tokenizer(name)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    size = {
        "vocab_size": len(tokenizer) + family.padding,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    grouped = {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": False}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    sizes = {"gpt2": gpt2, "opt": {}, "bloom": {}, "falcon": {}, "gpt_neox": {"intermediate_size": 48}}
    shape = sizes.get(family.model_type, grouped)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **{**size, **shape, **ids, **family.config})
    model = AutoModelForCausalLM.from_config(config)
    ends = [tokenizer.convert_tokens_to_ids(text) for text in family.generation_ends]
    model.generation_config = GenerationConfig(**{**ids, **({"eos_token_id": ends} if ends else {})})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
