"""The commands that README and docs show are commands, with options that they have; links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from mixpo.cli.main import app
from mixpo.data.sources import Format
from mixpo.experiments import arms
from mixpo.experiments.arms import ARMS
from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.shared_stages import SharedStages
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)


def shown_commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("mixpo ")})


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_has_the_options_that_are_shown(line: str) -> None:
    command: Any = COMMAND
    words = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_commands_are_found() -> None:
    assert len(shown_commands()) > 15


def test_every_arm_and_every_format_of_rows_is_described() -> None:
    text = (ROOT / "docs" / "using.md").read_text()
    assert [name for name in (*ARMS, *get_args(Format)) if f"`{name}`" not in text] == []


def test_the_python_of_the_pages_runs_but_for_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    blocks = [
        block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    built: list[Stage] = []
    monkeypatch.setattr(StageCache, "compute_with_inputs", lambda cache, stage: built.append(stage))
    for block in blocks:
        names = dict(vars(arms))
        exec(block, names)
        shared = SharedStages(read_recipe("world"), 0)
        built += [names[name](shared) for name in re.findall("^def ([a-z_]+)", block, re.M)]
    assert len(built) >= len(blocks) >= 3
    assert all(isinstance(stage, Stage) for stage in built)
