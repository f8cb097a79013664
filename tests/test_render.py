"""The report as a page and as Markdown: a document made here by hand, hostile wherever it holds text."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markupsafe import Markup

from mixpo.data.rows import Message
from mixpo.report.document import ArmCompletion, Document, Figure, PromptCompletions, Section, SectionGroup, Table
from mixpo.report.render import format_csv, make_csv_url, render_html, render_markdown, split_interval_columns

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror=hit=1>]]> \"'&{{ 1 }}|\n=1+1,`x` *b* @me"
FORMULA = '=HYPERLINK("http://evil.example","a")'
ARMS = ("sft", "dpo", "ppo", "mpo", "ipo", "kto", "best-of-8", HOSTILE)
SVG = Markup('<svg viewBox="0 0 9 9" role="img" aria-label="a figure"><path d="M0 0h9"/></svg>')


def figure(name: str, rows: int) -> Figure:
    numbers = [(f"{HOSTILE} {number}", number / 3, None, number) for number in range(rows - 1)]
    return Figure(name, SVG, ("arm", "score", "low", FORMULA), [*numbers, (FORMULA, -1.0, 1e-9, 7)])


def score(number: int, place: int) -> dict[str, float]:
    """Prompt 2 has the largest gain of mpo (3) over ppo (2), prompt 4 the largest loss; sft scores most in prompt 5."""
    score = {(2, 3): 9.0, (4, 2): 8.0, (5, 0): 7.0, (1, 0): -7.0}.get((number, place), place / 10)
    return {"score": score, "r*": 0.5 - number, "second score": -0.25}


def asked(number: int) -> PromptCompletions:
    earlier = [Message(role="user", content=f"earlier {HOSTILE}"), Message(role="assistant", content="a reply")]
    completions = [
        ArmCompletion(arm, f"{HOSTILE} answer {number} of arm {place}", score(number, place))
        for place, arm in enumerate(ARMS)
    ]
    return PromptCompletions(number, earlier if number == 1 else [], f"Question {number} {HOSTILE}", completions)


def document(prompts: int = 30) -> Document:
    rows = [[HOSTILE, "-1.50 [-2.00, -1.00]", "a|b"], [FORMULA, "2.00", "a long text " * 20]]
    table = Table(["arm", "reward", HOSTILE], rows, [HOSTILE])
    sections = [
        Section("results", HOSTILE, HOSTILE, [SectionGroup(HOSTILE, [figure("plane", 3)], table, [HOSTILE])]),
        Section("training", "Training", "Trained.", [SectionGroup("", [figure(f"lines-{n}", 20) for n in range(4)])]),
    ]
    recipes = [(HOSTILE, f"name: x\nnote: '</pre>{HOSTILE}'\n````\n"), ("two", "a: 1")]
    return Document(
        HOSTILE,
        [("arms", HOSTILE), (HOSTILE, "1")],
        sections,
        HOSTILE,
        [asked(number + 1) for number in range(prompts)],
        ("mpo", "ppo"),
        [(HOSTILE, f"it failed: {HOSTILE}")],
        recipes,
    )


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return render_html(document(), mixpo_version=f"9.9 {HOSTILE}", date="2025-11-21 10:00")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def decoded(address: str | None) -> list[list[str]]:
    start = "data:text/csv;charset=utf-8,"
    assert address.startswith(start)
    return list(csv.reader(io.StringIO(unquote(address.removeprefix(start)), newline="")))


def as_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [list(columns), *(["" if cell is None else str(cell) for cell in row] for row in rows)]


def test_hostile_text_is_only_text(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    # an arm's name stands in the two choices, in its box and in 30 completions; a text, in 30 prompts of 8 arms
    assert page.text.count(HOSTILE) > 30 * 8
    assert "{{ 1 }}" in page.text


def test_page_loads_nothing(text: str, page: Page) -> None:
    addresses = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster")
    ]
    assert addresses
    assert all(address.startswith(("#", "data:text/csv;")) for address in addresses)
    assert not page.all("link")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_downloads_hold_exactly_the_rows(page: Page) -> None:
    found = {link["download"]: link["href"] for link in page.all("a") if "download" in link}
    figures = [one for section in document().sections for group in section.groups for one in group.figures]
    for one in figures:
        assert decoded(found.pop(f"{one.name}.csv")) == as_text(one.columns, one.rows)
    ((name, address),) = found.items()
    assert decoded(address) == [
        ["arm", "reward", "reward, low", "reward, high", HOSTILE],
        [HOSTILE, "-1.50", "-2.00", "-1.00", "a|b"],
        [FORMULA, "2.00", "", "", "a long text " * 20],
    ]
    assert re.fullmatch(r"results-[a-z0-9-]+\.csv", name or "")


def test_csv_of_awkward_cells() -> None:
    rows = [("a,b", 0.1 + 0.2, None, 3), ('"', float("inf"), "\r", -1), (" x\n#%41&+", 1e-300, "é漢", 0)]
    columns = ("a", "b", "", "d")
    assert decoded(make_csv_url(columns, rows)) == as_text(columns, rows)
    assert "0.30000000000000004" in format_csv(columns, rows)


def test_numbers_with_bounds_become_columns() -> None:
    rows = [
        ["a", "0.10 [-0.12, 0.29] (p <0.001) (1 of 2 seeds)", "73% [70%, 76%]", "x [1, 2]"],
        ["b", "failed", "none (3 tied)", "1"],
        ["c", "1,200 [1,100, 1,300]", "", ""],
    ]
    assert split_interval_columns(Table(["arm", "r", "share", "text"], rows)) == (
        ["arm", "r", "r, low", "r, high", "r, note", "share", "share, low", "share, high", "text"],
        [
            ["a", "0.10", "-0.12", "0.29", "(p <0.001) (1 of 2 seeds)", "73%", "70%", "76%", "x [1, 2]"],
            ["b", "failed", "", "", "", "none (3 tied)", "", "", "1"],
            ["c", "1,200", "1,100", "1,300", "", "", "", "", ""],
        ],
    )
    assert split_interval_columns(Table(["arm"], [])) == (["arm"], [])


def test_contents_lead_to_every_section(page: Page) -> None:
    links = [link["href"] for link in page.all("a") if "download" not in link]
    ids = [str(section["id"]) for section in page.all("section")]
    assert ids == ["results", "training", "completions", "failed", "reproduce"]
    assert [link for link in links if link not in ("#report", "#failed")] == [f"#{id}" for id in ids if id != "failed"]
    targets = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(targets)) == len(targets)
    assert {str(link)[1:] for link in links} <= set(targets)
    assert links[0] == "#report"


def test_tables_and_figures_are_named_for_those_who_do_not_see(page: Page) -> None:
    assert {heading["scope"] for heading in page.all("th")} == {"col", "row"}
    assert len(page.all("figure")) == len([svg for svg in page.all("svg") if svg["role"] == "img"]) == 5
    wordy = [cell.get("class") == "words" for cell in page.all("td")]
    assert wordy == [False, True, False, True]


def test_page_is_whole_without_its_script(page: Page) -> None:
    blocks = [attributes for _, attributes in page.elements if "data-arm" in attributes]
    assert len(blocks) == 30 * 8
    assert not [block for block in blocks if "hidden" in block]
    assert "answer 30 of arm 7" in page.text
    assert "score 9.00 · r* −1.50 · second score −0.25" in " ".join(page.text.split())


@pytest.mark.parametrize(
    ("arms", "pair"), [(("a",), None), (("a", "b"), None), (("a", "b"), ("b", "gone")), ((), ("a", "b"))]
)
def test_documents_with_little_in_them(arms: tuple[str, ...], pair: tuple[str, str] | None) -> None:
    completions = [ArmCompletion(arm, "x", {"score": 1.0}) for arm in arms]
    prompts = [PromptCompletions(1, [], "?", completions)] if arms else []
    small = Document("small", [], [], "None.", prompts, pair, [])
    found = Page(render_html(small, mixpo_version="1", date="now"))
    assert [section["id"] for section in found.all("section")] == ["completions"]
    assert len(found.all("script")) == bool(arms)
    assert "r*" not in found.text
    assert render_markdown(small).startswith("# small\n\n## Completions\n\nNone.\n")


def outside(text: str) -> Iterator[str]:
    """Lines of Markdown that do not stand in a fenced block; fails where a fence is not closed."""
    fence = ""
    for line in text.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif found := re.match("`{3,}", line):
            fence = found[0]
        else:
            yield line
    assert not fence


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_markdown_tables_keep_their_columns() -> None:
    lines = list(outside(render_markdown(document())))
    tables = [line for line in lines if line.startswith("|")]
    assert [cells(line) for line in tables] == [4] * 5 + [3] * 4
    assert [line for line in tables if "---" in line] == ["| --- | ---: | ---: | ---: |", "| --- | ---: | --- |"]
    large = [f"(figure lines-{number}, 20 points: in the HTML report)" for number in range(4)]
    assert [line for line in lines if line.startswith("(figure")] == large


def test_markdown_of_hostile_text_is_only_text() -> None:
    text = render_markdown(document())
    loose = "\n".join(outside(text))
    assert not re.search(r"<|(?<!\\)[`*]|(?<!\\)\](?=[(\[:])", loose)
    assert "&lt;script&gt;" in loose
    headings = [line for line in loose.splitlines() if line.startswith("#")]
    titles = [line for line in headings if line.startswith("## ")]
    assert titles[1:] == ["## Training", "## Completions", "## Failed", "## Reproduce"]
    assert len(headings) == 1 + 5 + 1 + 5


def test_markdown_holds_the_pair_of_the_first_prompts() -> None:
    text = render_markdown(document())
    assert f"````text\n{HOSTILE} answer" not in text  # no longer a fence than needed
    assert f"```text\n{HOSTILE} answer 5 of arm 3\n```\n" in text
    assert "answer 5 of arm 2" in text
    assert "answer 6" not in text
    assert "of arm 0" not in text
    assert "mpo · score 9.00 · r\\* −1.50 · second score −0.25:" in text
    assert "`````yaml\nname: x" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.50 [0.1, 0.9]", "0.50 [0.1, 0.9]"),
        ("-0.5", "-0.5"),
        ("- a", "\\- a"),
        ("1. a", "1\\. a"),
        ("# a\n---", "\\# a ---"),
        ("[a](b)", "\\[a\\](b)"),
        ("a_b \\| c", "a\\_b \\\\\\| c"),
        ("> &lt;", "&gt; &amp;lt;"),
    ],
)
def test_markdown_words(given: str, expected: str) -> None:
    made = Document("t", [], [Section("a", "A", given)], "None.", [], None, [])
    assert f"\n\n{expected}\n\n" in render_markdown(made)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text, encoding="utf8")
    return path


@pytest.fixture
def tab(browser: Any, file: Path) -> Iterator[Any]:
    """The page, opened from disk; fails on what the console says and on every request but that for the file."""
    tab = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    yield tab
    assert tab.evaluate("window.hit") is None
    tab.close()
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def prompts(tab: Any) -> list[int]:
    labels = tab.locator(".prompt-block:visible").evaluate_all("all => all.map((one) => one.ariaLabel)")
    return [int(label.removeprefix("prompt ")) for label in labels]


def arms(tab: Any) -> list[int]:
    found = tab.locator(".prompt-block:visible").first.locator("[data-arm]:visible")
    return sorted(found.evaluate_all("all => all.map((one) => Number(one.dataset.arm))"))


def count(tab: Any) -> str:
    return str(tab.locator("#completions-count").inner_text())


def test_search_in_a_browser(tab: Any) -> None:
    assert count(tab) == "20 of 30 prompts shown"
    tab.fill("[name=find]", "QUESTION 1")
    assert prompts(tab) == [1, *range(10, 20)]
    assert count(tab) == "11 of 11 prompts shown"
    tab.fill("[name=find]", "answer 7 of arm 3")
    assert prompts(tab) == [7]
    tab.fill("[name=find]", "answer 7 of arm 7")  # an arm that is not shown
    assert prompts(tab) == []
    tab.fill("[name=find]", "<img src=x")
    assert len(prompts(tab)) == 20
    tab.click("#completions-more")
    assert len(prompts(tab)) == 30
    assert not tab.locator("#completions-more").is_visible()


def test_orders_in_a_browser(tab: Any) -> None:
    tab.select_option("[name=order]", "gain")
    assert prompts(tab)[:4] == [2, 1, 3, 5]
    tab.click("#completions-more")
    assert prompts(tab)[-1] == 4
    assert "score of mpo over ppo: +8.80" in tab.locator(".prompt-block").first.text_content()
    tab.select_option("[name=order]", "loss")
    assert prompts(tab)[0] == 4
    tab.click("#completions-more")
    assert prompts(tab)[-1] == 2
    assert "mpo over ppo: −7.70" in tab.locator(".prompt-block").first.text_content()
    tab.select_option("[name=order]", "highest")
    assert prompts(tab)[:2] == [2, 1]
    assert not tab.locator("[name=other]").is_visible()
    tab.select_option("[name=one]", label="sft")
    tab.click("#completions-more")
    assert (prompts(tab)[0], prompts(tab)[-1]) == (5, 1)
    tab.select_option("[name=order]", "lowest")
    tab.click("#completions-more")
    assert (prompts(tab)[0], prompts(tab)[-1]) == (1, 5)
    tab.select_option("[name=measure]", label="r*")
    assert prompts(tab)[:3] == [30, 29, 28]
    tab.select_option("[name=order]", "highest")
    assert prompts(tab)[:3] == [1, 2, 3]
    tab.select_option("[name=order]", "given")
    assert prompts(tab) == list(range(1, 21))
    assert not tab.locator("[name=measure]").is_visible()


def test_arms_shown_in_a_browser(tab: Any) -> None:
    assert arms(tab) == [0, 1, 2, 3, 4, 5]
    tab.click("summary:has-text('Arms shown')")
    tab.uncheck("[type=checkbox] >> nth=0")
    tab.check("[type=checkbox] >> nth=7")
    assert arms(tab) == [1, 2, 3, 4, 5, 7]
    tab.select_option("[name=order]", "gain")
    tab.select_option("[name=other]", "6")  # what is compared is shown
    assert arms(tab) == [1, 2, 3, 4, 5, 6, 7]


def test_keyboard_in_a_browser(tab: Any) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "report"
    tab.focus("[name=find]")
    tab.keyboard.type("question 30")
    tab.keyboard.press("Enter")
    assert prompts(tab) == [30]
    tab.focus("summary:has-text('Arms shown')")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert arms(tab) == [1, 2, 3, 4, 5]


def test_download_in_a_browser(tab: Any, tmp_path: Path) -> None:
    one = figure("plane", 3)
    with tab.expect_download() as started:
        tab.click("a[download='plane.csv']")
    assert started.value.suggested_filename == "plane.csv"
    started.value.save_as(tmp_path / "plane.csv")
    with (tmp_path / "plane.csv").open(encoding="utf8", newline="") as stream:
        assert list(csv.reader(stream)) == as_text(one.columns, one.rows)


@pytest.mark.parametrize("width", [360, 800, 1500])
def test_no_width_scrolls_the_page_in_a_browser(tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 700})
    tab.select_option("[name=order]", "gain")
    tab.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    tab.add_style_tag(content=".prompt-block { content-visibility: visible; }")
    assert tab.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("media", ["screen", "print"])
def test_bounds_stand_on_one_line_in_a_browser(tab: Any, media: str) -> None:
    tab.set_viewport_size({"width": 200, "height": 700})
    tab.emulate_media(media=media)
    rects = "all => all.map((one) => one.getClientRects().length)"
    assert tab.locator(".whole").evaluate_all(rects) == [1]
    assert tab.locator("td:has(.whole)").inner_text() == "-1.50 [-2.00, -1.00]"


def test_names_leave_room_on_a_phone_in_a_browser(tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 700})
    assert tab.locator("tbody th").first.bounding_box()["width"] < 0.4 * 390
    tab.locator(".scroll").first.evaluate("one => { one.scrollLeft = 100; }")
    assert tab.locator("tbody th").first.bounding_box()["x"] >= 0  # stays in view


def test_dark_scheme_in_a_browser(tab: Any) -> None:
    def colours() -> tuple[int, int]:
        style = tab.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
        return ground, ink

    tab.emulate_media(color_scheme="light")
    assert colours() > (700, 0)
    assert colours()[1] < 150
    tab.emulate_media(color_scheme="dark")
    assert colours()[0] < 150
    assert colours()[1] > 600
    tab.emulate_media(media="print", color_scheme="dark")
    assert colours() == (765, 0)


def test_print_holds_the_first_prompts_of_those_left_in_a_browser(tab: Any) -> None:
    tab.emulate_media(media="print")
    assert prompts(tab) == list(range(1, 21))
    assert tab.locator(".paper").is_visible()
    tab.emulate_media(media="screen")
    tab.fill("[name=find]", "question 2")
    tab.emulate_media(media="print")
    assert prompts(tab) == [2, *range(20, 30)]
