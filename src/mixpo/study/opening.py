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
from mixpo.study.store import StudyStore, format_current_time, make_private_folder
from mixpo.study.tables import FORMAT, StudyRow

DEFAULT_PROMPTS, DEFAULT_ANNOTATORS = 100, 3
"""The paper's numbers of prompts and annotators."""
MAX_NAME_LENGTH, MAX_ANNOTATORS = 40, 500


@dataclass(frozen=True)
class StudyOptions:
    """Options of a new or resumed study from the command line; None where an option is not given."""

    arms: tuple[str, str] | None = None
    prompts: int | None = None
    annotators: Sequence[str] | None = None
    seed: int | None = None
    draw: int | None = None
    guidelines: str | None = None


def parse_annotator_names(text: str) -> list[str]:
    """Return the annotators' names of --annotators: the given ones, or `annotator 1` and so on for a number.

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


def load_or_create_study(results: Results, store: StudyStore, options: StudyOptions) -> StudyRow:
    """Load the open study of a run, or create one with the given options if there is none.

    Raises `InputError` where it is closed, differs from the options, or where the run's completions have changed.
    """
    study = store.load_study()
    if study is None:
        return _create_study_of_run(results, store, options)
    if study.closed:
        raise InputError(
            f"{store.name}: found a study that was closed at {study.closed}; `mixpo agreement RUN` shows its results; "
            + _format_new_study_hint(results, store)
        )
    _require_matching_options(results, store, study, options)
    require_completions_unchanged(results, store, study)
    return study


def require_completions_unchanged(results: Results, store: StudyStore, study: StudyRow) -> None:
    """Raise `InputError` unless the run's completions are those that the study began with."""
    selection = {"seed": study.seed, "prompt_count": study.prompts, "draw_seed": study.draw}
    if not are_completions_unchanged(results, (study.first, study.second), **selection, content_digest=study.content):
        raise InputError(
            f"{store.name}: found a study of other completions than the run has now; expected the run as it was when "
            f"the study began; {_format_new_study_hint(results, store)}"
        )


def load_or_issue_link_tokens(store: StudyStore, folder: Path) -> tuple[dict[str, str], list[str]]:
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
        store.replace_token_hashes({name: hash_token(tokens[name]) for name in invalid})
    return tokens, [name for name, old_hash in invalid.items() if old_hash]


def _create_study_of_run(results: Results, store: StudyStore, options: StudyOptions) -> StudyRow:
    """Create the study of a run: choose seed and prompts, and store items, annotators and question orders."""
    if options.arms is None:
        raise InputError(
            f"--arms: found none, and no study in {store.name}; expected two arms of the run, such as --arms mpo ppo"
        )
    folder = results.runs[0].folder / "study"
    if (folder / "closed.json").exists():
        raise InputError(f"{folder}: found a closed study; {_format_new_study_hint(results, store)}")
    seed, draw = choose_compared_seed(results, options.arms, options.seed), options.draw or 0
    comparisons = pair_completions(
        results, options.arms, seed=seed, prompt_count=options.prompts, max_prompts=DEFAULT_PROMPTS, draw_seed=draw
    )
    items = [one for one in comparisons if not one.is_identical]
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
        same=json.dumps([[one.number, one.category] for one in comparisons if one.is_identical]),
        guidelines=options.guidelines or (files("mixpo.study") / "guidelines.txt").read_text(encoding="utf8"),
        secret=secrets.token_hex(32),
        began=format_current_time(),
        closed=None,
    )
    store.create_study(study, items, options.annotators or parse_annotator_names(str(DEFAULT_ANNOTATORS)))
    return study


def _format_new_study_hint(results: Results, store: StudyStore) -> str:
    """Format the last clause of error messages: how to begin another study."""
    database = "" if store.file else " and use another database"
    return f"move the folder {results.runs[0].folder / 'study'} away{database} to begin another"


def _require_matching_options(results: Results, store: StudyStore, study: StudyRow, options: StudyOptions) -> None:
    """Raise `InputError` on given options that differ from the existing study's, all in one message."""
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
            difference = f"{_format_option_value(requested)}; expected {_format_option_value(stored)}, that"
            if option == "--guidelines":
                difference = "other text; expected that"
            fix = f"leave it out, or {_format_new_study_hint(results, store)}"
            problems.append(f"{option}: found {difference} of the existing study; {fix}")
    if problems:
        raise InputError("\n".join(problems))


def _format_option_value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
