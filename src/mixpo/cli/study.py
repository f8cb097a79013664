"""`mixpo annotate` and `mixpo agreement`: a blind study with annotators, and its results."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixpo.data.errors import InputError

if TYPE_CHECKING:
    from mixpo.study.store import StudyStore
    from mixpo.study.tables import StudyRow

app = typer.Typer()
REQUIRED_PACKAGES = ("fastapi", "python_multipart", "sqlalchemy", "uvicorn")
StoreOption = Annotated[
    str | None, typer.Option(help="A PostgreSQL database by URL instead of study/study.sqlite in the run's folder.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/world.")]


@app.command("annotate")
def annotate_completions(
    context: typer.Context,
    run: RunFolder,
    arms: Annotated[tuple[str, str] | None, typer.Option(help="The two arms of a new study.")] = None,
    prompts: Annotated[int | None, typer.Option(help="How many test prompts; 100 if there are so many.")] = None,
    annotators: Annotated[str | None, typer.Option(help="How many, or names: anna,ben,cleo; 3 if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the arms; the first that both finished if not given.")] = None,
    draw: Annotated[int | None, typer.Option(help="Draws prompts, orders and sides; 0 if not given.")] = None,
    guidelines: Annotated[Path | None, typer.Option(help="What annotators are told, as text.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone if not given.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    address: Annotated[str | None, typer.Option(help="Under which annotators reach it, if not host and port.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate, as PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, as PEM.")] = None,
    store: StoreOption = None,
    export: Annotated[Path | None, typer.Option(help="Write the judgements to a .csv or .jsonl file.")] = None,
    import_path: Annotated[Path | None, typer.Option("--import", help="Read judgements that --export wrote.")] = None,
    close: Annotated[bool, typer.Option("--close", help="End the study and reveal its results.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Close without asking.")] = False,
) -> None:
    """Serve a blind comparison of two arms to annotators in a browser: starts a study of a run, or resumes it.

    Prints a link for every annotator. Nobody learns which arm is which before --close.
    """
    _require_study_packages()
    _reject_unused_options(context, close=close)
    if export is not None or import_path is not None or close:
        with _open_existing_study(run, store, allow_changed=export is not None) as (opened, study):
            from mixpo.study.files import export_judgements, import_judgements

            if export is not None:
                print(f"{export_judgements(opened, study, export)} judgements: {export}")
            elif import_path is not None:
                count, new = import_judgements(opened, study, import_path)
                print(f"{count} judgements in {import_path}: {new} new, {count - new} already in the study")
            else:
                _close_study(opened, study, run, without_asking=yes)
        return

    from mixpo.experiments.results import load_runs
    from mixpo.study import server
    from mixpo.study.app import make_app
    from mixpo.study.opening import StudyOptions, load_or_create_study, load_or_issue_link_tokens, parse_annotator_names
    from mixpo.study.store import StudyStore, parse_store_url

    server.require_certificate(tls_cert, tls_key)
    results = load_runs(run)
    names = parse_annotator_names(annotators) if annotators is not None else None
    options = StudyOptions(arms, prompts, names, seed, draw, _read_guidelines(guidelines))
    with server.open_listening_socket(host, port) as listening:
        bound, tls = listening.getsockname()[:2], tls_cert is not None
        at, hosts = server.build_base_url(host, bound, address, tls=tls)
        opened = StudyStore(parse_store_url(run, store))
        try:
            study = load_or_create_study(results, opened, options)
            tokens, lost = load_or_issue_link_tokens(opened, run / "study")
            if lost:
                print(f"warning: links.json had no valid link for {', '.join(lost)}; theirs are new", file=sys.stderr)
            if not server.is_traffic_encrypted(bound[0], at, tls=tls):
                print(server.UNENCRYPTED, file=sys.stderr)
            print(f"study: {opened.name}, for {len(tokens)} annotators; each one's own link, which nobody else needs:")
            for name, token in tokens.items():
                print(f"  {name}: {at}/a/{token}")
            print("until it is closed, leave the run's report and files unread: they show which completion is whose")
            print(f"Ctrl-C stops, the same command goes on; `mixpo annotate {run} --close` ends the study", flush=True)
            scheme = at.partition(":")[0]
            server.serve_app(make_app(opened, study, hosts=hosts, scheme=scheme), listening, tls_cert, tls_key)
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume")
        finally:
            opened.close_connections()


@app.command("agreement")
def show_agreement(run: RunFolder, store: StoreOption = None) -> None:
    """Print the results and the agreement of a closed study, or the progress of an open one."""
    from mixpo.cli.display import print_report_table
    from mixpo.experiments.results import load_runs
    from mixpo.report.people import build_human_study_section

    results = build_human_study_section(load_runs(run))
    if results is None:
        _require_study_packages()
        with _open_existing_study(run, store) as (opened, study):
            _print_judgement_counts(opened)
            command = f"`mixpo annotate {run} --close`"
            if study.closed:
                print(f"closed at {study.closed}, but its files are missing: {command} writes them again")
            else:
                print(f"results are shown once the study is closed: {command}")
        return
    print(results.opening)
    for group in results.groups:
        if group.table is not None:
            print_report_table(group.table, group.title)


def _close_study(store: "StudyStore", study: "StudyRow", run: Path, *, without_asking: bool) -> None:
    """Close the study, after a confirmation unless `without_asking`, write its files, and print where they are."""
    from mixpo.study.files import write_closed_study

    if not study.closed:
        _print_judgement_counts(store)
        typer.echo("Nobody can judge, change or import anything after this, and which arm is which is revealed.")
        if not without_asking and not typer.confirm("Close the study?"):
            raise typer.Exit(1)
    study.closed = store.close_study()
    print(f"closed at {study.closed}: {write_closed_study(store, study, run / 'study')}")
    print(f"`mixpo agreement {run}` shows the results, `mixpo report {run}` adds them to the report")


def _print_judgement_counts(store: "StudyStore") -> None:
    """Print how many questions each annotator judged and skipped, and how many judgements are missing."""
    progress = store.count_progress()
    for annotator in progress:
        print(f"{annotator.name}: {annotator.judged} of {annotator.questions} judged, {annotator.skipped} skipped")
    missing = sum(annotator.questions - annotator.judged for annotator in progress)
    print(f"{missing} of {sum(annotator.questions for annotator in progress)} judgements are missing")


@contextmanager
def _open_existing_study(
    run: Path, url: str | None, *, allow_changed: bool = False
) -> Iterator[tuple["StudyStore", "StudyRow"]]:
    """Context manager that yields the store and the existing study of a run, and closes the store at the end.

    Raises `InputError` if there is no study or, unless `allow_changed`, if the run has changed since it began.
    """
    from mixpo.experiments.results import load_runs
    from mixpo.study.opening import require_completions_unchanged
    from mixpo.study.store import StudyStore, parse_store_url

    results, opened = load_runs(run), StudyStore(parse_store_url(run, url))
    try:
        study = opened.load_study()
        if study is None:
            raise InputError(f"{run}: found no study; expected one begun by `mixpo annotate {run} --arms ONE OTHER`")
        if not allow_changed:
            require_completions_unchanged(results, opened, study)
        yield opened, study
    finally:
        opened.close_connections()


def _reject_unused_options(context: typer.Context, *, close: bool) -> None:
    """Raise `InputError` on given options that export, import, close or serving does not use."""
    options = {name: "--import" if name == "import_path" else f"--{name.replace('_', '-')}" for name in context.params}
    set_options = [name for name in options if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    mode = next((name for name in ("export", "import_path", "close") if name in set_options), None)
    used = {"run", "store", mode, "yes" if close else None} if mode else options.keys() - {"yes"}
    if ignored := [options[name] for name in set_options if name not in used]:
        where = f"beside {options[mode]}, which does nothing with it" if mode else "without --close"
        raise InputError(f"{', '.join(ignored)}: found {where}; leave it out")


def _read_guidelines(path: Path | None) -> str | None:
    """Read the text shown to annotators; None without a file. Raises `InputError` if it is empty or not text."""
    try:
        text = None if path is None else path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--guidelines: found {path}, which cannot be read ({error}); expected text") from error
    if text is not None and not text.strip():
        raise InputError(f"--guidelines: found nothing in {path}; expected what annotators are told")
    return text


def _require_study_packages() -> None:
    for name in REQUIRED_PACKAGES:
        if find_spec(name) is None:
            raise InputError(f"mixpo annotate: found no package {name}; a study needs it: `pip install 'mixpo[study]'`")
