"""Shapes and types of every signature are checked while the tests run; a small world is computed once for all."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is there
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models, and files of tests side by side
install_import_hook("mixpo.algorithms", "beartype.beartype")
settings.register_profile("no timings", deadline=None)
settings.load_profile("no timings")

if TYPE_CHECKING:
    from worlds import TinyWorld, World


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("found no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    from worlds import World

    cache: Path = tmp_path_factory.mktemp("cache")
    return World(cache)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyWorld":
    from worlds import TinyWorld

    return TinyWorld(tmp_path_factory.mktemp("tiny"))
