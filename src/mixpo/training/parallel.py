"""Data-parallel processes of one stage: distribution of rows, sums over processes, and the process that writes files.

Today there is one process. The optimizer step, sums over a batch, checkpoints and metrics use this module;
models, tables and summaries are still written without asking it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StageProcesses:
    """The processes that share a stage's rows, seen from one of them; today always one."""

    device: torch.device
    """Device of this process."""
    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """True for the process that writes the stage's files and reports to the listener."""
        return self.rank == 0

    def select_own_rows(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows, out of these, that this process computes."""
        return rows[self.rank :: self.count]

    def sum_over_processes(self, value: float) -> float:
        """Sum of a number over all processes; today the number itself."""
        return value
