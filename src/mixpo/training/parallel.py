"""The processes that compute one stage together: how work is shared out, numbers are summed and files are written.

There is one process today. The optimizer step, the counts of a whole batch, saving and logging go through here, so that
more processes change this file and no stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processes:
    """The processes of a stage, as one of them sees them."""

    device: torch.device
    """Where this process computes."""
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the stage's files and talks to the watcher."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows that this process computes."""
        return rows[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value
