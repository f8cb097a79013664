"""Beginning a study, or going on with the one that is there."""

import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import choose_compared_seed, pair_completions
from mixpo.experiments.results import Results
from mixpo.study.plan import content_digest, token_digest, unchanged
from mixpo.study.store import Store, now, private_folder
from mixpo.study.tables import FORMAT, StudyRow

PROMPTS, ANNOTATORS = 100, 3
"""As in the paper."""
NAME_LENGTH, MOST_NAMES = 40, 500


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
    found = [name.strip() for name in text.split(",")]
    if text.strip().isdecimal() and len(text) <= 9 and 0 < int(text) <= MOST_NAMES:
        return [f"annotator {number}" for number in range(1, int(text) + 1)]
    bad = [name for name in found if not name.isprintable() or not 0 < len(name) <= NAME_LENGTH or name.isdecimal()]
    bad += [name for name, count in Counter(found).items() if count > 1] + found[MOST_NAMES:]
    if bad:
        raise InputError(
            f"--annotators: found {bad[0]!r} among {len(found)}; expected a number, or different names of 1 to "
            f"{NAME_LENGTH} characters with commas between, such as anna,ben,cleo; {MOST_NAMES} at most"
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
            + _another(results, store)
        )
    _refuse_others(results, store, study, wanted)
    refuse_changed(results, store, study)
    return study


def refuse_changed(results: Results, store: Store, study: StudyRow) -> None:
    """Raises `InputError` where a store's study is of another run, or of this one as it was before."""
    drawn = {"seed": study.seed, "prompts": study.prompts, "draw": study.draw}
    if not unchanged(results, (study.first, study.second), **drawn, content=study.content):
        raise InputError(
            f"{store.name}: found a study of other completions than the run now has; expected the run as it was when "
            f"the study began; {_another(results, store)}"
        )


def links(store: Store, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Every annotator's token, as the folder's `links.json` keeps them, and whose is new because it was lost.

    Raises `InputError` where the file cannot be read.
    """
    path, rows = folder / "links.json", store.annotators()
    try:
        kept = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        new = {row.name: row.token for row in rows if token_digest(str(kept.get(row.name))) != row.token}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: found no readable links ({error}); expected names and links; delete it to make new ones"
        ) from error
    tokens = {row.name: secrets.token_urlsafe(24) if row.name in new else str(kept[row.name]) for row in rows}
    if new:
        _write_private(path, json.dumps(tokens, indent=2) + "\n")
        store.renew({name: token_digest(tokens[name]) for name in new})
    return tokens, [name for name, before in new.items() if before]


def default_guidelines() -> str:
    """What annotators are told if nothing else is given."""
    return files("mixpo.study").joinpath("guidelines.txt").read_text(encoding="utf8")


def _begin(results: Results, store: Store, wanted: Wanted) -> StudyRow:
    if wanted.arms is None:
        raise InputError(
            f"--arms: found none, and no study in {store.name}; expected two arms of the run, such as --arms mpo ppo"
        )
    folder = results.runs[0].folder / "study"
    if (folder / "closed.json").exists():
        raise InputError(f"{folder}: found a closed study; {_another(results, store)}")
    seed, draw = choose_compared_seed(results, wanted.arms, wanted.seed), wanted.draw or 0
    drawn = pair_completions(results, wanted.arms, seed=seed, prompts=wanted.prompts, at_most=PROMPTS, draw=draw)
    asked = [one for one in drawn if not one.same]
    if not asked:
        raise InputError("--arms: found two arms that complete every prompt alike; expected a prompt to ask about")
    study = StudyRow(
        id=1,
        format=FORMAT,
        first=wanted.arms[0],
        second=wanted.arms[1],
        seed=seed,
        draw=draw,
        prompts=len(drawn),
        content=content_digest(drawn),
        same=json.dumps([[one.number, one.category] for one in drawn if one.same]),
        guidelines=wanted.guidelines or default_guidelines(),
        secret=secrets.token_hex(32),
        began=now(),
        closed=None,
    )
    store.begin(study, asked, wanted.annotators or names(str(ANNOTATORS)))
    return study


def _another(results: Results, store: Store) -> str:
    """What to do where another study is wanted."""
    database = "" if store.file else " and use another database"
    return f"move the folder {results.runs[0].folder / 'study'} away{database} to begin another"


def _refuse_others(results: Results, store: Store, study: StudyRow, wanted: Wanted) -> None:
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
            do = f"leave it out, or {_another(results, store)}"
            lines.append(f"{option}: found {said}, as in the study that is there; {do}")
    if lines:
        raise InputError("\n".join(lines))


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    private_folder(path.parent)
    half = path.with_suffix(".part")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
