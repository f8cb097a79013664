"""Stages as jobs of a cluster: submitted to Slurm, or to this machine in the same way, and followed from the terminal.

A job's processes compute one stage together. Its main process writes progress and outcome to `progress.jsonl` in the
stage's folder, which is all that the terminal reads: the folder must be on a file system that both see.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import submitit

from mixpo.data.errors import InputError
from mixpo.experiments.workers import (
    FAILURE,
    ForwardingListener,
    Outcome,
    StageDisplay,
    StageFailure,
    compute_stage_or_failure,
    end_if_broken,
    follow_stages,
)
from mixpo.settings import Settings
from mixpo.stages.stage import Stage
from mixpo.stages.stage_cache import StageCache
from mixpo.training.record import append_jsonl, progress_listener, read_jsonl
from mixpo.training.rendezvous import join_rendezvous
from mixpo.training.runtime import Runtime

PROGRESS = "progress.jsonl"
POLL_SECONDS = 1.0
"""Time between two looks at the progress of jobs."""
TIMED_OUT = "timed-out too many times"
"""Words of the error that submitit raises where a job's time is over and it is not queued again."""
LAST_LINE_SECONDS = 20.0
"""Time after a job's end in which its last line must have come through the file system."""


class JobSettings(Settings):
    """What a job asks the cluster for."""

    nodes: int = pydantic.Field(1, ge=1)
    gpus_per_node: int = pydantic.Field(0, ge=0)
    tasks_per_node: int | None = pydantic.Field(None, ge=1)
    """Processes on each node; if not given, one a GPU, or one without GPUs."""
    cpus_per_task: int = pydantic.Field(1, ge=1)
    mem_gb: float | None = pydantic.Field(None, gt=0)
    """Memory of a node."""
    timeout_min: int = pydantic.Field(1440, ge=1)
    """Time after which the cluster stops the job, which is then queued again and goes on from its checkpoint."""
    slurm: dict[str, bool | str | int] = pydantic.Field(default_factory=dict)
    """Further options of `sbatch`, such as `{partition: gpu, account: mine, exclusive: true}`."""

    def count_tasks(self) -> int:
        """Number of processes on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


class InfraSettings(JobSettings):
    """Where stages are computed: here, or as jobs of a cluster. Not part of a stage's identity."""

    cluster: Literal["slurm", "local"] | None = None
    """`slurm` submits with sbatch, `local` starts jobs on this machine; without it stages are computed by the run."""
    requeues: int = pydantic.Field(3, ge=0)
    """Times that a job which ran out of time is queued again."""
    jobs: int = pydantic.Field(16, ge=1)
    """Jobs in the queue at once."""
    stages: dict[str, JobSettings] = pydantic.Field(default_factory=dict)
    """Other values for some kinds of stages, such as `{PPO: {nodes: 4}, Data: {cpus_per_task: 8}}`."""

    @pydantic.model_validator(mode="after")
    def _check_cluster(self) -> Self:
        """Validator: raise `InputError` on settings of jobs where nothing says that there are any."""
        if self.model_fields_set and "cluster" not in self.model_fields_set:
            raise InputError(
                f"infra.{min(self.model_fields_set)}: found without infra.cluster, so that stages are computed here; "
                "expected slurm or local beside it, or null to leave jobs out"
            )
        return self

    def choose_job_settings(self, stage: Stage) -> JobSettings:
        """Settings of a stage's job. What needs no model is computed by one process without a GPU, if not set."""
        common = self.model_dump(include=set(JobSettings.model_fields))
        if not stage.splits_over_processes:
            common |= {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1}
        own = self.stages.get(type(stage).__name__, JobSettings()).model_dump(exclude_unset=True)
        return JobSettings.model_validate({**common, **own})


@dataclass(frozen=True)
class SubmittedStage:
    """What each process of a job calls, through submitit: the computation of a stage in its folder."""

    cache: Path
    runtime: Runtime
    stage: Stage

    def __call__(self) -> None:
        """Compute the stage in the main process, or this process's share of it in another one."""
        rendezvous = join_rendezvous()
        stage_cache = StageCache(self.cache, self.runtime.decide_defaults_here(), rendezvous)
        if rendezvous is not None and rendezvous.rank > 0:
            follow_stages(stage_cache)
            return
        log = FileListener(stage_cache.locate_folder(self.stage) / PROGRESS)
        progress_listener.set(log)
        outcome = compute_stage_or_failure(stage_cache, self.stage)
        failure = asdict(outcome) if isinstance(outcome, StageFailure) else None
        log.forward_call("end", failure or outcome)
        end_if_broken(rendezvous, outcome)
        if rendezvous is not None:
            rendezvous.announce(None)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same again, which submitit calls where the job's time is over or another job takes its place.

        Whether it is then queued again, submitit decides afterwards.
        """
        folder = StageCache(self.cache, self.runtime).locate_folder(self.stage)
        FileListener(folder / PROGRESS).on_message("the job was interrupted")
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class FileListener(ForwardingListener):
    """Listener that appends a stage's progress to a file."""

    path: Path

    def forward_call(self, method_name: str, *arguments: Any) -> None:
        """Append the name of a method of the display and its arguments."""
        append_jsonl(self.path, [{"method": method_name, "arguments": arguments}])


@dataclass
class _RunningJob:
    """A submitted job: its stage, the display, and how much of its progress was read."""

    job: submitit.Job[None]
    stage: Stage
    display: StageDisplay
    progress: Path
    lines_read: int = 0
    ended: float | None = None
    """When the cluster was first seen to have ended the job."""


class ClusterExecutor:
    """Executor that submits every stage as a job, and follows the jobs through files in the stages' folders."""

    def __init__(self, stage_cache: StageCache, infra: InfraSettings, jobs_folder: Path) -> None:
        """`jobs_folder` receives the logs of the jobs, and the scripts and pickles by which submitit starts them."""
        self.stage_cache, self.infra, self.jobs_folder = stage_cache, infra, jobs_folder
        self.running: list[_RunningJob] = []

    @property
    def can_submit_stage(self) -> bool:
        """True if fewer jobs are in the queue than may be."""
        return len(self.running) < self.infra.jobs

    def submit_stage(self, stage: Stage, display: StageDisplay) -> None:
        """Submit a stage as a job and return at once. Raises `InputError` if the cluster refuses it."""
        progress = self.stage_cache.locate_folder(stage) / PROGRESS
        progress.parent.mkdir(parents=True, exist_ok=True)
        for file in (progress, progress.with_name(FAILURE)):
            file.unlink(missing_ok=True)
        settings, cluster = self.infra.choose_job_settings(stage), self.infra.cluster
        try:
            executor = submitit.AutoExecutor(
                self.jobs_folder / "%j", cluster, **{f"{cluster}_max_num_timeout": self.infra.requeues}
            )
            executor.update_parameters(**_make_job_parameters(settings, type(stage).__name__))
            job = executor.submit(SubmittedStage(self.stage_cache.cache, self.stage_cache.runtime, stage))
        except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
            raise InputError(
                f"infra: found a cluster that does not take the job of {type(stage).__name__} "
                f"({str(error).splitlines()[0]}); expected one that runs it; look at infra.cluster and its other "
                "settings"
            ) from error
        self.running.append(_RunningJob(job, stage, display, progress))

    def wait_for_outcome(self) -> tuple[Stage, StageDisplay, Outcome]:
        """Wait until any stage's job ends, showing progress; return the stage, its display, and its outcome."""
        while True:
            for running in self.running:
                if (outcome := self._read_progress(running)) is not None:
                    self.running.remove(running)
                    return running.stage, running.display, outcome
            time.sleep(POLL_SECONDS)

    def cancel_jobs(self) -> None:
        """Cancel the jobs that have not ended."""
        for running in self.running:
            running.job.cancel(check=False)

    def _read_progress(self, running: _RunningJob) -> Outcome | None:
        """Show a job's new progress; returns its outcome if it has ended, otherwise None."""
        is_over = running.job.done()
        lines = read_jsonl(running.progress)
        new, running.lines_read = lines[running.lines_read :], len(lines)
        for line in new:
            if line["method"] == "end":
                (outcome,) = line["arguments"]
                if not isinstance(outcome, dict):
                    return float(outcome)
                failure = StageFailure(**outcome)
                return self._explain_timeout(running.stage) if TIMED_OUT in failure.reason else failure
            getattr(running.display, line["method"])(*line["arguments"])
        if not is_over:
            running.ended = None
        elif running.ended is None:
            running.ended = time.monotonic()
        elif time.monotonic() - running.ended > LAST_LINE_SECONDS:
            job, trace = running.job, running.progress.with_name(FAILURE)  # of a process that was not the main one
            details = trace if trace.exists() else Path(job.paths.stderr)
            written = details.read_text(encoding="utf8", errors="replace").strip() if details.exists() else ""
            last_line = written.splitlines()[-1] if written else "it wrote no error; perhaps for lack of memory"
            text = last_line if details == trace else f"the job {job.job_id} was stopped ({job.state}): {last_line}"
            return StageFailure(f"{self._format_name(running.stage)}: {text} (details in {details})")
        return None

    def _explain_timeout(self, stage: Stage) -> StageFailure:
        """The failure of a stage whose job ran out of time more often than it may be queued again."""
        requeues, minutes = self.infra.requeues, self.infra.choose_job_settings(stage).timeout_min
        return StageFailure(
            f"{self._format_name(stage)}: found a job that ran out of time more than {requeues} times "
            f"(infra.requeues), after {minutes} minutes each (timeout_min); expected its end before; raise one of "
            "them: the same command resumes from the last checkpoint"
        )

    def _format_name(self, stage: Stage) -> str:
        """A stage's kind and identity."""
        return f"{type(stage).__name__} {self.stage_cache.compute_identity(stage)}"


def _make_job_parameters(settings: JobSettings, name: str) -> dict[str, Any]:
    """Parameters of submitit for a job; None is left to the cluster."""
    return {
        "name": f"mixpo-{name.lower()}",
        "nodes": settings.nodes,
        "tasks_per_node": settings.count_tasks(),
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node or None,
        "mem_gb": settings.mem_gb,
        "timeout_min": settings.timeout_min,
        "slurm_additional_parameters": settings.slurm,
        # since Slurm 22.05 srun does not take the cores of a task from the job
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={settings.cpus_per_task}"],
    }
