"""The tables of a study: who judges, what, on which side each arm stands, and what was said."""

from sqlalchemy import ForeignKey, ForeignKeyConstraint, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FORMAT = 1
"""Of the tables."""


class Base(DeclarativeBase):
    """The tables."""


class StudyRow(Base):
    """The one study of a store."""

    __tablename__ = "mixpo_study"
    id: Mapped[int] = mapped_column(primary_key=True)
    format: Mapped[int]
    first: Mapped[str]
    """The arm whose wins are counted."""
    second: Mapped[str]
    seed: Mapped[int]
    """Of the arms."""
    draw: Mapped[int]
    prompts: Mapped[int]
    content: Mapped[str]
    """Digest of all prompts and completions that were drawn."""
    same: Mapped[str]
    """JSON: number and category of the prompts that both arms completed alike, which nobody is asked about."""
    guidelines: Mapped[str]
    secret: Mapped[str]
    began: Mapped[str]
    closed: Mapped[str | None]


class AnnotatorRow(Base):
    """Somebody who judges."""

    __tablename__ = "mixpo_annotator"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    token: Mapped[str]
    """Its digest, empty before there is one: the token itself stands nowhere in the store."""


class ItemRow(Base):
    """A prompt and both completions."""

    __tablename__ = "mixpo_item"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[int]
    """The place of the prompt among the run's test prompts, from 0."""
    category: Mapped[str | None]
    content: Mapped[str]
    """JSON: `prompt`, and `completions` of the first arm and of the second."""


class QuestionRow(Base):
    """An item as one annotator meets it."""

    __tablename__ = "mixpo_question"
    __table_args__ = (UniqueConstraint("annotator", "item"),)
    annotator: Mapped[int] = mapped_column(ForeignKey(AnnotatorRow.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """From 1."""
    item: Mapped[int] = mapped_column(ForeignKey(ItemRow.id))
    swapped: Mapped[bool]
    """Whether the second arm stands on the left."""


class _Said:
    """What was said of a question."""

    choice: Mapped[str]
    reason: Mapped[str]
    comment: Mapped[str]
    seconds: Mapped[float]
    idle: Mapped[bool]
    at: Mapped[str]
    nonce: Mapped[str] = mapped_column(unique=True)
    """Of the form it came on: a form counts once."""


class JudgementRow(_Said, Base):
    """What stands: one a question."""

    __tablename__ = "mixpo_judgement"
    __table_args__ = (ForeignKeyConstraint(["annotator", "number"], [QuestionRow.annotator, QuestionRow.number]),)
    annotator: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)


class EarlierRow(_Said, Base):
    """What stood before somebody changed his mind."""

    __tablename__ = "mixpo_earlier"
    __table_args__ = (ForeignKeyConstraint(["annotator", "number"], [QuestionRow.annotator, QuestionRow.number]),)
    id: Mapped[int] = mapped_column(primary_key=True)
    annotator: Mapped[int]
    number: Mapped[int]
