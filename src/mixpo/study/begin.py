"""Beginning a study, or going on with the one that is there."""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import Comparison, comparisons
from mixpo.experiments.results import Results
from mixpo.study.plan import token_digest
from mixpo.study.store import FORMAT, Item, Store, StudyRow, now

PROMPTS, ANNOTATORS = 100, 3
"""As in the paper."""
NAME_LENGTH = 40


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line; None where nothing was."""

    arms: tuple[str, str] | None = None
    prompts: int | None = None
    annotators: Sequence[str] | None = None
    seed: int | None = None
    draw: int | None = None
    guidelines: str | None = None


def names(text: str) -> list[str]:
    """Annotators: as many as a number says, or those named with commas between. Raises `InputError` on bad ones."""
    if text.strip().isdecimal() and int(text) > 0:
        return [f"annotator {number}" for number in range(1, int(text) + 1)]
    found = [name.strip() for name in text.split(",")]
    bad = [name for name in found if not name.isprintable() or not 0 < len(name) <= NAME_LENGTH or name.isdecimal()]
    bad += [name for name in found if found.count(name) > 1]
    if bad:
        raise InputError(
            f"--annotators: found {bad[0]!r} among them; expected a number, or different names of 1 to {NAME_LENGTH} "
            "characters with commas between, such as anna,ben,cleo"
        )
    return found


def begin_or_go_on(results: Results, store: Store, wanted: Wanted) -> StudyRow:
    """The study of a run: a new one as asked for, or the one that is there if nothing else is asked for.

    Raises `InputError` where it is closed, differs from what is asked for, or where the run has changed.
    """
    study = store.study()
    if study is None:
        return _begin(results, store, wanted)
    if study.closed:
        raise InputError(
            f"{store.name}: found a study that was closed at {study.closed}; `mixpo agreement RUN` shows what it says; "
            "move it away to begin another"
        )
    _refuse_others(store, study, wanted)
    drawn = comparisons(results, (study.first, study.second), seed=study.seed, prompts=study.prompts, draw=study.draw)
    if _content(drawn) != study.content:
        raise InputError(
            f"{store.name}: found a study of other completions than the run now has; expected the run as it was when "
            "the study began; move the study away to begin another"
        )
    return study


def links(store: Store, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Every annotator's token, as the folder's `links.json` keeps them, and whose is new because it was lost."""
    path = folder / "links.json"
    try:
        kept = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    except ValueError:
        kept = {}
    rows = store.annotators()
    lost = [row.name for row in rows if token_digest(str(kept.get(row.name))) != row.token]
    tokens = {row.name: secrets.token_urlsafe(24) if row.name in lost else str(kept[row.name]) for row in rows}
    if lost:
        _write_private(path, json.dumps(tokens, indent=2) + "\n")
        store.renew({name: token_digest(tokens[name]) for name in lost})
    return tokens, lost


def default_guidelines() -> str:
    """What annotators are told if nothing else is given."""
    return files("mixpo.study").joinpath("guidelines.txt").read_text(encoding="utf8")


def _begin(results: Results, store: Store, wanted: Wanted) -> StudyRow:
    if wanted.arms is None:
        raise InputError(
            f"--arms: found none, and no study in {store.name}; expected two arms of the run, such as --arms mpo ppo"
        )
    draw = wanted.draw or 0
    every = comparisons(results, wanted.arms, seed=wanted.seed)
    prompts = wanted.prompts if wanted.prompts is not None else min(PROMPTS, len(every))
    drawn = comparisons(results, wanted.arms, seed=wanted.seed, prompts=prompts, draw=draw)
    asked = [Item(one.number, one.category, one.prompt, one.completions) for one in drawn if not one.same]
    if not asked:
        raise InputError("--arms: found two arms that complete every prompt alike; expected a prompt to ask about")
    study = StudyRow(
        id=1,
        format=FORMAT,
        first=wanted.arms[0],
        second=wanted.arms[1],
        seed=wanted.seed,
        draw=draw,
        prompts=prompts,
        content=_content(drawn),
        same=json.dumps([[one.number, one.category] for one in drawn if one.same]),
        guidelines=wanted.guidelines or default_guidelines(),
        secret=secrets.token_hex(32),
        began=now(),
        closed=None,
    )
    store.begin(study, asked, wanted.annotators or names(str(ANNOTATORS)))
    return study


def _refuse_others(store: Store, study: StudyRow, wanted: Wanted) -> None:
    found = [row.name for row in store.annotators()]
    pairs = (
        ("--arms", wanted.arms, (study.first, study.second)),
        ("--prompts", wanted.prompts, study.prompts),
        ("--seed", wanted.seed, study.seed),
        ("--draw", wanted.draw, study.draw),
        ("--annotators", None if wanted.annotators is None else tuple(wanted.annotators), tuple(found)),
        ("--guidelines", wanted.guidelines, study.guidelines),
    )
    lines = []
    for option, asked, there in pairs:
        if asked is not None and asked != there:
            said = "other ones" if option == "--guidelines" else f"{_words(asked)}; expected {_words(there)}"
            lines.append(f"{option}: found {said}, as in the study that is there; leave it out, or move the study away")
    if lines:
        raise InputError("\n".join(lines))


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def _content(drawn: Sequence[Comparison]) -> str:
    rows = [[one.number, one.category, one.prompt, one.completions] for one in drawn]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
