"""A display for tests: it watches every stage itself, and remembers what it saw."""

from collections.abc import Mapping, Sequence

from mixpo.experiments.workers import Failure, Outcome, StageDisplay


class Watching:
    def __init__(self) -> None:
        self.begun: list[str] = []
        """Kinds of stages, and the arms they are for."""
        self.going = 0
        self.most_at_once = 0
        self.steps = 0
        self.notes: list[str] = []
        self.failures: list[Failure] = []

    def start_stage(self, stage: str, identity: str, arms: Sequence[str]) -> StageDisplay:
        self.begun.append(f"{stage} for {', '.join(arms)}")
        self.going += 1
        self.most_at_once = max(self.most_at_once, self.going)
        return self

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        assert 0 < done <= total
        self.steps += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, outcome: Outcome) -> None:
        self.going -= 1
        if isinstance(outcome, Failure):
            self.failures.append(outcome)
