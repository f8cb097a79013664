"""`mixpo data`: inspect rows before a model is trained on them."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mixpo.data.text import escape_invisible

if TYPE_CHECKING:
    from mixpo.experiments.preview import DataPreview, TokenPreview

app = typer.Typer(help="Inspect rows before a model is trained on them.", no_args_is_help=True)

MAX_PIECES = 120
"""Largest number of pieces printed of a prompt or a completion."""
MAX_BAD_ROWS = 5
"""Largest number of bad rows printed."""


@app.callback()
def _require_subcommand() -> None:
    """Make typer keep the name of the only command, `preview`."""


@app.command("preview")
def preview_rows(
    source: Annotated[
        str, typer.Argument(help="A file of rows, hub:NAME, or a recipe: its name, or its file.", metavar="SOURCE")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted keys of the recipe, as `mixpo run` takes them.", metavar="KEY=VALUE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer is used: a folder, a .gguf file or a Hugging Face id.")
    ] = None,
) -> None:
    """Print the first row of each kind in tokens, which columns are read, and what is wrong with rows."""
    from mixpo.experiments.preview import make_data_preview, read_recipe_or_source

    recipe = read_recipe_or_source(source, overrides or (), model)
    print_data_preview(make_data_preview(recipe), Console(highlight=False))


def print_data_preview(preview: "DataPreview", console: Console) -> None:
    """Print the preview of rows, in colours or, on a console without colours, with brackets around every token."""
    plain = console.color_system is None
    for example in preview.examples:
        console.print(Text(f"first {example.kind}", style="bold"))
        for text in example.texts:
            console.print(_format_token_heading(text))
            console.print(Padding(_format_pieces(text, in_brackets=plain), (0, 0, 0, 2)))
    legend = "[a token]  «a control token»" if plain else "shades separate tokens; control tokens are magenta"
    for line in (f"{legend}; ⏎ is a line break", *preview.token_lines):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    width = max(map(len, preview.counts))
    for name, count in preview.counts.items():
        console.print(Text.assemble((f"{name:>{width}}  ", "dim"), count), soft_wrap=True)
    for line in preview.facts:
        console.print(Text(escape_invisible(line)), soft_wrap=True)
    for line in preview.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), escape_invisible(line)), soft_wrap=True)
    for row in preview.bad[:MAX_BAD_ROWS]:
        console.print(Text.assemble(("bad row: ", "bold red"), escape_invisible(str(row))), soft_wrap=True)
    if len(preview.bad) > MAX_BAD_ROWS:
        console.print(Text(f"... and {len(preview.bad) - MAX_BAD_ROWS} more bad rows"))


def _format_token_heading(token_preview: "TokenPreview") -> Text:
    """Format a text's name, number of tokens, and whether training uses and truncates it."""
    use = ("trained on", "bold green") if token_preview.trained else ("not trained on", "dim")
    cut = (", truncated: no end token", "bold yellow") if token_preview.truncated else ""
    return Text.assemble((token_preview.name, "bold"), f"  {token_preview.token_count} tokens, ", use, cut)


def _format_pieces(token_preview: "TokenPreview", *, in_brackets: bool) -> Text:
    """Format a text with its tokens in alternating styles or in brackets, without the middle of a long text."""
    from mixpo.experiments.preview import shorten_pieces

    line = Text()
    styles = ("green", "green on grey15") if token_preview.trained else ("dim", "dim on grey15")
    for number, piece in enumerate(shorten_pieces(token_preview.pieces, MAX_PIECES)):
        if isinstance(piece, int):
            line.append(f" … {piece} more … ", "italic")
            continue
        token = piece.text.replace("\n", "⏎").replace("\t", "⇥")
        if in_brackets:
            token = f"«{token}»" if piece.control else f"[{token}]"
        line.append(token, "bold magenta" if piece.control else styles[number % 2])
    return line
