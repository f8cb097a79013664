"""`mixpo data`: look at rows before anything trains on them."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mixpo.data.text import escape_invisible

if TYPE_CHECKING:
    from mixpo.experiments.preview import Preview, TokenizedText

app = typer.Typer(help="Look at rows before anything trains on them.", no_args_is_help=True)

SHOWN = 120
"""Pieces of a prompt or a completion that are shown."""
LISTED = 5
"""Bad rows that are shown."""


@app.callback()
def _group() -> None:
    """Look at rows before anything trains on them."""


@app.command()
def preview(
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
    """Show what would be learnt: a row of each kind in tokens, which columns are read, and what is wrong with rows."""
    from mixpo.experiments.preview import make_preview, read_source

    show_preview(make_preview(read_source(source, overrides or (), model)), Console(highlight=False))


def show_preview(preview: "Preview", console: Console) -> None:
    """Print a preview: in colours, or with a pair of brackets around every token where there are none."""
    plain = console.color_system is None
    for example in preview.examples:
        console.print(Text(f"{example.kind}, the first", style="bold"))
        for side in example.sides:
            console.print(_heading(side))
            console.print(Padding(_tokens(side, plain=plain), (0, 0, 0, 2)))
    legend = "[a token]  «a control token»" if plain else "shades part tokens; control tokens are magenta"
    for line in (f"{legend}; ⏎ is a line break", *preview.tokens):
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    width = max(map(len, preview.counts))
    for name, count in preview.counts.items():
        console.print(Text.assemble((f"{name:>{width}}  ", "dim"), count), soft_wrap=True)
    for line in preview.facts:
        console.print(Text(escape_invisible(line)), soft_wrap=True)
    for line in preview.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), escape_invisible(line)), soft_wrap=True)
    for row in preview.bad[:LISTED]:
        console.print(Text.assemble(("bad row: ", "bold red"), escape_invisible(str(row))), soft_wrap=True)
    if len(preview.bad) > LISTED:
        console.print(Text(f"... and {len(preview.bad) - LISTED} more bad rows"))


def _heading(side: "TokenizedText") -> Text:
    fate = ("trained on", "bold green") if side.trained else ("given, not trained on", "dim")
    cut = (", cut: no end token", "bold yellow") if side.truncated else ""
    return Text.assemble((side.name, "bold"), f"  {side.tokens} tokens, ", fate, cut)


def _tokens(side: "TokenizedText", *, plain: bool) -> Text:
    """The pieces of a side, the middle of a long one left out."""
    from mixpo.experiments.preview import shorten_pieces

    shown = Text()
    styles = ("green", "green on grey15") if side.trained else ("dim", "dim on grey15")
    for number, piece in enumerate(shorten_pieces(side.pieces, SHOWN)):
        if isinstance(piece, int):
            shown.append(f" … {piece} more … ", "italic")
            continue
        text = piece.text.replace("\n", "⏎").replace("\t", "⇥")
        if plain:
            text = f"«{text}»" if piece.control else f"[{text}]"
        shown.append(text, "bold magenta" if piece.control else styles[number % 2])
    return shown
