"""Records of a running stage: metrics of each step, cost, and messages to a listener."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from mixpo.data.errors import InputError
from mixpo.models.language_model import iterate_matrix_modules
from mixpo.training import memory
from mixpo.training.parallel import StageProcesses


class ProgressListener(Protocol):
    """A receiver of a stage's progress, such as the command line's progress bars."""

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of the last of `done` finished steps out of `total`."""

    def on_message(self, text: str) -> None:
        """Receive a message of one line."""


class NullListener:
    """A listener that ignores everything."""

    def on_step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Ignore progress."""

    def on_message(self, text: str) -> None:
        """Ignore a message."""


progress_listener: ContextVar[ProgressListener] = ContextVar("progress_listener", default=NullListener())  # noqa: B039


def make_progress_reporter(total: int) -> Callable[[int], None]:
    """Return a function that adds to a count of finished items and reports it to the listener, out of `total`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress_listener.get().on_step(done, total, {})

    return advance


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_replace_non_finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a killed process leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf8")
    temporary.replace(path)


def _replace_non_finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in nested lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """The file `metrics.jsonl`, one line a step; lines from step `resumed_at` on are deleted when it is opened."""

    def __init__(self, folder: Path, *, resumed_at: int, processes: StageProcesses) -> None:
        self.path = folder / "metrics.jsonl"
        self.processes = processes
        delete_lines_from_step(self.path, resumed_at)

    def add(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step (counted from 0) and report them to the listener."""
        if not self.processes.is_main:
            return
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **_replace_non_finite(metrics)}) + "\n")
        progress_listener.get().on_step(step + 1, total, metrics)

    def rows(self) -> list[dict[str, float]]:
        """Read all lines."""
        return read_jsonl(self.path)


class Cost:
    """Cost of a stage: tokens, model FLOPs, and this machine's seconds and peak memory."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens_sampled = 0.0
        self.tokens_trained = 0.0
        self.tokens_scored = 0.0
        self.flops = 0.0
        self._start = time.perf_counter()

    def restore(self, spent: Mapping[str, float]) -> None:
        """Set the counts to those of a checkpoint; seconds since the start of this process are added to its seconds."""
        for name, value in spent.items():
            setattr(self, name, value)

    def count_sampled(self, model: PreTrainedModel, tokens: int, prompt_tokens: int) -> None:
        """Count tokens sampled from a model, and prompt tokens of the prefill."""
        self.tokens_sampled += tokens
        self.flops += 2.0 * sum(count_weights(model)) * (tokens + prompt_tokens)

    def count_trained(self, model: PreTrainedModel, tokens: int) -> None:
        """Count tokens of forward and backward passes, prompts included: 6 FLOPs a trained weight, 4 a frozen one.

        A product takes 2 in the forward pass, 2 for the gradient of its input, and 2 for that of trained weights.
        """
        trained, frozen = count_weights(model)
        self.tokens_trained += tokens
        self.flops += (6.0 * trained + 4.0 * frozen) * tokens

    def count_scored(self, model: PreTrainedModel, tokens: int) -> None:
        """Count tokens of forward passes: 2 FLOPs a weight."""
        self.tokens_scored += tokens
        self.flops += 2.0 * sum(count_weights(model)) * tokens

    def counts(self) -> dict[str, float]:
        """Return seconds, tokens and FLOPs so far, which `restore` takes again."""
        return {
            "seconds": self.seconds + time.perf_counter() - self._start,
            "tokens_sampled": self.tokens_sampled,
            "tokens_trained": self.tokens_trained,
            "tokens_scored": self.tokens_scored,
            "flops": self.flops,
        }

    def summary(self) -> dict[str, float]:
        """Return the counts, and the peak memory of the process in MiB."""
        return {**self.counts(), "peak_memory_mib": memory.read_peak_mib()}


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Count the trained and the frozen weights that a token is multiplied by: matrices, adapters and heads.

    Of experts, only those that a token is routed to. Embeddings, norms and biases are in no matrix product.
    """
    counts = {True: 0, False: 0}
    for module in iterate_matrix_modules(model):
        counts[module.weight.requires_grad] += module.weight.numel()
    for weight in model.parameters():
        if weight.ndim == 3:  # all experts of a layer
            visited = getattr(model.config.get_text_config(), "num_experts_per_tok", len(weight))
            counts[weight.requires_grad] += weight[:visited].numel()
    return counts[True], counts[False]


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file."""
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(_replace_non_finite(row), ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[Any]:
    """Read the rows of a JSON Lines file, without an incomplete last line; no rows if there is no file.

    Raises `InputError` if a line is damaged.
    """
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


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of every step of a stage."""
    return read_jsonl(folder / "metrics.jsonl")


def delete_lines_from_step(path: Path, step: int) -> None:
    """Delete the lines of `step` and later steps, and an incomplete last line."""
    rows = read_jsonl(path)
    remaining = [line for line, row in zip(_read_complete_lines(path), rows, strict=True) if row["step"] < step]
    write_text(path, "".join(remaining))


def _read_complete_lines(path: Path) -> list[str]:
    """Read the lines of a file that end with a newline; none if there is no file."""
    if not path.exists():
        return []
    return [f"{line}\n" for line in path.read_text(encoding="utf8").split("\n")[:-1]]  # other separators are text
