"""Stages as jobs of a cluster: what is asked for, and what reaches the terminal."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit
from submitit.core.job_environment import SignalHandler

from mixpo import SFT, Runtime, StageCache
from mixpo.data.errors import InputError
from mixpo.experiments import cluster
from mixpo.experiments.cluster import PROGRESS, ClusterExecutor, FileListener, InfraSettings, SubmittedStage
from mixpo.experiments.executors import open_executor
from mixpo.experiments.plan import count_processes, list_plan, list_stages
from mixpo.experiments.recipe import read_recipe
from mixpo.experiments.results import load_runs
from mixpo.experiments.run import run_recipe
from mixpo.experiments.workers import StageFailure
from mixpo.stages.stage import Stage
from mixpo.training.rendezvous import Rendezvous
from process_pairs import StageFailingInOneProcess
from recording_display import RecordingDisplay
from worlds import TinyWorld


class FakeJob:
    """A job that does what a test says each time that it is asked whether it is done."""

    job_id, state = "77", "OUT_OF_MEMORY"
    paths = type("Paths", (), {"stderr": "/logs/77.err"})
    canceled = False

    def __init__(self, submitted: SubmittedStage, steps: list[Callable[[SubmittedStage], bool]]) -> None:
        self.submitted, self.steps = submitted, steps

    def done(self) -> bool:
        return self.steps.pop(0)(self.submitted) if self.steps else True

    def cancel(self, check: bool) -> None:
        self.canceled = True


class FakeCluster:
    """A cluster in submitit's place, which keeps the parameters of every submission."""

    def __init__(self, patch: pytest.MonkeyPatch, *steps: Callable[[SubmittedStage], bool]) -> None:
        self.submissions: list[dict[str, Any]] = []
        self.jobs: list[FakeJob] = []
        self.steps = steps
        patch.setattr(cluster.submitit, "AutoExecutor", self.open)
        patch.setattr(cluster, "POLL_SECONDS", 0.0)
        patch.setattr(cluster, "LAST_LINE_SECONDS", 0.0)

    def open(self, folder: Path, name: str, **options: Any) -> "FakeCluster":
        self.submissions.append({"cluster": name, **options})
        return self

    def update_parameters(self, **parameters: Any) -> None:
        self.submissions[-1] |= parameters

    def submit(self, submitted: SubmittedStage) -> FakeJob:
        self.jobs.append(FakeJob(submitted, list(self.steps)))
        return self.jobs[-1]


def stage_of(tmp_path: Path) -> tuple[StageFailingInOneProcess, StageCache]:
    return StageFailingInOneProcess(how="waits"), StageCache(tmp_path / "cache", Runtime(threads=1))


def log_of(submitted: SubmittedStage) -> FileListener:
    return FileListener(StageCache(submitted.cache, submitted.runtime).locate_folder(submitted.stage) / PROGRESS)


def go_on(submitted: SubmittedStage) -> bool:
    log_of(submitted).on_step(1, 2, {"loss": 0.5})
    return False


def end_well(submitted: SubmittedStage) -> bool:
    log_of(submitted).on_step(2, 2, {"loss": 0.25})
    log_of(submitted).forward_call("end", 12.5)
    return True


def be_requeued(submitted: SubmittedStage) -> bool:
    assert submitted.checkpoint().function == submitted
    return False


def end_badly(submitted: SubmittedStage) -> bool:
    log_of(submitted).forward_call("end", {"reason": "the loss is nan", "bad_input": False})
    return True


def time_out(submitted: SubmittedStage) -> bool:
    """What submitit does at the signal of a job whose time is over and which may not be queued again."""
    delayed = submitit.helpers.DelayedSubmission(submitted)
    delayed.set_timeout(0, 0)
    environment = SimpleNamespace(global_rank=0)
    paths = SimpleNamespace(submitted_pickle=log_of(submitted).path.with_name("submitted.pickle"))
    with pytest.raises(submitit.core.utils.UncompletedJobError) as raised:
        SignalHandler(environment, paths, delayed).checkpoint_and_try_requeue(signal.SIGUSR2)
    log_of(submitted).forward_call("end", {"reason": f"SFT 1: {raised.value!r} (details in x)", "bad_input": False})
    return True


def leave_a_trace(submitted: SubmittedStage) -> bool:
    (log_of(submitted).path.parent / "failure.txt").write_text("Traceback\nValueError: in another process\n")
    return True


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((go_on, be_requeued, go_on, end_well), 12.5),
        ((go_on, end_badly), "the loss is nan"),
        (
            (go_on,),
            "the job 77 was stopped (OUT_OF_MEMORY): it wrote no error; perhaps for lack of memory (details in "
            "/logs/77.err)",
        ),
        (
            (be_requeued, time_out),
            "more than 3 times (infra.requeues), after 1440 minutes each (timeout_min)",
        ),
        ((leave_a_trace,), "ValueError: in another process (details in "),
    ],
)
def test_progress_and_outcome_of_a_job_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Any, expected: Any
) -> None:
    stage, stage_cache = stage_of(tmp_path)
    FakeCluster(monkeypatch, *steps)
    executor, display = ClusterExecutor(stage_cache, InfraSettings(cluster="slurm"), tmp_path), RecordingDisplay()
    executor.submit_stage(stage, display)
    submitted, shown, outcome = executor.wait_for_outcome()
    assert (submitted, shown) == (stage, display)
    if isinstance(expected, float):
        assert outcome == expected
        assert (display.steps, display.notes) == (3, ["the job was interrupted"])
    else:
        assert isinstance(outcome, StageFailure)
        assert expected in outcome.reason
    assert not executor.running
    executor.submit_stage(stage, display)
    log = log_of(SubmittedStage(stage_cache.cache, stage_cache.runtime, stage)).path
    assert not log.exists(), "the next job begins with an empty log"
    assert not (log.parent / "failure.txt").exists()


def test_what_a_job_asks_for_depends_on_its_stage(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCluster(monkeypatch)
    infra = read_recipe(
        "world",
        [
            "infra={cluster: slurm, nodes: 2, gpus_per_node: 8, timeout_min: 90, requeues: 5}",
            "infra.slurm={partition: gpu, exclusive: true}",
            "infra.stages={SFT: {nodes: 1, tasks_per_node: 4, mem_gb: 64}, Data: {cpus_per_task: 6}}",
        ],
    ).infra
    with open_executor(StageCache(tmp_path, Runtime(threads=1)), infra, tmp_path / "jobs") as executor:
        for stage in (tiny.tuned, tiny.sft(), tiny.pairs):
            executor.submit_stage(stage, RecordingDisplay())
    assert all(job.canceled for job in fake.jobs), "what has not ended is canceled"
    names = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task")
    assert [[one[name] for name in names] for one in fake.submissions] == [[2, 8, 8, 1], [1, 4, 8, 1], [1, 1, None, 6]]
    first = fake.submissions[0]  # sbatch takes an option with a value, or by its name alone: submitit's True
    assert (first["cluster"], first["slurm_max_num_timeout"], first["timeout_min"]) == ("slurm", 5, 90)
    assert first["slurm_additional_parameters"] == {"partition": "gpu", "exclusive": True}
    assert [one["mem_gb"] for one in fake.submissions] == [None, 64, None]
    assert [one["slurm_srun_args"][-1] for one in fake.submissions] == [f"--cpus-per-task={n}" for n in (1, 1, 6)]


INFRA = "infra={cluster: slurm, nodes: 2, tasks_per_node: 4}"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sampler=vllm"], "several processes: found beside sampler: vllm in "),
        (["runtime.sharded=true", "lora.quantize_base=true"], "runtime.sharded: found beside lora.quantize_base in "),
    ],
)
def test_what_the_processes_of_a_job_exclude_is_refused_before_a_job_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], found: str
) -> None:
    fake = FakeCluster(monkeypatch)
    words = [*words, f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}", "arms=[ppo]", INFRA]
    with pytest.raises(InputError, match=f"^{found}"):
        list_plan(read_recipe("world", words))
    with pytest.raises(InputError, match=f"^{found}"):
        run_recipe(read_recipe("world", words), RecordingDisplay())
    assert not fake.submissions
    own = "infra.stages={Samples: {nodes: 1, tasks_per_node: 1}, SFT: {nodes: 3}}"
    recipe = read_recipe("world", [*words, own])
    counts = {type(stage).__name__: count_processes(stage, recipe) for stage in list_stages(recipe)}
    expected = {"Pretrained": 1, "Data": 1, "SFT": 12, "RewardModel": 8, "Samples": 1, "PPO": 8, "Evaluation": 8}
    assert counts == expected


def test_as_many_jobs_as_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch)
    executor = ClusterExecutor(StageCache(tmp_path, Runtime()), InfraSettings(cluster="slurm", jobs=1), tmp_path)
    assert executor.can_submit_stage
    executor.submit_stage(StageFailingInOneProcess(how="waits"), RecordingDisplay())
    assert not executor.can_submit_stage


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["infra={nodes: 2, gpus_per_node: 8}"],
            r"infra\.gpus_per_node: found without infra\.cluster, .*; expected slurm or local beside it, or null",
        ),
        (["infra={cluster: local, stages: {PPO: {node: 2}}}"], r"infra\.stages\.PPO\.node: unknown key"),
        (["infra.cluster=slurn"], r"infra\.cluster: found 'slurn'"),
        (["infra={cluster: local, nodes: 0}"], r"infra\.nodes: found 0"),
    ],
)
def test_bad_settings_are_named(words: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_recipe("world", words)


def test_settings_of_jobs_are_left_out_by_a_cluster_of_null() -> None:
    recipe = read_recipe("world", ["infra={cluster: slurm, nodes: 2}", "infra.cluster=null"])
    assert (recipe.infra.cluster, recipe.infra.nodes) == (None, 2)


def test_every_kind_of_stage_is_known_to_who_has_read_nothing_else(tmp_path: Path) -> None:
    kinds = ["Pretrained", "Data", "LabelNoise", "SFT", "RewardModel", "Samples", "Selection", "DPO", "PPO"]
    own = f"infra.stages={json.dumps({kind: {'nodes': 2} for kind in [*kinds, 'Evaluation', 'Gradients']})}"
    words = ["infra.cluster=local", own, f"cache={tmp_path / 'cache'}"]
    program = (
        "from mixpo.experiments.plan import list_plan; from mixpo.experiments.recipe import read_recipe; "
        f"list_plan(read_recipe('world', {words!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_an_unknown_kind_of_stage_is_refused_before_a_job_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCluster(monkeypatch)
    words = ["infra={cluster: slurm, stages: {PPQ: {nodes: 2}}}", f"cache={tmp_path / 'cache'}", f"out={tmp_path}/run"]
    found = r"^infra\.stages: found 'PPQ'; expected kinds of stages, such as PPO or Evaluation; did you mean PPO\?$"
    with pytest.raises(InputError, match=found):
        list_plan(read_recipe("world", words))
    with pytest.raises(InputError, match=found):
        run_recipe(read_recipe("world", words), RecordingDisplay())
    assert not fake.submissions


def test_a_server_that_jobs_alone_reach_is_not_contacted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the first job, of the initial model, that ends this run."""
    fake = FakeCluster(monkeypatch, end_badly)
    words = ["sampler=vllm", "runtime.vllm=http://127.0.0.1:9", "arms=[sft]", f"cache={tmp_path / 'cache'}"]
    words.append(f"out={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"runtime\.vllm: found nothing"):
        run_recipe(read_recipe("world", [*words, "runtime.vllm=null", "infra.cluster=slurm"]), RecordingDisplay())
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9"):
        run_recipe(read_recipe("world", words), RecordingDisplay())
    result = run_recipe(read_recipe("world", [*words, "infra.cluster=slurm"]), RecordingDisplay())
    assert [arm.status for arm in result.arms] == ["failed"]
    assert fake.submissions


def test_one_way_to_have_processes_at_a_time(tmp_path: Path) -> None:
    infra = InfraSettings(cluster="local")
    opening = open_executor(StageCache(tmp_path, Runtime(workers=2)), infra, tmp_path)
    with (
        pytest.raises(InputError, match=r"infra\.cluster: found runtime\.workers=2 .* beside local; expected 1"),
        opening,
    ):
        pass
    meeting = Rendezvous(None, 0, 2, 0)
    opening = open_executor(StageCache(tmp_path, Runtime(), meeting), infra, tmp_path)
    with pytest.raises(InputError, match="in processes of a launcher beside local"), opening:
        pass


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = ClusterExecutor(StageCache(tmp_path, Runtime()), InfraSettings(cluster="slurm"), tmp_path / "jobs")
    with pytest.raises(InputError, match="infra: found a cluster that does not take the job of StageFailing"):
        executor.submit_stage(StageFailingInOneProcess(how="waits"), RecordingDisplay())


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit waits for no local job
def test_jobs_on_this_machine_compute_a_run_in_two_processes_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where jobs find the stage that fails
    words = ["arms=[sft]", "data.train_rows=64", "data.test_rows=16", "data.demonstration_rows=64"]
    words += ["evaluation.prompts=8", "max_completion_tokens=12", "runtime.threads=1", f"cache={tmp_path / 'cache'}"]
    words += [f"out={tmp_path / 'run'}", "infra={cluster: local, tasks_per_node: 2, timeout_min: 10}"]
    display = RecordingDisplay()
    result = run_recipe(read_recipe("world", words), display)
    assert result.computed == len(display.started) == 5
    assert not display.failures
    assert load_runs(tmp_path / "run").arms[0].status == "done"
    assert any("demonstrations" in note for note in display.notes)
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "jobs").glob("*/*.err"))
    assert "Traceback" not in logs

    stage_cache = StageCache(tmp_path / "cache", Runtime(threads=1))
    executor = ClusterExecutor(stage_cache, InfraSettings(cluster="local", tasks_per_node=2), tmp_path / "jobs")
    for how, expected in (("raises", "ValueError: it raises (details in "), ("dies", "gloo/transport")):
        stage: Stage = StageFailingInOneProcess(how=how)
        executor.submit_stage(stage, display)
        _, _, outcome = executor.wait_for_outcome()
        assert isinstance(outcome, StageFailure)
        assert expected in outcome.reason
    monkeypatch.setenv("PYTHONPATH", "")
    executor.submit_stage(StageFailingInOneProcess(how="cannot be read"), display)
    assert "(FINISHED): ModuleNotFoundError: No module named 'process_pairs'" in executor.wait_for_outcome()[2].reason
    assert SFT.__name__ in " ".join(display.started)
