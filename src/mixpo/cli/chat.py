"""`mixpo chat`: a dialogue with a model in the terminal."""

import io
import sys
from pathlib import Path

import torch
from rich.console import Console

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, RowError
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import tokenize_prompt
from mixpo.models.folders import read_context_length
from mixpo.models.loading import ModelLoader
from mixpo.models.sampling import sample_completions


def run_chat(model_folder: Path, *, temperature: float, max_tokens: int) -> None:
    """Chat in the terminal: read user messages from standard input until it ends, and print the model's completions."""
    console = Console()
    lm = ModelLoader(torch.device("cuda" if torch.cuda.is_available() else "cpu")).load_policy(model_folder)
    assert lm.folder is not None
    context = read_context_length(lm.folder)
    if context is not None and max_tokens >= context:
        raise InputError(f"--max-tokens: found {max_tokens}; expected less than {context}, the model's context")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a line that is not UTF-8 is a traceback
    messages: list[Message] = []
    seed = 0
    while True:
        try:
            line = console.input("[bold]you>[/] " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            messages = []
            continue
        if not line.isascii() and line != line.encode("utf8", "ignore").decode("utf8"):
            print("skipped: found a line that is not UTF-8; expected text in UTF-8", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": line})
        try:
            tokens = tokenize_prompt(lm.tokenizer, messages)
        except RowError as error:
            raise InputError(f"{model_folder}: the dialogue {error.problem}") from error
        if context is not None and len(tokens) + max_tokens > context:
            print(
                f"skipped: found a dialogue of {len(tokens)} tokens beside --max-tokens {max_tokens}; expected at most "
                f"{context} together, the model's context; start a new dialogue with an empty line",
                file=sys.stderr,
            )
            messages.pop()
            continue
        sampled = sample_completions(
            lm,
            [tokens],
            k=1,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature or 1.0,
            top_k=int(not temperature),
        )
        seed += 1
        text = lm.decode_completion(sampled.to_lists()[0][0]).strip()
        console.print(escape_invisible(text), markup=False, highlight=False)
        messages.append({"role": "assistant", "content": text})
