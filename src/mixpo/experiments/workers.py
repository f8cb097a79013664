"""Where stages compute: right here, one after another, or in processes side by side."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from os import _exit
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any, Protocol

from mixpo.data.errors import InputError
from mixpo.stages.engine import Engine, read_summary
from mixpo.stages.stage import Stage
from mixpo.training.record import Watcher, watcher
from mixpo.training.runtime import Runtime
from mixpo.training.step import Diverged


@dataclass(frozen=True)
class Failure:
    """Why a stage has no results."""

    reason: str
    bad_input: bool = False


Outcome = float | Failure
"""The seconds that a stage took, or why it failed."""
PATIENCE = 1.0
"""Seconds without a word from any process, after which they are looked after."""


class Workers(Protocol):
    """Computes stages."""

    @property
    def free(self) -> bool:
        """Whether another stage may start now."""

    def start(self, stage: Stage, watching: Watcher) -> None:
        """Begin to compute a stage whose inputs are there, and tell how it goes on."""

    def ended(self) -> tuple[Stage, Outcome]:
        """The next of the started stages that comes to an end, waited for."""


@contextmanager
def workers(engine: Engine) -> Iterator[Workers]:
    """As many as the engine's runtime says."""
    count = engine.runtime.processes
    if count == 1:
        yield _Here(engine)
        return
    context = get_context("spawn")
    told = context.Queue()
    far, near = context.Pipe(duplex=False)
    begun_with = engine.cache, engine.runtime, told, far
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=begun_with) as pool, near:
        yield _Beside(engine, pool, told)


def attempt(engine: Engine, stage: Stage) -> Outcome:
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
        self.last: tuple[Stage, Outcome] | None = None

    @property
    def free(self) -> bool:
        return self.last is None

    def start(self, stage: Stage, watching: Watcher) -> None:
        watcher.set(watching)
        self.last = stage, attempt(self.engine, stage)

    def ended(self) -> tuple[Stage, Outcome]:
        last, self.last = self.last, None
        assert last is not None
        return last


class _Beside:
    def __init__(self, engine: Engine, pool: ProcessPoolExecutor, told: Any) -> None:
        self.engine, self.pool, self.told = engine, pool, told
        self.going: dict[str, tuple[Stage, Watcher, Future[None]]] = {}

    @property
    def free(self) -> bool:
        return len(self.going) < self.engine.runtime.processes

    def start(self, stage: Stage, watching: Watcher) -> None:
        self.going[self.engine.identity(stage)] = stage, watching, self.pool.submit(_work, stage)

    def ended(self) -> tuple[Stage, Outcome]:
        while True:
            try:
                identity, what, arguments = self.told.get(timeout=PATIENCE)
            except Empty:
                self._refuse_dead()
                continue
            stage, watching, _ = self.going[identity]
            if what == "end":
                del self.going[identity]
                return stage, arguments[0]
            getattr(watching, what)(*arguments)

    def _refuse_dead(self) -> None:
        try:
            for *_, future in self.going.values():
                if future.done():
                    future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"runtime.workers: found {self.engine.runtime.processes}, and one of the processes was killed (perhaps "
                "there was not enough memory); expected room for all; set fewer; the same command goes on where this "
                "one was"
            ) from error


_engine: Engine
_told: Any


def _begin(cache: Path, runtime: Runtime, told: Any, leash: Connection) -> None:
    """What a process does first. It ends when the other end of the leash is closed, by will or by death."""
    global _engine, _told
    _engine, _told = Engine(cache, runtime), told
    Thread(target=lambda: (wait([leash]), _exit(1)), daemon=True).start()


def _work(stage: Stage) -> None:
    teller = _Teller(_engine.identity(stage), _told.put)
    watcher.set(teller)
    teller.tell("end", attempt(_engine, stage))


@dataclass(frozen=True)
class _Teller:
    """A watcher that passes on what it is told."""

    identity: str
    put: Callable[[Any], None]

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.tell("step", done, total, dict(metrics))

    def note(self, text: str) -> None:
        self.tell("note", text)

    def tell(self, what: str, *arguments: Any) -> None:
        self.put((self.identity, what, arguments))
