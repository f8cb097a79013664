"""Creating the study of a run or reopening it, and issuing its annotators' link tokens."""

import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import choose_compared_seed, pair_completions
from mixpo.experiments.results import Results
from mixpo.study.files import write_atomically
from mixpo.study.plan import are_completions_unchanged, compute_content_digest, hash_token
from mixpo.study.store import Store, format_current_time, make_private_folder
from mixpo.study.tables import FORMAT, StudyRow

DEFAULT_PROMPTS, DEFAULT_ANNOTATORS = 100, 3
"""The paper's numbers of prompts and annotators."""
MAX_NAME_LENGTH, MAX_ANNOTATORS = 40, 500


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study from the command line; None where an option is not given."""

    arms: tuple[str, str] | None = None
    prompts: int | None = None
    annotators: Sequence[str] | None = None
    seed: int | None = None
    draw: int | None = None
    guidelines: str | None = None


def parse_annotator_names(text: str) -> list[str]:
    """Parse --annotators: a number of annotators, or different names separated by commas.

    Raises `InputError` on others.
    """
    names = [name.strip() for name in text.split(",")]
    if text.strip().isdecimal() and len(text) <= 9 and 0 < int(text) <= MAX_ANNOTATORS:
        return [f"annotator {number}" for number in range(1, int(text) + 1)]
    invalid = [
        name for name in names if not name.isprintable() or not 0 < len(name) <= MAX_NAME_LENGTH or name.isdecimal()
    ]
    invalid += [name for name, count in Counter(names).items() if count > 1] + names[MAX_ANNOTATORS:]
    if invalid:
        raise InputError(
            f"--annotators: found {invalid[0]!r} among {len(names)}; expected a number, or different names of 1 to "
            f"{MAX_NAME_LENGTH} characters separated by commas, such as anna,ben,cleo; {MAX_ANNOTATORS} at most"
        )
    return names


def open_study(results: Results, store: Store, options: StudyOptions) -> StudyRow:
    """Open the study of a run, or create it with the given options.

    Raises `InputError` where it is closed, differs from the options, or where the run's completions have changed.
    """
    study = store.load_study()
    if study is None:
        return _create_study(results, store, options)
    if study.closed:
        raise InputError(
            f"{store.name}: found a study that was closed at {study.closed}; `mixpo agreement RUN` shows its results; "
            + _format_new_study_hint(results, store)
        )
    _check_options_match(results, store, study, options)
    check_completions_unchanged(results, store, study)
    return study


def check_completions_unchanged(results: Results, store: Store, study: StudyRow) -> None:
    """Raise `InputError` unless the run's completions are those of the study."""
    selection = {"seed": study.seed, "prompts": study.prompts, "draw": study.draw}
    if not are_completions_unchanged(results, (study.first, study.second), **selection, content=study.content):
        raise InputError(
            f"{store.name}: found a study of other completions than the run has now; expected the run as it was when "
            f"the study began; {_format_new_study_hint(results, store)}"
        )


def load_or_issue_tokens(store: Store, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Load the annotators' link tokens from `links.json`, and issue new ones where missing or invalid.

    Returns the tokens by name, and the names whose lost token was replaced. Raises `InputError` on an unreadable
    file.
    """
    path, rows = folder / "links.json", store.load_annotators()
    try:
        stored = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
        invalid = {row.name: row.token for row in rows if hash_token(str(stored.get(row.name))) != row.token}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: found no readable links ({error}); expected names and links; delete it to make new ones"
        ) from error
    tokens = {row.name: secrets.token_urlsafe(24) if row.name in invalid else str(stored[row.name]) for row in rows}
    if invalid:
        make_private_folder(folder)
        write_atomically(path, json.dumps(tokens, indent=2) + "\n", private=True)
        store.replace_tokens({name: hash_token(tokens[name]) for name in invalid})
    return tokens, [name for name, old_hash in invalid.items() if old_hash]


def _create_study(results: Results, store: Store, options: StudyOptions) -> StudyRow:
    """Create the study of a run: choose seed and prompts, and write items, annotators and question orders."""
    if options.arms is None:
        raise InputError(
            f"--arms: found none, and no study in {store.name}; expected two arms of the run, such as --arms mpo ppo"
        )
    folder = results.runs[0].folder / "study"
    if (folder / "closed.json").exists():
        raise InputError(f"{folder}: found a closed study; {_format_new_study_hint(results, store)}")
    seed, draw = choose_compared_seed(results, options.arms, options.seed), options.draw or 0
    comparisons = pair_completions(
        results, options.arms, seed=seed, prompts=options.prompts, at_most=DEFAULT_PROMPTS, draw=draw
    )
    items = [one for one in comparisons if not one.same]
    if not items:
        raise InputError(
            "--arms: found two arms that complete every prompt alike; expected a prompt whose completions differ"
        )
    study = StudyRow(
        id=1,
        format=FORMAT,
        first=options.arms[0],
        second=options.arms[1],
        seed=seed,
        draw=draw,
        prompts=len(comparisons),
        content=compute_content_digest(comparisons),
        same=json.dumps([[one.number, one.category] for one in comparisons if one.same]),
        guidelines=options.guidelines or (files("mixpo.study") / "guidelines.txt").read_text(encoding="utf8"),
        secret=secrets.token_hex(32),
        began=format_current_time(),
        closed=None,
    )
    store.create_study(study, items, options.annotators or parse_annotator_names(str(DEFAULT_ANNOTATORS)))
    return study


def _format_new_study_hint(results: Results, store: Store) -> str:
    """The last clause of error messages: how to begin another study."""
    database = "" if store.file else " and use another database"
    return f"move the folder {results.runs[0].folder / 'study'} away{database} to begin another"


def _check_options_match(results: Results, store: Store, study: StudyRow, options: StudyOptions) -> None:
    """Raise `InputError` on options that differ from those of the existing study, all in one message."""
    names = [row.name for row in store.load_annotators()]
    pairs = (
        ("--arms", options.arms, (study.first, study.second)),
        ("--prompts", options.prompts, study.prompts),
        ("--seed", options.seed, study.seed),
        ("--draw", options.draw, study.draw),
        ("--annotators", None if options.annotators is None else tuple(options.annotators), tuple(names)),
        ("--guidelines", options.guidelines, study.guidelines),
    )
    problems = []
    for option, requested, stored in pairs:
        if requested is not None and requested != stored:
            found, expected = _format_option(requested), _format_option(stored)
            difference = (
                "other text; expected that" if option == "--guidelines" else f"{found}; expected {expected}, that"
            )
            fix = f"leave it out, or {_format_new_study_hint(results, store)}"
            problems.append(f"{option}: found {difference} of the existing study; {fix}")
    if problems:
        raise InputError("\n".join(problems))


def _format_option(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
