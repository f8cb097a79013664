"""Executors of stages: one after another in the run's own process, or in several processes at once."""

import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from os import _exit
from threading import Thread
from typing import Any, Protocol

from mixpo.data.errors import InputError
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_summary
from mixpo.training.record import ProgressListener, progress_listener
from mixpo.training.runtime import count_cores
from mixpo.training.step import Diverged


@dataclass(frozen=True)
class StageFailure:
    """Failure of a stage: the reason, and whether the user's input is the cause."""

    reason: str
    bad_input: bool = False


Outcome = float | StageFailure
"""Seconds that a stage took, or its failure."""


class StageDisplay(ProgressListener, Protocol):
    """Interface of a display of one stage's progress."""

    def on_end(self, outcome: Outcome) -> None:
        """Show how the stage ended: after how many seconds, or why it failed."""


def _compute_stage_or_failure(stage_cache: StageCache, stage: Stage) -> Outcome:
    """Compute a stage and return its seconds or its failure, whose traceback is written to the stage's folder."""
    try:
        return float(read_stage_summary(stage_cache.compute_stage(stage))["cost"]["seconds"])
    except InputError as error:
        return StageFailure(str(error), bad_input=True)
    except Exception as error:  # whatever it is, the other stages' results stand
        trace = stage_cache.locate_folder(stage) / "failure.txt"
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf8")
        text = str(error) if isinstance(error, Diverged) else f"{type(error).__name__}: {error}"
        return StageFailure(
            f"{type(stage).__name__} {stage_cache.compute_identity(stage)}: {text} (details in {trace})"
        )


class InProcessExecutor:
    """Executor that computes one stage after another in the run's own process, each before `submit_stage` returns."""

    def __init__(self, stage_cache: StageCache) -> None:
        self.stage_cache = stage_cache
        self.last: tuple[Stage, StageDisplay, Outcome] | None = None

    @property
    def can_submit_stage(self) -> bool:
        """True if the last outcome has been taken."""
        return self.last is None

    def submit_stage(self, stage: Stage, display: StageDisplay) -> None:
        """Compute the stage to its end, then return; `wait_for_outcome` gives its outcome."""
        token = progress_listener.set(display)
        try:
            self.last = stage, display, _compute_stage_or_failure(self.stage_cache, stage)
        finally:
            progress_listener.reset(token)

    def wait_for_outcome(self) -> tuple[Stage, StageDisplay, Outcome]:
        """Return the stage that was computed, its display, and its seconds or its failure."""
        last, self.last = self.last, None
        assert last is not None
        return last


class ProcessPool:
    """Executor that computes stages in parallel processes, which are started when they are first needed.

    Each has a pipe: stages go in, progress and at last the outcome come out. A pipe that ends is a process that died.
    Pipes pickle what they carry; only our own processes write to them, and nothing of it is read from a disk. Kept by
    hand, since ProcessPoolExecutor reports no progress and its workers outlive a killed parent.
    """

    def __init__(self, stage_cache: StageCache) -> None:
        runtime = stage_cache.runtime
        self.count = runtime.workers
        threads = runtime.threads or max(1, count_cores() // self.count)
        self.stage_cache = StageCache(stage_cache.cache, runtime.model_copy(update={"threads": threads}))
        self.processes: dict[Connection, SpawnProcess] = {}
        self.busy: dict[Connection, tuple[Stage, StageDisplay]] = {}

    @property
    def can_submit_stage(self) -> bool:
        """True if fewer stages are being computed than there may be processes."""
        return len(self.busy) < self.count

    def submit_stage(self, stage: Stage, display: StageDisplay) -> None:
        """Send the stage to an idle process and return at once. Raises `InputError` if the process is dead."""
        idle = [pipe for pipe in self.processes if pipe not in self.busy]
        pipe = idle[0] if idle else self._start_process()
        with self._report_killed_process():
            pipe.send(stage)
        self.busy[pipe] = stage, display

    def wait_for_outcome(self) -> tuple[Stage, StageDisplay, Outcome]:
        """Wait until any stage ends, showing progress; return it, its display, and its seconds or its failure."""
        while True:
            for pipe in wait(list(self.busy)):
                assert isinstance(pipe, Connection)
                with self._report_killed_process():
                    method, arguments = pipe.recv()
                if method == "end":
                    return *self.busy.pop(pipe), arguments[0]
                getattr(self.busy[pipe][1], method)(*arguments)

    def kill_workers(self) -> None:
        """Kill all worker processes and wait for them to end."""
        for process in self.processes.values():
            process.kill()
            process.join()

    def _start_process(self) -> Connection:
        """Start a worker process and return the pipe to it."""
        context = get_context("spawn")
        pipe, far = context.Pipe()
        process = context.Process(target=_serve_stages, args=(self.stage_cache, far), daemon=True)
        process.start()
        far.close()
        self.processes[pipe] = process
        return pipe

    @contextmanager
    def _report_killed_process(self) -> Iterator[None]:
        """Context manager that raises `InputError` where a pipe ends because its process was killed."""
        try:
            yield
        except (EOFError, OSError) as error:
            raise InputError(
                f"runtime.workers: found {self.count}, and one of the processes was killed, perhaps for lack of "
                "memory; set fewer workers and run the same command again to resume"
            ) from error


StageExecutor = InProcessExecutor | ProcessPool
"""An executor of stages: `submit_stage` one while it `can_submit_stage`, and `wait_for_outcome` of the next."""


@contextmanager
def open_executor(stage_cache: StageCache) -> Iterator[StageExecutor]:
    """Context manager that yields an executor with as many processes as the cache's runtime says; kills them at end."""
    if stage_cache.runtime.workers == 1:
        yield InProcessExecutor(stage_cache)
        return
    pool = ProcessPool(stage_cache)
    try:
        yield pool
    finally:
        pool.kill_workers()


def _serve_stages(stage_cache: StageCache, pipe: Connection) -> None:
    """Compute the stages that come through a pipe until it closes; runs in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with_parent, daemon=True).start()
    pipe_listener = PipeListener(pipe)
    progress_listener.set(pipe_listener)
    with suppress(EOFError):
        while True:
            pipe_listener.forward_call("end", _compute_stage_or_failure(stage_cache, pipe.recv()))


def _exit_with_parent() -> None:
    """Wait for the parent process to end, then end this process."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _exit(1)


@dataclass(frozen=True)
class PipeListener:
    """Listener that sends a stage's progress through a pipe, as names of methods and their arguments."""

    pipe: Connection

    def on_step(self, steps_done: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Send the steps done, their total and the metrics through the pipe."""
        self.forward_call("on_step", steps_done, total_steps, dict(metrics))

    def on_message(self, text: str) -> None:
        """Send a line of text through the pipe."""
        self.forward_call("on_message", text)

    def forward_call(self, method_name: str, *arguments: Any) -> None:
        """Send the name of a method of the display and its arguments through the pipe."""
        self.pipe.send((method_name, arguments))
