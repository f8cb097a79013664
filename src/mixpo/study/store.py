"""Database of one study, SQLite beside the run or PostgreSQL by URL; a transaction is on disk when it returns."""

import json
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ColumnElement, Connection, Engine, create_engine, event, func, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import Comparison
from mixpo.study.plan import IDLE_SECONDS, compute_question_digest, draw_question_order
from mixpo.study.tables import (
    FORMAT,
    AnnotatorQuestionRow,
    AnnotatorRow,
    JudgementRow,
    ReplacedJudgementRow,
    StudyItemRow,
    StudyRow,
    TableBase,
)

LOCK_SECONDS = 10
"""Seconds to wait for another process that writes."""
SAME_QUESTION = (JudgementRow.annotator == AnnotatorQuestionRow.annotator) & (
    JudgementRow.number == AnnotatorQuestionRow.number
)


@dataclass(frozen=True)
class Answer:
    """An annotator's answer to a question: choice, reason for skipping, comment, seconds taken and time."""

    choice: str
    reason: str
    comment: str
    seconds: float
    idle: bool
    at: str


@dataclass(frozen=True)
class AnnotatorQuestion:
    """A question as one annotator sees it, with the current answer."""

    annotator: str
    number: int
    item: Comparison
    swapped: bool
    answer: Answer | None

    @property
    def sides(self) -> tuple[str, str]:
        """The two completions as shown, left and right."""
        first, second = self.item.completions
        return (second, first) if self.swapped else (first, second)

    def compute_export_digest(self, secret: str) -> str:
        """Return the keyed digest that identifies the question in an export without revealing the arms."""
        return compute_question_digest(secret, self.annotator, self.number, self.item.prompt, *self.sides)


@dataclass(frozen=True)
class AnnotatorProgress:
    """Numbers of judged and skipped questions of an annotator, and of all questions."""

    name: str
    judged: int
    skipped: int
    questions: int


class StudyClosedError(Exception):
    """Raised where an answer is saved after the study was closed."""


class StudyStore:
    """Database of one study, SQLite or PostgreSQL. Every method raises `InputError` where it cannot be used."""

    def __init__(self, url: URL) -> None:
        self.name = str(url.database) if url.drivername == "sqlite" else url.render_as_string(hide_password=True)
        self.file = Path(str(url.database)) if url.drivername == "sqlite" else None
        self.password = str(url.password or "")
        with self._report_database_errors():
            try:
                self.engine = _create_engine(url)
            except ImportError as error:
                raise InputError(
                    f"--store: found no driver for {url.drivername} ({error}); expected an installed one, such as "
                    "`pip install 'psycopg[binary]'` for postgresql+psycopg://"
                ) from None

    def close_connections(self) -> None:
        """Close all connections to the database."""
        self.engine.dispose()

    def load_study(self) -> StudyRow | None:
        """Load the study; None where there is none. Creates no file."""
        if self.file is not None and not self.file.exists():
            return None
        with self._open_transaction() as session:
            if not inspect(session.connection()).has_table(StudyRow.__tablename__):
                return None
            study = session.scalars(select(StudyRow)).one_or_none()
            if study is not None and study.format != FORMAT:
                raise InputError(
                    f"{self.name}: found a study of format {study.format}, written by another version of mixpo; "
                    f"expected format {FORMAT}; use that version"
                )
            return study

    def is_study_closed(self) -> bool:
        """Return True if the study is closed, according to the database."""
        with self._open_transaction() as session:
            return session.scalars(select(StudyRow.closed)).one() is not None

    def create_study(self, study: StudyRow, items: Sequence[Comparison], annotators: Sequence[str]) -> None:
        """Create the tables and write study, items, annotators and their question orders in one transaction."""
        if self.file is not None:
            make_private_folder(self.file.parent)
        with self._open_transaction(write=True) as session:
            TableBase.metadata.create_all(session.connection())
            session.add(study)
            for index, item in enumerate(items):
                content = json.dumps({"prompt": item.prompt, "completions": item.completions})
                session.add(StudyItemRow(id=index + 1, prompt=item.number, category=item.category, content=content))
            for index, name in enumerate(annotators):
                session.add(AnnotatorRow(id=index + 1, name=name, token=""))
                session.flush()
                order = draw_question_order(len(items), draw=study.draw, secret=study.secret, annotator=name)
                for number, (item_index, swapped) in enumerate(order, start=1):
                    session.add(
                        AnnotatorQuestionRow(annotator=index + 1, number=number, item=item_index + 1, swapped=swapped)
                    )

    def load_annotators(self) -> list[AnnotatorRow]:
        """Load the rows of all annotators in their order."""
        with self._open_transaction() as session:
            return list(session.scalars(select(AnnotatorRow).order_by(AnnotatorRow.id)))

    def replace_token_hashes(self, token_hashes: dict[str, str]) -> None:
        """Replace the stored hashes of annotators' link tokens, given by annotator's name."""
        with self._open_transaction(write=True) as session:
            for row in session.scalars(select(AnnotatorRow).where(AnnotatorRow.name.in_(token_hashes))):
                row.token = token_hashes[row.name]

    def load_question(self, annotator_id: int, number: int) -> AnnotatorQuestion | None:
        """Load a question of an annotator with its current answer; None where there is none of this number."""
        matches = self.load_questions(
            AnnotatorQuestionRow.annotator == annotator_id, AnnotatorQuestionRow.number == number
        )
        return matches[0] if matches else None

    def load_questions(self, *conditions: ColumnElement[bool]) -> list[AnnotatorQuestion]:
        """Load the questions that meet all SQL conditions, with current answers, by annotator and number."""
        with self._open_transaction() as session:
            rows = session.execute(
                select(AnnotatorRow.name, AnnotatorQuestionRow, StudyItemRow, JudgementRow)
                .join(AnnotatorQuestionRow, AnnotatorQuestionRow.annotator == AnnotatorRow.id)
                .join(StudyItemRow, StudyItemRow.id == AnnotatorQuestionRow.item)
                .outerjoin(JudgementRow, SAME_QUESTION)
                .where(*conditions)
                .order_by(AnnotatorRow.id, AnnotatorQuestionRow.number)
            ).all()
            questions = []
            for name, question, item, judgement in rows:
                comparison = _make_comparison(item)
                answer = _make_answer(judgement) if judgement else None
                questions.append(AnnotatorQuestion(name, question.number, comparison, question.swapped, answer))
            return questions

    def find_unanswered_question(self, annotator_id: int, after: int = 0) -> int | None:
        """Return the first unanswered question's number, preferably one after `after`; None if all are answered."""
        with self._open_transaction() as session:
            open_numbers = session.scalars(
                select(AnnotatorQuestionRow.number)
                .outerjoin(JudgementRow, SAME_QUESTION)
                .where(AnnotatorQuestionRow.annotator == annotator_id, JudgementRow.number.is_(None))
                .order_by(AnnotatorQuestionRow.number)
            ).all()
        return next((number for number in open_numbers if number > after), open_numbers[0] if open_numbers else None)

    def count_progress(self, annotator_id: int | None = None) -> list[AnnotatorProgress]:
        """Count judged and skipped questions: a list of every annotator, or of one."""
        skipped = func.count(JudgementRow.number).filter(JudgementRow.choice == "skip")
        with self._open_transaction() as session:
            questions = session.scalar(select(func.count()).select_from(StudyItemRow)) or 0
            rows = session.execute(
                select(AnnotatorRow.name, func.count(JudgementRow.number), skipped)
                .outerjoin(JudgementRow, JudgementRow.annotator == AnnotatorRow.id)
                .where(*([] if annotator_id is None else [AnnotatorRow.id == annotator_id]))
                .group_by(AnnotatorRow.id, AnnotatorRow.name)
                .order_by(AnnotatorRow.id)
            ).all()
        return [AnnotatorProgress(name, answered - skips, skips, questions) for name, answered, skips in rows]

    def save_answer(self, annotator_id: int, number: int, answer: Answer, nonce: str) -> bool:
        """Save an answer to a question; return whether it is now the current answer.

        A form counts once, by its nonce: a second, different answer on it is not saved. A replaced answer is kept in
        its own table. Raises `StudyClosedError` once the study is closed.
        """
        with self._open_transaction(write=True) as session:
            _lock_open_study(session)
            # locked until the end, so that the second of two concurrent forms sees the first one's answer
            session.get_one(AnnotatorQuestionRow, (annotator_id, number), with_for_update=True)
            return _record_answer(session, annotator_id, number, answer, nonce)

    def import_answers(self, answers: Sequence[tuple[str, int, Answer]]) -> int:
        """Save imported answers (annotator, number, answer), all or none; return how many are new.

        Raises `InputError` where the store holds a different answer to a question.
        """
        added = 0
        with self._open_transaction(write=True) as session:
            _lock_open_study(session)
            ids = {row.name: row.id for row in session.scalars(select(AnnotatorRow))}
            for name, number, answer in answers:
                row = session.get(JudgementRow, (ids[name], number))
                if row is None:
                    added += _record_answer(session, ids[name], number, answer, secrets.token_hex(8))
                elif differing := [key for key, value in vars(answer).items() if getattr(row, key) != value]:
                    stored, imported = getattr(row, differing[0]), getattr(answer, differing[0])
                    raise InputError(
                        f"{name}, question {number}: found {differing[0]} {stored!r} in the store, {imported!r} in the "
                        "file; expected the same; nothing was imported; remove the row from the file"
                    )
        return added

    def close_study(self) -> str:
        """Close the study if it is open; return the time of closing, in ISO format."""
        with self._open_transaction(write=True) as session:
            study = session.scalars(select(StudyRow).with_for_update()).one()
            study.closed = study.closed or format_current_time()
            return study.closed

    @contextmanager
    def _open_transaction(self, *, write: bool = False) -> Iterator[Session]:
        """Context manager that yields a session in a transaction, committed at its end, rolled back on any error."""
        engine = self.engine.execution_options(write=write)
        with self._report_database_errors(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _report_database_errors(self) -> Iterator[None]:
        """Context manager that converts database errors into `InputError`, with the password removed."""
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            reason = reason.replace(self.password, "***") if self.password else reason
            fix = "check that it exists and that you may write it"
            if "locked" in reason:
                fix = "try again when the other process is done"
            raise InputError(f"{self.name}: found an unusable store ({reason}); {fix}") from None


def parse_store_url(run_folder: Path, url_text: str | None) -> URL:
    """Parse the URL of a PostgreSQL database; without one, return that of the SQLite file in the run's folder."""
    if url_text is None:
        return URL.create("sqlite", database=str(run_folder / "study" / "study.sqlite"))
    try:
        url = make_url(url_text)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "postgresql":
        raise InputError(
            f"--store: found {'no URL' if url is None else 'a URL of ' + url.get_backend_name()}; expected that of a "
            "PostgreSQL database, such as postgresql+psycopg://name:password@host/database"
        )
    return url


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner may open, if it does not exist."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def format_current_time() -> str:
    """Return the current UTC time in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _create_engine(url: URL) -> Engine:
    """Create an SQLAlchemy engine; for SQLite with full sync, foreign keys and explicit write locks."""
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def configure_sqlite_connection(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin where we say, with the lock that they need
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        write = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _lock_open_study(session: Session) -> None:
    """Raise `StudyClosedError` if the study is closed; otherwise lock it open until the transaction ends."""
    if session.scalars(select(StudyRow).with_for_update(read=True)).one().closed:
        raise StudyClosedError


def _record_answer(session: Session, annotator_id: int, number: int, answer: Answer, nonce: str) -> bool:
    """Write an answer unless its form was used before; return whether it is the current answer.

    The time of a change is added to the time of the answer that it replaces.
    """
    row = session.get(JudgementRow, (annotator_id, number))
    is_current = row is not None and all(
        getattr(row, name) == getattr(answer, name) for name in ("choice", "reason", "comment")
    )
    forms = [select(table.nonce).where(table.nonce == nonce) for table in (JudgementRow, ReplacedJudgementRow)]
    is_nonce_used = any(map(session.scalar, forms))
    if is_current or is_nonce_used:
        return is_current
    if row is None:
        row = JudgementRow(annotator=annotator_id, number=number)
        session.add(row)
    else:
        replaced = vars(_make_answer(row))
        session.add(ReplacedJudgementRow(annotator=annotator_id, number=number, nonce=row.nonce, **replaced))
        seconds = round(row.seconds + answer.seconds, 1)
        idle = row.idle or answer.idle or seconds > IDLE_SECONDS
        answer = replace(answer, seconds=min(seconds, IDLE_SECONDS), idle=idle)
    for name, value in vars(answer).items():
        setattr(row, name, value)
    row.nonce = nonce
    return True


def _make_answer(row: JudgementRow) -> Answer:
    return Answer(row.choice, row.reason, row.comment, row.seconds, row.idle, row.at)


def _make_comparison(row: StudyItemRow) -> Comparison:
    content = json.loads(row.content)
    first, second = content["completions"]
    return Comparison(row.prompt, content["prompt"], row.category, (first, second))
