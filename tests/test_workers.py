"""Stages side by side in processes: the same results, the same failures, and nothing that goes on alone."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pytest

from mixpo.data.errors import InputError
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.experiments.run import Watched, run
from mixpo.experiments.workers import Failure, Outcome
from mixpo.report.results import evaluation, load

TINY = [
    "arms=[sft,dpo,ppo]",
    "seeds=[0,1]",
    "data.train_rows=128",
    "data.test_rows=16",
    "data.demonstration_rows=128",
    "samples.prompts=32",
    "ppo.batch_size=16",
    "evaluation.prompts=16",
    "max_completion_tokens=12",
    "runtime.threads=1",
]


class Watching:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.going = 0
        self.most_at_once = 0
        self.steps = 0
        self.failures: list[str] = []

    def begin(self, stage: str, identity: str, arms: Sequence[str]) -> Watched:
        self.begun.append(stage)
        self.going += 1
        self.most_at_once = max(self.most_at_once, self.going)
        return self

    def step(self, done: int, total: int, metrics: object) -> None:
        self.steps += 1

    def note(self, text: str) -> None: ...

    def end(self, outcome: Outcome) -> None:
        self.going -= 1
        if isinstance(outcome, Failure):
            self.failures.append(outcome.reason)


def tiny(home: Path, workers: int, *overrides: str) -> Recipe:
    words = [*TINY, f"runtime.workers={workers}", f"cache={home / 'cache'}", f"out={home / 'run'}", *overrides]
    return read_recipe("world", words)


def scores(home: Path) -> list[float]:
    return [evaluation(arm)["score"]["mean"] for arm in load(home / "run").arms]


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watching]:
    home, watching = tmp_path_factory.mktemp("two"), Watching()
    run(tiny(home, 2), watching)
    return home, watching


def test_two_workers_find_what_one_finds(side_by_side: tuple[Path, Watching], tmp_path: Path) -> None:
    home, watching = side_by_side
    alone = Watching()
    run(tiny(tmp_path, 1), alone)
    assert scores(home) == scores(tmp_path)
    assert sorted(watching.begun) == sorted(alone.begun)
    assert (watching.most_at_once, alone.most_at_once) == (2, 1)
    assert watching.steps == alone.steps
    assert not multiprocessing.active_children()


def test_alone_an_arm_is_finished_before_the_next_begins(tmp_path: Path) -> None:
    watching = Watching()
    run(tiny(tmp_path, 1, "seeds=[0]", "arms=[dpo,ppo]"), watching)
    assert watching.begun[-4:] == ["DPO", "Evaluation", "PPO", "Evaluation"]


def test_a_failure_in_a_process_takes_only_its_arm_along(side_by_side: tuple[Path, Watching]) -> None:
    home, _ = side_by_side
    watching = Watching()
    found = run(tiny(home, 2, "ppo.max_kl=1e-9", "seeds=[0]", f"out={home / 'failed'}"), watching)
    assert [(arm.name, arm.status) for arm in found.arms] == [("sft", "done"), ("dpo", "done"), ("ppo", "failed")]
    assert len(watching.failures) == 1
    assert "ran away" in watching.failures[0]


def test_bad_input_found_in_a_process_is_raised(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    words = ["data.format=preference", f"data.train={tmp_path / 'pairs.jsonl'}", "data.train_rows=null"]
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        run(tiny(tmp_path, 2, *words), Watching())


def test_a_process_that_is_killed_stops_the_run_with_one_line(
    side_by_side: tuple[Path, Watching], tmp_path: Path
) -> None:
    class Killing(Watching):
        def step(self, done: int, total: int, metrics: object) -> None:
            for process in multiprocessing.active_children():
                process.kill()

    home, _ = side_by_side
    recipe = tiny(home, 2, "ppo.kl_coef=0.3", f"out={tmp_path / 'run'}")
    with pytest.raises(InputError, match=r"runtime\.workers: found 2, and one of the processes was killed"):
        run(recipe, Killing())
    assert run(recipe, Watching()).computed == 4, "the same command goes on: PPO and its evaluation at two seeds"


def test_no_process_outlives_a_run_that_is_stopped(side_by_side: tuple[Path, Watching], tmp_path: Path) -> None:
    class Stopping(Watching):
        def step(self, done: int, total: int, metrics: object) -> None:
            raise KeyboardInterrupt

    home, _ = side_by_side
    recipe = tiny(home, 2, "ppo.kl_coef=0.4", "ppo.epochs=1000", f"out={tmp_path / 'run'}")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, Stopping())
    assert not multiprocessing.active_children()
