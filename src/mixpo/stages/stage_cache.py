"""The cache of stages: finds the folder of a stage in the cache, and computes stages that are missing.

A folder is named by the stage's identity, in a cache that all runs share. A killed stage is computed again in the same
folder, from its checkpoint; a failed one is computed again. Caches may be from other people: only JSON, Parquet and
safetensors are read, never a pickle.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mixpo.data.errors import InputError
from mixpo.stages.identity import collect_identity_settings, make_stage_folder_name
from mixpo.stages.requirements import check_requirements
from mixpo.stages.stage import Stage
from mixpo.training import memory
from mixpo.training.job import SUMMARY, StageJob
from mixpo.training.record import write_json
from mixpo.training.rendezvous import Rendezvous
from mixpo.training.runtime import Runtime

VERSION = "8"
"""Increase when stages compute something else from the same settings; folders of other versions are not used."""

SETTINGS = "settings.json"


@dataclass
class StageCache:
    """Folders of stages, and the runtime and processes with which missing ones are computed."""

    cache: Path
    runtime: Runtime
    rendezvous: Rendezvous | None = None
    """Where the processes meet that compute each stage together, if there are several; this is the main one."""

    def __post_init__(self) -> None:
        self._folders: dict[Stage, Path] = {}
        with _explain_write_errors(self.cache):
            if self.cache.exists() and not self.cache.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def locate_folder(self, stage: Stage) -> Path:
        """Path of a stage's folder in the cache, computed or not."""
        if stage not in self._folders:
            kind = self.cache / type(stage).__name__.lower() / f"version-{VERSION}"
            self._folders[stage] = kind / make_stage_folder_name(stage)
        return self._folders[stage]

    def compute_identity(self, stage: Stage) -> str:
        """Digest of a stage's settings, inputs and data: the eight hex digits at the end of its folder's name."""
        return self.locate_folder(stage).name[-8:]

    def is_done(self, stage: Stage) -> bool:
        """True if the stage's folder is complete. Raises `InputError` if it is damaged or has other defaults."""
        folder = self.locate_folder(stage)
        settings, done = read_stage_settings(folder), (folder / SUMMARY).exists()
        if done:
            read_stage_summary(folder)
        if settings == stage.model_dump(mode="json"):
            return done
        # folder names leave out defaults, and fields outside the identity, such as paths
        differences = ["no settings.json"]
        if settings:
            differences = list(_describe_differences(collect_identity_settings(stage), settings))
        if differences and (settings or done):
            raise InputError(
                f"{folder}: the folder was written by another version of mixpo ({', '.join(differences[:3])}); "
                "delete it or choose another `cache`"
            )
        return done

    def compute_stage(self, stage: Stage) -> Path:
        """Compute a stage whose inputs are complete, unless it is done, and return its folder. Raises what it raises.

        A lock keeps two runs from computing a stage at the same time: the second waits and uses the first's result.
        """
        out = self.locate_folder(stage)
        lock = self.cache / "locks" / self.compute_identity(stage)
        with _explain_write_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            acquired_lock = FileLock(lock).acquire()
        with acquired_lock:
            if not self.is_done(stage):
                with _explain_write_errors(out):
                    out.mkdir(parents=True, exist_ok=True)
                    write_json(out / SETTINGS, stage.model_dump(mode="json"))
                if self.rendezvous is not None and stage.splits_over_processes:
                    self.rendezvous.announce(stage)
                self.compute_share(stage)
        return out

    def compute_share(self, stage: Stage) -> None:
        """Compute this process's share of a stage whose inputs are complete: all of it if the process is alone."""
        rendezvous = self.rendezvous if stage.splits_over_processes else None
        runtime = stage.select_runtime(self.runtime)
        check_requirements(stage, runtime, rendezvous.count if rendezvous else 1)
        with rendezvous.open_processes(runtime) if rendezvous else nullcontext() as processes:
            folders = {name: self.locate_folder(upstream) for name, upstream in stage.get_input_stages().items()}
            memory.reset_peak_memory()
            with closing(StageJob(self.locate_folder(stage), runtime, processes)) as job:
                stage.compute(stage.locate_inputs(folders), job)

    def compute_with_inputs(self, stage: Stage) -> Path:
        """Compute a stage and those of its direct and indirect inputs that are not done, and return its folder."""
        for needed in sort_topologically(stage):
            if not self.is_done(needed):
                self.compute_stage(needed)
        return self.locate_folder(stage)


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Context manager: raise `InputError` in place of errors of writing to the cache."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: found a place that cannot be written ({error.strerror}); expected a cache that mixpo wrote; "
            "choose another with cache=PATH"
        ) from error


def sort_topologically(stage: Stage) -> Iterator[Stage]:
    """Yield a stage and all its direct and indirect inputs once, each after its own inputs."""
    visited: set[int] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        """Yield a stage after its inputs, without those yielded before."""
        if id(stage) in visited:
            return
        visited.add(id(stage))
        for upstream in stage.get_input_stages().values():
            yield from visit(upstream)
        yield stage

    yield from visit(stage)


def _describe_differences(
    new_settings: Mapping[str, Any], old_settings: Mapping[str, Any], key_prefix: str = ""
) -> Iterator[str]:
    """Yield texts on the settings that have another value than before; those that did not exist before are skipped."""
    for key, value in new_settings.items():
        earlier = old_settings.get(key, value)
        if isinstance(value, Mapping) and isinstance(earlier, Mapping):
            yield from _describe_differences(value, earlier, f"{key_prefix}{key}.")
        elif earlier != value:
            yield f"{key_prefix}{key} {repr(earlier)[:60]} then, {repr(value)[:60]} now"


def read_stage_settings(stage_folder: Path) -> dict[str, Any]:
    """All settings saved in a stage's folder, defaults and input stages included; empty if it has no readable ones."""
    try:
        content = json.loads((stage_folder / SETTINGS).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_stage_summary(stage_folder: Path) -> dict[str, Any]:
    """Content of a complete stage's `summary.json`. Raises `InputError` if it is damaged or missing."""
    path = stage_folder / SUMMARY
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf8")))
        content["cost"]["seconds"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: found no readable summary ({type(error).__name__}); expected the one that the stage wrote; "
            "delete the stage's folder and run again"
        ) from error
    return content
