"""The engine: which folder a stage has, whether it is there, and computing what is not.

A stage's folder is named by its identity in a cache that all runs share. A stage that was killed is computed again in
the same folder, where it finds its checkpoint; a failed one is tried again. A cache may come from somebody else: what
is read of it is JSON, Parquet and safetensors, never a pickle.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixpo.data.errors import InputError
from mixpo.stages.identity import identity_settings, name_folder
from mixpo.stages.stage import SUMMARY, Stage
from mixpo.training import memory
from mixpo.training.record import write_json
from mixpo.training.runtime import Runtime

VERSION = "6"
"""Bump when stages compute something else from the same config: folders of other versions are left alone."""

SETTINGS = "settings.json"


@dataclass
class Engine:
    """Folders of stages in a cache."""

    cache: Path
    runtime: Runtime

    def __post_init__(self) -> None:
        self._folders: dict[Stage, Path] = {}
        with _writable(self.cache):
            if self.cache.exists() and not self.cache.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def folder(self, stage: Stage) -> Path:
        """Where the stage's results are or will be."""
        if stage not in self._folders:
            kind = self.cache / type(stage).__name__.lower() / f"version-{VERSION}"
            self._folders[stage] = kind / name_folder(stage)
        return self._folders[stage]

    def identity(self, stage: Stage) -> str:
        """Eight hex digits that stand for the stage's settings, inputs and data: the end of its folder's name."""
        return self.folder(stage).name[-8:]

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's folder is complete.

        Raises `InputError` if it was made with other defaults than today's, or if its summary is damaged.
        """
        folder = self.folder(stage)
        settings, done = read_settings(folder), (folder / SUMMARY).exists()
        if done:
            read_summary(folder)
        if settings == stage.model_dump(mode="json"):
            return done
        # a folder's name leaves out defaults, and what does not belong to the identity, such as paths
        differences = list(_differences(identity_settings(stage), settings)) if settings else ["no settings.json"]
        if differences and (settings or done):
            raise InputError(
                f"{folder}: the folder was written by another version of mixpo ({', '.join(differences[:3])}); "
                "delete it or choose another `cache`"
            )
        return done

    def compute(self, stage: Stage) -> Path:
        """The stage's folder, complete; what is upstream must be complete. Raises what the stage raises.

        Two runs on one cache never compute a stage at once: the second waits, and finds it done.
        """
        out = self.folder(stage)
        with _alone(self.cache / "locks" / self.identity(stage)):
            if not self.is_done(stage):
                with _writable(out):
                    out.mkdir(parents=True, exist_ok=True)
                    write_json(out / SETTINGS, stage.model_dump(mode="json"))
                folders = {name: self.folder(upstream) for name, upstream in stage.inputs().items()}
                memory.reset_peak()
                stage.work(stage.paths(folders), out, self.runtime)
        return out

    def build(self, stage: Stage) -> Path:
        """The stage's folder, complete, after what is missing upstream and the stage itself were computed."""
        for needed in sort_topologically(stage):
            if not self.is_done(needed):
                self.compute(needed)
        return self.folder(stage)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock between processes; it falls when the process ends, however it ends."""
    with _writable(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn what a damaged cache raises into `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: found a place that cannot be written ({error.strerror}); expected a cache that mixpo wrote; "
            "choose another with cache=PATH"
        ) from error


def sort_topologically(stage: Stage) -> Iterator[Stage]:
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


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Settings of today that had another value before; one that did not exist then is no difference."""
    for key, value in now.items():
        earlier = before.get(key, value)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            yield from _differences(value, earlier, f"{within}{key}.")
        elif earlier != value:
            yield f"{within}{key} {repr(earlier)[:60]} then, {repr(value)[:60]} now"


def read_settings(folder: Path) -> dict[str, Any]:
    """All settings that a stage's folder was computed with, defaults and upstream stages too; none if it was not."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_summary(folder: Path) -> dict[str, Any]:
    """A complete stage's `summary.json`. Raises `InputError` on a damaged one."""
    path = folder / SUMMARY
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf8")))
        content["cost"]["seconds"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: found no readable summary ({type(error).__name__}); expected the one that the stage wrote; "
            "delete the stage's folder and run again"
        ) from error
    return content
