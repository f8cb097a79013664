"""The blind study: pages, storage, access, blindness and results."""

import csv
import hashlib
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import trustme
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from statsmodels.stats.proportion import proportion_confint

from command_line import run_mixpo
from mixpo.cli import study as study_commands
from mixpo.data.errors import InputError
from mixpo.data.text import escape_invisible
from mixpo.experiments.results import load_runs
from mixpo.report.people import _correct_p_by_category, build_human_study_section, build_study_tables, describe_study
from mixpo.study import files, server, store
from mixpo.study.app import TokenBucket
from mixpo.study.findings import StudyFindings, load_study_findings
from mixpo.study.opening import StudyOptions, parse_annotator_names
from mixpo.study.plan import draw_question_order, make_csrf_token, verify_csrf_token
from mixpo.study.store import Answer, StudyClosedError, StudyStore, parse_store_url
from report_runs import rows
from studies import (
    ANNOTATORS,
    ARMS,
    FRUITS,
    HOST,
    Annotator,
    Study,
    list_choices,
    list_replaced_choices,
    parse_csrf_token,
    parse_sides,
    write_fruit_run,
)

Make = Callable[..., Study]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A function that creates or reopens a study in the test's folder."""
    studies: list[Study] = []

    def make_study(**settings: Any) -> Study:
        options, texts = settings.pop("options", None), settings.pop("texts", None)
        run = tmp_path / "run"
        if not run.exists():
            write_fruit_run(tmp_path, texts=texts)
        studies.append(Study(run, options or StudyOptions(arms=ARMS, annotators=ANNOTATORS), settings))
        return studies[-1]

    yield make_study
    for study in studies:
        study.store.close_connections()


@pytest.fixture
def study(make: Make) -> Study:
    return make()


@pytest.fixture
def anna(study: Study) -> Annotator:
    return study.sign_in("anna")


RunMixpo = Callable[..., tuple[int, str]]


@pytest.fixture
def mixpo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunMixpo:
    """A function that runs `mixpo WORDS`, which serves nothing; returns the exit code and everything printed."""
    monkeypatch.setattr(server, "serve_app", lambda *_: None)

    def run(*words: str) -> tuple[int, str]:
        result = run_mixpo(capsys, *words)
        return result.code, result.out + result.err

    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# what is asked


def test_each_one_has_an_order_of_his_own_and_each_arm_half_of_the_left_sides():
    drawn = {name: draw_question_order(101, draw=0, secret="s", annotator=name) for name in ANNOTATORS}
    for questions in drawn.values():
        assert sorted(item for item, _ in questions) == list(range(101))
        assert sum(swapped for _, swapped in questions) in (50, 51)
    assert len({tuple(questions) for questions in drawn.values()}) == 3
    assert drawn["anna"] == draw_question_order(101, draw=0, secret="s", annotator="anna")
    assert drawn["anna"] != draw_question_order(101, draw=1, secret="s", annotator="anna")


def test_the_seed_alone_tells_no_side():
    guesses = [dict(draw_question_order(400, draw=0, secret=secret, annotator="anna")) for secret in ("one", "other")]
    alike = sum(guesses[0][item] == guesses[1][item] for item in range(400))
    assert 140 < alike < 260


def test_a_form_is_for_one_person_and_one_question():
    csrf_token = make_csrf_token("secret", 1, 7, unix_seconds=12.5)
    nonce, served = verify_csrf_token(csrf_token, "secret", 1, 7) or ("", 0.0)
    assert served == 12.5
    assert nonce not in (verify_csrf_token(make_csrf_token("secret", 1, 7, unix_seconds=12.5), "secret", 1, 7) or ())
    for secret, annotator, number in (("other", 1, 7), ("secret", 2, 7), ("secret", 1, 8)):
        assert verify_csrf_token(csrf_token, secret, annotator, number) is None
    for forged in ("", ".", "x", csrf_token[:-1], csrf_token + "0", "1" + csrf_token, "é" + csrf_token):
        assert verify_csrf_token(forged, "secret", 1, 7) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", ["annotator 1", "annotator 2", "annotator 3"]), ("anna, ben", ["anna", "ben"]), ("Żółć", ["Żółć"])],
)
def test_names(text, expected):
    assert parse_annotator_names(text) == expected


@pytest.mark.parametrize(
    "text",
    ["0", "501", "9" * 5000, ",".join(f"n{n}" for n in range(501)), "anna,", "anna,anna", "a\x1bb", "x" * 41, "-1,2"],
    ids=range(9),
)
def test_bad_names(text):
    with pytest.raises(InputError, match=r"^--annotators: found .*; expected a number, or different names"):
        parse_annotator_names(text)


# the pages


def test_a_link_leaves_a_cookie_and_goes_to_the_guidelines(study):
    browser = study.open_browser()
    entered = browser.get(f"/a/{study.tokens['anna']}", follow_redirects=False)
    assert (entered.status_code, entered.headers["location"]) == (303, "/start")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert study.row.guidelines.split(".")[0] in unescape(browser.get("/start").text)
    first = browser.get("/")
    assert str(first.url) == f"http://{HOST}/q/1#question"
    assert "Question 1 of 5" in first.text
    assert study.tokens["anna"] not in first.text
    bare = study.open_browser().get(f"/a/{study.tokens['anna']}", follow_redirects=False)
    assert study.open_browser().get(bare.headers["location"]).status_code == 200  # without the cookie, as across sites


def test_a_cookie_goes_over_tls_alone_where_there_is_tls(make):
    study = make(scheme="https")
    entered = study.open_browser().get(f"/a/{study.tokens['anna']}", follow_redirects=False)
    assert "Secure" in entered.headers["set-cookie"]


def test_a_judgement_is_of_the_arm_that_was_on_that_side(study, anna):
    ben = study.sign_in("ben")
    chosen = {number: anna.prefer(number, "apples") for number in range(1, 6)}
    assert set(chosen.values()) == {"left", "right"}
    for number in range(1, 6):
        ben.prefer(number, "pears")
    study.close()
    judgements = read_lines(study.run / "study" / "judgements.jsonl")
    assert {(row["annotator"], row["better"]) for row in judgements} == {("anna", "zebra"), ("ben", "yak")}
    assert {row["question"]: row["choice"] for row in judgements if row["annotator"] == "anna"} == chosen
    assert sorted(row["prompt"] for row in judgements if row["annotator"] == "ben") == [0, 1, 2, 3, 4]
    closed = json.loads((study.run / "study" / "closed.json").read_text())
    assert closed["arms"] == list(ARMS)
    assert closed["same"] == [{"prompt": 5, "category": None}]
    assert (closed["annotators"], closed["seed"]) == (list(ANNOTATORS), 0)
    order = draw_question_order(5, draw=0, secret=closed["secret"], annotator="anna")  # reproducible once it is closed
    recorded = {row["question"]: (row["prompt"], row["left"]) for row in judgements if row["annotator"] == "anna"}
    assert recorded == {n: (item, ARMS[swapped]) for n, (item, swapped) in enumerate(order, start=1)}


def test_after_a_judgement_comes_the_next_open_question_and_then_thanks(anna):
    assert anna.judge(2, "tie") == "/q/3?saved=2#question"
    assert "Question 2 is saved." in anna.browser.get("/q/3?saved=2").text
    assert anna.judge(5, "left") == "/q/1?saved=5#question"
    assert anna.judge(1, "left") == "/q/3?saved=1#question"
    assert anna.judge(3, "left") == "/q/4?saved=3#question"
    assert anna.judge(4, "left") == "/done?saved=4"
    assert "You judged 5 of 5 questions." in anna.browser.get("/done").text


def test_a_form_counts_once_however_often_it_comes(study, anna):
    csrf_token = anna.get_csrf_token(1)
    redirects = [anna.post(1, choice, csrf_token).headers["location"] for choice in ("left", "left", "right")]
    redirects.append(anna.post(1, "left", csrf_token, comment="new").headers["location"])
    # what does not stand is not called saved: its page shows what does
    assert redirects == ["/q/2?saved=1#question"] * 2 + ["/q/1?unchanged=1#question"] * 2
    assert re.search(r'value="left"[^>]*aria-pressed="true"', anna.load_page(1))
    assert study.list_choices() == {("anna", 1): "left"}
    assert list_replaced_choices(study.store) == {}


def test_only_what_is_saved_is_called_so(anna):
    anna.judge(2, "tie")
    for path in ("/q/1", "/done"):
        shown = {n: f"Question {n} is saved." in anna.browser.get(f"{path}?saved={n}").text for n in (1, 2, 99)}
        assert shown == {1: False, 2: True, 99: False}


def test_going_back_changes_a_judgement_and_keeps_the_earlier_one(study, anna):
    csrf_token = anna.get_csrf_token(1)
    anna.post(1, "left", csrf_token, comment="so")
    page = anna.load_page(1)
    assert re.search(r'value="left"[^>]*aria-pressed="true"', page)
    assert ">\nso</textarea>" in page
    anna.judge(1, "right")
    anna.judge(1, "right")  # the same again is no change
    anna.judge(1, "tie")
    response = anna.post(1, "left", csrf_token)  # sent again by a browser that lost its connection
    assert response.headers["location"] == "/q/1?unchanged=1#question"
    assert "Not changed" in anna.browser.get(response.headers["location"]).text
    assert "Not changed" not in anna.load_page(1)
    assert "Not changed" not in anna.browser.get("/q/2?unchanged=1").text  # nothing is said there
    assert study.list_choices() == {("anna", 1): "tie"}
    assert list_replaced_choices(study.store) == {("anna", 1): ["left", "right"]}


def test_a_form_of_another_question_or_person_judges_nothing(study, anna):
    ben = study.sign_in("ben")
    assert anna.post(2, "left", anna.get_csrf_token(1)).status_code == 403
    assert anna.post(1, "left", ben.get_csrf_token(1)).status_code == 403
    assert anna.post(1, "left", "").status_code in (400, 403)
    assert anna.post(9, "left", anna.get_csrf_token(1)).status_code == 403
    assert study.list_choices() == {}


@pytest.mark.parametrize(
    "data", [{"choice": "best"}, {}, {"choice": "skip"}, {"choice": "skip", "reason": "bored"}], ids=str
)
def test_what_is_no_judgement_is_refused(study, anna, data):
    response = anna.browser.post("/q/1", data={"form": anna.get_csrf_token(1), **data})
    assert response.status_code == 400
    assert "The form was not complete" in response.text
    assert study.list_choices() == {}


def test_a_skip_has_a_reason_and_a_choice_needs_none(study, anna):
    anna.judge(1, "skip", reason="knowledge", comment="law")
    anna.judge(2, "left", reason="knowledge")
    one, two = (study.store.load_question(1, number).answer for number in (1, 2))
    assert (one.choice, one.reason, one.comment) == ("skip", "knowledge", "law")
    assert (two.choice, two.reason) == ("left", "")
    assert "You skipped this question." in anna.load_page(1)
    page = anna.load_page(3)
    assert len(re.findall(r"<button name=\"choice\"[^>]*formnovalidate", page)) == 3
    assert [(one.judged, one.skipped) for one in study.store.count_progress()] == [(1, 1), (0, 0), (0, 0)]


def test_time_is_measured_from_when_the_page_was_served(study, anna):
    for number, seconds in ((1, 12.34), (2, 601.0), (3, -5.0)):
        csrf_token = anna.get_csrf_token(number)
        study.clock.time += seconds
        anna.post(number, "tie", csrf_token)
    answers = [study.store.load_question(1, number).answer for number in (1, 2, 3)]
    assert [(answer.seconds, answer.idle) for answer in answers] == [(12.3, False), (600.0, True), (0.0, False)]
    for seconds, comment in ((5.0, ""), (9.0, ""), (595.0, "x")):  # a change, the same again, another change
        csrf_token = anna.get_csrf_token(1)
        study.clock.time += seconds
        anna.post(1, "left", csrf_token, comment=comment)
        answer = study.store.load_question(1, 1).answer
        assert (answer.seconds, answer.idle) == ((600.0, True) if comment else (17.3, False))
    anna.judge(1, "tie")
    assert study.store.load_question(1, 1).answer.idle  # away once
    (annotator, *_) = study.close().annotators
    assert (annotator.seconds, annotator.idle) == (600.0, 2)


def test_a_closed_study_says_thanks_and_takes_nothing(study, anna):
    anna.judge(1, "left")
    csrf_token = anna.get_csrf_token(2)
    study.close()
    response = anna.post(2, "right", csrf_token)
    assert response.status_code == 403
    assert "The study is closed" in response.text
    assert str(anna.browser.get("/").url) == f"http://{HOST}/done#question"
    assert "The study is closed" in anna.browser.get("/q/1").text
    with pytest.raises(StudyClosedError):
        study.store.save_answer(1, 2, Answer("left", "", "", 1.0, False, "now"), "nonce")
    assert study.list_choices() == {("anna", 1): "left"}


def test_hostile_text_is_text(anna):
    page = next(page for number in range(1, 6) if "window.hit" in (page := anna.load_page(number)))
    assert page.count("<script") == 1  # the page's own
    assert "<img" not in page
    completions = parse_sides(page)
    hostile = "<script>window.hit = 1</script><img src=x onerror=alert(1)> [x](javascript:"
    assert all(hostile in one for one in completions)
    assert all("␛[31m ⟦U+202E⟧abc⟦U+2066⟧" in one for one in completions)
    assert not set("\x1b\u202e\u2066") & set(page)
    assert "question 0 &amp; &lt;b&gt;more" in page


def test_what_cannot_be_seen_is_made_visible():
    assert escape_invisible("a\tb\r\nc\rd\0\x7f\x85") == "a\tb\nc␍d␀␡⟦U+0085⟧"
    assert escape_invisible("\u200b\u2028\ufeff\u200f\U000e0041") == "⟦U+200B⟧⟦U+2028⟧⟦U+FEFF⟧⟦U+200F⟧⟦U+E0041⟧"
    assert escape_invisible("👩\u200d💻 می\u200cخواهم é") == "👩\u200d💻 می\u200cخواهم é"


def test_an_empty_completion_says_so(make):
    study = make(texts={("yak", 0): "", ("zebra", 1): " \n\u200d\xa0", ("yak", 2): "\u200b"})
    anna = study.sign_in("anna")
    pages = [anna.load_page(number) for number in range(1, 6)]
    assert sum(page.count(">This completion is empty.<") for page in pages) == 2
    assert sum("⟦U+200B⟧" in page for page in pages) == 1


# who is kept out


def test_every_answer_has_the_headers_that_keep_it_safe(study, anna):
    large = "9" * 30
    responses = [anna.browser.get(path) for path in ("/q/1", "/start", "/done", "/static/study.js", "/q/77", "/x")]
    responses += [anna.browser.get(path) for path in (f"/q/{large}", f"/done?saved={large}")]
    responses += [study.open_browser().get("/"), anna.browser.get("/", headers={"host": "evil.example"})]
    responses.append(anna.post(1, "tie"))
    assert [response.status_code for response in responses] == [200, 200, 200, 200, 404, 404, 404, 400, 403, 421, 303]
    for response in responses:
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
    assert "Page not found" in responses[4].text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 303),
        ({"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}, 303),
        ({"origin": "null"}, 303),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": f"https://{HOST}"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "null"}, 403),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1:1"}, 421),
    ],
    ids=str,
)
def test_other_sites_and_hosts_judge_nothing(study, anna, headers, status):
    data = {"form": anna.get_csrf_token(1), "choice": "left"}
    assert anna.browser.post("/q/1", data=data, headers=headers, follow_redirects=False).status_code == status
    assert len(study.list_choices()) == (status == 303)


def test_large_bodies_are_refused_by_their_length_and_while_they_come(study, anna):
    assert anna.post(1, "left", comment="x" * 70_000).status_code == 413
    csrf_token = anna.get_csrf_token(1)

    def parts() -> Iterator[bytes]:
        yield f"form={csrf_token}&choice=left&comment=".encode()
        for _ in range(70):
            yield b"x" * 1000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = anna.browser.post("/q/1", content=parts(), headers=headers)
    assert response.status_code == 413
    assert "The text is too long" in response.text
    assert anna.post(1, "left", comment="x" * 2001).status_code == 413
    assert study.list_choices() == {}
    anna.judge(1, "left", comment="x" * 2000)


def test_who_is_too_fast_waits_and_others_do_not(make):
    study = make(rate=0.0, burst=4.0)
    anna, ben = study.sign_in("anna"), study.sign_in("ben")
    assert [anna.browser.get("/q/1").status_code for _ in range(6)] == [200] * 4 + [429] * 2
    assert "Too many requests" in anna.browser.get("/q/1").text
    assert ben.browser.get("/q/1").status_code == 200


def test_guessed_links_are_slowed_down_and_real_ones_are_not(study):
    statuses = [study.open_browser().get(f"/a/guess{number}").status_code for number in range(30)]
    assert set(statuses) == {403, 429}
    study.sign_in("ben")
    stranger = study.open_browser()
    stranger.cookies.set("study", study.tokens["anna"])  # of no such name
    assert stranger.get("/q/1").status_code in (403, 429)


def test_a_bucket_fills_again():
    seconds = [0.0]
    bucket = TokenBucket(0.5, 2.0, lambda: seconds[0])
    assert [bucket.take_token() for _ in range(3)] == [True, True, False]
    seconds[0] = 2.0
    assert [bucket.take_token() for _ in range(2)] == [True, False]


def test_a_store_that_is_locked_loses_nothing_and_says_so(make, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    study = make()
    anna = study.sign_in("anna")
    csrf_token = anna.get_csrf_token(1)
    connection = sqlite3.connect(study.run / "study" / "study.sqlite")
    connection.execute("BEGIN IMMEDIATE")
    response = anna.post(1, "left", csrf_token)
    connection.close()
    assert response.status_code == 503
    assert "The judgement could not be saved" in response.text
    assert study.list_choices() == {}
    assert anna.post(1, "left", csrf_token).status_code == 303
    assert study.list_choices() == {("anna", 1): "left"}


def test_many_forms_at_once_leave_one_judgement_and_every_change(study):
    answers = [Answer(("left", "right", "tie")[n % 3], "", f"{n}", 1.0, False, "now") for n in range(6)]
    nonces = [f"nonce {n % 4}" for n in range(6)]
    with ThreadPoolExecutor(6) as threads:
        saved = list(threads.map(study.store.save_answer, [1] * 6, [1] * 6, answers, nonces))
    assert sorted(saved) == [False, False, True, True, True, True]
    assert list(study.list_choices()) == [("anna", 1)]
    assert len(list_replaced_choices(study.store)[("anna", 1)]) == 3


def test_what_is_acknowledged_is_on_disk(study):
    with study.store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


# going on


def test_the_same_command_goes_on_with_the_same_study_and_links(study, make):
    study.sign_in("anna").judge(1, "left")
    texts = [parse_sides(study.sign_in("ben").load_page(number)) for number in range(1, 6)]
    for options in (StudyOptions(), StudyOptions(arms=ARMS, annotators=ANNOTATORS, prompts=6, seed=0, draw=0)):
        reopened = make(options=options)
        assert (reopened.tokens, reopened.lost) == (study.tokens, [])
        assert reopened.list_choices() == {("anna", 1): "left"}
        assert [parse_sides(reopened.sign_in("ben").load_page(number)) for number in range(1, 6)] == texts
    for path in (study.run / "study", study.run / "study" / "links.json"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StudyOptions(arms=("yak", "zebra")), "--arms: found yak, zebra; expected zebra, yak, that"),
        (StudyOptions(prompts=3), "--prompts: found 3; expected 6, that"),
        (StudyOptions(draw=4), "--draw: found 4; expected 0, that"),
        (StudyOptions(seed=1), "--seed: found 1; expected 0, that"),
        (StudyOptions(annotators=("dora",)), "--annotators: found dora; expected anna, ben, cleo, that"),
        (StudyOptions(guidelines="be quick"), "--guidelines: found other text; expected that"),
    ],
)
def test_another_study_of_the_same_run_is_refused(make, options, message):
    make()
    expected = rf"^{re.escape(message)} of the existing study; leave it out, or move .*/run/study a"
    with pytest.raises(InputError, match=expected):
        make(options=options)


def test_a_run_that_has_changed_or_a_study_that_is_closed_is_refused(study, make, mixpo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FRUITS, "yak", "plums")
        write_fruit_run(study.run.parent)
        with pytest.raises(InputError, match="found a study of other completions than the run has now"):
            make(options=StudyOptions())
        assert files.export_judgements(study.store, study.row, study.run / "kept.csv") == 0
        code, output = mixpo("annotate", str(study.run), "--export", str(study.run / "kept.csv"))
        assert (code, output) == (0, f"0 judgements: {study.run / 'kept.csv'}\n")
        for arguments in (("annotate", "--close", "--yes"), ("annotate", "--import", "x.csv"), ("agreement",)):
            code, output = mixpo(arguments[0], str(study.run), *arguments[1:])
            assert (code, output.count("\n")) == (2, 1)
            assert "found a study of other completions" in output
    write_fruit_run(study.run.parent)
    study.close()
    expected = r"found a study that was closed at 20.*; `mixpo agreement RUN` shows its results"
    with pytest.raises(InputError, match=expected):
        make(options=StudyOptions())
    for file in (study.run / "study").glob("study.sqlite*"):
        file.unlink()
    with pytest.raises(InputError, match=r"/run/study: found a closed study; move the folder .*/run/study away to b"):
        make()
    assert not (study.run / "study" / "study.sqlite").exists()


def test_a_study_knows_the_seed_that_it_is_of(tmp_path):
    run = write_fruit_run(tmp_path, seeds=(3, 4))
    study = Study(run)
    assert study.row.seed == 3
    findings = study.close()
    study.store.close_connections()
    assert findings.seed == 3
    report = build_human_study_section(load_runs(run))
    assert any("at seed 3;" in note for note in report.groups[0].table.notes)


def test_a_study_of_completions_that_have_changed_is_left_out_of_the_report(study, mixpo):
    study.sign_in("anna").prefer(1, "apples")
    study.close()
    write_fruit_run(study.run.parent, texts={("yak", 3): "plums"})
    report = build_human_study_section(load_runs(study.run))
    assert re.fullmatch(r"The study closed at 20\S+ is excluded: the completions have changed since\.", report.opening)
    assert report.groups == []
    assert mixpo("agreement", str(study.run)) == (0, f"{report.opening}\n")
    results = load_runs(study.run)
    (folder,) = {folder for arm in results.arms for key, folder in arm.stages.items() if key.startswith("Data")}
    (Path(folder) / "test.parquet").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"test\.parquet"):  # which is no change of the run
        build_human_study_section(results)
    write_fruit_run(study.run.parent)
    assert build_human_study_section(load_runs(study.run)).opening.startswith("One person")


def test_lost_links_are_made_anew(study, make):
    (study.run / "study" / "links.json").unlink()
    reopened = make()
    assert reopened.lost == list(ANNOTATORS)
    assert not set(reopened.tokens.values()) & set(study.tokens.values())
    reopened.sign_in("anna")
    assert reopened.open_browser().get(f"/a/{study.tokens['anna']}").status_code == 403
    stored = (study.run / "study" / "study.sqlite").read_bytes()
    assert not any(token.encode() in stored for token in reopened.tokens.values())


@pytest.mark.parametrize("text", ["[]", "null", "{", '"x"'])
def test_links_that_cannot_be_read_are_one_line(study, make, text):
    (study.run / "study" / "links.json").write_text(text)
    expected = r"^\S+links.json: found no readable links \(.*\); expected names and links; d"
    with pytest.raises(InputError, match=expected):
        make()
    assert study.store.load_annotators()[0].token


def test_no_study_without_arms_or_of_arms_that_say_the_same(make, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"--arms: found none, and no study in .*; expected two arms of the run"):
        make(options=StudyOptions())
    with pytest.raises(InputError, match="--prompts: found 7; expected 1 to 6"):
        make(options=StudyOptions(arms=ARMS, prompts=7))
    write_fruit_run(run.parent, texts={(arm, number): f"{number}" for arm in ARMS for number in range(6)})
    with pytest.raises(InputError, match="two arms that complete every prompt alike"):
        make(options=StudyOptions(arms=ARMS, prompts=3))
    assert not (run / "study").exists()


# blindness


def test_before_it_is_closed_nothing_tells_an_arm(study, mixpo, tmp_path):
    run = str(study.run)
    texts = []
    for name in ANNOTATORS:
        annotator = study.sign_in(name)
        texts += [annotator.load_page(number) for number in range(1, 6)]
        for number in range(1, 5):
            annotator.prefer(number, "apples")
        texts += [annotator.browser.get(path).text for path in ("/done", "/start", "/nowhere")]
    for path in ("a.csv", "a.jsonl"):
        texts.append(mixpo("annotate", run, "--export", str(tmp_path / path))[1])
        texts.append((tmp_path / path).read_text())
    code, output = mixpo("annotate", run, "--port", "0")
    assert code == 0
    assert re.findall(r"http://127\.0\.0\.1:\d+/a/(\S+)", output) == list(study.tokens.values())
    texts += [output, mixpo("agreement", run)[1]]
    assert "anna: 4 of 5 judged, 0 skipped" in texts[-1]
    assert "--close" in texts[-1]
    for text in texts:
        assert "zebra" not in text
        assert "yak" not in text
        assert "κ" not in text
    assert build_human_study_section(load_runs(study.run)) is None
    assert read_lines(tmp_path / "a.jsonl")[0].keys() == set(files.COLUMNS)


def test_an_export_does_not_show_where_an_arm_repeats_itself(make, tmp_path):
    study = make(texts={(arm, number): FRUITS[arm] for arm in ARMS for number in range(6)})
    for name in ANNOTATORS:
        for number in range(1, 7):
            study.sign_in(name).judge(number, "tie")
    files.export_judgements(study.store, study.row, tmp_path / "all.jsonl")
    lines = read_lines(tmp_path / "all.jsonl")
    assert len({line["digest"] for line in lines}) == 18
    for text in FRUITS.values():
        assert hashlib.sha256(text.encode()).hexdigest()[:32] not in str(lines)


def test_closing_asks_first_and_says_what_is_missing(study, mixpo, monkeypatch):
    study.sign_in("anna").judge(1, "left")
    run = str(study.run)
    with open(os.devnull) as empty_stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", empty_stdin)
        code, output = mixpo("annotate", run, "--close")
    assert code == 1
    assert "14 of 15 judgements are missing" in output
    assert study.store.load_study().closed is None
    code, output = mixpo("annotate", run, "--close", "--yes")
    assert code == 0
    assert "zebra" not in output
    for _ in range(2):  # a second time it writes the same files again
        code, output = mixpo("agreement", run)
        assert code == 0
        assert "zebra" in output
        (study.run / "study" / "closed.json").unlink()
        assert "its files are missing" in mixpo("agreement", run)[1]
        assert mixpo("annotate", run, "--close")[0] == 0


# the command line


def test_a_taken_port_makes_no_study(tmp_path, mixpo):
    run = write_fruit_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = mixpo("annotate", str(run), "--arms", *ARMS, "--port", port)
    assert code == 2
    assert output == f"--port: found {port} in use; expected a free port; 0 chooses one\n"
    assert not (run / "study").exists()


def test_bad_commands_say_so_on_one_line(tmp_path, mixpo, monkeypatch):
    run = str(write_fruit_run(tmp_path))
    pages = ("--arms", *ARMS, "--port", "0")
    database = (*pages, "--store")
    for arguments, expected in (
        (("--close",), "found no study; expected one begun by `mixpo annotate"),
        (("--close", "--export", "x.csv"), "--close: found beside --export, which does nothing with it"),
        (("--close", "--prompts", "3", "--tls-key", "k"), "--prompts, --tls-key: found beside --close, which does"),
        (("--import", "x.csv", "--yes"), "--yes: found beside --import"),
        ((*pages, "--yes"), "--yes: found without --close"),
        (("--arms", "zebra", "goat", "--port", "0"), "--arms: found 'goat'; expected two arms of the run"),
        ((*pages, "--tls-cert", "x.pem", "--tls-key", "x.pem"), "--tls-cert, --tls-key: found no usable pair"),
        ((*pages, "--host", "0.0.0.0"), "--host: found 0.0.0.0, which is every address"),
        ((*pages, "--host", "no.such.invalid"), "--host: found 'no.such.invalid'"),
        ((*pages, "--address", "example.org"), "--address: found 'example.org'; expected scheme, host and port alone"),
        ((*pages, "--tls-cert", "x.pem"), "--tls-cert, --tls-key: found one without the other"),
        ((*pages, "--guidelines", "none.txt"), "--guidelines: found none.txt, which cannot be read"),
        ((*database, "nonsense"), "--store: found no URL; expected that of a PostgreSQL"),
        ((*database, "postgresql+nodriver://me:hush@h/d"), "postgresql+nodriver://me:***@h/d: found an unusable store"),
        ((*database, "sqlite:////nowhere/at/all.sqlite"), "--store: found a URL of sqlite; expected that of a P"),
    ):
        code, output = mixpo("annotate", run, *arguments)
        assert code == 2, output
        assert expected in output
        assert output.count("\n") == 1
        assert "hush" not in output
    assert mixpo("agreement", run)[0] == 2
    assert not (Path(run) / "study").exists()
    (Path(run) / "study").mkdir()
    (Path(run) / "study" / "study.sqlite").write_bytes(b"no database" * 100)
    code, output = mixpo("agreement", run)
    assert (code, output.count("\n")) == (2, 1)
    assert "found an unusable store (file is not a database)" in output
    monkeypatch.setattr(study_commands, "REQUIRED_PACKAGES", ("no_such_package",))
    code, output = mixpo("annotate", run)
    assert code == 2
    assert output.endswith("`pip install 'mixpo[study]'`\n")


def test_beyond_this_machine_without_tls_there_is_a_warning(tmp_path, mixpo):
    run = str(write_fruit_run(tmp_path))
    arguments = ("annotate", run, "--arms", *ARMS, "--annotators", "2", "--port", "0", "--address")
    assert "warning: without TLS" in mixpo(*arguments, "http://study.example.org", "--host", "0.0.0.0")[1]
    code, output = mixpo(*arguments, "https://study.example.org/")
    assert code == 0
    assert "warning" not in output
    assert len(re.findall(r"  annotator [12]: https://study\.example\.org/a/\S{32}\n", output)) == 2


@pytest.mark.parametrize(
    ("bound", "address", "tls", "encrypted"),
    [
        ("127.0.0.1", "http://127.0.0.1:1", False, True),
        ("::1", "http://[::1]:1", False, True),
        ("127.0.0.1", "https://far.example", False, True),
        ("192.168.1.7", "https://far.example", True, True),
        ("127.0.0.1", "http://far.example", False, False),
        ("192.168.1.7", "https://far.example", False, False),  # from the proxy to us
        ("192.168.1.7", "http://localhost:1", False, False),
        ("192.168.1.7", "http://far.example", True, False),
    ],
)
def test_what_goes_over_a_network_in_the_clear_is_known(bound, address, tls, encrypted):
    assert server.is_traffic_encrypted(bound, address, tls=tls) == encrypted


def test_the_usual_port_is_no_part_of_an_address():
    local = ["[::1]:80", "localhost:80", "127.0.0.1:80"]
    assert server.build_base_url("::1", ("::1", 80), None, tls=True) == ("https://[::1]:80", local)
    usual = ["127.0.0.1", "localhost", "127.0.0.1"]
    assert server.build_base_url("127.0.0.1", ("127.0.0.1", 443), None, tls=True) == ("https://127.0.0.1", usual)
    for address, expected in (
        ("https://Study.example.org:443/", ("https://study.example.org", ["study.example.org"])),
        ("http://study.example.org:443", ("http://study.example.org:443", ["study.example.org:443"])),
        ("http://[::1]:80", ("http://[::1]", ["[::1]"])),
    ):
        assert server.build_base_url("127.0.0.1", ("127.0.0.1", 9), address, tls=False) == expected


@pytest.mark.parametrize(
    "address",
    ["http://[::1", "http://me:x@a.example", "http://@a", "http://a:b", "http://a:70000", "ftp://a", "http://a/b"],
)
def test_what_is_no_address_is_refused(address):
    expected = f"--address: found {address!r}; expected scheme, host and port alone, such as https://"
    with pytest.raises(InputError, match=re.escape(expected)):
        server.build_base_url("127.0.0.1", ("127.0.0.1", 9), address, tls=False)


@pytest.mark.parametrize(("host", "bound"), [("0", "0.0.0.0"), ("::", "::"), ("0:0::0", "::")])
def test_every_address_is_none(host, bound):
    with pytest.raises(InputError, match=f"^--host: found {host}, which is every address of this machine"):
        server.build_base_url(host, (bound, 9), None, tls=False)


def test_a_password_is_never_shown():
    database = StudyStore(URL.create("sqlite", database="/nowhere/x.sqlite"))
    database.password = "hush"
    with pytest.raises(InputError) as refused, database._report_database_errors():
        raise SQLAlchemyError("me:hush@h was refused\nfor reasons")
    assert str(refused.value).startswith("/nowhere/x.sqlite: found an unusable store (me:***@h was refused);")
    assert "\n" not in str(refused.value)


DATABASE = os.environ.get("MIXPO_TEST_DATABASE")


@pytest.mark.skipif(DATABASE is None, reason="MIXPO_TEST_DATABASE names no empty PostgreSQL database")
def test_a_study_in_postgresql(tmp_path):
    study = Study(write_fruit_run(tmp_path), url=DATABASE)
    try:
        anna = study.sign_in("anna")
        csrf_token = anna.get_csrf_token(1)
        for choice in ("left", "right"):
            anna.post(1, choice, csrf_token, comment="a\0b")
        anna.judge(1, "tie", comment="مرحبا")
        anna.judge(2, "skip", reason="other")
        answers = [Answer("left", "", f"{n % 3}", 1.0, False, store.format_current_time()) for n in range(8)]
        nonces = [f"n{n % 3}" for n in range(8)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(study.store.save_answer, [2] * 8, [1] * 8, answers, nonces))
        assert study.list_choices() == {("anna", 1): "tie", ("anna", 2): "skip", ("ben", 1): "left"}
        assert list_replaced_choices(study.store) == {("anna", 1): ["left"], ("ben", 1): ["left", "left"]}
        assert [(one.judged, one.skipped) for one in study.store.count_progress()] == [(1, 1), (1, 0), (0, 0)]
        files.export_judgements(study.store, study.row, tmp_path / "all.csv")
        assert files.import_judgements(study.store, study.row, tmp_path / "all.csv") == (3, 0)
        reopened = Study(study.run, url=DATABASE)
        reopened.store.close_connections()
        assert (reopened.tokens, reopened.lost) == (study.tokens, [])
        write_fruit_run(tmp_path / "other", texts={("yak", 1): "plums"})
        expected = r"found a study of other completions .* and use another database to begin"
        with pytest.raises(InputError, match=expected):
            Study(tmp_path / "other" / "run", StudyOptions(), url=DATABASE)
        csrf_token = anna.get_csrf_token(3)
        assert study.close().annotators_with_judgements == ["anna", "ben"]
        assert anna.post(3, "left", csrf_token).status_code == 403
        assert len(study.list_choices()) == 3
    finally:
        store.TableBase.metadata.drop_all(study.store.engine)
        study.store.close_connections()


# files


COMMENTS = ["=1+1", "+x", "-x", "@x", "'quoted", "plain, with a comma", 'two\nlines "and" marks', "𝔘 مرحبا", "\tx"]


def judge_questions(study: Study) -> None:
    """Judge questions as anna and ben, with comments that are hard to export."""
    for index, number in enumerate(range(1, 6)):
        study.sign_in("anna").judge(number, ("left", "tie", "right")[index % 3], comment=COMMENTS[index])
        study.sign_in("ben").judge(number, "tie", comment=COMMENTS[(index + 4) % len(COMMENTS)])
    study.sign_in("cleo").judge(1, "skip", reason="other", comment=COMMENTS[8])


@pytest.mark.parametrize("file_type", ["csv", "jsonl"])
def test_an_export_comes_back_as_it_was(study, mixpo, tmp_path, file_type):
    empty = tmp_path / "other" / "study" / "study.sqlite"
    empty.parent.mkdir(parents=True)
    with sqlite3.connect(study.run / "study" / "study.sqlite") as source, sqlite3.connect(empty) as copy:
        source.backup(copy)
    source.close()
    copy.close()
    judge_questions(study)
    path = tmp_path / f"all.{file_type}"
    assert files.export_judgements(study.store, study.row, path) == 11
    assert files.import_judgements(study.store, study.row, path) == (11, 0)
    path.write_bytes(path.read_bytes().replace(b"False", b"FALSE"))  # as spreadsheets write it
    imported = f"11 judgements in {path}: 0 new, 11 already in the study\n"
    assert mixpo("annotate", str(study.run), "--import", str(path)) == (0, imported)
    other = StudyStore(parse_store_url(tmp_path / "other", None))
    assert files.import_judgements(other, study.row, path) == (11, 11)
    assert [one.answer for one in other.load_questions()] == [one.answer for one in study.store.load_questions()]
    assert files.import_judgements(other, study.row, path) == (11, 0)
    other.close_connections()


def test_no_cell_of_an_export_is_a_formula(study, tmp_path):
    judge_questions(study)
    files.export_judgements(study.store, study.row, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(encoding="utf8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert "'=1+1" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


DIFFERS = "anna, question 2: found {} in the store, {} in the file; expected the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "left"}, DIFFERS.format("choice 'tie'", "'left'")),
        ({"comment": "other"}, DIFFERS.format("comment '+x'", "'other'")),
        ({"digest": "0" * 32}, f"found digest '{'0' * 32}'; expected "),
        ({"annotator": "dora"}, "found question 2 of 'dora'; expected one of this study"),
        ({"question": "99"}, "found question 99 of 'anna'; expected one of this study"),
        ({"question": "3"}, "another study, or another question"),
        ({"question": 2.5}, "found question 2.5; expected a whole number from 1"),
        ({"question": True}, "found question True; expected a whole number from 1"),
        ({"question": "9" * 5000}, "expected a whole number from 1"),
        ({"choice": "best"}, "found choice 'best'; expected one of left, right, tie, skip"),
        ({"reason": "other"}, "found reason 'other' of choice tie; expected none"),
        ({"choice": "skip"}, "found reason '' of choice skip; expected unreadable, "),
        ({"seconds": "nan"}, "found seconds 'nan' and idle"),
        ({"seconds": 10**400}, "int too large to convert to float"),
        ({"annotator": "x" * 100_000}, "found question "),
        ({"choice": ["x" * 100_000]}, "found choice "),
        ({"comment": 7}, "found comment 7; expected text"),
        ({"comment": "x" * 2001}, "found a comment of 2001 characters; expected 2000 at most"),
        ({"comment": "a\0b"}, "found a comment of 3 characters"),
        ({"comment": "a\ud800"}, "found a comment of 2 characters"),
        ({"at": "yesterday"}, "found at 'yesterday'; expected a time such as 2026-"),
        ({"at": None}, "found at None; expected text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused_whole(study, tmp_path, change, message):
    judge_questions(study)
    path = tmp_path / "all.jsonl"
    files.export_judgements(study.store, study.row, path)
    lines = read_lines(path)
    lines[1] |= change
    write_lines(path, lines)
    with study.store._open_transaction(write=True) as session:  # so that all others would be new
        session.query(store.JudgementRow).filter(store.JudgementRow.number != 2).delete()
    before = study.list_choices()
    with pytest.raises(InputError) as refused:
        files.import_judgements(study.store, study.row, path)
    first, *last = str(refused.value).splitlines()
    assert message in first
    assert len(first) < len(str(path)) + 420
    assert "nothing was imported" in "".join([first, *last][-1:])
    assert first.startswith(f"{path}:2: ") == bool(last)
    assert study.list_choices() == before


def test_files_that_are_no_export_are_refused(study, tmp_path, monkeypatch):
    judge_questions(study)
    path = tmp_path / "all.jsonl"
    files.export_judgements(study.store, study.row, path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(InputError, match="found question 1 of anna twice; expected it once"):
        files.import_judgements(study.store, study.row, path)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    heading = ",".join(files.COLUMNS)
    (tmp_path / "large.csv").write_text(f"{heading}\n{'x' * 200_000}\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "digits.jsonl").write_text("9" * 5_000)
    (tmp_path / "lines.csv").write_text(f'{heading}\nanna,0,"two\nlines"\n')
    for name, message in (
        ("x.csv", "found no column annotator"),
        ("x.txt", "found a file of type 'txt'"),
        ("none.csv", "found no readable csv"),
        ("large.csv", "found no readable csv"),
        ("deep.jsonl", "found no readable jsonl"),
        ("digits.jsonl", "found no readable jsonl"),
        ("lines.csv", r"lines.csv:3: found question '0'"),
    ):
        with pytest.raises(InputError, match=message):
            files.import_judgements(study.store, study.row, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(files, "MAX_IMPORT_BYTES", 100)
        with pytest.raises(InputError, match="found more than 100 bytes; expected what --export writes"):
            files.import_judgements(study.store, study.row, path)
    with pytest.raises(InputError, match="found a path that cannot be written"):
        files.export_judgements(study.store, study.row, tmp_path / "no" / "all.csv")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:11]))
    study.store.close_study()
    with pytest.raises(InputError, match="found a closed study; expected an open one"):
        files.import_judgements(study.store, study.row, path)


# what a study says


def write_closed_study(
    folder: Path, choices: dict[str, list[str]], categories: list[str | None] | None = None
) -> StudyFindings:
    """Write the files of a closed study: each annotator's choices by prompt, W, T, L, S, or - for none."""
    better = {"W": "mpo", "T": "tie", "L": "ppo", "S": None}
    prompts = max(map(len, choices.values()))
    lines = []
    for name, letters in choices.items():
        for prompt, letter in enumerate(letters):
            left = prompt % 2 == 0
            choice = {"W": "left" if left else "right", "L": "right" if left else "left", "T": "tie", "S": "skip"}
            category = categories[prompt] if categories else None
            if letter != "-":
                line = {"annotator": name, "question": prompt + 1, "prompt": prompt, "better": better[letter]}
                line |= {"category": category, "choice": choice[letter], "seconds": 10.0 + prompt, "idle": False}
                lines.append(line)
    (folder / "study").mkdir(parents=True, exist_ok=True)
    closed = {"format": 1, "arms": ["mpo", "ppo"], "seed": 0, "draw": 0, "content": "", "closed": "today", "same": []}
    closed |= {"prompts": prompts, "annotators": list(choices)}
    (folder / "study" / "closed.json").write_text(json.dumps(closed))
    write_lines(folder / "study" / "judgements.jsonl", lines)
    return load_study_findings(folder)


PATTERNS = {
    "helpful": {"WWW": 24, "TTT": 4, "LLL": 6, "WWT": 6, "WWL": 2, "TTL": 3, "WTL": 5},
    "harmless": {"WWW": 4, "TTT": 32, "LLL": 1, "WWT": 4, "TTW": 4, "TTL": 4, "LLT": 1},
}
"""Choices of three annotators on 50 prompts a category: 93 wins, 29 ties, 28 losses; 24 wins, 117 ties, 9 losses."""


def rotate_patterns(patterns: dict[str, int]) -> list[str]:
    """Choices of three annotators on each prompt, rotated so that none is always first."""
    expanded = [pattern for pattern, count in patterns.items() for _ in range(count)]
    return [pattern[n % 3 :] + pattern[: n % 3] for n, pattern in enumerate(expanded)]


def test_the_papers_table_and_its_kappa_by_hand(tmp_path):
    """Table 5: helpful 62.0 / 19.3 / 18.7%, harmless 16 / 78 / 6%.

    Helpful, by Fleiss 1971. Of 50 prompts 34 are unanimous, P = 1; 11 have two alike, P = (4 + 1 - 3) / (3 * 2) = 1/3;
    5 have none, P = 0: mean P = (34 + 11 / 3) / 50 = 0.753333. By chance 0.62^2 + 0.193333^2 + 0.186667^2 = 0.456622.
    kappa = (0.753333 - 0.456622) / (1 - 0.456622) = 0.546049, the paper's 0.55. Krippendorff's alpha has 150 ratings in
    all, so its chance is (93 * 92 + 29 * 28 + 28 * 27) / (150 * 149) = 0.452975: alpha = (0.753333 - 0.452975) /
    0.547025 = 0.549076.
    Harmless: 37 unanimous, 13 have two alike: mean P = (37 + 13 / 3) / 50 = 0.826667, by chance 0.16^2 + 0.78^2 +
    0.06^2 = 0.6376: kappa = 0.189067 / 0.3624 = 0.521707, the paper's 0.52.
    """
    helpful, harmless = map(rotate_patterns, PATTERNS.values())
    categories = ["helpful"] * 50 + ["harmless"] * 50
    choices = {name: [one[n] for one in helpful + harmless] for n, name in enumerate(ANNOTATORS)}
    findings = write_closed_study(tmp_path, choices, categories)
    for category, shares, kappa in (
        ("helpful", [62.0, 19.3, 18.7], 0.546049),
        ("harmless", [16.0, 78.0, 6.0], 0.521707),
    ):
        each, agreement = findings.shares[category], findings.agreement[category]
        assert (each.prompts, agreement.common, agreement.several) == (50, 50, 50)
        assert [round(100 * share.mean, 1) for share in (each.win, each.tie, each.lose)] == shares
        assert agreement.kappa.mean == pytest.approx(kappa, abs=2e-6)
        assert agreement.kappa.low < kappa < agreement.kappa.high
    agreement = findings.agreement["helpful"]
    assert agreement.alpha.mean == pytest.approx(0.549076, abs=2e-6)
    assert agreement.pairs.mean == pytest.approx(0.753333, abs=2e-6)
    assert agreement.pairs.low < 0.753333 < agreement.pairs.high
    shown = rows(build_study_tables(findings)["Preferences"])
    assert [cell[:4] for cell in shown["helpful"][1:]] == ["50", "0.62", "0.19", "0.19", "0.43", "<0.0"]
    assert [cell[:4] for cell in shown["all prompts"][1:]] == ["100", "0.39", "0.49", "0.12", "0.27", "<0.0"]
    assert describe_study(findings).startswith(
        "3 people judged blindly and preferred mpo on 39% of 100 prompts and ppo on 12%, with 49% ties: "
        "mpo has a significantly higher win rate than ppo (+0.27, 95% CI ["
    )
    assert "], p <0.001). Fleiss' κ 0.6" in describe_study(findings)
    assert describe_study(findings).endswith("over 100 prompts.")


def test_the_margins_of_categories_are_corrected_for_their_number(tmp_path):
    choices = {"anna": [*"WWWWWWWWLLWTWWLWWT", *"WTWTTTTTT"]}
    alone = write_closed_study(tmp_path / "alone", choices)
    several = write_closed_study(tmp_path / "several", choices, ["helpful"] * 18 + ["harmless"] * 9)
    one, many = (_correct_p_by_category(findings)[None] for findings in (alone, several))
    assert alone.shares[None].difference == several.shares[None].difference
    assert one == pytest.approx(scipy.stats.binomtest(15, 18).pvalue)
    assert many == pytest.approx(3 * one)
    assert "corrected for all rows (Holm)" in str(build_study_tables(several)["Preferences"].notes)
    assert "corrected" not in str(build_study_tables(alone)["Preferences"].notes)


def test_categories_stand_apart_and_together(tmp_path):
    categories = ["helpful", "harmless"] * 4
    choices = ["W", "T", "W", "T", "W", "L", "L", "T"]
    findings = write_closed_study(tmp_path, {"anna": choices, "ben": ["W"] * 8}, categories)
    assert list(findings.shares) == ["helpful", "harmless", None]
    assert findings.shares["helpful"].win.mean == pytest.approx(7 / 8)
    assert findings.shares["harmless"].win.mean == pytest.approx(4 / 8)
    assert findings.shares[None].win.mean == pytest.approx(11 / 16)
    assert [each.prompts for each in findings.shares.values()] == [4, 4, 8]
    named = write_closed_study(tmp_path, {"anna": choices}, ["all", None] * 4)  # no category is taken for the total
    assert [named.shares[name].prompts for name in ("all", None)] == [4, 8]
    assert list(rows(build_study_tables(named)["Preferences"])) == ["all", "all prompts"]


def test_who_judged_nothing_spoils_no_kappa(tmp_path):
    choices = {"anna": list("WWTL"), "ben": list("WWTW"), "cleo": list("----"), "dora": list("SS--")}
    findings = write_closed_study(tmp_path, choices)
    assert findings.annotators_without_judgements == ["cleo", "dora"]
    assert findings.agreement[None].common == 4
    # 3 of 4 agree; 5 wins, 2 ties, 1 loss of 8: chance (25 + 4 + 1) / 64
    assert findings.agreement[None].kappa.mean == pytest.approx((0.75 - 30 / 64) / (1 - 30 / 64))
    table = build_study_tables(findings)["Agreement"]
    assert "Excluded, without judgements: cleo, dora." in table.notes
    assert rows(build_study_tables(findings)["Annotators"])["dora"][:4] == ["dora", "0 of 4", "2", ""]


def test_kappa_is_of_the_prompts_that_all_judged_and_alpha_of_all(tmp_path):
    """Of WWW, WTL, TT, LLW and W: alpha has 11 ratings, 5 W, 3 T and 3 L, and disagreements 0 + 3 + 0 + 2.

    1 - 10 * 5 / (11^2 - 5^2 - 3^2 - 3^2) = 0.358974; of the three prompts that all judged it were 0.130435.
    """
    findings = write_closed_study(tmp_path, {"anna": list("WWTLW"), "ben": list("WT-LS"), "cleo": list("WLTW-")})
    agreement = findings.agreement[None]
    assert (agreement.common, agreement.several) == (3, 4)
    assert agreement.alpha.mean == pytest.approx(28 / 78)
    assert agreement.pairs.mean == pytest.approx(10 / 20)
    assert findings.shares[None].prompts == 5


def test_kappa_of_those_who_always_say_the_same_cannot_be_told(tmp_path):
    findings = write_closed_study(tmp_path, {"anna": list("WWWW"), "ben": list("WWWW")})
    assert rows(build_study_tables(findings)["Agreement"])["all prompts"][1] == "not estimable"
    assert "Fleiss' κ not estimable." in describe_study(findings)
    alone = write_closed_study(tmp_path, {"anna": list("WLTW")})
    assert rows(build_study_tables(alone)["Agreement"])["all prompts"][1:3] == ["not estimable", "0"]
    assert describe_study(alone).startswith("One person judged blindly")
    assert write_closed_study(tmp_path, {"anna": list("----")}).annotators_with_judgements == []
    skipped = write_closed_study(tmp_path, {"anna": list("SS--")})
    assert describe_study(skipped).startswith("Nobody judged a prompt of mpo and ppo")


def test_nothing_is_claimed_that_the_interval_does_not_hold(tmp_path):
    findings = write_closed_study(tmp_path, {"anna": list("WLWLW"), "ben": list("LWLWW")})
    assert "no significant difference between mpo and ppo in win rate" in describe_study(findings)
    assert not re.search(r"\bwins\b|significantly", describe_study(findings))
    lost = write_closed_study(tmp_path, {"anna": list("LLLLLL"), "ben": list("LLLLLT")})
    assert "mpo has a significantly lower win rate than ppo" in describe_study(lost)
    for choices, margin, p in (("WW", 1, 0.5), ("TTTTT", 0, 1.0)):  # alike on every prompt, and so few
        alike = write_closed_study(tmp_path, {"anna": list(choices), "ben": list(choices)})
        assert f"in win rate (+{margin}.00, 95% CI [" in describe_study(alike)
        assert f"], p {p:.2f})" in describe_study(alike)
        low, high = proportion_confint(len(choices), len(choices), method="wilson")
        shown = rows(build_study_tables(alike)["Preferences"])["all prompts"]
        assert shown[2 if margin else 3] == f"1.00 [{low:.2f}, {high:.2f}]"
    agreed = write_closed_study(tmp_path, {"anna": list("WL"), "ben": list("WL")})
    assert rows(build_study_tables(agreed)["Agreement"])["all prompts"][1:6:4] == ["1.00", "2"]
    once = write_closed_study(tmp_path, {"anna": ["W"], "ben": ["L"]})
    assert "(+0.00, 95% CI [−" in describe_study(once)
    assert "nan" not in "".join(cell for each in build_study_tables(once).values() for row in each.rows for cell in row)


def test_a_habit_of_one_side_shows(tmp_path):
    findings = write_closed_study(tmp_path, {"anna": ["WL"[n % 2] for n in range(40)], "ben": ["T"] * 40})
    anna, ben = findings.annotators
    assert anna.left.mean == 1.0  # W is on the left at even prompts, L at odd ones
    assert anna.left.low == pytest.approx(40 / (40 + 1.959964**2), abs=1e-4)  # Wilson's bound of 40 in 40
    assert ben.left is None
    assert anna.seconds == 29.5


def test_completions_that_are_the_same_are_ties_that_nobody_was_asked(study, anna):
    for number in range(1, 6):
        anna.prefer(number, "apples")
    findings = study.close()
    assert findings.shares[None].prompts == 6
    assert findings.shares[None].win.mean == pytest.approx(5 / 6)
    assert findings.shares[None].tie.mean == pytest.approx(1 / 6)
    assert "1 prompt with the same completion of both arms" in str(build_study_tables(findings)["Preferences"].notes)


def test_the_report_has_closed_studies(make):
    from mixpo.report.page import build_document, render_report

    study = make()
    study.sign_in("anna").prefer(1, "apples")
    findings = study.close()
    results = load_runs(study.run)
    made = build_human_study_section(results)
    assert made.opening == describe_study(findings)
    assert [group.title for group in made.groups] == list(build_study_tables(findings))
    assert "people" in [one.id for one in build_document(results).sections]
    assert '<section id="people">' in render_report(results, "html")
    assert "## People" in render_report(results, "md")


def test_damaged_files_of_a_closed_study_are_named(study):
    study.close()
    file = study.run / "study" / "closed.json"
    whole = file.read_text()
    for broken in (whole[:40], "{}", "[]", whole.replace('"format": 1', '"format": 9')):
        file.write_text(broken)
        with pytest.raises(InputError, match=r"found no readable study|found a study of format 9"):
            load_study_findings(study.run)


# a real server, over TLS, and killed


def start_server(run: Path, port: int, folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start `mixpo annotate` in a process; return it and the printed links by name."""
    command = [sys.executable, "-m", "mixpo.cli.main", "annotate", str(run), "--port", str(port), *arguments]
    if not (run / "study").exists():
        command += ["--arms", *ARMS, "--annotators", "50"]
    with (folder / "errors.txt").open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    links: dict[str, str] = {}
    for line in process.stdout:
        if match := re.match(r"  (annotator \d+): (\S+)", line):
            links[match[1]] = match[2]
        if line.startswith("Ctrl-C"):
            return process, links
    raise AssertionError((folder / "errors.txt").read_text())


def test_a_study_over_tls(tmp_path):
    import httpx2

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    pair = issued.private_key_and_cert_chain_pem
    (tmp_path / "pair.pem").write_bytes(pair.bytes())
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    arguments = ("--tls-cert", str(tmp_path / "pair.pem"), "--tls-key", str(tmp_path / "pair.pem"))
    process, links = start_server(write_fruit_run(tmp_path), 0, tmp_path, *arguments)
    try:
        trusted = ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))
        with httpx2.Client(verify=trusted, follow_redirects=True, trust_env=False) as browser:
            link = links["annotator 7"]
            assert link.startswith("https://127.0.0.1:")
            assert browser.get(link).status_code == 200
            assert "Question 1 of 5" in browser.get(httpx2.URL(link).join("/q/1")).text
    finally:
        process.kill()
        assert process.communicate()[0] == ""
    assert (tmp_path / "errors.txt").read_text() == ""


@pytest.mark.heavy
def test_fifty_people_at_once_and_a_killed_server_lose_nothing_and_double_nothing(tmp_path):
    import httpx2

    questions = 8
    run = write_fruit_run(tmp_path, prompts=questions + 1)  # one is the same of both
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, links = start_server(run, port, tmp_path)
    processes = [first]
    acknowledged: dict[tuple[str, int], str] = {}

    def judge_all(name: str, link: str) -> None:
        with httpx2.Client(follow_redirects=False, timeout=20.0, trust_env=False) as browser:

            def request_until_answered(method: str, path: str, **options: Any) -> Any:
                """As somebody who loads a page again until it comes."""
                for _ in range(600):
                    try:
                        response = browser.request(method, httpx2.URL(link).join(path), **options)
                    except httpx2.TransportError:
                        time.sleep(0.1)
                        continue
                    if response.status_code in (429, 503):
                        time.sleep(0.2)
                        continue
                    return response
                raise AssertionError("never came")

            def post(path: str, data: dict[str, str]) -> Any:
                return request_until_answered("POST", path, data=data)

            request_until_answered("GET", link)
            for number in range(1, questions + 1):
                page = request_until_answered("GET", f"/q/{number}").text
                choice = ("left", "tie", "right")[(number + int(name.split()[1])) % 3]
                data = {"form": parse_csrf_token(page), "choice": choice}
                with ThreadPoolExecutor(2) as both:  # a double click
                    for response in both.map(post, [f"/q/{number}"] * 2, [data] * 2):
                        assert response.status_code == 303
                        assert f"saved={number}" in response.headers["location"]
                acknowledged[name, number] = choice

    people = ThreadPoolExecutor(50)
    judged = [people.submit(judge_all, name, link) for name, link in links.items()]
    try:
        while len(acknowledged) < 50 * questions // 2 and not any(one.done() and one.exception() for one in judged):
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = dict(acknowledged)
        opened = StudyStore(parse_store_url(run, None))
        stored = list_choices(opened)
        opened.close_connections()
        assert before.items() <= stored.items()
        assert len(before) < 50 * questions
        second, new_links = start_server(run, port, tmp_path)
        processes.append(second)
        assert new_links == links
        for one in judged:
            one.result()
    finally:
        for process in processes:
            process.kill()
            assert process.communicate()[0] == ""  # nothing of requests, whose first address holds a token
        people.shutdown()
    opened = StudyStore(parse_store_url(run, None))
    assert list_choices(opened) == acknowledged
    assert len(acknowledged) == 50 * questions
    assert list_replaced_choices(opened) == {}
    opened.close_connections()
    assert (tmp_path / "errors.txt").read_text() == ""
