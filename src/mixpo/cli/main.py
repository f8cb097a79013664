"""The commands of `mixpo`. Bad input is one line a problem on standard error, and exit code 2."""

import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import pydantic
import typer

from mixpo.cli import data, study
from mixpo.cli.judge import judge_arms
from mixpo.data.errors import InputError
from mixpo.settings import format_found_and_expected

UsageError = cast(type[Exception], typer.BadParameter.__base__)
"""Click's base class of usage errors; some versions of typer bundle click instead of depending on it."""

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


@app.command("run")
def run_experiment(arguments: RecipeArgument = None, quiet: Quiet = False) -> None:
    """Run a recipe: compute the stages that are not cached, print the main table, write the report."""
    from mixpo.cli.display import open_run_display, print_run_results
    from mixpo.experiments.results import load_runs
    from mixpo.experiments.run import follow_main_process, run_recipe
    from mixpo.report.page import write_html_report

    recipe = _read_recipe_of_command(arguments)
    if follow_main_process(recipe):
        return
    with open_run_display(plain=quiet) as display:
        result = run_recipe(recipe, display)
    results = load_runs(recipe.run_folder)
    page = write_html_report(results, recipe.run_folder)
    print_run_results(results, page, computed=result.computed, cached=result.found)
    failed = [arm for arm in result.arms if arm.status == "failed"]
    if failed:
        raise typer.Exit(2 if all(arm.bad_input for arm in failed) else 1)


@app.command("plan")
def show_plan(
    arguments: RecipeArgument = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that share a stage, with weights cut if runtime.sharded.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0.0, help="GB of one device; what cannot fit is refused.")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100 (if none is named), h200, b200 or l40s.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, or its folder, without weights.")
    ] = None,
) -> None:
    """Print the tree of stages of every arm, cached or why not, and the memory, tokens, FLOPs and time of the others.

    Without --gpus and --gpu, for this machine. A stage that does not fit is named, with the settings that make it fit.
    """
    from mixpo.cli.display import print_line, print_plan, print_run_costs
    from mixpo.experiments.plan import list_plan
    from mixpo.experiments.run_costs import choose_devices, plan_run_costs

    recipe, devices = _read_recipe_of_command(arguments), choose_devices(gpus, memory, gpu)
    print_plan(list_plan(recipe, devices.gpus or None))
    try:
        costs = plan_run_costs(recipe, devices, config_path=config)
    except InputError as error:
        if (gpus, memory, gpu, config) != (None, None, None, None):
            raise
        print_line(f"costs are not known: {error}")
        return
    print_run_costs(costs)
    if costs.refusal:
        raise InputError(costs.refusal)


@app.command("select")
def select_pairs(arguments: RecipeArgument = None, quiet: Quiet = False) -> None:
    """Sample, score and split pairs as a recipe says; print sizes, the gap histogram, and examples."""
    from mixpo.cli.display import open_run_display, print_pair_selection
    from mixpo.experiments.run import compute_stage, follow_main_process

    recipe = _read_recipe_of_command(arguments)
    if follow_main_process(recipe):
        return
    with open_run_display(plain=quiet) as display:
        selection = compute_stage(recipe, lambda setup: setup.selection, display)
    if not isinstance(selection, Path):
        print(selection.reason, file=sys.stderr)
        raise typer.Exit(2 if selection.bad_input else 1)
    print_pair_selection(selection)


RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs, such as runs/world.")]


class ReportFormat(StrEnum):
    """File format of a report."""

    HTML = "html"
    MD = "md"
    CSV = "csv"
    JSON = "json"


@app.command("report")
def report_runs(
    runs: RunFolders,
    format: Annotated[
        ReportFormat, typer.Option(help="html is a page; csv holds the means alone.")
    ] = ReportFormat.HTML,
    out: Annotated[Path | None, typer.Option(help="A file instead of report.html in the run's folder.")] = None,
) -> None:
    """Write the report of one finished run, or of several side by side (to report.html in the current folder).

    md, csv and json go to standard output unless --out names a file.
    """
    from mixpo.experiments.results import load_runs
    from mixpo.report.page import render_report

    content = render_report(load_runs(*runs), format.value)
    if out is None and format is not ReportFormat.HTML:
        sys.stdout.write(content)
        return
    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    try:
        path.write_text(content, encoding="utf8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    print(f"report: {path}")


@app.command("compare")
def compare_runs(runs: RunFolders) -> None:
    """Print the main table of finished runs, side by side."""
    from mixpo.cli.display import print_main_table
    from mixpo.experiments.results import load_runs

    print_main_table(load_runs(*runs))


app.command("judge")(judge_arms)


@app.command("chat")
def chat_with_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, such as `mixpo run` prints.")],
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 takes the most probable token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Chat with a model. An empty line starts a new dialogue, Ctrl-D ends."""
    from mixpo.cli.chat import run_chat

    run_chat(model, temperature=temperature, max_tokens=max_tokens)


@app.command("export")
def export_arm(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/world.")],
    arm: Annotated[str, typer.Argument(metavar="ARM", help="An arm of it, such as mpo.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[int | None, typer.Option(help="Of the run; the first at which the arm finished.")] = None,
) -> None:
    """Write an arm's model to a folder as a whole Hugging Face model, its adapters merged into the weights."""
    from mixpo.experiments.results import load_runs, locate_arm_model
    from mixpo.models.exporting import export_model

    export_model(locate_arm_model(load_runs(run), arm, seed), out)
    print(f"model: {out}")


app.add_typer(data.app, name="data")
app.add_typer(study.app)


def _read_recipe_of_command(command_arguments: list[str] | None) -> Any:
    """Read the recipe that a command's arguments name, `world` if none, with the overrides among them."""
    from mixpo.experiments.recipe import read_recipe

    words = list(command_arguments or ())
    name = words.pop(0) if words and "=" not in words[0] else None
    return read_recipe(name, words)


def main() -> None:
    """Run the command line of `mixpo` and exit: with code 2 on bad input, 1 on other failures, else 0."""
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
        if text := _format_usage_error(error):
            print(text, file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print("stopped", file=sys.stderr)
        sys.exit(1)


def _format_usage_error(error: Any) -> str:
    """Format an error of the command line as one line: command, option, value found, value expected."""
    text = error.format_message().strip().rstrip(".")
    if not text or "\n" in text:  # the help, or nothing if it is already printed
        return str(text)
    command = error.ctx.command_path if error.ctx else "mixpo"
    if isinstance(error.__cause__, pydantic.ValidationError):
        found, expected = format_found_and_expected(error.__cause__.errors()[0])
        expected = re.sub("^.* is not (?=one of )", "", expected)
        return f"{command}: {error.param.opts[0]}: found {found}; expected {expected}"
    usage = f"; usage: {error.ctx.get_usage().removeprefix('Usage: ').strip()}" if error.ctx else ""
    return f"{command}: {text}{usage}"


if __name__ == "__main__":
    main()
