"""The choice of an executor: in this process, in worker processes, together with a launcher's, or on a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.experiments.cluster import ClusterExecutor, InfraSettings
from mixpo.experiments.workers import InProcessExecutor, ProcessPool
from mixpo.stages.stage_cache import StageCache

StageExecutor = InProcessExecutor | ProcessPool | ClusterExecutor
"""An executor of stages: `submit_stage` one while it `can_submit_stage`, and `wait_for_outcome` of the next."""


@contextmanager
def open_executor(stage_cache: StageCache, infra: InfraSettings, jobs_folder: Path) -> Iterator[StageExecutor]:
    """Context manager that yields the executor that settings and launcher ask for, and ends its processes at the end.

    Raises `InputError` if they ask for more than one.
    """
    runtime, rendezvous = stage_cache.runtime, stage_cache.rendezvous
    found = f"found runtime.workers={runtime.workers} and runtime.processes={runtime.processes}"
    is_alone = runtime.workers == 1 and runtime.processes == 1
    if infra.cluster is not None:
        if not is_alone or rendezvous is not None:
            raise InputError(
                f"infra.cluster: {found}{' in processes of a launcher' * (rendezvous is not None)} beside "
                f"{infra.cluster}; expected 1 and 1 in one process, since the number of a job's processes is "
                "infra.tasks_per_node; leave them out"
            )
        cluster = ClusterExecutor(stage_cache, infra, jobs_folder)
        try:
            yield cluster
        finally:
            cluster.cancel_jobs()
    elif rendezvous is not None:
        try:
            if not is_alone:
                raise InputError(
                    f"runtime: {found} in one of {rendezvous.count} processes of a launcher (WORLD_SIZE); expected 1 "
                    "and 1, since all of them compute every stage together; leave both out, or start one process"
                )
            yield InProcessExecutor(stage_cache)
        finally:
            rendezvous.announce(None)
    elif runtime.processes == 1 and runtime.workers != "gpus" and runtime.count_workers() == 1:
        yield InProcessExecutor(stage_cache)
    else:
        pool = ProcessPool(stage_cache)
        try:
            yield pool
        finally:
            pool.kill_workers()
