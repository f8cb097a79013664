"""The command line: parse, call, print. Bad input is one line a problem on standard error, and exit code 2."""

import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import pydantic
import typer

from mixpo.cli import data, studied
from mixpo.cli.judged import judge
from mixpo.data.errors import InputError
from mixpo.settings import found_and_expected

UsageError = cast(type[Exception], typer.BadParameter.__base__)
"""Of click, which some versions of typer have within them."""

app = typer.Typer(
    name="mixpo",
    help="Mixed Preference Optimization: preference pairs in, an aligned model and its evidence out.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe file, or the name of one that comes with mixpo (world if not given), and dotted overrides.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of progress bars.")]


@app.command()
def run(words: RecipeArgument = None, quiet: Quiet = False) -> None:
    """Run a recipe: compute what is missing, print the table, write the report."""
    from mixpo.cli.display import show_results, watch
    from mixpo.experiments.results import load_runs
    from mixpo.experiments.run import run_recipe
    from mixpo.report.page import write_page

    recipe = _recipe(words)
    with watch(plain=quiet) as display:
        result = run_recipe(recipe, display)
    results = load_runs(recipe.folder)
    show_results(results, write_page(results, recipe.folder), computed=result.computed, found=result.found)
    failed = [arm for arm in result.arms if arm.status == "failed"]
    if failed:
        raise typer.Exit(2 if all(arm.bad_input for arm in failed) else 1)


@app.command()
def plan(words: RecipeArgument = None) -> None:
    """Print the tree of stages: identity, whether it is there, and why one would be computed."""
    from mixpo.cli.display import show_plan
    from mixpo.experiments.plan import plan_stages

    show_plan(plan_stages(_recipe(words)))


@app.command()
def select(words: RecipeArgument = None, quiet: Quiet = False) -> None:
    """Sample, score and split as a recipe says; print sizes, the gap histogram, and samples from both ends."""
    from mixpo.cli.display import show_selection, watch
    from mixpo.experiments.run import run_stage

    recipe = _recipe(words)
    with watch(plain=quiet) as display:
        found = run_stage(recipe, lambda setup: setup.selection, display)
    if not isinstance(found, Path):
        print(found.reason, file=sys.stderr)
        raise typer.Exit(2 if found.bad_input else 1)
    show_selection(found)


RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs, such as runs/world.")]


class Form(StrEnum):
    """What a report is written as."""

    HTML = "html"
    MD = "md"
    CSV = "csv"
    JSON = "json"


@app.command()
def report(
    runs: RunFolders,
    form: Annotated[Form, typer.Option("--format", help="html is a page; csv holds the means alone.")] = Form.HTML,
    out: Annotated[Path | None, typer.Option(help="A file instead of report.html in the run's folder.")] = None,
) -> None:
    """Write the report of finished runs, side by side if there are several (then to report.html right here).

    md, csv and json go to standard output unless --out names a file.
    """
    from mixpo.experiments.results import load_runs
    from mixpo.report.page import text

    written = text(load_runs(*runs), form.value)
    if out is None and form is not Form.HTML:
        sys.stdout.write(written)
        return
    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        path.write_text(written, encoding="utf8")
    except OSError as error:
        raise InputError(
            f"{path}: found a place that cannot be written ({error.strerror}); choose another --out"
        ) from error
    print(f"report: {path}")


@app.command()
def compare(runs: RunFolders) -> None:
    """Print the main table of finished runs, side by side."""
    from mixpo.cli.display import show_table
    from mixpo.experiments.results import load_runs

    show_table(load_runs(*runs))


app.command()(judge)


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, such as `mixpo run` prints.")],
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 takes the most probable token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to a model. An empty line starts a new dialogue, Ctrl-D ends."""
    from mixpo.cli.chat import talk

    talk(model, temperature=temperature, max_tokens=max_tokens)


app.add_typer(data.app, name="data")
app.add_typer(studied.app)


def _recipe(words: list[str] | None) -> Any:
    from mixpo.experiments.recipe import read_recipe

    words = list(words or ())
    name = words.pop(0) if words and "=" not in words[0] else None
    return read_recipe(name, words)


def main() -> None:
    """The entry point of `mixpo`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait starve a shared machine
    try:
        sys.exit(app(prog_name="mixpo", standalone_mode=False) or 0)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except UsageError as error:
        if text := _in_one_line(error):
            print(text, file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print("stopped", file=sys.stderr)
        sys.exit(1)


def _in_one_line(error: Any) -> str:
    """What is wrong with a command line, as every other error is told."""
    text = error.format_message().strip().rstrip(".")
    if not text or "\n" in text:  # the help, or nothing where it is printed already
        return str(text)
    command = error.ctx.command_path if error.ctx else "mixpo"
    if isinstance(error.__cause__, pydantic.ValidationError):
        found, expected = found_and_expected(error.__cause__.errors()[0])
        expected = re.sub("^.* is not (?=one of )", "", expected)
        return f"{command}: {error.param.opts[0]}: found {found}; expected {expected}"
    usage = f"; usage: {error.ctx.get_usage().removeprefix('Usage: ').strip()}" if error.ctx else ""
    return f"{command}: {text}{usage}"


if __name__ == "__main__":
    main()
