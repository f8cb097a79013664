"""The engine: which folder a stage has, whether it is there, and computing what is not. The one file that knows exca.

A stage's folder is named by its identity in a cache that all runs share. A stage that was killed is computed again in
the same folder, where it finds its checkpoint; a failed one is tried again.
"""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import exca
import pydantic

from mixpo.data.errors import InputError
from mixpo.stages.stage import Stage
from mixpo.training import memory
from mixpo.training.record import write_json
from mixpo.training.runtime import Runtime

VERSION = "5"
"""Bump when stages compute something else from the same config: folders of other versions are left alone."""

SETTINGS = "settings.json"


class _Task(pydantic.BaseModel):
    stage: Stage
    cache: Path
    runtime: Runtime
    infra: exca.TaskInfra = exca.TaskInfra(version=VERSION, mode="retry")
    _exclude_from_cls_uid: ClassVar[tuple[str, ...]] = ("cache", "runtime")

    @infra.apply
    def compute(self) -> None:
        """Fill the stage's folder; the upstream stages' folders are full."""
        engine = Engine(self.cache, self.runtime)
        out = engine.folder(self.stage)
        out.mkdir(parents=True, exist_ok=True)
        folders = {name: engine.folder(stage) for name, stage in self.stage.inputs().items()}
        write_json(out / SETTINGS, self.stage.model_dump(mode="json"))
        memory.reset_peak()
        self.stage.work(self.stage.paths(folders), out, self.runtime)


@dataclass
class Engine:
    """Folders of stages in a cache."""

    cache: Path
    runtime: Runtime

    def __post_init__(self) -> None:
        logging.getLogger("exca").setLevel(logging.ERROR)
        self._tasks: dict[Stage, _Task] = {}

    def _task(self, stage: Stage) -> _Task:
        if stage not in self._tasks:
            infra = {"folder": self.cache / type(stage).__name__.lower()}
            self._tasks[stage] = _Task(stage=stage, cache=self.cache, runtime=self.runtime, infra=infra)
        return self._tasks[stage]

    def folder(self, stage: Stage) -> Path:
        """Where the stage's results are or will be."""
        folder = self._task(stage).infra.uid_folder()
        assert folder is not None
        return Path(folder)

    def identity(self, stage: Stage) -> str:
        """Eight hex digits that stand for the stage's settings, inputs and data: the end of its folder's name."""
        return self.folder(stage).name[-8:]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's folder is complete. Raises `InputError` if made with other defaults than today's."""
        task, folder = self._task(stage), self.folder(stage)
        if not (folder / "summary.json").exists() or task.infra.status() != "completed":
            return False
        if read_settings(folder) != stage.model_dump(mode="json"):  # a folder's name leaves out defaults and paths
            with self._told_apart(stage):
                task.infra.job()  # slow, and says which one differs
        return True

    def compute(self, stage: Stage) -> Path:
        """The stage's folder, complete; what is upstream must be complete. Raises what the stage raises.

        Two runs on one cache never compute a stage at once: the second waits, and finds it done.
        """
        with self._told_apart(stage), _alone(self.cache / "locks" / self.identity(stage)):
            self._tasks.pop(stage, None)  # exca does not try again what failed with the same object
            self._task(stage).compute()
        return self.folder(stage)

    @contextmanager
    def _told_apart(self, stage: Stage) -> Iterator[None]:
        """What exca finds wrong with a folder, as one line."""
        try:
            yield
        except RuntimeError as error:
            if "seems incompatible" not in str(error):
                raise
            raise InputError(
                f"{self.folder(stage)}: the folder was written by another version of mixpo "
                f"({str(error).splitlines()[0]}); delete it or choose another `cache`"
            ) from error

    def build(self, stage: Stage) -> Path:
        """The stage's folder, complete, after what is missing upstream and the stage itself were computed."""
        for needed in in_order(stage):
            if not self.is_done(needed):
                self.compute(needed)
        return self.folder(stage)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock between processes; it falls when the process ends, however it ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_order(stage: Stage) -> Iterator[Stage]:
    """The stage and everything upstream, each once, inputs before what reads them."""
    seen: set[int] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if id(stage) in seen:
            return
        seen.add(id(stage))
        for upstream in stage.inputs().values():
            yield from visit(upstream)
        yield stage

    yield from visit(stage)


def read_settings(folder: Path) -> dict[str, Any]:
    """All settings that a stage's folder was computed with, defaults and upstream stages too; none if it was not."""
    path = folder / SETTINGS
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    return content


def read_summary(folder: Path) -> dict[str, Any]:
    """A complete stage's `summary.json`."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf8"))
    return content
