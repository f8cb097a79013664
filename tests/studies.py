"""Studies of run folders that are written by hand, and people who judge them through the application itself."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from mixpo.experiments.results import Results, load_runs
from mixpo.stages.rows import write_table
from mixpo.study.app import make_app
from mixpo.study.begin import Wanted, begin_or_go_on, links
from mixpo.study.store import Store, store_url
from mixpo.study.tables import AnnotatorRow, EarlierRow, StudyRow
from report_runs import Arm, Writer, scores

ARMS = ("zebra", "yak")
WORDS = {"zebra": "apples", "yak": "pears"}
"""What an arm writes, so that a test knows it by its text and a page does not name it."""
HOST = "127.0.0.1:8765"
HOSTILE = "<script>window.hit = 1</script><img src=x onerror=alert(1)> [x](javascript:hit()) \x1b[31m \u202eabc\u2066"
KINDS = ("helpful", "harmless", "helpful", "harmless", "helpful", None)
PEOPLE = ("anna", "ben", "cleo")


@dataclass
class Fruit(Writer):
    """Writes runs whose prompt 0 is hostile and whose prompt 5 both arms complete alike."""

    texts: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Other completions, by arm and prompt."""

    def evaluation(self, key: str, arm: str, columns: Any) -> dict[str, str]:
        made = super().evaluation(key, arm, columns)
        rows = []
        for number in range(len(columns["score"])):
            text = f"{WORDS[arm]} {number}" + (f" {HOSTILE}" if number == 0 else "")
            text = self.texts.get((arm, number), "the same" if number == 5 else text)
            row = {"prompt": self.prompt(number), "completion": text, "tokens": 3.0}
            rows.append({**row, "ended": 1.0, "score": 0.0, "kl_from_sft": 0.0})
        write_table(Path(made[key]) / "completions.parquet", rows)
        return made


def fruit_run(
    folder: Path, prompts: int = 6, texts: Mapping[tuple[str, int], str] | None = None, seeds: Sequence[int] = (0,)
) -> Path:
    """A finished run of two arms."""
    kinds = (KINDS * prompts)[:prompts]
    done = dict.fromkeys(seeds, scores([0.0] * prompts, kl=[0.0] * prompts))
    return Fruit(folder / "run", categories=kinds, texts=texts or {}).run([Arm(name, done) for name in ARMS])


def earlier(store: Store) -> dict[tuple[str, int], list[str]]:
    """Choices that were changed, the oldest first, by annotator and number."""
    found: dict[tuple[str, int], list[str]] = {}
    joined = select(AnnotatorRow.name, EarlierRow).join(EarlierRow, EarlierRow.annotator == AnnotatorRow.id)
    with Session(store.engine) as session:
        for name, row in session.execute(joined.order_by(EarlierRow.id)):
            found.setdefault((name, row.number), []).append(row.choice)
    return found


@dataclass
class Clock:
    """A clock that a test moves."""

    at: float = 1_000_000.0

    def __call__(self) -> float:
        return self.at


@dataclass
class Study:
    """A study in a folder, its application, and a browser for each of its people."""

    run: Path
    wanted: Wanted = field(default_factory=lambda: Wanted(arms=ARMS, annotators=PEOPLE))
    settings: dict[str, Any] = field(default_factory=dict)
    url: str | None = None
    """Of another store than the run's own."""

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.store = Store(store_url(self.run, self.url))
        try:
            self.row: StudyRow = begin_or_go_on(self.results, self.store, self.wanted)
            self.tokens, self.lost = links(self.store, self.run / "study")
        except BaseException:
            self.store.dispose()
            raise
        settings = {"hosts": [HOST], "clock": self.clock, **self.settings}
        self.app = make_app(self.store, self.row, **settings)

    @property
    def results(self) -> Results:
        return load_runs(self.run)

    def browser(self) -> TestClient:
        """One that holds no cookie."""
        return TestClient(self.app, base_url=f"http://{HOST}", raise_server_exceptions=False)

    def person(self, name: str) -> "Person":
        """Somebody who opened his link."""
        browser = self.browser()
        assert browser.get(f"/a/{self.tokens[name]}").status_code == 200
        return Person(browser, name)

    def said(self) -> dict[tuple[str, int], str]:
        """What is stored, by person and question."""
        return {(one.annotator, one.number): one.said.choice for one in self.store.questions() if one.said}


@dataclass
class Person:
    """Somebody at a browser."""

    browser: TestClient
    name: str

    def page(self, number: int) -> str:
        found = self.browser.get(f"/q/{number}")
        assert found.status_code == 200, found.text
        return found.text

    def word(self, number: int) -> str:
        """The word on a fresh form."""
        found = re.search(r'name="form" value="([^"]+)"', self.page(number))
        assert found is not None
        return found[1]

    def post(self, number: int, choice: str, word: str | None = None, **more: str) -> Any:
        data = {"form": self.word(number) if word is None else word, "choice": choice, **more}
        return self.browser.post(f"/q/{number}", data=data, follow_redirects=False)

    def judge(self, number: int, choice: str, **more: str) -> str:
        """Judge, and where that leads to."""
        answer = self.post(number, choice, **more)
        assert answer.status_code == 303, answer.text
        return str(answer.headers["location"])

    def prefer(self, number: int, fruit: str) -> str:
        """Choose the side that speaks of a fruit; the side."""
        left = fruit in sides(self.page(number))[0]
        self.judge(number, "left" if left else "right")
        return "left" if left else "right"


def sides(page: str) -> Sequence[str]:
    """Both completions as a page shows them."""
    return [unescape(one) for one in re.findall(r'<h2 id="side-\d">.*?<div[^>]*>(.*?)</div>', page, re.DOTALL)]
