"""What a stage leaves behind while it runs: metrics a step, its cost, and a line for whoever watches."""

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
from mixpo.training.parallel import Processes


class Watcher(Protocol):
    """Whoever watches a stage run: the command line's progress bars, or nobody."""

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Called when `done` of `total` steps are over, with the metrics of the last one."""

    def note(self, text: str) -> None:
        """Called with a line worth reading now."""


class NullWatcher:
    """A watcher that does nothing."""

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Ignore progress."""

    def note(self, text: str) -> None:
        """Ignore a line."""


watcher: ContextVar[Watcher] = ContextVar("watcher", default=NullWatcher())  # noqa: B039


def report_progress(total: int) -> Callable[[int], None]:
    """Return a function that adds to the number of things done and tells the watcher, out of `total`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watcher.get().step(done, total, {})

    return advance


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one move; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one move: a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """`metrics.jsonl`: one line a step. Lines of steps that a resumed stage will take again are dropped."""

    def __init__(self, folder: Path, *, resumed_at: int, processes: Processes) -> None:
        self.path = folder / "metrics.jsonl"
        self.processes = processes
        trim_jsonl(self.path, resumed_at)

    def add(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step (counted from 0) and tell the watcher."""
        if not self.processes.is_main:
            return
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **_finite(metrics)}) + "\n")
        watcher.get().step(step + 1, total, metrics)

    def rows(self) -> list[dict[str, float]]:
        """All lines so far."""
        return read_jsonl(self.path)


class Cost:
    """What a stage costs. Counted in tokens and model FLOPs; seconds and peak memory are this machine's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens_sampled = 0.0
        self.tokens_trained = 0.0
        self.tokens_scored = 0.0
        self.flops = 0.0
        self._start = time.perf_counter()

    def resume(self, spent: Mapping[str, float]) -> None:
        """Go on from a checkpoint's counts; what was done since the start to come there costs seconds alone."""
        for name, value in spent.items():
            setattr(self, name, value)

    def sampled(self, model: PreTrainedModel, tokens: int, prompt_tokens: int) -> None:
        """Count tokens drawn from a model and prompt tokens prefilled."""
        self.tokens_sampled += tokens
        self.flops += 2.0 * sum(count_weights(model)) * (tokens + prompt_tokens)

    def trained(self, model: PreTrainedModel, tokens: int) -> None:
        """Count tokens, prompts included, that went forward and backward: 6 FLOPs a trained weight, 4 a frozen one.

        A product costs 2 forward, 2 for the gradient of what goes in and 2 for that of the weights, which frozen ones
        are spared.
        """
        trained, frozen = count_weights(model)
        self.tokens_trained += tokens
        self.flops += (6.0 * trained + 4.0 * frozen) * tokens

    def scored(self, model: PreTrainedModel, tokens: int) -> None:
        """Count tokens that went forward only: 2 FLOPs a weight."""
        self.tokens_scored += tokens
        self.flops += 2.0 * sum(count_weights(model)) * tokens

    def counts(self) -> dict[str, float]:
        """Everything so far, for a checkpoint: what a resumed stage has already spent."""
        return {
            "seconds": self.seconds + time.perf_counter() - self._start,
            "tokens_sampled": self.tokens_sampled,
            "tokens_trained": self.tokens_trained,
            "tokens_scored": self.tokens_scored,
            "flops": self.flops,
        }

    def summary(self) -> dict[str, float]:
        """The counts, and the peak memory of the process in MiB."""
        return {**self.counts(), "peak_memory_mib": memory.read_peak_mib()}


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Weights in a token's matrix products, trained and frozen: adapters and heads too; of experts, those it visits.

    Not embeddings, norms and biases, which multiply no matrix, nor attention, which has no weights.
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
        file.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON Lines file that was written here; a last line that was not finished is left out.

    Raises `InputError` on a damaged one.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
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


def trim_jsonl(path: Path, step: int) -> None:
    """Drop the lines of `step` and later ones, and a last line that was not finished."""
    rows = read_jsonl(path)
    kept = [line for line, row in zip(_whole_lines(path), rows, strict=True) if row["step"] < step]
    write_text(path, "".join(kept))


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [f"{line}\n" for line in path.read_text(encoding="utf8").split("\n")[:-1]]  # other separators are text
