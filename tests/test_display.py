"""The main table in terminals of several widths: no cell is cut, and hidden columns are named."""

import re
from pathlib import Path

import pytest

from mixpo.cli.display import print_main_table
from report_runs import SFT_SCORES, Arm, Writer, scores

SETTING = "selection.easy_fraction"


def printed(folder: Path, capsys: pytest.CaptureFixture[str], width: int) -> list[str]:
    """Lines of the table of arms with long names and two measures, then what stands below it."""
    values = {seed: scores(SFT_SCORES, kl=SFT_SCORES, second_score=SFT_SCORES) for seed in (0, 1)}
    arms = [Arm("sft", values), Arm("ppo", values), Arm("mpo-sft-kl", values, changes={SETTING: 0.25})]
    results = Writer(folder / "run", second=True).load(arms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        print_main_table(results)
    return capsys.readouterr().out.splitlines()


def read_hidden_columns(lines: list[str]) -> str:
    notes = [line for line in lines if line.startswith("Hidden")]
    return notes[0].removeprefix("Hidden at this width: ").partition(";")[0] if notes else ""


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (200, ""),
        (120, ""),
        (108, "tokens"),
        (90, "tokens, end rate, win/tie/lose vs ppo"),
        (85, "tokens, end rate, win/tie/lose vs ppo, sd of reward"),
        (62, "tokens, end rate, win/tie/lose vs ppo, sd of reward, sd of second reward"),
    ],
)
def test_no_cell_is_cut_at_any_width(tmp_path, capsys, width, missing):
    lines = printed(tmp_path, capsys, width)
    assert read_hidden_columns(lines) == missing
    end = next(place for place, line in enumerate(lines) if line.startswith(("Hidden", "Reward")))
    table = lines[:end]
    assert max(map(len, table)) <= width
    assert "…" not in "".join(table)
    whole = re.findall(r"\[-?\d+\.\d\d, -?\d+\.\d\d\]", "\n".join(table))
    assert len(whole) == 3 * 3
    names = "".join(re.split(r" {2,}|\[", line[1:])[0] for line in table).replace(" ", "")
    assert f"mpo-sft-kl{SETTING}=0.25" in names
