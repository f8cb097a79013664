"""From rows to token ids and back: what a prompt is, and where a completion begins and ends.

- A prompt followed by its completion has the tokens that the tokenizer gives to their joined text, wherever a token
  does not span the boundary.
- The end token is an action of the policy: it belongs to the completion and to its mask. It is what the chat template
  writes behind an assistant's message, whatever the tokenizer names. Nothing here looks at padding ids, because many
  tokenizers pad with their end token.
- Text stays text: a row that holds `</s>` or `<|assistant|>` cannot end or forge a turn. Only the chat template writes
  control tokens, and prompts where `data.special_tokens` is `parse`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, Prompt, RowError, excerpt
from mixpo.data.templates import ANSWER, ASK, REMEDY, TurnFormat, read_turn_format, render_dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

SPECIAL_TOKENS = "mixpo_special_tokens"
"""Key of tokenizer_config.json: `parse` where control tokens in the text of prompts count as such."""
MARK, STAND_IN = "\ufdd0", "\ufdd1"
"""Noncharacters, which no text should hold: within the name of a control token that is text, and before the number of
one that is not."""


def tokenize_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, up to where the completion starts.

    Messages go through the tokenizer's chat template, with its generation prompt. A string is taken as it is, after the
    tokenizer's own start token if it has one, which it may hold itself; what the tokenizer would put behind it is left
    out. Raises `RowError` on messages that the template refuses.
    """
    return tokenize_row(tokenizer, prompt, (), limit=0)[0]


def tokenize_row(
    tokenizer: Tokenizer, prompt: Prompt, completions: Sequence[str], *, limit: int
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt (`tokenize_prompt`), and of each of its completions with its end token.

    Completions are cut to `limit` tokens, and then have no end token.
    """
    return _codec(tokenizer).encode_row(prompt, completions, limit)


def decode_completion(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of completion tokens, without the end token or any other special token.

    What the chat template writes between a prompt and an assistant's message, or behind it, is not part of the text.
    """
    return _codec(tokenizer).decode(list(tokens))


def find_end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion.

    The token that the chat template writes after an assistant's message, and the tokenizer's end-of-sequence token
    where there is no template or the template writes none.
    """
    return _codec(tokenizer).end


def list_control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens that part and end turns, by name: special ones, and all that the chat template writes."""
    return _codec(tokenizer).control


def check_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """What is worth knowing of how a tokenizer and its chat template treat rows, a line each.

    Raises `InputError` if completions cannot be trained and sampled with them.
    """
    return list(_codec(tokenizer).warnings)


def check_rows(tokenizer: Tokenizer, rows: Sequence[tuple[Prompt, Sequence[str]]]) -> list[str]:
    """What a person should know of how prompts and their completions are read, a line for each kind of thing, if any.

    How many hold control tokens and what becomes of them, roles whose messages the chat template leaves out, and
    completions that it does not write as they are.
    """
    codec = _codec(tokenizer)
    prompts = [prompt for prompt, _ in rows]
    started = sum(isinstance(prompt, str) and codec.without_start(prompt) != prompt for prompt in prompts)
    texts = [codec.without_start(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    lines = []
    if started:
        lines.append(f"{started} of {len(prompts)} prompts begin with {codec.start_text!r}, which is not written twice")
    parsed = "are taken as such, as data.special_tokens=parse asks"
    text = "stay text; data.special_tokens=parse takes them as control tokens"
    lines += _count_names(codec, "prompts", texts, parsed if codec.parses else text)
    lines += _count_names(codec, "completions", [text for _, texts in rows for text in texts], "stay text")
    return [*lines, *_check_roles(tokenizer, prompts), *_check_rendering(codec, rows)]


def _count_names(codec: "_Codec", what: str, texts: Sequence[Any], fate: str) -> list[str]:
    """Say how many texts hold names of control tokens."""
    held = [names[0] for text in texts if (names := [name for part in _strings(text) for name in codec.find(part)])]
    if not held:
        return []
    return [f"{len(held)} of {len(texts)} {what} hold names of control tokens, such as {held[0]!r}, which {fate}"]


def _check_rendering(codec: "_Codec", rows: Sequence[tuple[Prompt, Sequence[str]]]) -> list[str]:
    """Say how many completions the chat template does not write as they are, or not behind their prompt."""
    total, apart, spaces, changed = 0, list[str](), 0, list[tuple[str, str]]()
    for prompt, completions in rows:
        if isinstance(prompt, str):
            continue
        total += len(completions)
        try:
            rendered = codec.written(prompt, completions)
        except RowError as error:
            dialogue = f"the dialogue of the prompt {excerpt(prompt[-1]['content'])} and {excerpt(completions[0])}"
            raise InputError(f"{dialogue} {error.problem}") from error
        for completion, written in zip(completions, rendered, strict=True):
            if written is None:
                apart.append(completion)
            elif "".join(completion.split()) not in "".join(written.split()):
                changed.append((completion, written))
            else:
                spaces += completion not in written
    lines = []
    if apart:
        lines.append(
            f"the chat template does not write {len(apart)} of {total} completions, such as {excerpt(apart[0])}, "
            "between their prompt and the end of a turn; they are trained on behind the prompt that is sampled from, "
            f"which no rendered dialogue shows; {REMEDY}"
        )
    if changed:
        lines.append(
            f"the chat template changes the text of {len(changed)} of {total} completions, such as "
            f"{excerpt(changed[0][0])} to {excerpt(changed[0][1])}; they are trained on as it writes them; {REMEDY}"
        )
    if spaces:
        lines.append(
            f"the chat template changes the whitespace of {spaces} of {total} completions, which are trained on as it "
            "writes them"
        )
    return lines


def _check_roles(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    """Roles whose messages a rendered prompt does not hold, looked at in the first prompt that has them."""
    first: dict[str, list[Message]] = {}
    for prompt in prompts:
        for message in prompt if not isinstance(prompt, str) else ():
            first.setdefault(message["role"], prompt)  # type: ignore[arg-type]
    return [
        f"the chat template does not write messages from {role!r} as they are; look at them in a preview"
        for role, messages in first.items()
        if any(
            one["role"] == role and one["content"].strip() not in render_dialogue(tokenizer, messages, prompt=True)
            for one in messages
        )
    ]


def parses_special_tokens(tokenizer: Tokenizer) -> bool:
    """Whether control tokens in the text of prompts count as such (`data.special_tokens`)."""
    return bool(tokenizer.init_kwargs.get(SPECIAL_TOKENS) == "parse")


def _codec(tokenizer: Tokenizer) -> "_Codec":
    """The tokenizer's codec, made anew when its template or its special tokens have changed."""
    known: _Codec | None = getattr(tokenizer, "_mixpo_codec", None)
    state = _state(tokenizer)
    if known is None or known.state != state:
        known = tokenizer._mixpo_codec = _Codec(tokenizer, state)
    return known


def _state(tokenizer: Tokenizer) -> tuple[Any, ...]:
    template = tokenizer.chat_template
    template = json.dumps(template, sort_keys=True) if isinstance(template, dict) else template
    return template, tokenizer.eos_token, tokenizer.bos_token, len(tokenizer), parses_special_tokens(tokenizer)


class _Codec:
    """How one tokenizer turns rows into tokens and tokens into text."""

    def __init__(self, tokenizer: Tokenizer, state: tuple[Any, ...]) -> None:
        self.state, self.tokenizer, self.parses = state, tokenizer, parses_special_tokens(tokenizer)
        name = tokenizer.name_or_path
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise InputError(
                f"{name}: found a {type(tokenizer).__name__}, which has no tokenizer.json; expected a tokenizer of the "
                "`tokenizers` library; convert it with transformers and save it"
            )
        # The calls also switch off the truncation and padding that some tokenizer.json files ask for.
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.start, suffix = list(whole[:place]), list(whole[place + len(plain) :])
        self.start_text = _names(tokenizer, self.start)
        self.turn = (
            read_turn_format(tokenizer) if tokenizer.chat_template is not None else TurnFormat("a", "", "", (), ())
        )
        added = {
            token: entry for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip(" ▁\t\r\n")
        }
        ends = [token for token in self._encode(self.turn.after) if token in added]
        self.tail, self.closing = "", ""
        if ends:
            self.tail, end, _ = self.turn.after.partition(added[ends[0]].content)
            self.closing = self.tail + end
        elif tokenizer.eos_token_id is None:
            raise InputError(
                f"{name}: the tokenizer has no end token; expected an `eos_token` or a chat template that ends an "
                "assistant's message with an added token; set one in tokenizer_config.json"
            )
        self.end: int = ends[0] if ends else tokenizer.eos_token_id
        written = {self.end, *(token for text in self.turn.dialogues for token in self._encode(text))}
        self.control: dict[str, int] = {
            entry.content: token
            for token, entry in added.items()
            if (entry.special or token in written) and len(entry.content) > 1
        }
        longest_first = sorted(self.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._separate: Any = None
        self._before = self._encode(self.turn.prompt)
        if (
            self.turn.dialogues
            and self.decode(self.encode_row([ASK], [ANSWER["content"]], 99)[1][0]) != ANSWER["content"]
        ):
            self._before = []  # the prompt ends with a control token, behind which the tokenizer begins a word anew
        self.warnings = [*self.turn.warnings]
        if tokenizer.chat_template is not None and not ends:
            self.warnings.append(
                f"{name}: the chat template ends an assistant's message with no token; completions end with "
                f"{tokenizer.eos_token!r}, which earlier turns of a prompt do not have"
            )
        if suffix:
            self.warnings.append(
                f"{name}: the tokenizer puts {_names(tokenizer, suffix)!r} behind text; prompts are taken without it"
            )

    def encode_row(self, prompt: Prompt, completions: Sequence[str], limit: int) -> tuple[list[int], list[list[int]]]:
        start: list[int] = []
        if isinstance(prompt, str):
            start, prompt = self.start, self.without_start(prompt)
        marked, prompt, completions = self._mark_row(prompt, completions)
        encode = self._encode_marked if marked else self._encode
        text, bodies = (prompt, completions) if isinstance(prompt, str) else self._render(prompt, completions)
        ids = encode(text)
        context, known = text, ids
        if bodies and (place := self._last_control(text)):  # what stands before a control token changes nothing behind
            shorter = encode(text[place:])
            if ids[-len(shorter) :] == shorter:
                context, known = text[place:], shorter
        ended = []
        for body in bodies:
            joint = encode(context + body)
            behind = joint[len(known) :] if joint[: len(known)] == known else _encode_behind_text(encode, body)
            ended.append(behind if behind[-1:] == [self.end] else [*behind, self.end])
        return start + ids, [tokens[:limit] for tokens in ended]

    def decode(self, tokens: list[int]) -> str:
        ended = tokens[-1:] == [self.end]
        text, first = (  # together, because some decoders drop a space from the first token
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (self._before + tokens[: len(tokens) - ended], self._before)
        )
        text = text[len(first) :].removeprefix(self.turn.lead)
        return text.removesuffix(self.tail) if ended else text

    def find(self, text: str) -> list[str]:
        """The control tokens that a text names."""
        return self._control.findall(text)

    def without_start(self, text: str) -> str:
        """A plain prompt without the start token, which is written anyway."""
        return text.removeprefix(self.start_text)

    def written(self, prompt: list[Message], completions: Sequence[str]) -> list[str | None]:
        """What the chat template writes of each completion; None where that does not stand right behind the prompt."""
        _, prompt, completions = self._mark_row(prompt, completions)
        text = render_dialogue(self.tokenizer, prompt, prompt=True)
        bodies = [self._written(prompt, text, completion) for completion in completions]
        return [body if body is None else body.replace(MARK, "") for body in bodies]

    def _render(self, prompt: list[Message], completions: Sequence[str]) -> tuple[str, list[str]]:
        """A prompt as the chat template writes it, and what it writes behind that for each completion."""
        text = render_dialogue(self.tokenizer, prompt, prompt=True)
        bodies = [self._written(prompt, text, one) or self.turn.lead + one for one in completions]
        return text, [body + self.closing for body in bodies]

    def _written(self, prompt: list[Message], text: str, completion: str) -> str | None:
        if not completion.strip():  # a drawn completion may be empty
            return None
        turn = Message(role="assistant", content=completion)
        whole = render_dialogue(self.tokenizer, [*prompt, turn], prompt=False)
        around = len(text) + len(self.turn.after)  # a template may leave a message out
        if len(whole) > around and whole.startswith(text) and whole.endswith(self.turn.after):
            return whole[len(text) : len(whole) - len(self.turn.after)]
        return None

    def _mark_row(self, prompt: Any, completions: Sequence[str]) -> tuple[bool, Any, Sequence[str]]:
        """Whether a row names control tokens, and the row with a mark in those that are text."""
        if not any(map(self.find, _strings([*completions, prompt]))):
            return False, prompt, completions
        marked = prompt if self.parses else _map_strings(prompt, self._mark)
        return True, marked, [self._mark(completion) for completion in completions]

    def _last_control(self, text: str) -> int:
        return max((match.start() for match in self._control.finditer(text)), default=0)

    def _encode(self, text: str) -> list[int]:
        """Tokens as plain transformers gives them: names of added tokens become those tokens."""
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_marked(self, text: str) -> list[int]:
        """Tokens of a text of which the control tokens that `_mark` has not marked are control tokens."""
        if self._separate is None:
            self._separate = _rename_tokens(self.tokenizer, {name: self._stand_in(name) for name in self.control})
        text = self._control.sub(lambda match: self._stand_in(match[0]), text).replace(MARK, "")
        return list(self._separate.encode(text, add_special_tokens=False).ids)

    def _stand_in(self, name: str) -> str:
        return STAND_IN + chr(0xF0000 + list(self.control).index(name))

    def _mark(self, text: str) -> str:
        """A text whose control tokens have a mark in their names, so that they are neither found nor written."""
        text = text.replace(MARK, "").replace(STAND_IN, "")
        while self._control.search(text):  # again where they overlap
            text = self._control.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
        return text


def _encode_behind_text(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Tokens of a text that follows another, without the space that some tokenizers put before the first word."""
    for before in ("a", ".", "\n", "0"):
        known, joint = encode(before), encode(before + text)
        if joint[: len(known)] == known:
            return joint[len(known) :]
    return encode(text)


def _rename_tokens(tokenizer: Tokenizer, names: Mapping[str, str]) -> Any:
    """A copy of a tokenizer, of which tokens have other names and the same ids, so that text cannot name them."""
    from tokenizers import Tokenizer as Backend

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = None
    for entry in content["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    model = content["model"]
    vocabulary = model["vocab"].items() if isinstance(model["vocab"], dict) else model["vocab"]
    renamed = [(names.get(piece, piece), value) for piece, value in vocabulary]
    model["vocab"] = dict(renamed) if isinstance(model["vocab"], dict) else renamed
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    return Backend.from_str(json.dumps(content))


def _names(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))


def _strings(value: Any) -> Iterator[str]:
    """Every text within nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and objects with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, Sequence) else value
