"""`mixpo` run in the test's own process."""

import re
import sys
from dataclasses import dataclass

import pytest

from mixpo.cli import main as cli


@dataclass
class CommandResult:
    code: int
    out: str
    err: str

    def cell(self, heading: str) -> str:
        """The first cell beside a heading of the printed table."""
        pattern = rf"\s*{re.escape(heading)}\s+(\S.*?)(\s\s|\s?$)"
        return next(match[1] for line in self.out.splitlines() if (match := re.match(pattern, line)))

    def means(self, *headings: str) -> list[str]:
        """The first cells beside headings, without their intervals."""
        return [self.cell(heading).partition(" [")[0] for heading in headings]


def run_mixpo(capsys: pytest.CaptureFixture[str], *words: str) -> CommandResult:
    """Run `mixpo WORDS`; return its exit code and what it printed, which is no traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mixpo", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return CommandResult(int(stopped.value.code or 0), printed.out, printed.err)
