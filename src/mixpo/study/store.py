"""Where a study is kept: SQLite beside the run, or PostgreSQL by URL. What is acknowledged is on disk."""

import json
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import Comparison
from mixpo.study.plan import IDLE_SECONDS, order, question_digest
from mixpo.study.tables import (
    FORMAT,
    AnnotatorRow,
    Base,
    EarlierRow,
    ItemRow,
    JudgementRow,
    QuestionRow,
    StudyRow,
)

LOCK_SECONDS = 10
"""How long to wait for another process that writes."""


@dataclass(frozen=True)
class Said:
    """What an annotator says of a question."""

    choice: str
    reason: str
    comment: str
    seconds: float
    idle: bool
    at: str


@dataclass(frozen=True)
class Question:
    """A question as it is shown, and what was said of it so far."""

    annotator: str
    number: int
    item: Comparison
    swapped: bool
    said: Said | None

    @property
    def sides(self) -> tuple[str, str]:
        """The completions, left and right."""
        one, other = self.item.completions
        return (other, one) if self.swapped else (one, other)

    def digest(self, secret: str) -> str:
        """What stands for it in an export."""
        return question_digest(secret, self.annotator, self.number, self.item.prompt, *self.sides)


@dataclass(frozen=True)
class Progress:
    """How far an annotator is."""

    name: str
    judged: int
    skipped: int
    questions: int


class ClosedError(Exception):
    """The study is closed: nothing is judged any more."""


class Store:
    """A store's one study. Raises `InputError` where the store cannot be used."""

    def __init__(self, url: URL) -> None:
        self.name = str(url.database) if url.drivername == "sqlite" else url.render_as_string(hide_password=True)
        self.file = Path(str(url.database)) if url.drivername == "sqlite" else None
        self.password = str(url.password or "")
        with self._told():
            try:
                self.engine = _engine(url)
            except ImportError as error:
                raise InputError(
                    f"--store: found no driver for {url.drivername} ({error}); expected it to be installed, such as "
                    "`pip install 'psycopg[binary]'` for postgresql+psycopg://"
                ) from None

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def study(self) -> StudyRow | None:
        """The study, if there is one; no file is made to find out."""
        if self.file is not None and not self.file.exists():
            return None
        with self._session() as session:
            if not inspect(session.connection()).has_table(StudyRow.__tablename__):
                return None
            found = session.scalars(select(StudyRow)).one_or_none()
            if found is not None and found.format != FORMAT:
                raise InputError(
                    f"{self.name}: found a study of format {found.format}, written by another version of mixpo; "
                    f"expected format {FORMAT}; use that version"
                )
            return found

    def closed(self) -> bool:
        """Whether the study is closed."""
        with self._session() as session:
            return session.scalars(select(StudyRow.closed)).one() is not None

    def begin(self, study: StudyRow, items: Sequence[Comparison], annotators: Sequence[str]) -> None:
        """Make a study whole or not at all."""
        if self.file is not None:
            private_folder(self.file.parent)
        with self._session(write=True) as session:
            Base.metadata.create_all(session.connection())
            session.add(study)
            for place, item in enumerate(items):
                content = json.dumps({"prompt": item.prompt, "completions": item.completions})
                row = ItemRow(id=place + 1, prompt=item.number, category=item.category, content=content)
                session.add(row)
            for place, name in enumerate(annotators):
                session.add(AnnotatorRow(id=place + 1, name=name, token=""))
            session.flush()
            for place, name in enumerate(annotators):
                drawn = order(len(items), draw=study.draw, secret=study.secret, annotator=name)
                for number, (at, swapped) in enumerate(drawn, start=1):
                    session.add(QuestionRow(annotator=place + 1, number=number, item=at + 1, swapped=swapped))

    def annotators(self) -> list[AnnotatorRow]:
        """All annotators."""
        with self._session() as session:
            return list(session.scalars(select(AnnotatorRow).order_by(AnnotatorRow.id)))

    def renew(self, tokens: dict[str, str]) -> None:
        """Give annotators other tokens: digests by name."""
        with self._session(write=True) as session:
            for row in session.scalars(select(AnnotatorRow).where(AnnotatorRow.name.in_(tokens))):
                row.token = tokens[row.name]

    def question(self, annotator: int, number: int) -> Question | None:
        """A question, if there is one of this number."""
        found = self.questions(QuestionRow.annotator == annotator, QuestionRow.number == number)
        return found[0] if found else None

    def questions(self, *where: ColumnElement[bool]) -> list[Question]:
        """All questions, or those of which something holds, by annotator and number."""
        joined = (JudgementRow.annotator == QuestionRow.annotator) & (JudgementRow.number == QuestionRow.number)
        with self._session() as session:
            rows = session.execute(
                select(AnnotatorRow.name, QuestionRow, ItemRow, JudgementRow)
                .join(QuestionRow, QuestionRow.annotator == AnnotatorRow.id)
                .join(ItemRow, ItemRow.id == QuestionRow.item)
                .outerjoin(JudgementRow, joined)
                .where(*where)
                .order_by(AnnotatorRow.id, QuestionRow.number)
            ).all()
            return [
                Question(name, asked.number, _item(item), asked.swapped, _said(said) if said else None)
                for name, asked, item, said in rows
            ]

    def next_open(self, annotator: int, after: int = 0) -> int | None:
        """The first question behind another that nothing was said of, else the first of all; None where all are."""
        joined = (JudgementRow.annotator == QuestionRow.annotator) & (JudgementRow.number == QuestionRow.number)
        with self._session() as session:
            left = session.scalars(
                select(QuestionRow.number)
                .outerjoin(JudgementRow, joined)
                .where(QuestionRow.annotator == annotator, JudgementRow.number.is_(None))
                .order_by(QuestionRow.number)
            ).all()
        return next((number for number in left if number > after), left[0] if left else None)

    def progress(self, annotator: int | None = None) -> list[Progress]:
        """How far every annotator is, or one."""
        skipped = func.count(JudgementRow.number).filter(JudgementRow.choice == "skip")
        with self._session() as session:
            questions = session.scalar(select(func.count()).select_from(ItemRow)) or 0
            rows = session.execute(
                select(AnnotatorRow.name, func.count(JudgementRow.number), skipped)
                .outerjoin(JudgementRow, JudgementRow.annotator == AnnotatorRow.id)
                .where(*([] if annotator is None else [AnnotatorRow.id == annotator]))
                .group_by(AnnotatorRow.id, AnnotatorRow.name)
                .order_by(AnnotatorRow.id)
            ).all()
        return [Progress(name, said - skips, skips, questions) for name, said, skips in rows]

    def judge(self, annotator: int, number: int, said: Said, nonce: str) -> bool:
        """Keep what is said of a question, on disk when this returns; whether that is what stands.

        A form counts once: what else is said on it does not stand. What was said of the question before is kept apart.
        Raises `ClosedError` once the study is closed.
        """
        with self._session(write=True) as session:
            _refuse_closed(session)
            # held until the end, so that of two forms at once the second finds what the first one said
            session.get_one(QuestionRow, (annotator, number), with_for_update=True)
            return _keep(session, annotator, number, said, nonce)

    def add(self, given: Sequence[tuple[str, int, Said]]) -> int:
        """Keep what annotators said elsewhere, all or nothing: name, number and what; how many were not there yet.

        Raises `InputError` where something else is said of a question here.
        """
        added = 0
        with self._session(write=True) as session:
            _refuse_closed(session)
            ids = {row.name: row.id for row in session.scalars(select(AnnotatorRow))}
            for name, number, said in given:
                row = session.get(JudgementRow, (ids[name], number))
                if row is None:
                    added += _keep(session, ids[name], number, said, secrets.token_hex(8))
                elif other := [key for key, value in vars(said).items() if getattr(row, key) != value]:
                    here, there = getattr(row, other[0]), getattr(said, other[0])
                    raise InputError(
                        f"{name}, question {number}: found {other[0]} {here!r} here and {there!r} in the file; "
                        "expected the same; nothing was imported; take it out of the file"
                    )
        return added

    def close(self) -> str:
        """Close the study, if it is not yet; when it was closed."""
        with self._session(write=True) as session:
            study = session.scalars(select(StudyRow).with_for_update()).one()
            study.closed = study.closed or now()
            return study.closed

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[Session]:
        """A transaction: committed at its end, undone on any error."""
        engine = self.engine.execution_options(write=write)
        with self._told(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            reason = reason.replace(self.password, "***") if self.password else reason
            do = "try again when the other process is done" if "locked" in reason else "see that it is there and yours"
            raise InputError(f"{self.name}: found a store that cannot be used ({reason}); {do}") from None


def store_url(run: Path, given: str | None) -> URL:
    """Where a run's study is kept: a URL if one is given, else a file in the run's folder."""
    if given is None:
        return URL.create("sqlite", database=str(run / "study" / "study.sqlite"))
    try:
        url = make_url(given)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "postgresql":
        raise InputError(
            f"--store: found {'no URL' if url is None else 'one of ' + url.get_backend_name()}; expected that of a "
            "PostgreSQL database, such as postgresql+psycopg://name:password@host/database"
        )
    return url


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner may open, where there is none."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def now() -> str:
    """The time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin where we say, with the lock that they need
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        write = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _refuse_closed(session: Session) -> None:
    """Raises `ClosedError` once the study is closed; it cannot be closed before the transaction ends."""
    if session.scalars(select(StudyRow).with_for_update(read=True)).one().closed:
        raise ClosedError


def _keep(session: Session, annotator: int, number: int, said: Said, nonce: str) -> bool:
    """Keep what a form says, once; whether it stands. The time of a change is added to that before it."""
    row = session.get(JudgementRow, (annotator, number))
    alike = row is not None and (row.choice, row.reason, row.comment) == (said.choice, said.reason, said.comment)
    known = any(session.scalar(select(one.nonce).where(one.nonce == nonce)) for one in (JudgementRow, EarlierRow))
    if alike or known:
        return alike
    if row is None:
        row = JudgementRow(annotator=annotator, number=number)
        session.add(row)
    else:
        before = EarlierRow(annotator=annotator, number=number, nonce=row.nonce, **vars(_said(row)))
        session.add(before)
        seconds = round(row.seconds + said.seconds, 1)
        away = row.idle or said.idle or seconds > IDLE_SECONDS
        said = replace(said, seconds=min(seconds, IDLE_SECONDS), idle=away)
    for name, value in vars(said).items():
        setattr(row, name, value)
    row.nonce = nonce
    return True


def _said(row: JudgementRow) -> Said:
    return Said(row.choice, row.reason, row.comment, row.seconds, row.idle, row.at)


def _item(row: ItemRow) -> Comparison:
    content = json.loads(row.content)
    one, other = content["completions"]
    return Comparison(row.prompt, content["prompt"], row.category, (one, other))
