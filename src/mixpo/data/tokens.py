"""Tokenization of prompts and completions, and decoding of completions.

- The tokens of a prompt and its completion are those of their joined text, unless a token spans the boundary.
- The end token is an action of the policy: it is part of the completion and of its mask. It is the token that the chat
  template writes after an assistant's message, which may differ from the tokenizer's `eos_token`. Padding ids are never
  used, because many tokenizers pad with their end token.
- Text cannot inject control tokens: a row with `</s>` or `<|assistant|>` in it cannot end or forge a turn. Only the
  chat template writes control tokens, and prompts if `data.special_tokens` is `parse`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, Prompt, RowError, make_excerpt
from mixpo.data.templates import (
    ASSISTANT_MESSAGE,
    CHAT_TEMPLATE_HINT,
    USER_MESSAGE,
    AssistantTurnFormat,
    infer_assistant_turn_format,
    render_dialogue,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

NEW_PAD_TOKEN = "<|reward_padding|>"
"""Pad token that is added to a reward model's tokenizer without another special token."""
SPECIAL_TOKENS_KEY = "mixpo_special_tokens"
"""Key of tokenizer_config.json; its value `parse` makes control tokens in the text of prompts count as such."""
TEXT_MARK, PLACEHOLDER = "\ufdd0", "\ufdd1"
"""Unicode noncharacters: one is inserted into the names of control tokens that are plain text, the other begins the
placeholder of a real control token."""


def tokenize_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, generation prompt included: up to where the completion starts.

    Messages are rendered by the chat template with its generation prompt. A string is tokenized as it is, after the
    tokenizer's start token, if any (not repeated if the string begins with it) and without tokens that the tokenizer
    appends. Raises `RowError` if the template rejects the messages.
    """
    return tokenize_row(tokenizer, prompt, (), max_tokens=0)[0]


def tokenize_row(
    tokenizer: Tokenizer, prompt: Prompt, completions: Sequence[str], *, max_tokens: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and of each completion with its end token, which one cut to the limit lacks."""
    return _get_row_tokenizer(tokenizer).encode_row(prompt, completions, max_tokens)


def decode_completion(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Text of completion tokens, without special tokens and the chat template's text around the content."""
    return _get_row_tokenizer(tokenizer).decode_completion(list(tokens))


def compute_tokenization_digest(tokenizer: Tokenizer) -> str:
    """Digest, 16 hex digits, of all that determines the tokens of prompts and completions; not of `NEW_PAD_TOKEN`."""
    return _get_row_tokenizer(tokenizer).tokenization_digest


def find_completion_end_token(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a completion: what the chat template writes after a message, or `eos_token`."""
    return _get_row_tokenizer(tokenizer).end_token


def get_control_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the control tokens by name: special tokens, and added tokens that the chat template writes."""
    return _get_row_tokenizer(tokenizer).control_tokens


def check_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Warnings, as texts, about a tokenizer and its chat template. Raises `InputError` if they are unusable."""
    return list(_get_row_tokenizer(tokenizer).warnings)


def find_tokenization_warnings(tokenizer: Tokenizer, rows: Sequence[tuple[Prompt, Sequence[str]]]) -> list[str]:
    """Warnings, as texts, about control tokens named in rows, and roles and completions that the template changes."""
    row_tokenizer = _get_row_tokenizer(tokenizer)
    prompts = [prompt for prompt, _ in rows]
    start = row_tokenizer.start_text
    texts = [prompt.removeprefix(start) if isinstance(prompt, str) else prompt for prompt in prompts]
    warnings = []
    if count := sum(text != prompt for text, prompt in zip(texts, prompts, strict=True)):
        warnings.append(f"{count} of {len(prompts)} prompts begin with {start!r}, which is not written twice")
    treatment = "are plain text; data.special_tokens=parse makes them control tokens"
    if row_tokenizer.parses_control_tokens:
        treatment = "are control tokens, because data.special_tokens=parse"
    warnings += _warn_of_control_tokens(row_tokenizer, "prompts", texts, treatment)
    completions = [completion for _, completions in rows for completion in completions]
    warnings += _warn_of_control_tokens(row_tokenizer, "completions", completions, "are plain text")
    return [*warnings, *_warn_of_changed_roles(tokenizer, prompts), *_warn_of_changed_completions(row_tokenizer, rows)]


def _warn_of_control_tokens(
    row_tokenizer: "_RowTokenizer", text_kind: str, texts: Sequence[Any], treatment: str
) -> list[str]:
    """A list of one warning, with the number of texts that contain names of control tokens; empty if none does."""
    names = list(filter(None, map(row_tokenizer.find_control_name, texts)))
    if not names:
        return []
    count = f"{len(names)} of {len(texts)}"
    return [f"{count} {text_kind} contain names of control tokens, such as {names[0]!r}, which {treatment}"]


def _warn_of_changed_completions(
    row_tokenizer: "_RowTokenizer", rows: Sequence[tuple[Prompt, Sequence[str]]]
) -> list[str]:
    """Warnings about completions that the chat template changes or does not write directly after their prompt."""
    total, misplaced, whitespace, changed = 0, list[str](), 0, list[tuple[str, str]]()
    for prompt, completions in rows:
        if isinstance(prompt, str):
            continue
        total += len(completions)
        try:
            rendered_completions = row_tokenizer.render_completions(prompt, completions)
        except RowError as error:
            dialogue = f"{make_excerpt(prompt[-1]['content'])} and {make_excerpt(completions[0])}"
            raise InputError(f"the dialogue of the prompt {dialogue} {error.problem}") from error
        for completion, rendered in zip(completions, rendered_completions, strict=True):
            if rendered is None:
                misplaced.append(completion)
            elif "".join(completion.split()) not in "".join(rendered.split()):
                changed.append((completion, rendered))
            else:
                whitespace += completion not in rendered
    warnings = []
    if misplaced:
        warnings.append(
            f"the chat template does not write {len(misplaced)} of {total} completions, such as "
            f"{make_excerpt(misplaced[0])}, between their prompt and the end of a turn; they are trained directly "
            f"after the sampling prompt, unlike any rendered dialogue; {CHAT_TEMPLATE_HINT}"
        )
    if changed:
        warnings.append(
            f"the chat template changes the text of {len(changed)} of {total} completions, such as "
            f"{make_excerpt(changed[0][0])} to {make_excerpt(changed[0][1])}; they are trained as rendered; "
            f"{CHAT_TEMPLATE_HINT}"
        )
    if whitespace:
        warnings.append(
            f"the chat template changes the whitespace of {whitespace} of {total} completions; they are trained as "
            "rendered"
        )
    return warnings


def _warn_of_changed_roles(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Warnings about roles whose messages the chat template changes or leaves out, by the first prompt of each role."""
    first: dict[str, list[Message]] = {}
    for prompt in prompts:
        for message in prompt if not isinstance(prompt, str) else ():
            first.setdefault(message["role"], prompt)  # type: ignore[arg-type]
    return [
        f"the chat template changes or leaves out messages from {role!r}; look at them in a preview"
        for role, messages in first.items()
        if any(
            message["role"] == role
            and message["content"].strip() not in render_dialogue(tokenizer, messages, add_generation_prompt=True)
            for message in messages
        )
    ]


def parses_special_tokens(tokenizer: Tokenizer) -> bool:
    """True if names of control tokens in prompts become those tokens (`data.special_tokens=parse`), not plain text."""
    return bool(tokenizer.init_kwargs.get(SPECIAL_TOKENS_KEY) == "parse")


def _get_row_tokenizer(tokenizer: Tokenizer) -> "_RowTokenizer":
    """The `_RowTokenizer` of a tokenizer, kept on it until its template or its special tokens change."""
    cached: _RowTokenizer | None = getattr(tokenizer, "_mixpo_row_tokenizer", None)
    template = tokenizer.chat_template
    template = json.dumps(template, sort_keys=True) if isinstance(template, dict) else template
    special_tokens = tokenizer.eos_token, tokenizer.bos_token, parses_special_tokens(tokenizer)
    cache_key = (template, len(tokenizer), *special_tokens)
    if cached is None or cached.cache_key != cache_key:
        cached = tokenizer._mixpo_row_tokenizer = _RowTokenizer(tokenizer, cache_key)
    return cached


class _RowTokenizer:
    """Encoder of prompts with their completions, and decoder of completions, that wraps one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, cache_key: tuple[Any, ...]) -> None:
        self.cache_key, self.tokenizer = cache_key, tokenizer
        self.parses_control_tokens = parses_special_tokens(tokenizer)
        name = tokenizer.name_or_path
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise InputError(
                f"{name}: found a {type(tokenizer).__name__}, which has no tokenizer.json; expected a tokenizer of the "
                "`tokenizers` library; convert it with transformers and save it"
            )
        # The calls also switch off the truncation and padding that some tokenizer.json files ask for.
        plain, complete = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        position = next((i for i in range(len(complete)) if complete[i : i + len(plain)] == plain), 0)
        self.start_tokens, suffix = list(complete[:position]), list(complete[position + len(plain) :])
        self.start_text = _join_token_names(tokenizer, self.start_tokens)
        self.turn_format = (
            infer_assistant_turn_format(tokenizer)
            if tokenizer.chat_template is not None
            else AssistantTurnFormat("a", "", "", (), ())
        )
        added = {
            token: entry for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip(" ▁\t\r\n")
        }
        end_tokens = [token for token in self._encode_like_transformers(self.turn_format.suffix) if token in added]
        self.trailing_text, self.closing_text = "", ""
        if end_tokens:
            self.trailing_text, end, _ = self.turn_format.suffix.partition(added[end_tokens[0]].content)
            self.closing_text = self.trailing_text + end
        elif tokenizer.eos_token_id is None:
            raise InputError(
                f"{name}: the tokenizer has no end token; expected an `eos_token` or a chat template that ends an "
                "assistant's message with an added token; set one in tokenizer_config.json"
            )
        self.end_token: int = end_tokens[0] if end_tokens else tokenizer.eos_token_id
        template_tokens = {self.end_token}.union(*map(self._encode_like_transformers, self.turn_format.dialogues))
        self.control_tokens: dict[str, int] = {
            entry.content: token
            for token, entry in added.items()
            if (entry.special or token in template_tokens) and len(entry.content) > 1
        }
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._renamed_tokenizer: Any = None
        self._decoding_context = self._encode_like_transformers(self.turn_format.prompt)
        if (
            self.turn_format.dialogues
            and self.decode_completion(self.encode_row([USER_MESSAGE], [ASSISTANT_MESSAGE["content"]], 99)[1][0])
            != ASSISTANT_MESSAGE["content"]
        ):
            self._decoding_context = []  # the tokenizer begins a new word after the prompt's last control token
        self.warnings = [*self.turn_format.warnings]
        if tokenizer.chat_template is not None and not end_tokens:
            self.warnings.append(
                f"{name}: the chat template ends an assistant's message with no token; completions end with "
                f"{tokenizer.eos_token!r}, which earlier turns of a prompt lack"
            )
        if suffix:
            self.warnings.append(
                f"{name}: the tokenizer appends {_join_token_names(tokenizer, suffix)!r} to text; prompts are "
                "tokenized without it"
            )

    @cached_property
    def tokenization_digest(self) -> str:
        """Digest, 16 hex digits, of template, special tokens and the tokenizer's rules, without padding and truncation.

        The same after saving and loading, which changes line ends and the order of named templates.
        """
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] != NEW_PAD_TOKEN]
        rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
        special = {name: str(value) for name, value in self.tokenizer.special_tokens_map.items() if name != "pad_token"}
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True).replace("\\r\\n", "\\n")
        content = json.dumps([template, special, self.parses_control_tokens, self.end_token, rules], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def find_control_name(self, texts: Any) -> str | None:
        """First name of a control token in nested lists and mappings of texts; None if there is none."""
        matches = (match for text in _iterate_strings(texts) if (match := self.control_pattern.search(text)))
        return next((match[0] for match in matches), None)

    def encode_row(
        self, prompt: Prompt, completions: Sequence[str], max_tokens: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of each completion with its end token, cut to `max_tokens` if given."""
        if isinstance(prompt, str):
            prompt = prompt.removeprefix(self.start_text)
        marked, prompt, completions = self._mark_plain_control_names(prompt, completions)
        encode = self._encode_marked if marked else self._encode_like_transformers
        if isinstance(prompt, str):
            start, text, bodies = self.start_tokens, prompt, completions
        else:
            start, text = [], render_dialogue(self.tokenizer, prompt, add_generation_prompt=True)
            rendered = [self._render_completion(prompt, text, c) or self.turn_format.prefix + c for c in completions]
            bodies = [body + self.closing_text for body in rendered]
        ids = encode(text)
        context, context_ids = text, ids
        # Text before a control token does not affect the tokens after it, so a shorter context saves time.
        if bodies and (cut := max((match.start() for match in self.control_pattern.finditer(text)), default=0)):
            shorter = encode(text[cut:])
            if ids[-len(shorter) :] == shorter:
                context, context_ids = text[cut:], shorter
        encoded = []
        for body in bodies:
            joint = encode(context + body)
            starts_alike = joint[: len(context_ids)] == context_ids
            tokens = joint[len(context_ids) :] if starts_alike else _encode_continuation(encode, body)
            encoded.append(tokens if tokens[-1:] == [self.end_token] else [*tokens, self.end_token])
        return start + ids, [tokens[:max_tokens] for tokens in encoded]

    def decode_completion(self, tokens: list[int]) -> str:
        """Text of completion tokens, without special tokens and the template's text around the content."""
        has_end = tokens[-1:] == [self.end_token]
        text, context = (  # with a context, because some decoders drop a space from the first token
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (self._decoding_context + tokens[: len(tokens) - has_end], self._decoding_context)
        )
        text = text[len(context) :].removeprefix(self.turn_format.prefix)
        return text.removesuffix(self.trailing_text) if has_end else text

    def render_completions(self, prompt: list[Message], completions: Sequence[str]) -> list[str | None]:
        """Completions as the chat template writes them; None for one that it does not write right after the prompt."""
        _, prompt, completions = self._mark_plain_control_names(prompt, completions)
        text = render_dialogue(self.tokenizer, prompt, add_generation_prompt=True)
        bodies = [self._render_completion(prompt, text, completion) for completion in completions]
        return [body if body is None else body.replace(TEXT_MARK, "") for body in bodies]

    def _render_completion(self, prompt: list[Message], rendered_prompt: str, completion: str) -> str | None:
        """A completion as rendered between `rendered_prompt` and the turn's suffix; None if it is written elsewhere."""
        if not completion.strip():  # a sampled completion may be empty
            return None
        reply = Message(role="assistant", content=completion)
        dialogue = render_dialogue(self.tokenizer, [*prompt, reply], add_generation_prompt=False)
        suffix = self.turn_format.suffix
        is_longer = len(dialogue) > len(rendered_prompt) + len(suffix)  # a template may leave a message out
        if is_longer and dialogue.startswith(rendered_prompt) and dialogue.endswith(suffix):
            return dialogue[len(rendered_prompt) : len(dialogue) - len(suffix)]
        return None

    def _mark_plain_control_names(self, prompt: Any, completions: Sequence[str]) -> tuple[bool, Any, Sequence[str]]:
        """(True if the row names control tokens, prompt, completions), those names marked that are to be plain text."""
        if self.find_control_name([*completions, prompt]) is None:
            return False, prompt, completions
        marked = prompt if self.parses_control_tokens else _map_strings(prompt, self._mark_control_tokens)
        return True, marked, [self._mark_control_tokens(completion) for completion in completions]

    def _encode_like_transformers(self, text: str) -> list[int]:
        """Token ids of a text as transformers computes them: names of added tokens become those tokens."""
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a text in which only the names of control tokens without a mark become control tokens."""
        if self._renamed_tokenizer is None:
            self._renamed_tokenizer = _build_renamed_backend(
                self.tokenizer, {name: self._make_placeholder(name) for name in self.control_tokens}
            )
        text = self.control_pattern.sub(lambda match: self._make_placeholder(match[0]), text).replace(TEXT_MARK, "")
        return list(self._renamed_tokenizer.encode(text, add_special_tokens=False).ids)

    def _make_placeholder(self, token_name: str) -> str:
        """Name of a control token in the renamed tokenizer, which no text contains."""
        return PLACEHOLDER + chr(0xF0000 + list(self.control_tokens).index(token_name))

    def _mark_control_tokens(self, text: str) -> str:
        """A text with a mark inserted into all names of control tokens, so that they are encoded as plain text."""
        text = text.replace(TEXT_MARK, "").replace(PLACEHOLDER, "")
        while self.control_pattern.search(text):  # repeat for overlapping names
            text = self.control_pattern.sub(lambda match: match[0][0] + TEXT_MARK + match[0][1:], text)
        return text


def _encode_continuation(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Token ids of a text that continues another, without the space that some tokenizers put before the first word."""
    for context in ("a", ".", "\n", "0"):
        context_ids, joint = encode(context), encode(context + text)
        if joint[: len(context_ids)] == context_ids:
            return joint[len(context_ids) :]
    return encode(text)


def _build_renamed_backend(tokenizer: Tokenizer, new_names: Mapping[str, str]) -> Any:
    """A tokenizer of the `tokenizers` library with new names for some tokens, same ids, so that no text names them."""
    from tokenizers import Tokenizer as Backend

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = None
    for entry in content["added_tokens"]:
        entry["content"] = new_names.get(entry["content"], entry["content"])
    model = content["model"]
    vocabulary = model["vocab"].items() if isinstance(model["vocab"], dict) else model["vocab"]
    pieces = [(new_names.get(piece, piece), value) for piece, value in vocabulary]
    model["vocab"] = dict(pieces) if isinstance(model["vocab"], dict) else pieces
    if model.get("unk_token") in new_names:
        model["unk_token"] = new_names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in new_names]
    return Backend.from_str(json.dumps(content))


def _join_token_names(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Names of tokens, joined without a separator."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))


def _iterate_strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested lists and mappings, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _iterate_strings(list(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _iterate_strings(item)


def _map_strings(value: Any, convert: Callable[[str], str]) -> Any:
    """A copy of nested lists and mappings with `convert` applied to every string, keys left out."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, convert) for key, item in value.items()}
    return [_map_strings(item, convert) for item in value] if isinstance(value, Sequence) else value
