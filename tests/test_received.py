"""Folders that come from somebody else: nothing in them runs, whatever it is."""

import ast
import os
import pickle
import shutil
from pathlib import Path

import pytest

import mixpo
from mixpo.data.errors import InputError
from mixpo.experiments.plan import list_plan
from mixpo.experiments.recipe import Recipe, read_recipe
from mixpo.experiments.run import run_recipe
from mixpo.stages.pretrained import Pretrained
from mixpo.stages.stage_cache import StageCache
from mixpo.training.runtime import Runtime
from recording_display import RecordingDisplay

TINY = [
    "arms=[sft]",
    "data.train_rows=64",
    "data.test_rows=8",
    "data.demonstration_rows=64",
    "evaluation.prompts=8",
    "max_completion_tokens=4",
    "runtime.threads=1",
]
UNPICKLED = ("job.pkl", "job.pickle", "result.pkl", "checkpoint.pt", "checkpoint.safetensors", "optimizer.pt")


class Runs:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def tiny(cache: Path, out: Path) -> Recipe:
    return read_recipe("world", [*TINY, f"cache={cache}", f"out={out}"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("received")
    run_recipe(tiny(home / "cache", home / "run"), RecordingDisplay())
    return home / "cache"


def plant(folders: list[Path], marker: Path) -> None:
    for folder in folders:
        for name in UNPICKLED:
            (folder / name).write_bytes(pickle.dumps(Runs(marker)))


def test_a_pickle_that_is_planted_in_a_cache_is_not_run(cache: Path, tmp_path: Path) -> None:
    """In complete stages, and in those that would be computed, by `list_plan` and by `run`."""
    marker, mine = tmp_path / "it ran", tmp_path / "cache"
    shutil.copytree(cache, mine)
    folders = [summary.parent for summary in mine.rglob("summary.json")]
    assert len(folders) > 4
    plant(folders, marker)
    recipe = tiny(mine, tmp_path / "run")
    assert all(line.done for _, lines in list_plan(recipe) for line in lines)
    assert run_recipe(recipe, RecordingDisplay()).computed == 0
    for folder in folders:
        (folder / "summary.json").unlink()
    assert not any(line.done for _, lines in list_plan(recipe) for line in lines)
    run = run_recipe(recipe, RecordingDisplay())  # a checkpoint that is none ends the stage that would go on from it
    assert run.arms[0].status == "failed"
    assert not marker.exists()
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists(), "the pickle does run where it is read"


def test_a_folder_is_complete_when_summary_and_settings_say_so(tmp_path: Path) -> None:
    stage_cache = StageCache(tmp_path, Runtime(threads=1))
    folder = stage_cache.compute_with_inputs(Pretrained())
    (folder / "settings.json").write_text("{}")
    with pytest.raises(InputError, match=r"written by another version of mixpo \(no settings\.json\)"):
        stage_cache.is_done(Pretrained())
    for damaged in ("[" * 100_000, "[1]", "nothing"):
        (folder / "settings.json").write_text(damaged)
        with pytest.raises(InputError, match="written by another version"):
            stage_cache.is_done(Pretrained())
    (folder / "summary.json").unlink()
    assert not stage_cache.is_done(Pretrained()), "torn by a kill, and computed again"
    stage_cache.compute_with_inputs(Pretrained())
    assert stage_cache.is_done(Pretrained())
    assert not list(tmp_path.rglob("*.pkl"))


FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch.load", "torch.jit.load", "eval"}
FORBIDDEN |= {"exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load", "pd.read_pickle"}
ALLOWED = {("yaml.load", "experiments/recipe.py"), ("pickle", "training/rendezvous.py")}
"""A loader of our own that is safe; and what the processes of one stage tell each other, as torch.distributed does."""


def test_nothing_in_the_source_reads_what_can_run() -> None:
    """Every import and call but those that are allowed; nothing that is allowed reads a file that may be another's."""
    root = Path(mixpo.__file__).parent
    violations = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            names = [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            if names == ["torch.load"] and any(ast.unparse(one) == "weights_only=True" for one in node.keywords):
                continue  # of weights that a user names: tensors alone, and no object is made
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{one.name}" for one in node.names)]
            violations += [(name, str(path.relative_to(root))) for name in names if name in FORBIDDEN]
    assert [one for one in violations if one not in ALLOWED] == []
