"""Database tables of a study: study, annotators, items, questions and judgements."""

from sqlalchemy import ForeignKey, ForeignKeyConstraint, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FORMAT = 1
"""Version of the tables."""


class TableBase(DeclarativeBase):
    """SQLAlchemy's base class of all tables of a study."""


class StudyRow(TableBase):
    """The one study of a database: its arms, seed, prompts, guidelines, secret and times."""

    __tablename__ = "mixpo_study"
    id: Mapped[int] = mapped_column(primary_key=True)
    format: Mapped[int]
    first: Mapped[str]
    """The arm whose wins are counted."""
    second: Mapped[str]
    seed: Mapped[int]
    """Seed of the compared arms."""
    draw: Mapped[int]
    prompts: Mapped[int]
    content: Mapped[str]
    """Digest of all compared prompts and completions."""
    same: Mapped[str]
    """JSON: number and category of the prompts with identical completions, which are ties without a question."""
    guidelines: Mapped[str]
    secret: Mapped[str]
    began: Mapped[str]
    closed: Mapped[str | None]


class AnnotatorRow(TableBase):
    """An annotator: name and hash of the link token."""

    __tablename__ = "mixpo_annotator"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    token: Mapped[str]
    """SHA-256 of the link token, empty before one is issued; the token itself is not stored."""


class StudyItemRow(TableBase):
    """A prompt with the completions of both arms, which every annotator judges once."""

    __tablename__ = "mixpo_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[int]
    """Index of the prompt among the run's test prompts, from 0."""
    category: Mapped[str | None]
    content: Mapped[str]
    """JSON: `prompt`, and `completions` of the first arm and of the second."""


class AnnotatorQuestionRow(TableBase):
    """An item as shown to one annotator: its number in the order, and the sides."""

    __tablename__ = "mixpo_question"
    __table_args__ = (UniqueConstraint("annotator", "item"),)
    annotator: Mapped[int] = mapped_column(ForeignKey(AnnotatorRow.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """From 1."""
    item: Mapped[int] = mapped_column(ForeignKey(StudyItemRow.id))
    swapped: Mapped[bool]
    """Whether the second arm is on the left."""


class _AnswerColumns:
    """Columns of an annotator's answer, shared by current and replaced judgements."""

    choice: Mapped[str]
    reason: Mapped[str]
    comment: Mapped[str]
    seconds: Mapped[float]
    idle: Mapped[bool]
    at: Mapped[str]
    nonce: Mapped[str] = mapped_column(unique=True)
    """Nonce of the form that was submitted: each form counts once."""


class JudgementRow(_AnswerColumns, TableBase):
    """The current judgement of a question, one at most."""

    __tablename__ = "mixpo_judgement"
    __table_args__ = (
        ForeignKeyConstraint(["annotator", "number"], [AnnotatorQuestionRow.annotator, AnnotatorQuestionRow.number]),
    )
    annotator: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class ReplacedJudgementRow(_AnswerColumns, TableBase):
    """An earlier judgement that the annotator replaced."""

    __tablename__ = "mixpo_earlier"
    __table_args__ = (
        ForeignKeyConstraint(["annotator", "number"], [AnnotatorQuestionRow.annotator, AnnotatorQuestionRow.number]),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    annotator: Mapped[int]
    number: Mapped[int]
