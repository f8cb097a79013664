"""`mixpo chat`: try a model by hand."""

import sys
from pathlib import Path

import torch
from rich.console import Console

from mixpo.data.errors import InputError
from mixpo.data.rows import Message, RowError
from mixpo.data.tokens import prompt_tokens
from mixpo.models.loading import load_policy
from mixpo.models.sampling import sample


def talk(folder: Path, *, temperature: float, max_tokens: int) -> None:
    """Read a user's messages from standard input, print the model's completions."""
    console = Console()
    lm = load_policy(folder, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
        turns.append({"role": "user", "content": line})
        try:
            tokens = prompt_tokens(lm.tokenizer, turns)
        except RowError as error:
            raise InputError(f"{folder}: the dialogue {error.problem}") from error
        drawn = sample(
            lm,
            [tokens],
            k=1,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature or 1.0,
            top_k=int(not temperature),
        )
        seed += 1
        text = lm.read_text(drawn[0].completions[0]).strip()
        console.print(text, markup=False, highlight=False)
        turns.append({"role": "assistant", "content": text})
