"""`mixpo chat`: dialogues longer than the context, lines that are not UTF-8, control characters in completions."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixpo.cli import main as cli
from mixpo.data.branches import Completions
from mixpo.data.world import build_world_tokenizer
from mixpo.models.loading import ModelLoader
from mixpo.models.sources import initialize_world_model

Chat = Callable[..., tuple[str, str, list[str]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for part in initialize_world_model(0):
        part.save_pretrained(path)
    return path


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Chat:
    """Return a function that sends lines to a model which completes with `answer`: its output, errors, prompts."""
    tokenizer = build_world_tokenizer()

    def run(lines: bytes, *words: str, answer: str = "Yes.", code: int = 0) -> tuple[str, str, list[str]]:
        prompts: list[str] = []

        def sample_completions(lm: Any, tokens: list[list[int]], **settings: Any) -> Any:
            prompts.append(tokenizer.decode(tokens[0]))
            return Completions.from_lists([[[*tokenizer.encode(answer), tokenizer.eos_token_id]]])

        stdin = io.TextIOWrapper(io.BytesIO(lines), encoding="utf8")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr("mixpo.cli.chat.sample_completions", sample_completions)
        monkeypatch.setattr(sys, "argv", ["mixpo", "chat", str(folder), *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert (stopped.value.code or 0) == code
        printed = capfd.readouterr()
        return printed.out, printed.err, prompts

    return run


def test_a_dialogue_goes_on_until_an_empty_line(chat: Chat) -> None:
    out, err, prompts = chat(b"One?\nTwo?\n\nThree?\n", "--max-tokens", "8")
    assert (out, err) == ("Yes.\n" * 3, "")
    one, three = ("<|user|>One?<|assistant|>", "<|user|>Three?<|assistant|>")
    assert prompts == [one, f"{one}Yes.<|end|><|user|>Two?<|assistant|>", three]


def test_a_message_beyond_the_context_is_skipped(chat: Chat) -> None:
    long = b"why " * 400
    out, err, prompts = chat(b"One?\n" + long + b"\nTwo?\n", "--max-tokens", "300")
    assert out == "Yes.\n" * 2
    assert len(err.splitlines()) == 1
    expected = (
        "beside --max-tokens 300; expected at most 512 together, the model's context; start a new dialogue with an"
    )
    assert expected in err
    assert prompts[1] == "<|user|>One?<|assistant|>Yes.<|end|><|user|>Two?<|assistant|>"
    _, err, prompts = chat(b"One?\n", "--max-tokens", "512", code=2)
    assert (err, prompts) == ("--max-tokens: found 512; expected less than 512, the model's context\n", [])


def test_a_line_that_is_not_utf8_is_skipped(chat: Chat) -> None:
    out, err, prompts = chat("One \xff?\n".encode("latin-1") + "Größe?\n".encode())
    assert (out, err) == ("Yes.\n", "skipped: found a line that is not UTF-8; expected text in UTF-8\n")
    assert prompts == ["<|user|>Größe?<|assistant|>"]


def test_nothing_in_a_completion_reaches_the_terminal_raw(chat: Chat) -> None:
    out, _, _ = chat(b"One?\n", answer="\x1b[2JSo.\u202e [bold]No.[/bold]")
    assert out == "␛[2JSo.⟦U+202E⟧ [bold]No.[/bold]\n"


def test_the_text_of_a_completion_is_without_whichever_end_token_it_has(folder: Path) -> None:
    file = folder / "generation_config.json"
    settings, tokenizer = json.loads(file.read_text()), build_world_tokenizer()
    (other,) = tokenizer.encode("?")
    file.write_text(json.dumps(settings | {"eos_token_id": [tokenizer.eos_token_id, other]}))
    lm = ModelLoader(torch.device("cpu")).load_policy(folder)
    file.write_text(json.dumps(settings))
    body = tokenizer.encode("So? Yes")
    assert lm.decode_completion([*body, other]) == lm.decode_completion([*body, lm.end_token]) == "So? Yes"
    assert lm.decode_completion([*body, *tokenizer.encode(".")]) == "So? Yes."
