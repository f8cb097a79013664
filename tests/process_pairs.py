"""Two processes that call functions together, as two processes of a stage do, and stages that fail in one of them."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

from mixpo.stages.stage import Stage
from mixpo.training import rendezvous
from mixpo.training.job import StageJob
from mixpo.training.rendezvous import LocalRendezvousStore, Rendezvous
from mixpo.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1)


class ProcessPair:
    """Two processes that wait for functions to call; a function's first argument are the processes, then its own."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a test module in both processes; returns results, or the exceptions raised, by rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return [pipe.recv() for pipe in self.pipes]


@contextmanager
def start_process_pair() -> Iterator[ProcessPair]:
    context, store, processes, pipes = get_context("spawn"), LocalRendezvousStore(), [], []
    for rank in range(2):
        pipe, far = context.Pipe()
        pipes.append(pipe)
        processes.append(context.Process(target=_serve, args=(store.store.port, rank, far), daemon=True))
        processes[-1].start()
        far.close()
    try:
        yield ProcessPair(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(port: int, rank: int, pipe: Connection) -> None:
    from torch.distributed import TCPStore

    meeting = Rendezvous(TCPStore("127.0.0.1", port), rank, 2, rank)
    while True:
        function, arguments = pipe.recv()
        try:
            with meeting.open_processes(RUNTIME) as processes:
                result = function(processes, *arguments)
            pipe.send(result)
        except Exception as error:
            error.args = (*error.args, meeting.is_broken)
            pipe.send(error)
            if meeting.is_broken:
                os._exit(1)  # so that the other one fails too


class StageFailingInOneProcess(Stage):
    """A stage that fails in its last process while the first of two waits for it."""

    how: str

    parts: ClassVar[tuple[str, ...]] = ()

    def compute(self, input_paths: Mapping[str, Path], job: StageJob) -> None:
        rendezvous.AGREEMENT_TIME /= 5
        if job.processes.rank == job.processes.count - 1:
            if self.how == "dies":
                os._exit(3)
            raise ValueError(f"it {self.how}")
        if self.how == "raises alone":
            time.sleep(600)  # as a process that hangs in a GPU's operation
        job.processes.wait_for_all()
