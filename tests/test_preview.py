"""`mixpo data preview`: what is trained on, in tokens, and what is wrong with the rows, before anything trains."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command_line import run_mixpo
from mixpo.cli.data import print_data_preview
from mixpo.data.errors import InputError
from mixpo.data.world import build_world_tokenizer
from mixpo.experiments.preview import make_data_preview, read_recipe_or_source, shorten_pieces, split_into_pieces
from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.run import compute_stage
from recording_display import RecordingDisplay
from worlds import write_jsonl

ROW = {"prompt": [{"role": "user", "content": "How?"}], "chosen": "So.", "rejected": "No."}


def rows(prompts: range, **fields: Any) -> list[dict[str, Any]]:
    return [{**ROW, "prompt": [{"role": "user", "content": f"How {number}?"}], **fields} for number in prompts]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        result = run_mixpo(capsys, "data", "preview", *words)
    assert result.code == (2 if result.err else 0)
    return result.out or result.err


def test_a_preview_shows_what_is_trained_on_and_what_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_world_tokenizer()

    def bracketed(text: str) -> str:
        tokens = [token.replace("Ġ", " ") for token in tokenizer.tokenize(text)]
        return "".join(f"«{token}»" if token in tokenizer.all_special_tokens else f"[{token}]" for token in tokens)

    train = write_jsonl(tmp_path / "rows.jsonl", rows(range(10), id=3, tools=[{"name": "f"}]))
    lines = printed(
        capsys, train, f"data.test={write_jsonl(tmp_path / 'test.jsonl', rows(range(10, 12)))}"
    ).splitlines()
    before, chosen, rejected = map(bracketed, ("<|user|>How 0?<|assistant|>", "So.<|end|>", "No.<|end|>"))
    assert before == "«<|user|>»[How][ ][0][?]«<|assistant|>»"
    assert [line.strip() for line in lines[:7]] == [
        "first preference",
        "prompt  6 tokens, not trained on",
        before,
        f"chosen  {len(tokenizer.tokenize('So.')) + 1} tokens, trained on",
        chosen,
        f"rejected  {len(tokenizer.tokenize('No.')) + 1} tokens, trained on",
        rejected,
    ]
    assert "the tokenizer has no BOS; prompts begin without one" in lines
    assert f"completions end with <|end|> ({tokenizer.eos_token_id})" in lines
    assert "preferences read as preference: prompt, chosen, rejected; ignored: id, tools" in lines
    assert "tools and tool calls are ignored: mixpo renders the text of messages and nothing else" in lines
    assert "demonstrations for SFT are the chosen completions of train" in lines


def test_everything_wrong_with_rows_is_counted(tmp_path: Path) -> None:
    long = "very " * 50
    train = [
        *rows(range(10)),
        *rows(range(2)),  # again, word for word
        *rows(range(2, 3), chosen="No.", rejected="So."),  # sides exchanged
        *rows(range(20, 23), chosen=long + "good", rejected=long + "bad"),  # equal after the cut
        *rows(range(30, 31), chosen=long),  # cut on one side
        *rows(range(40, 41), rejected="So."),  # equal sides
        *rows(range(41, 42), rejected=None),
    ]
    test = write_jsonl(tmp_path / "test.jsonl", rows(range(5, 12)))
    words = [f"data.test={test}", "max_completion_tokens=20"]
    source = write_jsonl(tmp_path / "train.jsonl", train)
    recipe = read_recipe_or_source(source, words)
    preview = make_data_preview(recipe)
    assert preview.counts == {
        "rows": "26 read: 17 to train, 7 to test, 17 demonstrations",
        "bad": "2, of which 1 with identical completions",
        "duplicate": "2 in train, 0 in test",
        "contradictory": "2 in train, 0 in test",
        "prompts in train and test": "5 of 7 test prompts",
        "truncated": "7 of 34 completions are longer than max_completion_tokens 20",
        "identical after truncation": "3 of 17 pairs",
        "truncated demonstrations": "4 of 17 are longer than max_completion_tokens 20",
    }
    assert "train: 2 of 17 rows stand there already, word for word" in preview.facts
    assert "train: 2 of 17 rows contradict another, which prefers the other side" in preview.facts
    assert "5 of 7 test prompts are trained on too; data.shared_prompts=drop leaves their rows out" in preview.facts
    assert "1 of the bad rows have two equal sides" in preview.facts
    assert [row.row for row in preview.bad] == [18, 19]
    dropped = make_data_preview(read_recipe_or_source(source, [*words, "data.shared_prompts=drop"]))
    assert dropped.counts["prompts in train and test"] == "0 of 7 test prompts"
    assert "5 rows left out, whose prompts are test prompts" in dropped.facts
    assert dropped.counts["rows"] == "26 read: 12 to train, 7 to test, 12 demonstrations"


def test_the_rows_of_a_recipe_and_a_file_of_demonstrations(tmp_path: Path) -> None:
    (world,) = make_data_preview(read_recipe("world", ["data.train_rows=32", "data.test_rows=8"])).examples[:1]
    assert world.kind == "preference"
    assert world.texts[1].text.endswith("<|end|>")
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "How?", "completion": "So.", "score": 1}])
    preview = make_data_preview(read_recipe_or_source(path))
    assert [example.kind for example in preview.examples] == ["demonstration"]
    assert [side.text for side in preview.examples[0].texts] == ["How?", "So.<|end|>"]
    assert preview.facts == ["demonstrations read as demonstration: prompt, completion; ignored: score"]


def test_a_row_alone_is_shown_with_what_would_stop_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, write_jsonl(tmp_path / "a.jsonl", [ROW]))
    assert "tokens, trained on" in text
    assert "warning: data.train: found one prompt in 1 usable rows" in text
    assert "nor.jsonl: no such file" in printed(capsys, str(tmp_path / "nor.jsonl"))
    bad = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": ""}])
    assert "1 of 1 rows cannot be used:" in printed(capsys, bad)
    assert "expected a .yaml file or one of" in printed(capsys, "wrld")


def test_nothing_in_a_row_reaches_the_terminal_raw(tmp_path: Path) -> None:
    hostile = {"chosen": "\x1b[2JSo.\u202e", "rejected": "[bold]No.[/bold]", "\x1b[31mred": 1}
    preview = make_data_preview(read_recipe_or_source(write_jsonl(tmp_path / "a.jsonl", rows(range(4), **hostile))))
    for color in (None, "256"):
        file = io.StringIO()
        print_data_preview(preview, Console(file=file, width=200, force_terminal=color is not None, color_system=color))
        text = file.getvalue()
        assert not [raw for raw in ("\x1b[2J", "\x1b[31m", "\u202e") if raw in text]
        assert "␛" in text
        assert "⟦U+202E⟧" in text
        assert ("\x1b[" in text) == (color is not None)
        assert "«<|end|>»" in text if color is None else "<|end|>" in text
    assert "[bold]" in "".join(piece.text for piece in preview.examples[0].texts[2].pieces)


@pytest.mark.parametrize("text", ["Größe 日本語 👩‍💻!", " leading", "a\n\nb\tc", "<|end|> as text"])
def test_pieces_are_the_text_and_every_token_is_in_one(text: str) -> None:
    tokenizer = build_world_tokenizer()
    tokens = tokenizer(text, split_special_tokens=True)["input_ids"]
    pieces = split_into_pieces(tokenizer, tokens, preceding_ids=tokenizer.encode("before"))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) <= len(tokens)
    assert not any(piece.control for piece in pieces)
    (end,) = split_into_pieces(tokenizer, [tokenizer.eos_token_id])
    assert (end.text, end.control) == ("<|end|>", True)


def test_the_space_before_a_word_is_kept_by_tokenizers_whose_decoder_strips_it() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁So": 0, "▁what": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert tokenizer.decode([1]) == "what"
    assert [piece.text for piece in split_into_pieces(tokenizer, [0, 1])] == ["So", " what"]
    assert [piece.text for piece in split_into_pieces(tokenizer, [1], preceding_ids=[0])] == [" what"]


def test_the_middle_of_a_long_side_is_left_out() -> None:
    tokenizer = build_world_tokenizer()
    pieces = split_into_pieces(tokenizer, tokenizer.encode("word " * 100))
    shown = list(shorten_pieces(pieces, 30))
    assert shown == [*pieces[:20], len(pieces) - 30, *pieces[-10:]]
    assert list(shorten_pieces(pieces, len(pieces))) == pieces


def test_a_model_that_no_run_could_start_from(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(build_world_tokenizer())
    tokenizer.bos_token = "<|user|>"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 1000}')
    path = write_jsonl(tmp_path / "a.jsonl", rows(range(4)))
    preview = make_data_preview(read_recipe_or_source(path, model=str(tmp_path / "model")))
    assert preview.warnings == [
        f"{tmp_path}/model: found no config.json that names an architecture; expected a decoder-only language model in "
        "a Hugging Face folder",
    ]
    assert preview.token_lines[0] == f"BOS is <|user|> ({tokenizer.bos_token_id}); prompts begin with it"


def test_names_of_control_tokens_in_texts_are_counted_once_a_row(tmp_path: Path) -> None:

    def find_lines(path: str) -> list[str]:
        facts = make_data_preview(read_recipe_or_source(path)).facts
        return [line for line in facts if "names of control tokens" in line]

    forged = [{"role": "user", "content": "a<|user|>b"}]
    given = [*rows(range(3), chosen="So.<|end|>"), {**ROW, "prompt": forged}, *rows(range(4, 6))]
    assert find_lines(write_jsonl(tmp_path / "a.jsonl", given)) == [
        "1 of 6 prompts contain names of control tokens, such as '<|user|>', which are plain text; "
        "data.special_tokens=parse makes them control tokens",
        "3 of 12 completions contain names of control tokens, such as '<|end|>', which are plain text",
    ]
    (line,) = find_lines(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "How?", "completion": "So.<|end|>"}] * 2))
    assert line.startswith("2 of 2 completions contain")


def test_a_format_that_is_asked_for_is_not_guessed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(range(4)))
    assert read_recipe_or_source(path).data.format == "preference"
    with pytest.raises(InputError, match="4 of 4 rows cannot be used"):
        make_data_preview(read_recipe_or_source(path, ["data.format=tldr"]))
    path = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "How?"}])
    assert not read_recipe_or_source(path).data.train, "without two sides it is a demonstration"
    assert read_recipe_or_source(path, ["data.format=tldr"]).data.train == (path,)
    with pytest.raises(InputError, match=r"b\.jsonl' beside format 'world', whose rows are generated; expected files"):
        make_data_preview(read_recipe_or_source(path, ["data.format=world"]))


@pytest.mark.parametrize("given", ["''", "['a.jsonl', '']"])
def test_an_empty_name_of_a_file_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"data\.train: found ''; expected the name of a file or hub:NAME$"):
        read_recipe("pairs", ["model.path=world", f"data.train={given}"])


def test_a_run_begins_with_what_it_learns_from_whether_rows_are_read_or_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = write_jsonl(tmp_path / "rows.jsonl", rows(range(10), id=3))
    test = write_jsonl(tmp_path / "test.jsonl", rows(range(10, 12)))
    recipe = read_recipe_or_source(train, [f"data.test={test}"])
    expected = [
        "preferences read as preference: prompt, chosen, rejected; ignored: id",
        "demonstrations for SFT are the chosen completions of train",
        "10 pairs to train, 2 to test, 10 demonstrations; the tokenizer has no BOS; prompts begin without one; "
        "completions end with <|end|> (3); the first pair:",
        "  prompt        6 tokens, not trained on: <|user|>How 0?<|assistant|>",
        "  chosen        4 tokens, trained on: So.<|end|>",
        "  rejected      4 tokens, trained on: No.<|end|>",
    ]
    for _ in range(2):
        display = RecordingDisplay()
        compute_stage(recipe, lambda setup: setup.data, display)
        assert display.notes == expected


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ({"columns": None}, "AttributeError: "),
        ({"columns": ...}, "KeyError: 'columns'"),
        ({"train_rows": ...}, "KeyError: 'train_rows'"),
        ({"train_rows": "many"}, "ValueError: "),
        ({"tokenizer": 3}, "TypeError: "),
    ],
)
def test_a_cache_without_the_counts_of_its_rows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any], found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe_or_source(write_jsonl(tmp_path / "rows.jsonl", rows(range(10))))
    compute_stage(recipe, lambda setup: setup.data, RecordingDisplay())
    (summary,) = [path for path in tmp_path.rglob("summary.json") if "columns" in json.loads(path.read_text())]
    figures = json.loads(summary.read_text()) | damage
    summary.write_text(json.dumps({name: value for name, value in figures.items() if value is not ...}))
    with pytest.raises(InputError) as caught:
        compute_stage(recipe, lambda setup: setup.data, RecordingDisplay())
    assert f"summary.json of the data stage: found no usable counts of its rows ({found}" in str(caught.value)
    assert "delete the stage's folder and run again" in str(caught.value)
