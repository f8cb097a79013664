"""Executors of stages: one after another in the run's own process, or in several processes at once."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any, Protocol

from mixpo.data.errors import InputError
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache, read_stage_summary
from mixpo.training.record import ProgressListener, progress_listener
from mixpo.training.rendezvous import LocalRendezvousStore, Rendezvous, join_rendezvous
from mixpo.training.runtime import count_cores, list_gpu_names
from mixpo.training.step import Diverged

FAILURE = "failure.txt"
"""File of a stage's folder with the traceback of its failure."""


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


def compute_stage_or_failure(stage_cache: StageCache, stage: Stage) -> Outcome:
    """Compute a stage and return its seconds or its failure, whose traceback is written to the stage's folder."""
    try:
        return float(read_stage_summary(stage_cache.compute_stage(stage))["cost"]["seconds"])
    except Exception as error:  # whatever it is, the other stages' results stand
        return _describe_failure(stage_cache, stage, error)


def _describe_failure(stage_cache: StageCache, stage: Stage, error: Exception) -> StageFailure:
    """The failure of a stage by an exception, whose traceback is written to the stage's folder if that is possible."""
    if isinstance(error, InputError):
        return StageFailure(str(error), bad_input=True)
    trace = stage_cache.locate_folder(stage) / FAILURE
    details = f"details in {trace}"
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf8")
    except OSError as unwritten:  # the disk may be full, which may have been the failure
        details = f"details could not be written: {unwritten}"
    text = str(error) if isinstance(error, Diverged) else f"{type(error).__name__}: {error}"
    return StageFailure(f"{type(stage).__name__} {stage_cache.compute_identity(stage)}: {text} ({details})")


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
            outcome = compute_stage_or_failure(self.stage_cache, stage)
            end_if_broken(self.stage_cache.rendezvous, outcome)
            self.last = stage, display, outcome
        finally:
            progress_listener.reset(token)

    def wait_for_outcome(self) -> tuple[Stage, StageDisplay, Outcome]:
        """Return the stage that was computed, its display, and its seconds or its failure."""
        last, self.last = self.last, None
        assert last is not None
        return last


@dataclass(frozen=True)
class WorkerGroup:
    """Processes that compute one stage at a time together; the first of them is at the other end of the pipe."""

    pipe: Connection
    processes: Sequence[SpawnProcess]
    store: LocalRendezvousStore | None
    """Where they meet; None if there is only one process."""
    devices: str | None
    """The GPUs that are theirs alone, as CUDA_VISIBLE_DEVICES names them; None if all are there for all groups."""

    @property
    def is_alive(self) -> bool:
        """True if none of the processes has ended."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Kill the processes and wait for them to end."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class ProcessPool:
    """Executor that computes stages in parallel groups of processes, which are started when they are first needed.

    Each group has a pipe: stages go in, progress and at last the outcome come out. A pipe that ends is a process that
    died. Pipes pickle what they carry; only our own processes write to them, and nothing of it is read from a disk.
    Kept by hand, since ProcessPoolExecutor reports no progress and its workers outlive a killed parent.
    """

    def __init__(self, stage_cache: StageCache) -> None:
        runtime = stage_cache.runtime
        self.count = runtime.count_workers()
        threads = runtime.threads or max(1, count_cores() // (self.count * runtime.processes))
        self.stage_cache = StageCache(stage_cache.cache, runtime.model_copy(update={"threads": threads}))
        self.devices = assign_devices(list_gpu_names(), runtime.processes) if runtime.workers == "gpus" else []
        self.groups: dict[Connection, WorkerGroup] = {}
        self.busy: dict[Connection, tuple[Stage, StageDisplay]] = {}

    @property
    def can_submit_stage(self) -> bool:
        """True if fewer stages are being computed than there may be groups."""
        return len(self.busy) < self.count

    def submit_stage(self, stage: Stage, display: StageDisplay) -> None:
        """Send the stage to an idle group and return at once. Raises `InputError` if one of its processes is dead."""
        idle = [pipe for pipe in self.groups if pipe not in self.busy]
        group = self.groups[idle[0]] if idle else self._start_group()
        if not group.is_alive:
            raise self._make_killed_error()
        try:
            group.pipe.send(stage)
        except OSError as error:
            raise self._make_killed_error() from error
        self.busy[group.pipe] = stage, display

    def wait_for_outcome(self) -> tuple[Stage, StageDisplay, Outcome]:
        """Wait until any stage ends, showing progress; return it, its display, and its seconds or its failure."""
        while True:
            pipes_by_sentinel = {one.sentinel: pipe for pipe in self.busy for one in self.groups[pipe].processes}
            ready = wait([*self.busy, *pipes_by_sentinel])
            pipes = [pipe for pipe in ready if isinstance(pipe, Connection)]
            for pipe in pipes:
                try:
                    method, arguments = pipe.recv()
                except (EOFError, OSError) as error:
                    return self._stop_group_of_dead_process(pipe, error)
                if method == "end":
                    return *self.busy.pop(pipe), arguments[0]
                getattr(self.busy[pipe][1], method)(*arguments)
            if not pipes:
                return self._stop_group_of_dead_process(
                    next(pipes_by_sentinel[one] for one in ready if isinstance(one, int))
                )

    def kill_workers(self) -> None:
        """Kill all worker processes and wait for them to end."""
        for group in self.groups.values():
            group.kill()

    def _start_group(self) -> WorkerGroup:
        """Start the processes of a group and return it."""
        context = get_context("spawn")
        pipe, worker_pipe = context.Pipe()
        count = self.stage_cache.runtime.processes
        store = LocalRendezvousStore() if count > 1 else None
        used = {group.devices for group in self.groups.values()}
        devices = next((one for one in self.devices if one not in used), None)
        visible = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
        processes = []
        for rank in range(count):
            arguments = self.stage_cache, worker_pipe if rank == 0 else None
            processes.append(context.Process(target=_serve_stages, args=arguments, daemon=True))
            with _extend_environment({**visible, **(store.make_environment(rank, count) if store else {})}):
                processes[-1].start()
        worker_pipe.close()
        self.groups[pipe] = WorkerGroup(pipe, processes, store, devices)
        return self.groups[pipe]

    def _stop_group_of_dead_process(
        self, pipe: Connection, cause: Exception | None = None
    ) -> tuple[Stage, StageDisplay, Outcome]:
        """End a group of which a process has died; return its stage, the display, and the failure that was reported.

        Raises `InputError` if none was.
        """
        group = self.groups.pop(pipe)
        group.kill()
        if group.store is None or (failure := group.store.read_failure()) is None:
            raise self._make_killed_error() from cause
        return *self.busy.pop(pipe), failure

    def _make_killed_error(self) -> InputError:
        """The error of a process that was killed."""
        runtime = self.stage_cache.runtime
        name = "processes" if runtime.processes > 1 else "workers"
        return InputError(
            f"runtime.{name}: found {getattr(runtime, name)}, and one of the processes was killed, perhaps for lack of "
            f"memory; set fewer {name} and run the same command again to resume"
        )


def assign_devices(names: Sequence[str], group_size: int) -> list[str]:
    """Devices of each group of processes, as texts for CUDA_VISIBLE_DEVICES; what is too few for a group is left."""
    return [",".join(names[first : first + group_size]) for first in range(0, len(names) - group_size + 1, group_size)]


@contextmanager
def _extend_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Context manager in which processes are started with these variables, which PyTorch reads when it is imported."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve_stages(stage_cache: StageCache, pipe: Connection | None) -> None:
    """Compute the stages that come through a pipe, or from the main process of the group, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with_parent, daemon=True).start()
    rendezvous = join_rendezvous()
    stage_cache = StageCache(stage_cache.cache, stage_cache.runtime.decide_defaults_here(), rendezvous)
    if pipe is None:
        follow_stages(stage_cache)
        return
    pipe_listener = PipeListener(pipe)
    progress_listener.set(pipe_listener)
    with suppress(EOFError):
        while True:
            outcome = compute_stage_or_failure(stage_cache, pipe.recv())
            end_if_broken(rendezvous, outcome)
            pipe_listener.forward_call("end", outcome)


def follow_stages(stage_cache: StageCache) -> None:
    """Compute this process's share of every stage that the main process announces, until that ends."""
    rendezvous = stage_cache.rendezvous
    assert rendezvous is not None
    while (stage := rendezvous.wait_for_stage()) is not None:
        try:
            stage_cache.compute_share(stage)
        except Exception as error:  # which the main process reports, unless it hangs
            if rendezvous.is_broken:
                end_if_broken(rendezvous, _describe_failure(stage_cache, stage, error))


def end_if_broken(rendezvous: Rendezvous | None, outcome: Outcome) -> None:
    """End this process if others hang in a stage that failed here, so that whoever started it ends them."""
    if rendezvous is not None and rendezvous.is_broken:
        assert isinstance(outcome, StageFailure)
        if parent_process() is None:  # else the parent shows it
            print(outcome.reason, file=sys.stderr, flush=True)
        rendezvous.report_failure(outcome)
        os._exit(1)


def _exit_with_parent() -> None:
    """Wait for the parent process to end, then end this process."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class ForwardingListener:
    """Listener that forwards a stage's progress to another process, as names of a display's methods and arguments."""

    def on_step(self, steps_done: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Forward the steps done, their total and the metrics."""
        self.forward_call("on_step", steps_done, total_steps, dict(metrics))

    def on_message(self, text: str) -> None:
        """Forward a line of text for the user."""
        self.forward_call("on_message", text)

    def forward_call(self, method_name: str, *arguments: Any) -> None:
        """Forward the name of a method of the display and its arguments."""
        raise NotImplementedError


@dataclass(frozen=True)
class PipeListener(ForwardingListener):
    """Listener that sends a stage's progress through a pipe."""

    pipe: Connection

    def forward_call(self, method_name: str, *arguments: Any) -> None:
        """Send the name of a method of the display and its arguments through the pipe."""
        self.pipe.send((method_name, arguments))
