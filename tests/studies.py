"""Studies of run folders written by hand, and annotators who judge them through the web application."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from mixpo.experiments.results import load_runs
from mixpo.study.app import make_app
from mixpo.study.files import write_closed_study
from mixpo.study.findings import StudyFindings, load_study_findings
from mixpo.study.opening import StudyOptions, load_or_create_study, load_or_issue_link_tokens
from mixpo.study.store import StudyStore, parse_store_url
from mixpo.study.tables import AnnotatorRow, ReplacedJudgementRow, StudyRow
from report_runs import Arm, Writer, scores

ARMS = ("zebra", "yak")
FRUITS = {"zebra": "apples", "yak": "pears"}
"""Word in an arm's completions, by which a test recognizes the arm; the page does not name it."""
HOST = "127.0.0.1:8765"
HOSTILE = "<script>window.hit = 1</script><img src=x onerror=alert(1)> [x](javascript:hit()) \x1b[31m \u202eabc\u2066"
CATEGORIES = ("helpful", "harmless", "helpful", "harmless", "helpful", None)
ANNOTATORS = ("anna", "ben", "cleo")


@dataclass
class FruitWriter(Writer):
    """Writes runs whose prompt 0 has hostile text and whose prompt 5 has identical completions."""

    texts: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Other completions, by arm and prompt."""

    def completion(self, arm: str, number: int) -> str:
        text = f"{FRUITS[arm]} {number}" + (f" {HOSTILE}" if number == 0 else "")
        return self.texts.get((arm, number), "the same" if number == 5 else text)


def write_fruit_run(
    folder: Path, prompts: int = 6, texts: Mapping[tuple[str, int], str] | None = None, seeds: Sequence[int] = (0,)
) -> Path:
    """Write a finished run of two arms."""
    categories = (CATEGORIES * prompts)[:prompts]
    done = dict.fromkeys(seeds, scores([0.0] * prompts, kl=[0.0] * prompts))
    return FruitWriter(folder / "run", categories=categories, texts=texts or {}).run([Arm(name, done) for name in ARMS])


def list_choices(store: StudyStore) -> dict[tuple[str, int], str]:
    """List the stored choices by annotator and question number."""
    return {(one.annotator, one.number): one.answer.choice for one in store.load_questions() if one.answer}


def list_replaced_choices(store: StudyStore) -> dict[tuple[str, int], list[str]]:
    """List replaced choices, the oldest first, by annotator and question number."""
    choices: dict[tuple[str, int], list[str]] = {}
    is_by = ReplacedJudgementRow.annotator == AnnotatorRow.id
    rows = select(AnnotatorRow.name, ReplacedJudgementRow).join(ReplacedJudgementRow, is_by)
    with Session(store.engine) as session:
        for name, row in session.execute(rows.order_by(ReplacedJudgementRow.id)):
            choices.setdefault((name, row.number), []).append(row.choice)
    return choices


@dataclass
class Clock:
    """A clock that a test sets."""

    time: float = 1_000_000.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Study:
    """A study in a folder with its web application and browsers for its annotators."""

    run: Path
    options: StudyOptions = field(default_factory=lambda: StudyOptions(arms=ARMS, annotators=ANNOTATORS))
    settings: dict[str, Any] = field(default_factory=dict)
    url: str | None = None
    """URL of another store than the run's own."""

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.store = StudyStore(parse_store_url(self.run, self.url))
        try:
            self.row: StudyRow = load_or_create_study(load_runs(self.run), self.store, self.options)
            self.tokens, self.lost = load_or_issue_link_tokens(self.store, self.run / "study")
        except BaseException:
            self.store.close_connections()
            raise
        settings = {"hosts": [HOST], "clock": self.clock, **self.settings}
        self.app = make_app(self.store, self.row, **settings)

    def open_browser(self) -> TestClient:
        """Open a browser without cookies."""
        return TestClient(self.app, base_url=f"http://{HOST}", raise_server_exceptions=False)

    def sign_in(self, name: str) -> "Annotator":
        """Open an annotator's link in a new browser."""
        browser = self.open_browser()
        assert browser.get(f"/a/{self.tokens[name]}").status_code == 200
        return Annotator(browser, name)

    def list_choices(self) -> dict[tuple[str, int], str]:
        """List the stored choices by annotator and question number."""
        return list_choices(self.store)

    def close(self) -> StudyFindings:
        """Close the study and load its results."""
        self.row.closed = self.store.close_study()
        write_closed_study(self.store, self.row, self.run / "study")
        return load_study_findings(self.run)


@dataclass
class Annotator:
    """An annotator at a browser."""

    browser: TestClient
    name: str

    def load_page(self, number: int) -> str:
        """Load the page of a question."""
        found = self.browser.get(f"/q/{number}")
        assert found.status_code == 200, found.text
        return found.text

    def get_csrf_token(self, number: int) -> str:
        """The CSRF token of a freshly loaded form."""
        return parse_csrf_token(self.load_page(number))

    def post(self, number: int, choice: str, csrf_token: str | None = None, **fields: str) -> Any:
        """Submit a form without following the redirect."""
        data = {"form": self.get_csrf_token(number) if csrf_token is None else csrf_token, "choice": choice, **fields}
        return self.browser.post(f"/q/{number}", data=data, follow_redirects=False)

    def judge(self, number: int, choice: str, **fields: str) -> str:
        """Judge a question; return where the response redirects."""
        response = self.post(number, choice, **fields)
        assert response.status_code == 303, response.text
        return str(response.headers["location"])

    def prefer(self, number: int, fruit: str) -> str:
        """Choose the completion that contains a fruit; return its side."""
        left = fruit in parse_sides(self.load_page(number))[0]
        self.judge(number, "left" if left else "right")
        return "left" if left else "right"


def parse_sides(page: str) -> Sequence[str]:
    """The two completions as a page shows them."""
    return [unescape(text) for text in re.findall(r'<h2 id="side-\d">.*?<div[^>]*>(.*?)</div>', page, re.DOTALL)]


def parse_csrf_token(page: str) -> str:
    return re.search(r'name="form" value="([^"]+)"', page)[1]
