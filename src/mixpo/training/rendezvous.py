"""Where processes that compute stages together meet: torchrun's, those of a Slurm step, or workers on this machine.

Whoever starts them sets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). The main
process, of rank 0, announces each stage to the others, and all of them open a process group for it, which is closed on
every way out. A process that fails says so in the store that all of them reach, so that the stage ends everywhere with
the error that was first. A process that hears nothing from the others for ten seconds after a failure must end itself,
so that its launcher ends the rest.
"""

import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from mixpo.training.parallel import StageProcesses
from mixpo.training.runtime import Runtime

AGREEMENT_TIME = timedelta(seconds=10)
"""Time after a failure in which all processes must have left the stage."""
COLLECTIVE_TIME = timedelta(hours=4)
"""Time in which all processes must have come to a collective operation: the main one may be writing a large model."""
_FAILURE = "failure"
"""Key of the failure that a process reported before it ended alone."""


class Rendezvous:
    """Where the processes that compute stages together meet, seen from one of them: its rank, and a common store."""

    def __init__(self, store: Any, rank: int, count: int, local_rank: int) -> None:
        self.store, self.rank, self.count, self.local_rank = store, rank, count, local_rank
        self.stage_number = 0
        """Number of the next stage, from 0."""
        self.is_broken = False
        """True after a failure that not all processes have left: this process must end."""

    def announce(self, stage: Any) -> None:
        """Tell the other processes to compute a stage, any picklable object, or to end if it is None."""
        self.store.set(f"stage {self.stage_number}", pickle.dumps(stage))

    def wait_for_stage(self) -> Any:
        """The next stage that the main process announces; None if it has ended."""
        key = f"stage {self.stage_number}"
        try:
            self.store.wait([key], timedelta(days=365))
            return pickle.loads(self.store.get(key))  # written by our own main process
        except dist.DistError:
            return None

    @contextmanager
    def open_processes(self, runtime: Runtime) -> Iterator[StageProcesses]:
        """Context manager in which the processes compute one stage together.

        Where it is left by an exception, every process raises the one that was raised first in any of them.
        """
        store: Any = PrefixStore(f"in stage {self.stage_number}", self.store)
        self.stage_number += 1
        try:
            processes = runtime.set_up_processes(self.rank, self.count, self.local_rank)
            dist.init_process_group(
                "gloo" if processes.device.type == "cpu" else "cpu:gloo,cuda:nccl",
                store=store,
                rank=self.rank,
                world_size=self.count,
                timeout=COLLECTIVE_TIME,
            )
            yield processes
        except Exception as error:
            is_first = store.add("failures", 1) == 1
            if is_first:
                store.set("first failure", _pickle_error(error, self.rank, self.count))
            self._leave(store, wait=True)
            if is_first:
                raise
            raise pickle.loads(store.get("first failure")) from error
        else:
            self._leave(store, wait=False)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _leave(self, store: Any, *, wait: bool) -> None:
        """Tell the others that this process has left the stage, and wait for them a while, which breaks if in vain."""
        store.set(f"left by {self.rank}", b"")
        if wait:
            if dist.is_initialized() and dist.get_backend() == "gloo":
                dist.destroy_process_group()  # those who wait for this process then fail at once
            try:
                store.wait([f"left by {rank}" for rank in range(self.count)], AGREEMENT_TIME)
            except dist.DistError:
                self.is_broken = True

    def report_failure(self, failure: Any) -> None:
        """Tell the launcher, by any picklable object, why this process ends while others of the stage do not."""
        self.store.set(_FAILURE, pickle.dumps(failure))
        self.store.get(_FAILURE)  # setting does not wait for the store


class LocalRendezvousStore:
    """The store of processes that this process starts on its machine, and the variables that lead them to it."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def make_environment(self, rank: int, count: int) -> dict[str, str]:
        """Environment variables of one of the processes, as torchrun sets them."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # else the process of rank 0 opens a store of its own
        }

    def read_failure(self) -> Any:
        """What a process told before it ended alone (`Rendezvous.report_failure`); None if nothing."""
        return pickle.loads(self.store.get(_FAILURE)) if self.store.check([_FAILURE]) else None


@cache
def join_rendezvous() -> Rendezvous | None:
    """Meet the processes that were started with this one; None if it was started alone. Once a process."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # a step of srun
        os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:  # which torchrun sets
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    store, rank, count = next(rendezvous("env://"))
    return Rendezvous(store, rank, count, int(os.environ.get("LOCAL_RANK", rank)))


def _pickle_error(error: Exception, rank: int, count: int) -> bytes:
    """An exception with its traceback as a note; a RuntimeError of its text if it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In process {rank + 1} of {count}:\n{trace}")
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:  # some classes take other arguments than they keep
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(trace)
        return pickle.dumps(plain)
