"""`mixpo chat`: try a model by hand."""

import io
import sys
from pathlib import Path

import torch
from rich.console import Console

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, RowError
from mixpo.data.text import escape_invisible
from mixpo.data.tokens import tokenize_prompt
from mixpo.models.folders import read_context
from mixpo.models.loading import load_policy
from mixpo.models.sampling import sample


def talk(folder: Path, *, temperature: float, max_tokens: int) -> None:
    """Read a user's messages from standard input, print the model's completions."""
    console = Console()
    lm = load_policy(folder, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    context = read_context(folder)
    if context is not None and max_tokens >= context:
        raise InputError(f"--max-tokens: found {max_tokens}; expected less than {context}, the model's context")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a line that is not UTF-8 is a traceback
    turns: list[Message] = []
    seed = 0
    while True:
        try:
            line = console.input("[bold]you>[/] " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            turns = []
            continue
        if not line.isascii() and line != line.encode("utf8", "ignore").decode("utf8"):
            print("left out: a line that is not UTF-8", file=sys.stderr)
            continue
        turns.append({"role": "user", "content": line})
        try:
            tokens = tokenize_prompt(lm.tokenizer, turns)
        except RowError as error:
            raise InputError(f"{folder}: the dialogue {error.problem}") from error
        if context is not None and len(tokens) + max_tokens > context:
            print(
                f"left out: the dialogue has {len(tokens)} tokens, which with --max-tokens {max_tokens} are more than "
                f"the model's context of {context}; begin a new one with an empty line",
                file=sys.stderr,
            )
            turns.pop()
            continue
        sampled = sample(
            lm,
            [tokens],
            k=1,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature or 1.0,
            top_k=int(not temperature),
        )
        seed += 1
        text = lm.read_text(sampled.to_lists()[0][0]).strip()
        console.print(escape_invisible(text), markup=False, highlight=False)
        turns.append({"role": "assistant", "content": text})
