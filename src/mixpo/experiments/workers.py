"""Where stages compute: right here, one after another, or in processes side by side."""

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
from mixpo.stages.engine import Engine, read_summary
from mixpo.stages.stage import Stage
from mixpo.training.record import Watcher, watcher
from mixpo.training.runtime import count_cores
from mixpo.training.step import Diverged


@dataclass(frozen=True)
class Failure:
    """Why a stage has no results."""

    reason: str
    bad_input: bool = False


Outcome = float | Failure
"""The seconds that a stage took, or why it failed."""


class StageDisplay(Watcher, Protocol):
    """How whoever watches a run sees one stage."""

    def end(self, outcome: Outcome) -> None:
        """The stage is over."""


class Workers(Protocol):
    """Computes stages."""

    @property
    def free(self) -> bool:
        """Whether another stage may start now."""

    def start(self, stage: Stage, shown: StageDisplay) -> None:
        """Begin to compute a stage whose inputs are there, and tell how it goes on."""

    def ended(self) -> tuple[Stage, StageDisplay, Outcome]:
        """The next of the started stages that comes to an end, waited for; its display is not told yet."""


@contextmanager
def workers(engine: Engine) -> Iterator[Workers]:
    """As many as the engine's runtime says."""
    if engine.runtime.workers == 1:
        yield _Here(engine)
        return
    beside = _Beside(engine)
    try:
        yield beside
    finally:
        beside.close()


def _attempt(engine: Engine, stage: Stage) -> Outcome:
    """Compute a stage, whatever comes of it; the traceback of a failure is in its folder."""
    try:
        return float(read_summary(engine.compute(stage))["cost"]["seconds"])
    except InputError as error:
        return Failure(str(error), bad_input=True)
    except Exception as error:  # whatever it is, the other stages' results stand
        trace = engine.folder(stage) / "failure.txt"
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("".join(traceback.format_exception(error)), encoding="utf8")
        text = str(error) if isinstance(error, Diverged) else f"{type(error).__name__}: {error}"
        return Failure(f"{type(stage).__name__} {engine.identity(stage)}: {text} (details in {trace})")


class _Here:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last: tuple[Stage, StageDisplay, Outcome] | None = None

    @property
    def free(self) -> bool:
        return self.last is None

    def start(self, stage: Stage, shown: StageDisplay) -> None:
        watcher.set(shown)
        self.last = stage, shown, _attempt(self.engine, stage)

    def ended(self) -> tuple[Stage, StageDisplay, Outcome]:
        last, self.last = self.last, None
        assert last is not None
        return last


class _Beside:
    """Processes, begun when they are first needed, and a pipe to each: stages go in, what a watcher is told comes out,
    and at last the outcome. A pipe that ends is a process that died. Pipes pickle what they carry; nobody but our own
    processes writes to them, and nothing of it is read from a disk."""

    def __init__(self, engine: Engine) -> None:
        runtime = engine.runtime
        self.count = runtime.workers
        threads = runtime.threads or max(1, count_cores() // self.count)
        self.engine = Engine(engine.cache, runtime.model_copy(update={"threads": threads}))
        self.processes: dict[Connection, SpawnProcess] = {}
        self.busy: dict[Connection, tuple[Stage, StageDisplay]] = {}

    @property
    def free(self) -> bool:
        return len(self.busy) < self.count

    def start(self, stage: Stage, shown: StageDisplay) -> None:
        idle = [pipe for pipe in self.processes if pipe not in self.busy]
        pipe = idle[0] if idle else self._begin()
        with self._refusing_death():
            pipe.send(stage)
        self.busy[pipe] = stage, shown

    def ended(self) -> tuple[Stage, StageDisplay, Outcome]:
        while True:
            for pipe in wait(list(self.busy)):
                assert isinstance(pipe, Connection)
                with self._refusing_death():
                    what, arguments = pipe.recv()
                if what == "end":
                    return *self.busy.pop(pipe), arguments[0]
                getattr(self.busy[pipe][1], what)(*arguments)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()

    def _begin(self) -> Connection:
        context = get_context("spawn")
        pipe, far = context.Pipe()
        process = context.Process(target=_serve, args=(self.engine, far), daemon=True)
        process.start()
        far.close()
        self.processes[pipe] = process
        return pipe

    @contextmanager
    def _refusing_death(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise InputError(
                f"runtime.workers: found {self.count}, and one of the processes was killed (perhaps there was not "
                "enough memory); expected room for all; set fewer; the same command goes on where this one was"
            ) from error


def _serve(engine: Engine, pipe: Connection) -> None:
    """What a process does: compute the stages that come. It ends with the process that began it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    teller = _Teller(pipe)
    watcher.set(teller)
    with suppress(EOFError):
        while True:
            teller.tell("end", _attempt(engine, pipe.recv()))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _exit(1)


@dataclass(frozen=True)
class _Teller:
    """A watcher that passes on what it is told."""

    pipe: Connection

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.tell("step", done, total, dict(metrics))

    def note(self, text: str) -> None:
        self.tell("note", text)

    def tell(self, what: str, *arguments: Any) -> None:
        self.pipe.send((what, arguments))
