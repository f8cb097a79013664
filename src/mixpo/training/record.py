"""Records of a running stage: metrics of each step, cost, and messages to a listener."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mixpo.data.errors import InputError
from mixpo.models.language_model import LanguageModel
from mixpo.training import memory
from mixpo.training.parallel import StageProcesses


class ProgressListener(Protocol):
    """Protocol of a receiver of a stage's progress, such as the command line's progress bars."""

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of the last of `done` finished steps out of `total`."""

    def on_message(self, text: str) -> None:
        """Receive a message of one line for the user."""


class NullListener:
    """A progress listener that ignores everything."""

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Ignore the progress of a step."""

    def on_message(self, text: str) -> None:
        """Ignore a message for the user."""


progress_listener: ContextVar[ProgressListener] = ContextVar("progress_listener", default=NullListener())  # noqa: B039


def make_progress_reporter(total_items: int) -> Callable[[int], None]:
    """Make a function that takes a number of newly finished items and reports their total to the progress listener."""
    done = 0

    def advance(count: int) -> None:
        """Report `count` more finished items."""
        nonlocal done
        done += count
        progress_listener.get().on_step(done, total_items, {})

    return advance


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_replace_non_finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a killed process leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf8")
    temporary.replace(path)


def _replace_non_finite(value: Any) -> Any:
    """A copy of nested lists and mappings with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepLog:
    """A JSON Lines file of rows with a `step`, by the main process; rows from `resumed_at` on are deleted first."""

    def __init__(self, path: Path, *, resumed_at: int, processes: StageProcesses) -> None:
        self.path, self.processes = path, processes
        if processes.is_main_process:
            _delete_lines_from_step(path, resumed_at)

    def append_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; in the main process alone."""
        if self.processes.is_main_process:
            append_jsonl(self.path, rows)


class MetricsLog(StepLog):
    """The file `metrics.jsonl`, one line a step; lines from step `resumed_at` on are deleted when it is opened."""

    def __init__(self, folder: Path, *, resumed_at: int, processes: StageProcesses) -> None:
        super().__init__(folder / "metrics.jsonl", resumed_at=resumed_at, processes=processes)

    def append_step(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step (counted from 0) and report them to the progress listener."""
        self.append_rows([{"step": step, **metrics}])
        progress_listener.get().on_step(step + 1, total_steps, metrics)

    def read_steps(self) -> list[dict[str, float]]:
        """Read the metrics of all steps written so far, one dict a step."""
        return read_jsonl(self.path)


@dataclass
class Cost:
    """Cost of a stage: tokens, model FLOPs, and this machine's seconds and peak memory."""

    seconds: float = 0.0
    """Those of earlier processes."""
    tokens_sampled: float = 0.0
    tokens_trained: float = 0.0
    tokens_scored: float = 0.0
    flops: float = 0.0

    def __post_init__(self) -> None:
        self._start = time.perf_counter()

    def restore_counts(self, saved_counts: Mapping[str, float]) -> None:
        """Set the counts to those of a checkpoint; seconds since the start of this process are added to its seconds."""
        for name, value in saved_counts.items():
            setattr(self, name, value)

    def add_sampled_tokens(self, lm: LanguageModel, tokens: int, prompt_tokens: int) -> None:
        """Add tokens sampled from a model; with the prompt tokens of the prefill they add 2 FLOPs a weight."""
        self.tokens_sampled += tokens
        self.flops += 2.0 * sum(lm.count_multiplied_weights()) * (tokens + prompt_tokens)

    def add_trained_tokens(self, lm: LanguageModel, tokens: int) -> None:
        """Add tokens of forward and backward passes, prompts included: 6 FLOPs a trained weight, 4 a frozen one.

        A product takes 2 in the forward pass, 2 for the gradient of its input, and 2 for that of trained weights.
        """
        trained, frozen = lm.count_multiplied_weights()
        self.tokens_trained += tokens
        self.flops += (6.0 * trained + 4.0 * frozen) * tokens

    def add_scored_tokens(self, lm: LanguageModel, tokens: int) -> None:
        """Add tokens of forward passes without gradients: 2 FLOPs a weight."""
        self.tokens_scored += tokens
        self.flops += 2.0 * sum(lm.count_multiplied_weights()) * tokens

    def get_counts(self) -> dict[str, float]:
        """Seconds, tokens and FLOPs so far, by name, as `restore_counts` takes them."""
        return {**asdict(self), "seconds": self.seconds + time.perf_counter() - self._start}

    def summarize(self) -> dict[str, float]:
        """Seconds, tokens and FLOPs so far and the peak memory of the process in MiB, by name."""
        return {**self.get_counts(), "peak_memory_mib": memory.read_peak_memory_mib()}


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file; numbers that are not finite become null."""
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(_replace_non_finite(row), ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[Any]:
    """Rows of a JSON Lines file but a torn last one; none without a file. Raises `InputError` on a damaged line."""
    rows = []
    for number, line in enumerate(_read_complete_lines(path), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: found no JSON ({type(error).__name__}); expected the lines that the stage wrote; "
                "delete the stage's folder to compute it again"
            ) from error
    return rows


def read_metrics(stage_folder: Path) -> list[dict[str, float]]:
    """The metrics of every step of a stage, one dict a step; empty if there are none."""
    return read_jsonl(stage_folder / "metrics.jsonl")


def _delete_lines_from_step(path: Path, step: int) -> None:
    """Delete the lines of this step and of later ones from a JSON Lines file, and an incomplete last line."""
    rows = read_jsonl(path)
    remaining = [line for line, row in zip(_read_complete_lines(path), rows, strict=True) if row["step"] < step]
    write_text(path, "".join(remaining))


def _read_complete_lines(path: Path) -> list[str]:
    """Lines of a file that end with a newline; empty if there is no file."""
    if not path.exists():
        return []
    return [f"{line}\n" for line in path.read_text(encoding="utf8").split("\n")[:-1]]  # other separators are text
