"""A display for tests that records the stages, steps, messages and failures of a run."""

from collections.abc import Mapping, Sequence

from mixpo.experiments.workers import Outcome, StageDisplay, StageFailure


class RecordingDisplay:
    def __init__(self) -> None:
        self.started: list[str] = []
        """Kind of every stage that was started, and its arms."""
        self.running = 0
        self.most_at_once = 0
        self.steps = 0
        self.notes: list[str] = []
        self.failures: list[StageFailure] = []

    def start_stage(self, stage: str, identity: str, arms: Sequence[str]) -> StageDisplay:
        self.started.append(f"{stage} for {', '.join(arms)}")
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        return self

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        assert 0 < done <= total
        self.steps += 1

    def on_message(self, text: str) -> None:
        self.notes.append(text)

    def on_end(self, outcome: Outcome) -> None:
        self.running -= 1
        if isinstance(outcome, StageFailure):
            self.failures.append(outcome)
