"""Three people judge a study in a real browser: by keyboard, by mouse on a narrow screen, and without JavaScript."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mixpo.report.people import build_study_tables
from mixpo.study import server
from report_runs import rows
from studies import ANNOTATORS, Study, list_replaced_choices, write_fruit_run


@pytest.fixture
def study(tmp_path: Path) -> Iterator[tuple[Study, str]]:
    """A study served on a free port, and its address."""
    run = write_fruit_run(tmp_path)
    with server.open_listening_socket("127.0.0.1", 0) as listening:
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        made = Study(run, settings={"hosts": [host], "clock": time.time})
        config = uvicorn.Config(made.app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield made, f"http://{host}"
        finally:
            running.should_exit = True
            thread.join()
            made.store.close_connections()


OpenPage = Callable[..., Any]


@pytest.fixture
def open_annotator_page(browser: Any, study: tuple[Study, str]) -> OpenPage:
    """A context manager that opens an annotator's link; fails on console messages and on requests elsewhere."""
    made, address = study

    @contextmanager
    def open_link(name: str, **settings: Any) -> Iterator[Any]:
        context = browser.new_context(**settings)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        console_messages: list[str] = []
        requested_urls: list[str] = []
        tab.on("console", lambda message: console_messages.append(message.text))
        tab.on("pageerror", lambda error: console_messages.append(str(error)))
        tab.on("request", lambda request: requested_urls.append(request.url))
        tab.goto(f"{address}/a/{made.tokens[name]}")
        assert tab.url == f"{address}/start"
        save_screenshot(tab, f"{name}-start")
        tab.click("text=To the questions")
        yield tab
        save_screenshot(tab, f"{name}-done")
        context.close()
        assert not console_messages
        assert requested_urls
        assert all(url.startswith(f"{address}/") for url in requested_urls)
        assert sum(made.tokens[name] in url for url in requested_urls) == 1

    return open_link


def save_screenshot(tab: Any, name: str) -> None:
    """Save a screenshot if MIXPO_SCREENSHOTS names a folder."""
    if folder := os.environ.get("MIXPO_SCREENSHOTS"):
        tab.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def wait_until_active(tab: Any) -> None:
    """Wait for the half second during which a page ignores input."""
    tab.wait_for_timeout(600)


def find_apple_key(tab: Any) -> str:
    """The key of the completion that contains apples."""
    first, second = tab.locator(".sides div.text").all_inner_texts()
    assert ("apples" in first) != ("apples" in second)
    return "1" if "apples" in first else "2"


def read_heading(tab: Any) -> str:
    return str(tab.inner_text("h1"))


def test_three_people_judge_and_their_kappa_is_told(study: tuple[Study, str], open_annotator_page: OpenPage) -> None:
    made, _ = study
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "color_scheme": "dark"}
    with (
        open_annotator_page("anna") as one,
        open_annotator_page("ben", **phone) as two,
        open_annotator_page("cleo", java_script_enabled=False) as three,
    ):
        judge_by_keyboard(made, one)
        judge_by_mouse(made, two)
        judge_without_script(made, three)
    found = made.close()
    assert found.annotators_with_judgements == list(ANNOTATORS)
    # on prompts 0 to 4 anna and cleo prefer apples; ben does, but calls one a tie; nobody was asked about prompt 5
    assert found.shares[None].win.mean == pytest.approx((14 / 3) / 6)
    # 15 ratings: 14 wins and a tie; four prompts agree wholly, of the fifth one pair in three
    chance = (14 / 15) ** 2 + (1 / 15) ** 2
    kappa = ((4 + 1 / 3) / 5 - chance) / (1 - chance)
    assert found.agreement[None].kappa.mean == pytest.approx(kappa)
    assert set(rows(build_study_tables(found)["Annotators"])) == set(ANNOTATORS)


def judge_by_keyboard(made: Study, tab: Any) -> None:
    assert read_heading(tab) == "Question 1 of 5"
    assert tab.evaluate("document.activeElement.id") == "question"
    one, other = (one.bounding_box() for one in tab.locator(".sides section").all())
    assert other["y"] == one["y"]
    assert other["x"] >= one["x"] + one["width"]
    assert {text.get_attribute("lang") for text in tab.locator("main div.text[dir]").all()} == {""}
    save_screenshot(tab, "question")
    key = find_apple_key(tab)
    tab.reload()
    tab.keyboard.press(key)  # within the first half second
    tab.wait_for_timeout(200)
    assert made.list_choices() == {}
    wait_until_active(tab)
    tab.keyboard.down(find_apple_key(tab))
    for _ in range(12):  # a held key repeats
        tab.wait_for_timeout(50)
        tab.keyboard.down("1")
    tab.keyboard.up("1")
    assert read_heading(tab) == "Question 2 of 5"
    assert len(made.list_choices()) == 1
    assert tab.evaluate("document.activeElement.id") == "question"
    assert tab.get_by_role("status").inner_text() == "Question 1 is saved."
    tree = tab.locator("body").aria_snapshot()
    for line in (
        *("status: Question 1 is saved.", 'heading "Question 2 of 5" [level=1]', 'heading "Prompt" [level=2]'),
        *('heading "Completion 1" [level=2]', 'heading "Completion 2" [level=2]', 'button "A tie"'),
        *('button "Completion 1 is better"', 'button "Completion 2 is better"', 'progressbar "Questions done"'),
        *('region "Completion 1"', 'checkbox "Keyboard shortcuts 1, 2 and 0" [checked]'),
    ):
        assert f"- {line}" in tree
    wait_until_active(tab)
    for selector in ("summary >> nth=0", "nav a", "#keys"):  # keys belong to what has the focus
        tab.focus(selector)
        tab.keyboard.press("1")
    tab.keyboard.press("Space")  # on the checkbox: off
    tab.focus("h1")
    tab.keyboard.press("1")
    tab.reload()
    assert not tab.is_checked("#keys")
    assert tab.locator("kbd:visible").count() == 0
    tab.wait_for_timeout(600)
    tab.keyboard.press("1")
    tab.wait_for_timeout(200)
    assert read_heading(tab) == "Question 2 of 5"
    assert len(made.list_choices()) == 1
    tab.check("#keys")
    assert tab.locator("[aria-keyshortcuts='1']").count() == 1
    tab.focus("#comment")
    tab.keyboard.type("1 and 2, 0")  # keys in a text are text
    assert read_heading(tab) == "Question 2 of 5"
    tab.focus("h1")
    tab.keyboard.press(find_apple_key(tab))
    tab.wait_for_url("**/q/3*")
    assert made.store.load_question(1, 2).answer.comment == "1 and 2, 0"
    wait_until_active(tab)
    tab.keyboard.press("0")
    tab.wait_for_url("**/q/4*")
    tab.click("text=Back to question 3")
    assert read_heading(tab) == "Question 3 of 5"
    assert tab.locator("[aria-pressed=true]").get_attribute("value") == "tie"
    wait_until_active(tab)
    button = tab.locator(f"[data-key='{find_apple_key(tab)}']")
    for _ in range(30):  # to the button by Tab alone, past the first choice
        if button.evaluate("one => one === document.activeElement"):
            break
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/q/4*")
    assert list_replaced_choices(made.store) == {("anna", 3): ["tie"]}
    for number in (4, 5):
        assert read_heading(tab) == f"Question {number} of 5"
        wait_until_active(tab)
        tab.keyboard.press(find_apple_key(tab))
        tab.wait_for_url("**/done*" if number == 5 else "**/q/5*")
    assert "You judged 5 of 5 questions." in tab.inner_text("main")


def test_a_lost_connection_and_a_way_back_change_nothing_unasked(
    study: tuple[Study, str], open_annotator_page: OpenPage
) -> None:
    made, _ = study
    with open_annotator_page("anna") as tab:
        wait_until_active(tab)
        tab.context.set_offline(True)
        tab.keyboard.press("1")
        tab.wait_for_timeout(500)
        assert made.list_choices() == {}
        tab.context.set_offline(False)
        tab.go_back()
        assert read_heading(tab) == "Question 1 of 5"
        wait_until_active(tab)
        tab.keyboard.press("1")
        tab.wait_for_url("**/q/2*")
        assert made.list_choices() == {("anna", 1): "left"}
        tab.go_back()
        assert read_heading(tab) == "Question 1 of 5"
        assert tab.locator("[aria-pressed=true]").get_attribute("value") == "left"  # a fresh page, not a used form
        assert tab.locator("[aria-pressed=false]").count() == 2
        wait_until_active(tab)
        tab.keyboard.press("2")
        tab.wait_for_url("**/q/2*")
        assert made.list_choices() == {("anna", 1): "right"}
        assert list_replaced_choices(made.store) == {("anna", 1): ["left"]}
        token_script = "document.querySelector('[name=form]').value"
        used_token = tab.evaluate(token_script)
        tab.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
        tab.wait_for_function(f"{token_script} !== '{used_token}'")  # as the browser does with a page that it kept


def judge_by_mouse(made: Study, tab: Any) -> None:
    save_screenshot(tab, "narrow")
    for number in range(1, 6):
        assert read_heading(tab) == f"Question {number} of 5"
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        one, other = (one.bounding_box() for one in tab.locator(".sides section").all())
        assert other["y"] >= one["y"] + one["height"]
        if number == 1:
            tab.click("summary:has-text('Skip')")
            tab.click("button:has-text('Skip')")  # without a reason the browser asks for one
            assert read_heading(tab) == "Question 1 of 5"
            assert len(made.list_choices()) == 5
            tab.select_option("#reason", "other")
            tab.click("button:has-text('Skip')")
            tab.wait_for_url("**/q/2*")
            assert made.list_choices()["ben", 1] == "skip"
            tab.click("text=Back to question 1")
        key = "0" if number == 1 else find_apple_key(tab)
        wait_until_active(tab)
        box = tab.locator(f"[data-key='{key}']")
        box.scroll_into_view_if_needed()
        box.dblclick()
        tab.wait_for_url("**/done*" if number == 5 else f"**/q/{number + 1}*")
        tab.wait_for_timeout(100)
        assert len(made.list_choices()) == 5 + number


def judge_without_script(made: Study, tab: Any) -> None:
    for number in range(1, 6):
        assert read_heading(tab) == f"Question {number} of 5"
        box = tab.locator(f"[data-key='{find_apple_key(tab)}']").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        wait_until_active(tab)
        tab.mouse.click(x, y)
        tab.wait_for_url("**/done*" if number == 5 else f"**/q/{number + 1}*")
        tab.mouse.click(x, y)  # the second click of a slow double click, on the next page
        tab.wait_for_timeout(150)
        assert len(made.list_choices()) == 10 + number
    assert "You judged 5 of 5 questions." in tab.inner_text("main")
