"""The blind study: what is shown, what is kept, who is kept out, what stays hidden; and what it says in the end."""

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
import threading
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

from mixpo.cli import main as cli
from mixpo.cli import studied
from mixpo.data.errors import InputError
from mixpo.data.text import escape_invisible
from mixpo.experiments.results import load_runs
from mixpo.report.people import _corrected, opening, section, tables
from mixpo.study import files, server, store
from mixpo.study.app import Bucket
from mixpo.study.begin import Wanted, names
from mixpo.study.findings import Findings, findings
from mixpo.study.plan import form_word, order, read_form_word
from mixpo.study.store import ClosedError, Said, Store, store_url
from report_runs import rows
from studies import ARMS, HOST, PEOPLE, WORDS, Study, earlier, fruit_run, sides

Make = Callable[..., Study]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Begins a study, or goes on with it."""
    made: list[Study] = []

    def one(**settings: Any) -> Study:
        wanted, texts = settings.pop("wanted", None), settings.pop("texts", None)
        run = tmp_path / "run"
        if not run.exists():
            fruit_run(tmp_path, texts=texts)
        made.append(Study(run, wanted or Wanted(arms=ARMS, annotators=PEOPLE), settings))
        return made[-1]

    yield one
    for study in made:
        study.store.dispose()


def close(study: Study) -> Findings:
    study.row.closed = study.store.close()
    files.write_closed(study.store, study.row, study.run / "study")
    found = findings(study.run)
    assert found is not None
    return found


# what is asked


def test_each_one_has_an_order_of_his_own_and_each_arm_half_of_the_left_sides():
    drawn = {name: order(101, draw=0, secret="s", annotator=name) for name in PEOPLE}
    for questions in drawn.values():
        assert sorted(item for item, _ in questions) == list(range(101))
        assert sum(swapped for _, swapped in questions) in (50, 51)
    assert len({tuple(questions) for questions in drawn.values()}) == 3
    assert drawn["anna"] == order(101, draw=0, secret="s", annotator="anna")
    assert drawn["anna"] != order(101, draw=1, secret="s", annotator="anna")


def test_the_seed_alone_tells_no_side():
    guesses = [dict(order(400, draw=0, secret=secret, annotator="anna")) for secret in ("one", "other")]
    alike = sum(guesses[0][item] == guesses[1][item] for item in range(400))
    assert 140 < alike < 260


def test_a_form_is_for_one_person_and_one_question():
    word = form_word("secret", 1, 7, now=12.5)
    nonce, served = read_form_word(word, "secret", 1, 7) or ("", 0.0)
    assert served == 12.5
    assert nonce not in (read_form_word(form_word("secret", 1, 7, now=12.5), "secret", 1, 7) or ())
    for secret, annotator, number in (("other", 1, 7), ("secret", 2, 7), ("secret", 1, 8)):
        assert read_form_word(word, secret, annotator, number) is None
    for forged in ("", ".", "x", word[:-1], word + "0", "1" + word, "é" + word):
        assert read_form_word(forged, "secret", 1, 7) is None


@pytest.mark.parametrize(
    ("given", "found"),
    [("3", ["annotator 1", "annotator 2", "annotator 3"]), ("anna, ben", ["anna", "ben"]), ("Żółć", ["Żółć"])],
)
def test_names(given, found):
    assert names(given) == found


@pytest.mark.parametrize(
    "given",
    ["0", "501", "9" * 5000, ",".join(f"n{n}" for n in range(501)), "anna,", "anna,anna", "a\x1bb", "x" * 41, "-1,2"],
    ids=range(9),
)
def test_bad_names(given):
    with pytest.raises(InputError, match=r"^--annotators: found .*; expected a number, or different names"):
        names(given)


# the pages


def test_a_link_leaves_a_cookie_and_goes_to_the_guidelines(make):
    study = make()
    browser = study.browser()
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
    bare = study.browser().get(f"/a/{study.tokens['anna']}", follow_redirects=False)
    assert study.browser().get(bare.headers["location"]).status_code == 200  # without the cookie, as across sites


def test_a_cookie_goes_over_tls_alone_where_there_is_tls(make):
    study = make(scheme="https")
    assert "Secure" in study.browser().get(f"/a/{study.tokens['anna']}", follow_redirects=False).headers["set-cookie"]


def test_a_judgement_is_of_the_arm_that_was_on_that_side(make):
    study = make()
    anna, ben = study.person("anna"), study.person("ben")
    chosen = {number: anna.prefer(number, "apples") for number in range(1, 6)}
    assert set(chosen.values()) == {"left", "right"}
    for number in range(1, 6):
        ben.prefer(number, "pears")
    close(study)
    kept = [json.loads(line) for line in (study.run / "study" / "judgements.jsonl").read_text().splitlines()]
    assert {(row["annotator"], row["better"]) for row in kept} == {("anna", "zebra"), ("ben", "yak")}
    assert {row["question"]: row["choice"] for row in kept if row["annotator"] == "anna"} == chosen
    assert sorted(row["prompt"] for row in kept if row["annotator"] == "ben") == [0, 1, 2, 3, 4]
    closed = json.loads((study.run / "study" / "closed.json").read_text())
    assert closed["arms"] == list(ARMS)
    assert closed["same"] == [{"prompt": 5, "category": None}]
    assert (closed["annotators"], closed["seed"]) == (list(PEOPLE), 0)
    again = order(5, draw=0, secret=closed["secret"], annotator="anna")  # reproducible once it is closed
    told = {row["question"]: (row["prompt"], row["left"]) for row in kept if row["annotator"] == "anna"}
    assert told == {n: (item, ARMS[swapped]) for n, (item, swapped) in enumerate(again, start=1)}


def test_after_a_judgement_comes_the_next_open_question_and_then_thanks(make):
    anna = make().person("anna")
    assert anna.judge(2, "tie") == "/q/3?saved=2#question"
    assert "Question 2 is saved." in anna.browser.get("/q/3?saved=2").text
    assert anna.judge(5, "left") == "/q/1?saved=5#question"
    assert anna.judge(1, "left") == "/q/3?saved=1#question"
    assert anna.judge(3, "left") == "/q/4?saved=3#question"
    assert anna.judge(4, "left") == "/done?saved=4"
    assert "You judged 5 of 5 questions." in anna.browser.get("/done").text


def test_a_form_counts_once_however_often_it_comes(make):
    study = make()
    anna = study.person("anna")
    word = anna.word(1)
    told = [anna.post(1, choice, word).headers["location"] for choice in ("left", "left", "right")]
    told.append(anna.post(1, "left", word, comment="new").headers["location"])
    # what does not stand is not called saved: its page shows what does
    assert told == ["/q/2?saved=1#question"] * 2 + ["/q/1?unchanged=1#question"] * 2
    assert re.search(r'value="left"[^>]*aria-pressed="true"', anna.page(1))
    assert study.said() == {("anna", 1): "left"}
    assert earlier(study.store) == {}


def test_only_what_is_saved_is_called_so(make):
    anna = make().person("anna")
    anna.judge(2, "tie")
    for path in ("/q/1", "/done"):
        shown = {n: f"Question {n} is saved." in anna.browser.get(f"{path}?saved={n}").text for n in (1, 2, 99)}
        assert shown == {1: False, 2: True, 99: False}


def test_going_back_changes_a_judgement_and_keeps_the_earlier_one(make):
    study = make()
    anna = study.person("anna")
    old = anna.word(1)
    anna.post(1, "left", old, comment="so")
    page = anna.page(1)
    assert re.search(r'value="left"[^>]*aria-pressed="true"', page)
    assert ">\nso</textarea>" in page
    anna.judge(1, "right")
    anna.judge(1, "right")  # the same again is no change
    anna.judge(1, "tie")
    again = anna.post(1, "left", old)  # sent again by a browser that lost its connection
    assert again.headers["location"] == "/q/1?unchanged=1#question"
    assert "Not changed" in anna.browser.get(again.headers["location"]).text
    assert "Not changed" not in anna.page(1)
    assert "Not changed" not in anna.browser.get("/q/2?unchanged=1").text  # nothing is said there
    assert study.said() == {("anna", 1): "tie"}
    assert earlier(study.store) == {("anna", 1): ["left", "right"]}


def test_a_form_of_another_question_or_person_judges_nothing(make):
    study = make()
    anna, ben = study.person("anna"), study.person("ben")
    assert anna.post(2, "left", anna.word(1)).status_code == 403
    assert anna.post(1, "left", ben.word(1)).status_code == 403
    assert anna.post(1, "left", "").status_code in (400, 403)
    assert anna.post(9, "left", anna.word(1)).status_code == 403
    assert study.said() == {}


@pytest.mark.parametrize(
    "data", [{"choice": "best"}, {}, {"choice": "skip"}, {"choice": "skip", "reason": "bored"}], ids=str
)
def test_what_is_no_judgement_is_refused(make, data):
    study = make()
    anna = study.person("anna")
    answer = anna.browser.post("/q/1", data={"form": anna.word(1), **data})
    assert answer.status_code == 400
    assert "This could not be understood" in answer.text
    assert study.said() == {}


def test_a_skip_has_a_reason_and_a_choice_needs_none(make):
    study = make()
    anna = study.person("anna")
    anna.judge(1, "skip", reason="knowledge", comment="law")
    anna.judge(2, "left", reason="knowledge")
    one, two = (study.store.question(1, number).said for number in (1, 2))
    assert (one.choice, one.reason, one.comment) == ("skip", "knowledge", "law")
    assert (two.choice, two.reason) == ("left", "")
    assert "You skipped this question." in anna.page(1)
    page = anna.page(3)
    assert len(re.findall(r"<button name=\"choice\"[^>]*formnovalidate", page)) == 3
    assert [(one.judged, one.skipped) for one in study.store.progress()] == [(1, 1), (0, 0), (0, 0)]


def test_time_is_measured_from_when_the_page_was_served(make):
    study = make()
    anna = study.person("anna")
    for number, seconds in ((1, 12.34), (2, 601.0), (3, -5.0)):
        word = anna.word(number)
        study.clock.at += seconds
        anna.post(number, "tie", word)
    said = [study.store.question(1, number).said for number in (1, 2, 3)]
    assert [(one.seconds, one.idle) for one in said] == [(12.3, False), (600.0, True), (0.0, False)]
    for seconds, more in ((5.0, ""), (9.0, ""), (595.0, "x")):  # a change, the same again, another change
        word = anna.word(1)
        study.clock.at += seconds
        anna.post(1, "left", word, comment=more)
        one = study.store.question(1, 1).said
        assert (one.seconds, one.idle) == ((600.0, True) if more else (17.3, False))
    anna.judge(1, "tie")
    assert study.store.question(1, 1).said.idle  # away once
    (who, *_) = close(study).annotators
    assert (who.seconds, who.idle) == (600.0, 2)


def test_a_closed_study_says_thanks_and_takes_nothing(make):
    study = make()
    anna = study.person("anna")
    anna.judge(1, "left")
    word = anna.word(2)
    close(study)
    answer = anna.post(2, "right", word)
    assert answer.status_code == 403
    assert "The study is closed" in answer.text
    assert str(anna.browser.get("/").url) == f"http://{HOST}/done#question"
    assert "The study is closed" in anna.browser.get("/q/1").text
    with pytest.raises(ClosedError):
        study.store.judge(1, 2, Said("left", "", "", 1.0, False, "now"), "nonce")
    assert study.said() == {("anna", 1): "left"}


def test_hostile_text_is_text(make):
    study = make()
    anna = study.person("anna")
    page = next(page for number in range(1, 6) if "window.hit" in (page := anna.page(number)))
    assert page.count("<script") == 1  # the page's own
    assert "<img" not in page
    shown = sides(page)
    assert all("<script>window.hit = 1</script><img src=x onerror=alert(1)> [x](javascript:" in one for one in shown)
    assert all("␛[31m ⟦U+202E⟧abc⟦U+2066⟧" in one for one in shown)
    assert not set("\x1b\u202e\u2066") & set(page)
    assert "question 0 &amp; &lt;b&gt;more" in page


def test_what_cannot_be_seen_is_made_visible():
    assert escape_invisible("a\tb\r\nc\rd\0\x7f\x85") == "a\tb\nc␍d␀␡⟦U+0085⟧"
    assert escape_invisible("\u200b\u2028\ufeff\u200f\U000e0041") == "⟦U+200B⟧⟦U+2028⟧⟦U+FEFF⟧⟦U+200F⟧⟦U+E0041⟧"
    assert escape_invisible("👩\u200d💻 می\u200cخواهم é") == "👩\u200d💻 می\u200cخواهم é"


def test_an_empty_completion_says_so(make):
    study = make(texts={("yak", 0): "", ("zebra", 1): " \n\u200d\xa0", ("yak", 2): "\u200b"})
    anna = study.person("anna")
    pages = [anna.page(number) for number in range(1, 6)]
    assert sum(page.count(">This completion is empty.<") for page in pages) == 2
    assert sum("⟦U+200B⟧" in page for page in pages) == 1


# who is kept out


def test_every_answer_has_the_headers_that_keep_it_safe(make):
    study = make()
    anna = study.person("anna")
    large = "9" * 30
    answers = [anna.browser.get(path) for path in ("/q/1", "/start", "/done", "/static/study.js", "/q/77", "/x")]
    answers += [anna.browser.get(path) for path in (f"/q/{large}", f"/done?saved={large}")]
    answers += [study.browser().get("/"), anna.browser.get("/", headers={"host": "evil.example"})]
    answers.append(anna.post(1, "tie"))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 404, 404, 400, 403, 421, 303]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    assert "There is no such page" in answers[4].text


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
def test_other_sites_and_hosts_judge_nothing(make, headers, status):
    study = make()
    anna = study.person("anna")
    data = {"form": anna.word(1), "choice": "left"}
    assert anna.browser.post("/q/1", data=data, headers=headers, follow_redirects=False).status_code == status
    assert len(study.said()) == (status == 303)


def test_large_bodies_are_refused_by_their_length_and_while_they_come(make):
    study = make()
    anna = study.person("anna")
    assert anna.post(1, "left", comment="x" * 70_000).status_code == 413
    word = anna.word(1)

    def parts() -> Iterator[bytes]:
        yield f"form={word}&choice=left&comment=".encode()
        for _ in range(70):
            yield b"x" * 1000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = anna.browser.post("/q/1", content=parts(), headers=headers)
    assert answer.status_code == 413
    assert "That is too much text" in answer.text
    assert anna.post(1, "left", comment="x" * 2001).status_code == 413
    assert study.said() == {}
    anna.judge(1, "left", comment="x" * 2000)


def test_who_is_too_fast_waits_and_others_do_not(make):
    study = make(rate=0.0, burst=4.0)
    anna, ben = study.person("anna"), study.person("ben")
    assert [anna.browser.get("/q/1").status_code for _ in range(6)] == [200] * 4 + [429] * 2
    assert "That was very fast" in anna.browser.get("/q/1").text
    assert ben.browser.get("/q/1").status_code == 200


def test_guessed_links_are_slowed_down_and_real_ones_are_not(make):
    study = make()
    found = [study.browser().get(f"/a/guess{number}").status_code for number in range(30)]
    assert set(found) == {403, 429}
    study.person("ben")
    stranger = study.browser()
    stranger.cookies.set("study", study.tokens["anna"])  # of no such name
    assert stranger.get("/q/1").status_code in (403, 429)


def test_a_bucket_fills_again():
    at = [0.0]
    bucket = Bucket(0.5, 2.0, lambda: at[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    at[0] = 2.0
    assert [bucket.take() for _ in range(2)] == [True, False]


def test_a_store_that_is_locked_loses_nothing_and_says_so(make, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    study = make()
    anna = study.person("anna")
    word = anna.word(1)
    other = sqlite3.connect(study.run / "study" / "study.sqlite")
    other.execute("BEGIN IMMEDIATE")
    answer = anna.post(1, "left", word)
    other.close()
    assert answer.status_code == 503
    assert "This could not be saved" in answer.text
    assert study.said() == {}
    assert anna.post(1, "left", word).status_code == 303
    assert study.said() == {("anna", 1): "left"}


def test_many_forms_at_once_leave_one_judgement_and_every_change(make):
    study = make()
    said = [Said(("left", "right", "tie")[n % 3], "", f"{n}", 1.0, False, "now") for n in range(6)]
    kept: list[bool] = []

    def send(number: int) -> None:
        kept.append(study.store.judge(1, 1, said[number], f"nonce {number % 4}"))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept) == [False, False, True, True, True, True]
    assert list(study.said()) == [("anna", 1)]
    assert len(earlier(study.store)[("anna", 1)]) == 3


def test_what_is_acknowledged_is_on_disk(make):
    study = make()
    with study.store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


# going on


def test_the_same_command_goes_on_with_the_same_study_and_links(make):
    study = make()
    study.person("anna").judge(1, "left")
    texts = [sides(study.person("ben").page(number)) for number in range(1, 6)]
    for wanted in (Wanted(), Wanted(arms=ARMS, annotators=PEOPLE, prompts=6, seed=0, draw=0)):
        again = make(wanted=wanted)
        assert (again.tokens, again.lost) == (study.tokens, [])
        assert again.said() == {("anna", 1): "left"}
        assert [sides(again.person("ben").page(number)) for number in range(1, 6)] == texts
    for place in (study.run / "study", study.run / "study" / "links.json"):
        assert place.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(arms=("yak", "zebra")), "--arms: found yak, zebra; expected zebra, yak, as in the study"),
        (Wanted(prompts=3), "--prompts: found 3; expected 6, as in the study"),
        (Wanted(draw=4), "--draw: found 4; expected 0, as in the study"),
        (Wanted(seed=1), "--seed: found 1; expected 0, as in the study"),
        (Wanted(annotators=("dora",)), "--annotators: found dora; expected anna, ben, cleo, as in the study"),
        (Wanted(guidelines="be quick"), "--guidelines: found other ones, as in the study"),
    ],
)
def test_another_study_of_the_same_run_is_refused(make, wanted, message):
    make()
    with pytest.raises(InputError, match=rf"^{re.escape(message)} that is there; leave it out, or move .*/run/study a"):
        make(wanted=wanted)


def test_a_run_that_has_changed_or_a_study_that_is_closed_is_refused(make, capsys):
    study = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORDS, "yak", "plums")
        fruit_run(study.run.parent)
        with pytest.raises(InputError, match="found a study of other completions than the run now has"):
            make(wanted=Wanted())
        assert files.export(study.store, study.row, study.run / "kept.csv") == 0
        code, said = run_cli(capsys, "annotate", str(study.run), "--export", str(study.run / "kept.csv"))
        assert (code, said) == (0, f"0 judgements: {study.run / 'kept.csv'}\n")
        for words in (("annotate", "--close", "--yes"), ("annotate", "--import", "x.csv"), ("agreement",)):
            code, said = run_cli(capsys, words[0], str(study.run), *words[1:])
            assert (code, said.count("\n")) == (2, 1)
            assert "found a study of other completions" in said
    fruit_run(study.run.parent)
    close(study)
    with pytest.raises(InputError, match=r"found a study that was closed at 20.*; `mixpo agreement RUN` shows"):
        make(wanted=Wanted())
    for file in (study.run / "study").glob("study.sqlite*"):
        file.unlink()
    with pytest.raises(InputError, match=r"/run/study: found a closed study; move the folder .*/run/study away to b"):
        make()
    assert not (study.run / "study" / "study.sqlite").exists()


def test_a_study_knows_the_seed_that_it_is_of(tmp_path):
    run = fruit_run(tmp_path, seeds=(3, 4))
    study = Study(run)
    assert study.row.seed == 3
    found = close(study)
    study.store.dispose()
    assert found.seed == 3
    shown = section(load_runs(run))
    assert shown is not None
    assert any("at seed 3." in note for note in shown.groups[0].table.notes)


def test_a_study_of_completions_that_have_changed_is_left_out_of_the_report(make, capsys):
    study = make()
    study.person("anna").prefer(1, "apples")
    close(study)
    fruit_run(study.run.parent, texts={("yak", 3): "plums"})
    shown = section(load_runs(study.run))
    assert shown is not None
    assert re.fullmatch(r"The study closed at 20\S+ is left out: the completions have changed since\.", shown.opening)
    assert shown.groups == []
    assert run_cli(capsys, "agreement", str(study.run)) == (0, f"{shown.opening}\n")
    results = load_runs(study.run)
    (folder,) = {folder for arm in results.arms for key, folder in arm.stages.items() if key.startswith("Data")}
    (Path(folder) / "test.parquet").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"test\.parquet"):  # which is no change of the run
        section(results)
    fruit_run(study.run.parent)
    assert section(load_runs(study.run)).opening.startswith("One person")


def test_lost_links_are_made_anew(make):
    study = make()
    (study.run / "study" / "links.json").unlink()
    again = make()
    assert again.lost == list(PEOPLE)
    assert not set(again.tokens.values()) & set(study.tokens.values())
    again.person("anna")
    assert again.browser().get(f"/a/{study.tokens['anna']}").status_code == 403
    assert not any(
        token in (study.run / "study" / "study.sqlite").read_bytes().decode("latin1") for token in again.tokens.values()
    )


@pytest.mark.parametrize("text", ["[]", "null", "{", '"x"'])
def test_links_that_cannot_be_read_are_one_line(make, text):
    study = make()
    (study.run / "study" / "links.json").write_text(text)
    with pytest.raises(
        InputError, match=r"^\S+links.json: found no readable links \(.*\); expected names and links; d"
    ):
        make()
    assert study.store.annotators()[0].token


def test_no_study_without_arms_or_of_arms_that_say_the_same(make, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"--arms: found none, and no study in .*; expected two arms of the run"):
        make(wanted=Wanted())
    with pytest.raises(InputError, match="--prompts: found 7; expected 1 to 6"):
        make(wanted=Wanted(arms=ARMS, prompts=7))
    fruit_run(run.parent, texts={(arm, number): f"{number}" for arm in ARMS for number in range(6)})
    with pytest.raises(InputError, match="two arms that complete every prompt alike"):
        make(wanted=Wanted(arms=ARMS, prompts=3))
    assert not (run / "study").exists()


# blindness


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """`mixpo WORDS`: its exit code, and all that it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mixpo", *words])
        patch.setattr(server, "serve", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            sys.exit(cli.main())
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out + printed.err


def test_before_it_is_closed_nothing_tells_an_arm(make, capsys, tmp_path):
    study = make()
    run = str(study.run)
    told = []
    for name in PEOPLE:
        person = study.person(name)
        told += [person.page(number) for number in range(1, 6)]
        for number in range(1, 5):
            person.prefer(number, "apples")
        told += [person.browser.get(path).text for path in ("/done", "/start", "/nowhere")]
    for path in ("a.csv", "a.jsonl"):
        told.append(run_cli(capsys, "annotate", run, "--export", str(tmp_path / path))[1])
        told.append((tmp_path / path).read_text())
    code, begun = run_cli(capsys, "annotate", run, "--port", "0")
    assert code == 0
    assert re.findall(r"http://127\.0\.0\.1:\d+/a/(\S+)", begun) == list(study.tokens.values())
    told += [begun, run_cli(capsys, "agreement", run)[1]]
    assert "anna: 4 of 5 judged, 0 skipped" in told[-1]
    assert "--close" in told[-1]
    for text in told:
        assert "zebra" not in text
        assert "yak" not in text
        assert "κ" not in text
    assert section(load_runs(study.run)) is None
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[0].keys() == set(files.COLUMNS)


def test_an_export_does_not_show_where_an_arm_repeats_itself(make, tmp_path):
    study = make(texts={(arm, number): WORDS[arm] for arm in ARMS for number in range(6)})
    for name in PEOPLE:
        for number in range(1, 7):
            study.person(name).judge(number, "tie")
    files.export(study.store, study.row, tmp_path / "all.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len({line["digest"] for line in lines}) == 18
    for text in WORDS.values():
        assert hashlib.sha256(text.encode()).hexdigest()[:32] not in str(lines)


def test_closing_asks_first_and_says_what_is_missing(make, capsys, monkeypatch):
    study = make()
    study.person("anna").judge(1, "left")
    run = str(study.run)
    with open(os.devnull) as nothing, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        code, said = run_cli(capsys, "annotate", run, "--close")
    assert code == 1
    assert "14 of 15 judgements are missing" in said
    assert study.store.study().closed is None
    code, said = run_cli(capsys, "annotate", run, "--close", "--yes")
    assert code == 0
    assert "zebra" not in said
    for _ in range(2):  # a second time it writes the same files again
        code, said = run_cli(capsys, "agreement", run)
        assert code == 0
        assert "zebra" in said
        (study.run / "study" / "closed.json").unlink()
        assert "its files are not here" in run_cli(capsys, "agreement", run)[1]
        assert run_cli(capsys, "annotate", run, "--close")[0] == 0


# the command line


def test_a_taken_port_makes_no_study(tmp_path, capsys):
    run = fruit_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = run_cli(capsys, "annotate", str(run), "--arms", *ARMS, "--port", port)
    assert code == 2
    assert said == f"--port: found {port} taken; expected a free one; 0 takes any that is free\n"
    assert not (run / "study").exists()


def test_bad_commands_say_so_on_one_line(tmp_path, capsys, monkeypatch):
    run = str(fruit_run(tmp_path))
    pages = ("--arms", *ARMS, "--port", "0")
    for words, expected in (
        (("--close",), "found no study; expected one begun by `mixpo annotate"),
        (("--close", "--export", "x.csv"), "--close: found beside --export, which does nothing with it"),
        (("--close", "--prompts", "3", "--tls-key", "k"), "--prompts, --tls-key: found beside --close, which does"),
        (("--import", "x.csv", "--yes"), "--yes: found beside --import"),
        ((*pages, "--yes"), "--yes: found without --close"),
        (("--arms", "zebra", "goat", "--port", "0"), "--arms: found 'goat'; expected two arms of the run"),
        ((*pages, "--tls-cert", "x.pem", "--tls-key", "x.pem"), "--tls-cert, --tls-key: found no usable pair"),
        ((*pages, "--host", "0.0.0.0"), "--host: found 0.0.0.0, which is every address"),
        ((*pages, "--host", "no.such.invalid"), "--host: found 'no.such.invalid'"),
        ((*pages, "--address", "example.org"), "--address: found 'example.org'; expected only such as https"),
        ((*pages, "--tls-cert", "x.pem"), "--tls-cert, --tls-key: found one of them"),
        ((*pages, "--guidelines", "none.txt"), "--guidelines: found none.txt, which cannot be read"),
        ((*pages, "--store", "nonsense"), "--store: found no URL; expected that of a PostgreSQL"),
        ((*pages, "--store", "postgresql+nodriver://me:hush@h/d"), "postgresql+nodriver://me:***@h/d: found a store"),
        ((*pages, "--store", "sqlite:////nowhere/at/all.sqlite"), "--store: found one of sqlite; expected that of a P"),
    ):
        code, said = run_cli(capsys, "annotate", run, *words)
        assert code == 2, said
        assert expected in said
        assert said.count("\n") == 1
        assert "hush" not in said
    assert run_cli(capsys, "agreement", run)[0] == 2
    assert not (Path(run) / "study").exists()
    (Path(run) / "study").mkdir()
    (Path(run) / "study" / "study.sqlite").write_bytes(b"no database" * 100)
    code, said = run_cli(capsys, "agreement", run)
    assert (code, said.count("\n")) == (2, 1)
    assert "found a store that cannot be used (file is not a database)" in said
    monkeypatch.setattr(studied, "NEEDED", ("no_such_package",))
    code, said = run_cli(capsys, "annotate", run)
    assert code == 2
    assert said.endswith("`pip install 'mixpo[study]'`\n")


def test_beyond_this_machine_without_tls_there_is_a_warning(tmp_path, capsys):
    run = str(fruit_run(tmp_path))
    words = ("annotate", run, "--arms", *ARMS, "--annotators", "2", "--port", "0", "--address")
    assert "warning: without TLS" in run_cli(capsys, *words, "http://study.example.org", "--host", "0.0.0.0")[1]
    code, said = run_cli(capsys, *words, "https://study.example.org/")
    assert code == 0
    assert "warning" not in said
    assert len(re.findall(r"  annotator [12]: https://study\.example\.org/a/\S{32}\n", said)) == 2


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
    assert server.is_encrypted(bound, address, tls=tls) == encrypted


def test_the_usual_port_is_no_part_of_an_address():
    local = ["[::1]:80", "localhost:80", "127.0.0.1:80"]
    assert server.addresses("::1", ("::1", 80), None, tls=True) == ("https://[::1]:80", local)
    usual = ["127.0.0.1", "localhost", "127.0.0.1"]
    assert server.addresses("127.0.0.1", ("127.0.0.1", 443), None, tls=True) == ("https://127.0.0.1", usual)
    for given, found in (
        ("https://Study.example.org:443/", ("https://study.example.org", ["study.example.org"])),
        ("http://study.example.org:443", ("http://study.example.org:443", ["study.example.org:443"])),
        ("http://[::1]:80", ("http://[::1]", ["[::1]"])),
    ):
        assert server.addresses("127.0.0.1", ("127.0.0.1", 9), given, tls=False) == found


@pytest.mark.parametrize(
    "given",
    ["http://[::1", "http://me:x@a.example", "http://@a", "http://a:b", "http://a:70000", "ftp://a", "http://a/b"],
)
def test_what_is_no_address_is_refused(given):
    with pytest.raises(InputError, match=re.escape(f"--address: found {given!r}; expected only such as https://")):
        server.addresses("127.0.0.1", ("127.0.0.1", 9), given, tls=False)


@pytest.mark.parametrize(("host", "bound"), [("0", "0.0.0.0"), ("::", "::"), ("0:0::0", "::")])
def test_every_address_is_none(host, bound):
    with pytest.raises(InputError, match=f"^--host: found {host}, which is every address of this machine"):
        server.addresses(host, (bound, 9), None, tls=False)


def test_a_password_is_never_shown():
    opened = Store(URL.create("sqlite", database="/nowhere/x.sqlite"))
    opened.password = "hush"
    with pytest.raises(InputError) as refused, opened._told():
        raise SQLAlchemyError("me:hush@h was refused\nfor reasons")
    assert str(refused.value).startswith("/nowhere/x.sqlite: found a store that cannot be used (me:***@h was refused);")
    assert "\n" not in str(refused.value)


DATABASE = os.environ.get("MIXPO_TEST_DATABASE")


@pytest.mark.skipif(DATABASE is None, reason="MIXPO_TEST_DATABASE names no empty PostgreSQL database")
def test_a_study_in_postgresql(tmp_path):
    study = Study(fruit_run(tmp_path), url=DATABASE)
    try:
        anna = study.person("anna")
        word = anna.word(1)
        for choice in ("left", "right"):
            anna.post(1, choice, word, comment="a\0b")
        anna.judge(1, "tie", comment="مرحبا")
        anna.judge(2, "skip", reason="other")
        said = [Said("left", "", f"{n % 3}", 1.0, False, store.now()) for n in range(8)]
        threads = [threading.Thread(target=study.store.judge, args=(2, 1, said[n], f"n{n % 3}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert study.said() == {("anna", 1): "tie", ("anna", 2): "skip", ("ben", 1): "left"}
        assert earlier(study.store) == {("anna", 1): ["left"], ("ben", 1): ["left", "left"]}
        assert [(one.judged, one.skipped) for one in study.store.progress()] == [(1, 1), (1, 0), (0, 0)]
        files.export(study.store, study.row, tmp_path / "all.csv")
        assert files.take_in(study.store, study.row, tmp_path / "all.csv") == (3, 0)
        again = Study(study.run, url=DATABASE)
        again.store.dispose()
        assert (again.tokens, again.lost) == (study.tokens, [])
        fruit_run(tmp_path / "other", texts={("yak", 1): "plums"})
        with pytest.raises(
            InputError, match=r"found a study of other completions .* and use another database to begin"
        ):
            Study(tmp_path / "other" / "run", Wanted(), url=DATABASE)
        word = anna.word(3)
        assert close(study).counted == ["anna", "ben"]
        assert anna.post(3, "left", word).status_code == 403
        assert len(study.said()) == 3
    finally:
        store.Base.metadata.drop_all(study.store.engine)
        study.store.dispose()


# files


COMMENTS = ["=1+1", "+x", "-x", "@x", "'quoted", "plain, with a comma", 'two\nlines "and" marks', "𝔘 مرحبا", "\tx"]


def judged(study: Study) -> None:
    for place, number in enumerate(range(1, 6)):
        study.person("anna").judge(number, ("left", "tie", "right")[place % 3], comment=COMMENTS[place])
        study.person("ben").judge(number, "tie", comment=COMMENTS[(place + 4) % len(COMMENTS)])
    study.person("cleo").judge(1, "skip", reason="other", comment=COMMENTS[8])


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_comes_back_as_it_was(make, tmp_path, form):
    study = make()
    empty = tmp_path / "other" / "study" / "study.sqlite"
    empty.parent.mkdir(parents=True)
    with sqlite3.connect(study.run / "study" / "study.sqlite") as there, sqlite3.connect(empty) as copy:
        there.backup(copy)
    there.close()
    copy.close()
    judged(study)
    path = tmp_path / f"all.{form}"
    assert files.export(study.store, study.row, path) == 11
    assert files.take_in(study.store, study.row, path) == (11, 0)
    path.write_bytes(path.read_bytes().replace(b"False", b"FALSE"))  # as spreadsheets write it
    assert files.take_in(study.store, study.row, path) == (11, 0)
    other = Store(store_url(tmp_path / "other", None))
    assert files.take_in(other, study.row, path) == (11, 11)
    assert [one.said for one in other.questions()] == [one.said for one in study.store.questions()]
    assert files.take_in(other, study.row, path) == (11, 0)
    other.dispose()


def test_no_cell_of_an_export_is_a_formula(make, tmp_path):
    study = make()
    judged(study)
    files.export(study.store, study.row, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(encoding="utf8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert "'=1+1" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "left"}, "anna, question 2: found choice 'tie' here and 'left' in the file; expected the same"),
        ({"comment": "other"}, "anna, question 2: found comment '+x' here and 'other' in the file; expected the same"),
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
def test_what_does_not_fit_is_refused_whole(make, tmp_path, change, message):
    study = make()
    judged(study)
    path = tmp_path / "all.jsonl"
    files.export(study.store, study.row, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with study.store._session(write=True) as session:  # so that all others would be new
        session.query(store.JudgementRow).filter(store.JudgementRow.number != 2).delete()
    before = study.said()
    with pytest.raises(InputError) as refused:
        files.take_in(study.store, study.row, path)
    first, *last = str(refused.value).splitlines()
    assert message in first
    assert len(first) < len(str(path)) + 420
    assert "nothing was imported" in "".join([first, *last][-1:])
    assert first.startswith(f"{path}:2: ") == bool(last)
    assert study.said() == before


def test_files_that_are_no_export_are_refused(make, tmp_path, monkeypatch):
    study = make()
    judged(study)
    path = tmp_path / "all.jsonl"
    files.export(study.store, study.row, path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(InputError, match="found question 1 of anna twice; expected it once"):
        files.take_in(study.store, study.row, path)
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
            files.take_in(study.store, study.row, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(files, "LARGEST", 100)
        with pytest.raises(InputError, match="found more than 100 bytes; expected what --export writes"):
            files.take_in(study.store, study.row, path)
    with pytest.raises(InputError, match="found a place that cannot be written"):
        files.export(study.store, study.row, tmp_path / "no" / "all.csv")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:11]))
    study.store.close()
    with pytest.raises(InputError, match="found a study that is closed"):
        files.take_in(study.store, study.row, path)


# what a study says


def closed_study(folder: Path, choices: dict[str, list[str]], kinds: list[str | None] | None = None) -> Findings:
    """The files of a closed study: what everybody chose, prompt by prompt; W, T, L, S, or - for nothing."""
    better = {"W": "mpo", "T": "tie", "L": "ppo", "S": None}
    prompts = max(map(len, choices.values()))
    lines = []
    for name, said in choices.items():
        for prompt, word in enumerate(said):
            left = prompt % 2 == 0
            choice = {"W": "left" if left else "right", "L": "right" if left else "left", "T": "tie", "S": "skip"}
            if word != "-":
                line = {"annotator": name, "question": prompt + 1, "prompt": prompt, "better": better[word]}
                line |= {"category": kinds[prompt] if kinds else None, "choice": choice[word], "seconds": 10.0 + prompt}
                lines.append({**line, "idle": False})
    (folder / "study").mkdir(parents=True, exist_ok=True)
    closed = {"format": 1, "arms": ["mpo", "ppo"], "seed": 0, "draw": 0, "content": "", "closed": "today", "same": []}
    closed |= {"prompts": prompts, "annotators": list(choices)}
    (folder / "study" / "closed.json").write_text(json.dumps(closed))
    (folder / "study" / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = findings(folder)
    assert found is not None
    return found


PATTERNS = {
    "helpful": {"WWW": 24, "TTT": 4, "LLL": 6, "WWT": 6, "WWL": 2, "TTL": 3, "WTL": 5},
    "harmless": {"WWW": 4, "TTT": 32, "LLL": 1, "WWT": 4, "TTW": 4, "TTL": 4, "LLT": 1},
}
"""How three people judged 50 prompts of a kind: 93 wins, 29 ties and 28 losses; 24 wins, 117 ties and 9 losses."""


def turned(patterns: dict[str, int]) -> list[str]:
    """What three people said of each prompt, none of them always first."""
    said = [pattern for pattern, count in patterns.items() for _ in range(count)]
    return [pattern[n % 3 :] + pattern[: n % 3] for n, pattern in enumerate(said)]


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
    helpful, harmless = map(turned, PATTERNS.values())
    kinds = ["helpful"] * 50 + ["harmless"] * 50
    said = {name: [one[n] for one in helpful + harmless] for n, name in enumerate(PEOPLE)}
    found = closed_study(tmp_path, said, kinds)
    for kind, shares, kappa in (("helpful", [62.0, 19.3, 18.7], 0.546049), ("harmless", [16.0, 78.0, 6.0], 0.521707)):
        each, agreement = found.shares[kind], found.agreement[kind]
        assert (each.prompts, agreement.common, agreement.several) == (50, 50, 50)
        assert [round(100 * share.mean, 1) for share in (each.win, each.tie, each.lose)] == shares
        assert agreement.kappa.mean == pytest.approx(kappa, abs=2e-6)
        assert agreement.kappa.low < kappa < agreement.kappa.high
    agreement = found.agreement["helpful"]
    assert agreement.alpha.mean == pytest.approx(0.549076, abs=2e-6)
    assert agreement.pairs.mean == pytest.approx(0.753333, abs=2e-6)
    assert agreement.pairs.low < 0.753333 < agreement.pairs.high
    shown = rows(tables(found)["What people prefer"])
    assert [cell[:4] for cell in shown["helpful"][1:]] == ["50", "0.62", "0.19", "0.19", "0.43", "<0.0"]
    assert [cell[:4] for cell in shown["all prompts"][1:]] == ["100", "0.39", "0.49", "0.12", "0.27", "<0.0"]
    assert opening(found).startswith(
        "3 people, who did not know which was which, preferred mpo to ppo on 39% of 100 prompts, called 49% a tie, "
        "and preferred ppo on 12%: difference 0.27 ["
    )
    assert "] (p <0.001), above zero. Fleiss' κ 0.6" in opening(found)
    assert opening(found).endswith("over 100 prompts.")


def test_the_margins_of_categories_are_corrected_for_their_number(tmp_path):
    said = {"anna": [*"WWWWWWWWLLWTWWLWWT", *"WTWTTTTTT"]}
    alone = closed_study(tmp_path / "alone", said)
    several = closed_study(tmp_path / "several", said, ["helpful"] * 18 + ["harmless"] * 9)
    one, many = (_corrected(found)[None] for found in (alone, several))
    assert alone.shares[None].difference == several.shares[None].difference
    assert one == pytest.approx(scipy.stats.binomtest(15, 18).pvalue)
    assert many == pytest.approx(3 * one)
    assert "corrected for all rows (Holm)" in str(tables(several)["What people prefer"].notes)
    assert "corrected" not in str(tables(alone)["What people prefer"].notes)


def test_categories_stand_apart_and_together(tmp_path):
    kinds = ["helpful", "harmless"] * 4
    said = ["W", "T", "W", "T", "W", "L", "L", "T"]
    found = closed_study(tmp_path, {"anna": said, "ben": ["W"] * 8}, kinds)
    assert list(found.shares) == ["helpful", "harmless", None]
    assert found.shares["helpful"].win.mean == pytest.approx(7 / 8)
    assert found.shares["harmless"].win.mean == pytest.approx(4 / 8)
    assert found.shares[None].win.mean == pytest.approx(11 / 16)
    assert [each.prompts for each in found.shares.values()] == [4, 4, 8]
    named = closed_study(tmp_path, {"anna": said}, ["all", None] * 4)  # no category is taken for the total
    assert [named.shares[name].prompts for name in ("all", None)] == [4, 8]
    assert list(rows(tables(named)["What people prefer"])) == ["all", "all prompts"]


def test_who_judged_nothing_spoils_no_kappa(tmp_path):
    said = {"anna": list("WWTL"), "ben": list("WWTW"), "cleo": list("----"), "dora": list("SS--")}
    found = closed_study(tmp_path, said)
    assert found.left_out == ["cleo", "dora"]
    assert found.agreement[None].common == 4
    # 3 of 4 agree; 5 wins, 2 ties, 1 loss of 8: chance (25 + 4 + 1) / 64
    assert found.agreement[None].kappa.mean == pytest.approx((0.75 - 30 / 64) / (1 - 30 / 64))
    table = tables(found)["How far they agree"]
    assert "Left out, having judged nothing: cleo, dora." in table.notes
    assert rows(tables(found)["The annotators"])["dora"][:4] == ["dora", "0 of 4", "2", ""]


def test_kappa_is_of_the_prompts_that_all_judged_and_alpha_of_all(tmp_path):
    """Of WWW, WTL, TT, LLW and W: alpha has 11 ratings, 5 W, 3 T and 3 L, and disagreements 0 + 3 + 0 + 2.

    1 - 10 * 5 / (11^2 - 5^2 - 3^2 - 3^2) = 0.358974; of the three prompts that all judged it were 0.130435.
    """
    found = closed_study(tmp_path, {"anna": list("WWTLW"), "ben": list("WT-LS"), "cleo": list("WLTW-")})
    agreement = found.agreement[None]
    assert (agreement.common, agreement.several) == (3, 4)
    assert agreement.alpha.mean == pytest.approx(28 / 78)
    assert agreement.pairs.mean == pytest.approx(10 / 20)
    assert found.shares[None].prompts == 5


def test_kappa_of_those_who_always_say_the_same_cannot_be_told(tmp_path):
    found = closed_study(tmp_path, {"anna": list("WWWW"), "ben": list("WWWW")})
    assert rows(tables(found)["How far they agree"])["all prompts"][1] == "cannot be told"
    assert "Fleiss' κ cannot be told." in opening(found)
    alone = closed_study(tmp_path, {"anna": list("WLTW")})
    assert rows(tables(alone)["How far they agree"])["all prompts"][1:3] == ["cannot be told", "0"]
    assert opening(alone).startswith("One person, who did not know")
    assert closed_study(tmp_path, {"anna": list("----")}).counted == []
    assert opening(closed_study(tmp_path, {"anna": list("SS--")})).startswith("Nobody judged a prompt of mpo and ppo")


def test_nothing_is_claimed_that_the_interval_does_not_hold(tmp_path):
    found = closed_study(tmp_path, {"anna": list("WLWLW"), "ben": list("LWLWW")})
    assert "which does not tell the two apart" in opening(found)
    assert not re.search(r"\bwins\b|above zero|below zero", opening(found))
    lost = closed_study(tmp_path, {"anna": list("LLLLLL"), "ben": list("LLLLLT")})
    assert ", below zero." in opening(lost)
    for said, margin, p in (("WW", 1, 0.5), ("TTTTT", 0, 1.0)):  # alike on every prompt, and so few
        alike = closed_study(tmp_path, {"anna": list(said), "ben": list(said)})
        assert f"difference {margin}.00 [" in opening(alike)
        assert f"(p {p:.2f}), which does not tell the two apart" in opening(alike)
        low, high = proportion_confint(len(said), len(said), method="wilson")
        shown = rows(tables(alike)["What people prefer"])["all prompts"]
        assert shown[2 if margin else 3] == f"1.00 [{low:.2f}, {high:.2f}]"
    agreed = closed_study(tmp_path, {"anna": list("WL"), "ben": list("WL")})
    assert rows(tables(agreed)["How far they agree"])["all prompts"][1:6:4] == ["1.00", "2"]
    once = closed_study(tmp_path, {"anna": ["W"], "ben": ["L"]})
    assert "difference 0.00 [-" in opening(once)
    assert "nan" not in "".join(cell for table in tables(once).values() for row in table.rows for cell in row)


def test_a_habit_of_one_side_shows(tmp_path):
    found = closed_study(tmp_path, {"anna": ["WL"[n % 2] for n in range(40)], "ben": ["T"] * 40})
    anna, ben = found.annotators
    assert anna.left.mean == 1.0  # W is on the left at even prompts, L at odd ones
    assert anna.left.low == pytest.approx(40 / (40 + 1.959964**2), abs=1e-4)  # Wilson's bound of 40 in 40
    assert ben.left is None
    assert anna.seconds == 29.5


def test_completions_that_are_the_same_are_ties_that_nobody_was_asked(make):
    study = make()
    anna = study.person("anna")
    for number in range(1, 6):
        anna.prefer(number, "apples")
    found = close(study)
    assert found.shares[None].prompts == 6
    assert found.shares[None].win.mean == pytest.approx(5 / 6)
    assert found.shares[None].tie.mean == pytest.approx(1 / 6)
    assert any("1 prompt that both arms completed alike" in note for note in tables(found)["What people prefer"].notes)


def test_the_report_has_closed_studies(make):
    from mixpo.report.page import document, text

    study = make()
    study.person("anna").prefer(1, "apples")
    found = close(study)
    results = load_runs(study.run)
    made = section(results)
    assert made is not None
    assert made.opening == opening(found)
    assert [group.title for group in made.groups] == list(tables(found))
    assert "people" in [one.id for one in document(results).sections]
    assert '<section id="people">' in text(results, "html")
    assert "## People" in text(results, "md")


def test_damaged_files_of_a_closed_study_are_named(make):
    study = make()
    close(study)
    file = study.run / "study" / "closed.json"
    whole = file.read_text()
    for broken in (whole[:40], "{}", "[]", whole.replace('"format": 1', '"format": 9')):
        file.write_text(broken)
        with pytest.raises(InputError, match=r"found no readable study|found a study of format 9"):
            findings(study.run)


# a real server, over TLS, and killed


def start(run: Path, port: int, folder: Path, *more: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """`mixpo annotate` in a process of its own; it and the links that it prints, by name."""
    command = [sys.executable, "-m", "mixpo.cli.main", "annotate", str(run), "--port", str(port), *more]
    if not (run / "study").exists():
        command += ["--arms", *ARMS, "--annotators", "50"]
    with (folder / "errors.txt").open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        if match := re.match(r"  (annotator \d+): (\S+)", line):
            found[match[1]] = match[2]
        if line.startswith("Ctrl-C"):
            return process, found
    raise AssertionError((folder / "errors.txt").read_text())


def test_a_study_over_tls(tmp_path):
    import httpx2

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    pair = issued.private_key_and_cert_chain_pem
    (tmp_path / "pair.pem").write_bytes(pair.bytes())
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    words = ("--tls-cert", str(tmp_path / "pair.pem"), "--tls-key", str(tmp_path / "pair.pem"))
    process, links = start(fruit_run(tmp_path), 0, tmp_path, *words)
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
    run = fruit_run(tmp_path, prompts=questions + 1)  # one is the same of both
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, links = start(run, port, tmp_path)
    processes = [first]
    acknowledged: dict[tuple[str, int], str] = {}
    failures: list[str] = []

    def work(name: str, link: str) -> None:
        with httpx2.Client(follow_redirects=False, timeout=20.0, trust_env=False) as browser:

            def ask(method: str, path: str, **more: Any) -> Any:
                """As somebody who loads a page again until it comes."""
                for _ in range(600):
                    try:
                        answer = browser.request(method, httpx2.URL(link).join(path), **more)
                    except httpx2.TransportError:
                        time.sleep(0.1)
                        continue
                    if answer.status_code in (429, 503):
                        time.sleep(0.2)
                        continue
                    return answer
                raise AssertionError("never came")

            def post(path: str, data: dict[str, str]) -> Any:
                return ask("POST", path, data=data)

            try:
                ask("GET", link)
                for number in range(1, questions + 1):
                    word = re.search(r'name="form" value="([^"]+)"', ask("GET", f"/q/{number}").text)[1]
                    choice = ("left", "tie", "right")[(number + int(name.split()[1])) % 3]
                    data = {"form": word, "choice": choice}
                    with ThreadPoolExecutor(2) as both:  # a double click
                        for answer in both.map(post, [f"/q/{number}"] * 2, [data] * 2):
                            assert answer.status_code == 303
                            assert f"saved={number}" in answer.headers["location"]
                    acknowledged[name, number] = choice
            except Exception as error:
                failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=one) for one in links.items()]
    for thread in threads:
        thread.start()
    try:
        while len(acknowledged) < 50 * questions // 2 and not failures:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = dict(acknowledged)
        opened = Store(store_url(run, None))
        kept = {(one.annotator, one.number): one.said.choice for one in opened.questions() if one.said}
        opened.dispose()
        assert before.items() <= kept.items()
        assert len(before) < 50 * questions
        second, again = start(run, port, tmp_path)
        processes.append(second)
        assert again == links
        for thread in threads:
            thread.join()
    finally:
        for process in processes:
            process.kill()
            assert process.communicate()[0] == ""  # nothing of requests, whose first address holds a token
    assert failures == []
    opened = Store(store_url(run, None))
    assert {(one.annotator, one.number): one.said.choice for one in opened.questions() if one.said} == acknowledged
    assert len(acknowledged) == 50 * questions
    assert earlier(opened) == {}
    opened.dispose()
    assert (tmp_path / "errors.txt").read_text() == ""
