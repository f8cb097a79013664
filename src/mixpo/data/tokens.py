"""From rows to token ids: how a prompt is rendered, and where a completion ends.

The end token is an action of the policy: it belongs to the completion and to its mask. Nothing here looks at padding
ids, because many tokenizers pad with their end token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from mixpo.data.errors import InputError
from mixpo.data.rows import FIX, Prompt, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, up to where the completion starts.

    Messages go through the tokenizer's chat template, with its generation prompt; a string is taken as it is, after
    the tokenizer's own start token if it has one. Raises `RowError` on messages that the template refuses.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the prompts are lists of messages, but the tokenizer has no chat template; "
            "set `model.chat_template` to a Jinja template, or use prompts that are plain strings"
        )
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RowError("prompt", f"is refused by the tokenizer's chat template ({error}); {FIX}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def completion_tokens(tokenizer: Tokenizer, completion: str, *, limit: int) -> list[int]:
    """Token ids of a completion with its end token, cut to `limit` tokens (then without an end token)."""
    ids = tokenizer(completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, end_token(tokenizer)][:limit]


def completion_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of completion tokens, without the end token or any other special token."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion.

    The token that the chat template writes after an assistant's message, and the tokenizer's end-of-sequence token
    where there is no template or the template writes none.
    """
    known: int | None = getattr(tokenizer, "_mixpo_end_token", None)
    if known is None:
        known = _end_token(tokenizer)
        tokenizer._mixpo_end_token = known
    return known


def _end_token(tokenizer: Tokenizer) -> int:
    if tokenizer.chat_template is not None:
        content = "mixpo"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        if content not in text:
            raise InputError(
                f"{tokenizer.name_or_path}: the chat template does not print an assistant's message; expected a "
                "template of the messages' roles and contents; set another as `model.chat_template`"
            )
        after = tokenizer(text[text.rindex(content) + len(content) :], add_special_tokens=False)["input_ids"]
        special = [token for token in after if token in tokenizer.all_special_ids]
        if special:
            return int(special[0])
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no end token; expected an `eos_token` or a chat template "
            "that ends an assistant's message with a special token; set one in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)
