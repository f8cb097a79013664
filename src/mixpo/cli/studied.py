"""`mixpo annotate` and `mixpo agreement`: a blind study with people, and what it says."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixpo.data.errors import InputError

if TYPE_CHECKING:
    from mixpo.study.store import Store
    from mixpo.study.tables import StudyRow

app = typer.Typer()
NEEDED = ("fastapi", "python_multipart", "sqlalchemy", "uvicorn")
StoreOption = Annotated[
    str | None, typer.Option(help="A PostgreSQL database by URL instead of study/study.sqlite in the run's folder.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, such as runs/world.")]


@app.command()
def annotate(
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
    take: Annotated[Path | None, typer.Option("--import", help="Take in what --export wrote.")] = None,
    close: Annotated[bool, typer.Option("--close", help="End the study and reveal what it says.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Close without asking.")] = False,
) -> None:
    """Let people compare two arms blindly in a browser: begins a study of a run, or goes on with it.

    Prints a link for every annotator. Nobody learns which arm is which before --close.
    """
    _refuse_missing()
    _refuse_ignored(context, close=close)
    if export is not None or take is not None or close:
        with _there(run, store, changed=export is not None) as (opened, study):
            if export is not None:
                _export(opened, study, export)
            elif take is not None:
                _import(opened, study, take)
            else:
                _close(opened, study, run, yes=yes)
        return

    from mixpo.experiments.results import load_runs
    from mixpo.study import server
    from mixpo.study.app import make_app
    from mixpo.study.begin import Wanted, begin_or_go_on, links, names
    from mixpo.study.store import Store, store_url

    server.check_certificate(tls_cert, tls_key)
    results = load_runs(run)
    wanted = Wanted(arms, prompts, names(annotators) if annotators is not None else None, seed, draw, _read(guidelines))
    with server.listen(host, port) as listening:
        bound, tls = listening.getsockname()[:2], tls_cert is not None
        at, hosts = server.addresses(host, bound, address, tls=tls)
        opened = Store(store_url(run, store))
        try:
            study = begin_or_go_on(results, opened, wanted)
            tokens, lost = links(opened, run / "study")
            if lost:
                print(f"warning: links.json had no valid link for {', '.join(lost)}; theirs are new", file=sys.stderr)
            if not server.is_encrypted(bound[0], at, tls=tls):
                print(server.UNENCRYPTED, file=sys.stderr)
            print(f"study: {opened.name}, for {len(tokens)} annotators; each one's own link, which nobody else needs:")
            for name, token in tokens.items():
                print(f"  {name}: {at}/a/{token}")
            print("until it is closed, leave the run's report and files unread: they show which completion is whose")
            print(f"Ctrl-C stops, the same command goes on; `mixpo annotate {run} --close` ends the study", flush=True)
            scheme = at.partition(":")[0]
            server.serve(make_app(opened, study, hosts=hosts, scheme=scheme), listening, tls_cert, tls_key)
        except KeyboardInterrupt:
            print("stopped; the same command goes on where this one was")
        finally:
            opened.dispose()


@app.command()
def agreement(run: RunFolder, store: StoreOption = None) -> None:
    """Print what a closed study says and how far its annotators agree; before that, how far they are."""
    from mixpo.cli.display import show
    from mixpo.experiments.results import load_runs
    from mixpo.report.people import section

    found = section(load_runs(run))
    if found is None:
        _refuse_missing()
        with _there(run, store) as (opened, study):
            _show_progress(opened, study, run)
        return
    print(found.opening)
    for group in found.groups:
        if group.table is not None:
            show(group.table, group.title)


def _export(store: "Store", study: "StudyRow", path: Path) -> None:
    from mixpo.study.files import export

    print(f"{export(store, study, path)} judgements: {path}")


def _import(store: "Store", study: "StudyRow", path: Path) -> None:
    from mixpo.study.files import take_in

    found, new = take_in(store, study, path)
    print(f"{found} judgements in {path}: {new} new, {found - new} there before")


def _close(store: "Store", study: "StudyRow", run: Path, *, yes: bool) -> None:
    from mixpo.study.files import write_closed

    if not study.closed:
        _show_counts(store)
        typer.echo("Nobody can judge, change or import anything after this, and which arm is which is revealed.")
        if not yes and not typer.confirm("Close the study?"):
            raise typer.Exit(1)
    study.closed = store.close()
    print(f"closed at {study.closed}: {write_closed(store, study, run / 'study')}")
    print(f"`mixpo agreement {run}` shows what it says, `mixpo report {run}` has it in the report")


def _show_progress(store: "Store", study: "StudyRow", run: Path) -> None:
    _show_counts(store)
    if study.closed:
        print(f"the study was closed at {study.closed}, its files are not here: `mixpo annotate {run} --close`")
    else:
        print(f"nothing more is told before the study is closed: `mixpo annotate {run} --close`")


def _show_counts(store: "Store") -> None:
    progress = store.progress()
    for one in progress:
        print(f"{one.name}: {one.judged} of {one.questions} judged, {one.skipped} skipped")
    missing = sum(one.questions - one.judged for one in progress)
    print(f"{missing} of {sum(one.questions for one in progress)} judgements are missing")


@contextmanager
def _there(run: Path, url: str | None, *, changed: bool = False) -> Iterator[tuple["Store", "StudyRow"]]:
    """The study of a run, which must be there, and of what the run is now unless it may have `changed`."""
    from mixpo.experiments.results import load_runs
    from mixpo.study.begin import refuse_changed
    from mixpo.study.store import Store, store_url

    results, opened = load_runs(run), Store(store_url(run, url))
    try:
        study = opened.study()
        if study is None:
            raise InputError(f"{run}: found no study; expected one begun by `mixpo annotate {run} --arms ONE OTHER`")
        if not changed:
            refuse_changed(results, opened, study)
        yield opened, study
    finally:
        opened.dispose()


def _refuse_ignored(context: typer.Context, *, close: bool) -> None:
    """Raises `InputError` on options that nothing would be done with."""
    options = {name: "--import" if name == "take" else f"--{name.replace('_', '-')}" for name in context.params}
    given = [name for name in options if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    mode = next((name for name in ("export", "take", "close") if name in given), None)
    used = {"run", "store", mode, "yes" if close else None} if mode else options.keys() - {"yes"}
    if ignored := [options[name] for name in given if name not in used]:
        where = f"beside {options[mode]}, which does nothing with it" if mode else "without --close"
        raise InputError(f"{', '.join(ignored)}: found {where}; leave it out")


def _read(path: Path | None) -> str | None:
    try:
        text = None if path is None else path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--guidelines: found {path}, which cannot be read ({error}); expected text") from error
    if text is not None and not text.strip():
        raise InputError(f"--guidelines: found nothing in {path}; expected what annotators are told")
    return text


def _refuse_missing() -> None:
    for name in NEEDED:
        if find_spec(name) is None:
            raise InputError(
                f"mixpo annotate: found no package {name}; expected what a study needs; `pip install 'mixpo[study]'`"
            )
