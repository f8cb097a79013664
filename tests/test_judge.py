"""LLM judges at a server on loopback, well-behaved and not: questions, verdicts, retries, limits, keys and report."""

import asyncio
import errno
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from command_line import CommandResult, run_mixpo
from judge_server import (
    JudgeRequest,
    Response,
    Server,
    format_scores,
    make_completion,
    make_error,
    make_response,
    run_server,
)
from mixpo.algorithms.agreement import cohen_kappa, krippendorff_alpha
from mixpo.algorithms.multiple_testing import correct_by_holm
from mixpo.algorithms.win_rates import win_minus_loss_rate
from mixpo.cli import display
from mixpo.data.errors import InputError
from mixpo.experiments.comparisons import Comparison
from mixpo.experiments.results import load_runs
from mixpo.judge import client
from mixpo.judge.endpoint import is_loopback_endpoint, is_unencrypted_endpoint, normalize_endpoint
from mixpo.judge.outcomes import Verdict, compute_verdict_shares
from mixpo.judge.questions import Template, read_template
from mixpo.judge.replies import JudgeReply, parse_reply, parse_scores
from mixpo.judge.verdicts import FILE, open_verdicts_for_append, read_verdicts
from mixpo.report import judges, page
from mixpo.report.document import Section
from mixpo.stages.rows import read_table, write_table
from report_runs import SFT_SCORES, Writer, plain, rows, table

KINDS = ["helpful", None, "harmless", "helpful", None, "harmless"]
KEY = "sk-very-secret-0123456789"
ARMS = ("mpo", "ppo")


@pytest.fixture
def server() -> Iterator[Server]:
    with run_server() as running:
        running.prefer(lambda request: "of mpo" in request.completions[0])
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that the client asked for, in seconds: no test sleeps, and prompts keep their order."""
    seconds_waited: list[float] = []

    async def sleep_unless_halted(seconds: float, halt_event: asyncio.Event) -> None:
        seconds_waited.append(seconds)

    monkeypatch.setattr(client, "sleep_unless_halted", sleep_unless_halted)
    monkeypatch.setattr(client, "shuffle_by_prompt", list)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return seconds_waited


class Study:
    """A run folder, and `mixpo judge` on it."""

    def __init__(self, run: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.server, self.capsys = run, server, capsys
        self.file = self.run / FILE

    def judge(self, *words: str, arms: tuple[str, str] = ARMS, model: str = "tiny") -> CommandResult:
        settings = ["--arms", *arms, "--model", model, "--endpoint", self.server.url]
        return run_mixpo(self.capsys, "judge", str(self.run), *settings, *words)

    def read_refusal(self, *words: str) -> str:
        """The one line with which a command is refused before anything is asked."""
        result = self.judge(*words)
        assert (result.code, result.err.count("\n"), self.server.requests) == (2, 1, [])
        return result.err

    def scored(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [line for line in lines if "question" in line]

    def section(self) -> Section:
        return judges.build_judges_section(load_runs(self.run))

    def rows(self, title: str = "tiny") -> dict[str, list[str]]:
        return rows(table(self.section(), title))


def write_run(folder: Path) -> Path:
    return Writer(folder / "run", categories=KINDS).run(plain(dict.fromkeys([*ARMS, "mpo-sft-kl"], SFT_SCORES)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def study(written: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> Study:
    """A copy of the run folder, whose stages are shared."""
    return Study(Path(shutil.copytree(written, tmp_path / "run")), server, capsys)


# Replies


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_scores(8, 5), (8.0, 5.0)),
        (format_scores(0, 10), (0.0, 10.0)),
        (format_scores("7.5", "8/10"), (7.5, 8.0)),
        ("Response 1 Quality Score: 3 Explanation: a. Response 2 Quality Score: 4", (3.0, 4.0)),
        ("**Response 1 Quality Score: 3**\r\nwhy\r\n**Response 2 Quality Score:** 4\r\n", (3.0, 4.0)),
        (format_scores("8/100", 5), None),
        (format_scores("7/5", 5), None),
        (format_scores("7.", 5), None),
        (format_scores(8, "10.5"), None),
        (format_scores(11, 5), None),
        (format_scores(-1, 5), None),
        (format_scores("NaN", 5), None),
        (format_scores("8 9", 5), None),
        (format_scores("8 or 9", 5), None),
        (format_scores("٣", 5), None),
        (format_scores(8, 5) + "\n" + format_scores(5, 8), None),
        ("Response 1 Quality Score: 8\n", None),
        ("Response 2 Quality Score: 8\nResponse 1 Quality Score: 5", None),
        (format_scores(8, 5) + "\nResponse 3 Quality Score: 5", None),
        ("8 5", None),
        ("", None),
    ],
)
def test_scores_are_those_that_the_papers_prompt_asks_for_or_none(text, expected):
    assert parse_scores(JudgeReply(text)) == expected


def test_a_number_that_was_cut_is_no_score():
    whole = "Response 1 Quality Score: 9\nExplanation: a\nResponse 2 Quality Score: 10"
    assert parse_scores(JudgeReply(whole)) == (9.0, 10.0)
    assert parse_scores(JudgeReply(whole[:-1], truncated=True)) is None
    assert parse_scores(JudgeReply(whole + "\nExplanation: it was good beca", truncated=True)) == (9.0, 10.0)
    assert parse_reply(make_completion("9", finish="length")[2]).truncated


# What is asked, and what it says


def test_both_orders_of_every_pair_are_asked_once_and_kept(study, server):
    result = study.judge()
    assert result.code == 0
    pairs = {tuple(request.completions) for request in server.requests}
    orders = (ARMS, ARMS[::-1])
    assert pairs == {(f"answer {n} of {one}", f"answer {n} of {other}") for n in range(1, 6) for one, other in orders}
    assert len(server.requests) == len(study.scored()) == 10
    assert {request.key for request in server.requests} == {""}
    body = server.requests[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 1024)
    assert "Assistant: a reply\n\nUser: question" in body["messages"][0]["content"]
    assert result.means("win", "tie", "lose") == ["0.83", "0.17", "0.00"]
    assert "mpo vs ppo: the same text on 1 prompt, counted as a tie without a request." in result.out
    assert "10 requests, 150 tokens, 10 of 10 questions done" in result.out
    row = next(line for line in study.scored() if line["prompt"] == 3 and line["arms"] == ["ppo", "mpo"])
    assert (row["scores"], row["tokens"], row["category"], row["seed"]) == ([4.0, 9.0], [10, 5], "helpful", 0)
    assert row["replies"] == [format_scores(4, 9)]
    assert row["format"] == 1

    repeated = study.judge()
    assert len(server.requests) == 10
    assert repeated.cell("win") == result.cell("win")
    assert "10 of 10 questions were asked before" in repeated.out
    swapped = study.judge(arms=ARMS[::-1])
    assert (swapped.cell("lose"), swapped.cell("prompts")) == (result.cell("win"), "6")
    assert "ppo vs mpo: the same text on 1 prompt" in swapped.out
    assert len(server.requests) == 10
    assert len(read_verdicts(study.file).assignments) == 1  # so the report says it once
    assert len(judges.load_judge_verdicts(load_runs(study.run))) == 1
    for words in (["--temperature", "0.5"], ["--reply-tokens", "99"], ["--seed", "0", "--prompts", "6"]):
        study.judge(*words)
    assert len(server.requests) == 30  # another temperature, another limit; the last asks nothing new


@pytest.mark.parametrize(
    ("prefers_first", "other", "expected"),
    [
        (lambda request: True, "ppo", {"tie": "1.00", "flips": "1.00", "flips to the first": "1.00"}),
        (lambda request: request.prompt == 2, "ppo", {"flips": "1.00", "flips to the first": "0.20"}),
        (lambda request: True if "of mpo" in request.completions[0] else None, "ppo", {"tie": "1.00", "flips": "0.00"}),
        (
            lambda request: len(request.completions[0]) > len(request.completions[1]),
            "mpo-sft-kl",
            {"lose": "0.83", "longer wins": "1.00", "win at equal length": "not estimable"},
        ),
    ],
    ids=["always the first", "mostly the second", "a win in one order and a tie in the other", "the longer"],
)
def test_what_a_judge_prefers_is_what_the_table_says(study, server, prefers_first, other, expected):
    server.prefer(prefers_first)
    assert study.judge(arms=("mpo", other)).means(*expected) == list(expected.values())
    if expected.get("flips to the first") == "1.00":
        flips = "100% of the verdicts flip with the order, 100% of these to the completion shown first."
        assert flips in study.section().opening


def test_only_the_prompts_asked_for_count(study, server):
    result = study.judge("--prompts", "2", "--draw", "1")
    numbers = {request.prompt for request in server.requests}
    same = "the same text on 1 prompt" in result.out
    assert len(numbers) + same == 2
    assert result.cell("prompts") == "2"
    study.judge("--prompts", "5")
    assert len(server.requests) <= 10


def test_categories_and_a_template_of_ones_own(study, server, tmp_path):
    own = tmp_path / "own.j2"
    own.write_text("{{ messages[-1].content }}\n\nResponse 1: {{ first }}\n\nResponse 2: {{ second }}")
    server.prefer(lambda request: ("of mpo" in request.completions[0]) == (request.prompt in (2, 5)))
    result = study.judge("--template", str(own))
    assert server.requests[0].body["messages"][0]["content"].startswith("question ")
    found = study.rows()
    assert list(found) == ["mpo vs ppo", "mpo vs ppo: helpful", "mpo vs ppo: harmless"]
    # helpful: 0 (same text) and 3 (lost); harmless: 2 and 5 (won); of none: 1 and 4 (lost)
    counts = {name: [row[1], *(cell.split()[0] for cell in row[2:6])] for name, row in found.items()}
    assert counts == {
        "mpo vs ppo": ["6", "0.33", "0.17", "0.50", "−0.17"],
        "mpo vs ppo: helpful": ["2", "0.00", "0.50", "0.50", "−0.50"],
        "mpo vs ppo: harmless": ["2", "1.00", "0.00", "0.00", "1.00"],
    }
    assert "harmless" in result.out
    study.judge()
    assert len(server.requests) == 20  # other words, other questions


def test_two_judges_and_their_agreement(study, server):
    server.prefer(
        lambda request: ("of mpo" in request.completions[0]) == (request.model == "one" or request.prompt < 4)
    )
    result = study.judge("--model", "two", model="one")
    assert len(server.requests) == 20
    # by hand: one says 1 five times; two says 1 three times and -1 twice
    one, two = np.array([2] * 5), np.array([2, 2, 2, 0, 0])
    counts = np.stack([np.bincount(pair, minlength=3) for pair in np.stack([one, two], axis=1)])
    found = study.rows("Agreement of judges")
    assert found["one and two"][1:] == ["mpo vs ppo", "5", f"{cohen_kappa(one, two):.2f}"]
    assert found["one and two"][3] == "0.00"  # observed 0.6, by chance 0.6
    assert found["all 2"][2] == "5"
    assert found["all 2"][3].startswith(f"{krippendorff_alpha(counts):.2f}".replace("-", "−"))
    assert "Agreement of judges" in result.out
    assert [study.rows(name)["mpo vs ppo"][2].split()[0] for name in ("one", "two")] == ["0.83", "0.50"]


def test_p_is_corrected_for_every_row_of_every_judge(study, server):
    def load_verdict_rows() -> list[judges.VerdictRow]:
        return judges.compute_verdict_rows(judges.load_judge_verdicts(load_runs(study.run)))

    study.judge()
    (alone,) = [row.p for row in load_verdict_rows() if row.category is None]
    server.prefer(lambda request: None)
    study.judge(model="other")
    shown = load_verdict_rows()
    assert len(shown) == 6
    corrected = next(row.p for row in shown if row.judged.judge.model == "tiny" and row.category is None)
    assert [row.p for row in shown] == pytest.approx(correct_by_holm([row.tally.p for row in shown]))
    assert alone == pytest.approx(3 * 0.0625)  # five wins of five, in one row of three
    assert corrected > alone


# Servers that behave badly

ENDLESS = make_response(itertools.repeat(b" " * 65536))
BAD: dict[str, Response | str] = {
    "slow": "slow",
    "cut": "cut",
    "500": make_error(500, "oh no"),
    "429": make_error(429, "slow down"),
    "malformed JSON": make_response(b'{"choices": [{"mess'),
    "a page": make_response(b"<html>it works</html>", Content_Type="text/html"),
    "nothing": make_response(b""),
    "a list": make_response(b"[1]"),
    "no choices": make_response(b'{"choices": []}'),
    "choices of null": make_response(b'{"choices": null, "usage": 3}'),
    "no message": make_response(b'{"choices": [{"finish_reason": "stop"}]}'),
    "a message that is none": make_response(b'{"choices": [{"message": "hello"}]}'),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_fails_is_asked_again_and_nothing_is_unparsed(study, server, waits, kind):
    server.override(lambda request: BAD[kind] if request.number < 2 else None)
    result = study.judge("--concurrency", "1", "--timeout", "1" if kind == "slow" else "20")
    assert (result.code, len(server.requests), result.means("win")) == (0, 12, ["0.83"])
    assert "parsed" not in result.out
    assert (1.0 <= waits[0] <= 1.5, 2.0 <= waits[1] <= 3.0, len(waits)) == (True, True, 2)


@pytest.mark.parametrize(
    "content",
    [None, [{"type": "text", "text": format_scores(8, 5)}], 8, ""],
    ids=["null", "parts", "a number", "empty"],
)
def test_a_reply_without_text_is_asked_again_once_and_is_no_failure(study, server, waits, content):
    server.override(lambda request: make_completion(content) if request.prompt in (2, 4) else None)
    result = study.judge()
    assert (result.code, len(server.requests), waits) == (0, 10 + 4, [])
    assert "no verdict on 2 prompts, because a reply could not be parsed" in result.out


def test_a_real_pause_ends_early_where_nothing_more_is_asked(monkeypatch):
    monkeypatch.undo()

    async def measure_waits() -> list[float]:
        clock, halt_event = asyncio.get_running_loop().time, asyncio.Event()
        begin = clock()
        await client.sleep_unless_halted(0.02, halt_event)
        between = clock()
        asyncio.get_running_loop().call_later(0.02, halt_event.set)
        await client.sleep_unless_halted(60.0, halt_event)
        await client.sleep_unless_halted(60.0, halt_event)
        return [between - begin, clock() - between]

    whole, early = asyncio.run(measure_waits())
    assert 0.015 <= whole < 5
    assert early < 5


def test_no_more_at_once_than_were_asked_for(study, server):
    together = threading.Barrier(3)

    def wait_for_others(request: JudgeRequest) -> None:
        if request.number < 9:  # three at a time, each of which waits for two others
            together.wait(10)

    server.override(wait_for_others)
    assert study.judge("--concurrency", "3").code == 0
    assert (len(server.requests), server.max_concurrent) == (10, 3)
    study.file.unlink()
    assert study.judge("--concurrency", "1000000000").code == 0  # nor than there are questions
    assert len(server.requests) == 20


def test_a_server_says_how_long_to_wait(study, server, waits):
    date = datetime.now(UTC) + timedelta(seconds=90)
    headers = ("20", format_datetime(date, usegmt=True), "100000", "soon")
    bad = [make_error(429, "slow down", Retry_After=header) for header in headers]
    server.override(lambda request: bad[request.number] if request.number < 4 else None)
    assert study.judge("--concurrency", "1").code == 0
    limits = [(20, 30), (80, 135), (300, 450), (8, 12)]  # the fourth in turn: 2 ** 3
    assert all(low <= wait <= high for wait, (low, high) in zip(waits, limits, strict=True))
    assert client.parse_retry_after("nan") is None
    assert client.parse_retry_after("-3") == 0.0


def test_questions_that_fail_are_counted_by_kind_and_asked_by_the_next_call(study, server):
    respond_well = server.respond
    bad = {2: make_error(500, "no <memory>\n on \x1b[31mthe device"), 4: make_error(400, "too long")}
    server.override(lambda request: bad.get(request.prompt))
    result = study.judge("--attempts", "3")
    assert (result.code, len(server.requests)) == (1, 6 + 2 * 3 + 2)  # a bad request is not asked again
    assert "2 questions failed: HTTP 500: no <memory> on \ufffd[31mthe device\n" in result.err
    assert "2 questions failed: HTTP 400: too long\n" in result.err
    assert result.means("win") == ["0.75"]
    assert "no reply yet on 2 prompts" in result.out
    assert "a tie without a request, counted in proportion to the other prompts with a verdict;" in result.out
    server.respond, before = respond_well, len(server.requests)
    assert study.judge().code == 0
    assert {request.prompt for request in server.requests[before:]} == {2, 4}
    assert len(server.requests) == before + 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_run_of_refusals_stops_with_one_line(study, server, status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.respond = lambda request: make_error(status, "The model `tiny` does not exist")
    result = study.judge("--concurrency", "1")
    assert (result.code, len(server.requests)) == (1, client.MAX_CONSECUTIVE_FAILURES) == (1, 8)
    assert result.err.splitlines()[-1] == (
        f"stopped: tiny: 8 questions in a row failed, the last with HTTP {status}: The model `tiny` does "
        "not exist; 2 questions are left; the same command asks them"
    )


def test_questions_that_always_fail_stand_in_nobodys_way(study, server):
    server.override(lambda request: make_error(400, "too long") if request.prompt != 5 else None)
    for _ in range(2):  # nothing was ever replied: the fault may be the call's
        result = study.judge("--concurrency", "1")
        assert result.err.splitlines()[-1].startswith("stopped: tiny: 8 questions in a row failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "shuffle_by_prompt", lambda questions: questions[::-1])
        study.judge("--concurrency", "1", "--max-requests", "1")
    assert len(study.scored()) == 1
    result = study.judge("--concurrency", "1")  # eight fail before the one that does not
    assert result.err == "8 questions failed: HTTP 400: too long\n"
    assert [line["prompt"] for line in study.scored()] == [5, 5]


def test_a_question_that_fails_once_others_have_replies_stops_nothing(study, server):
    server.override(lambda request: make_error(413, "too long") if request.prompt != 1 else None)
    assert study.judge("--concurrency", "1").err == "8 questions failed: HTTP 413: too long\n"
    server.respond = lambda request: make_error(500, "down")
    assert "stopped: tiny: 8 questions in a row failed" in study.judge("--concurrency", "1", "--attempts", "1").err


def test_prompts_come_in_another_order_at_every_call(study, server, monkeypatch):
    monkeypatch.undo()
    orders = set()
    for seed in range(3):
        random.seed(seed)
        study.file.unlink(missing_ok=True)
        study.judge("--concurrency", "1")
        numbers = [request.prompt for request in server.requests[10 * seed :]]
        assert numbers[::2] == numbers[1::2]  # both orders of a pair behind each other
        assert sorted(numbers[::2]) == [1, 2, 3, 4, 5]
        orders.add(tuple(numbers))
    assert len(orders) > 1


def test_a_wrong_name_of_a_judge_does_not_stop_the_others(study, server):
    server.override(lambda request: make_error(404, "no such model") if request.model == "wrong" else None)
    result = study.judge("--model", "tiny", "--concurrency", "1", model="wrong")
    assert (result.code, result.means("win")) == (1, ["0.83"])
    assert [sum(request.model == name for request in server.requests) for name in ("wrong", "tiny")] == [8, 10]
    assert result.err.splitlines()[-1] == (
        "stopped: wrong: 8 questions in a row failed, the last with HTTP 404: no such model; 2 questions "
        "are left; the same command asks them"
    )


def test_what_cannot_be_parsed_is_asked_again_once_and_counted(study, server):
    def dislike_numbers(request: JudgeRequest) -> Response | None:
        is_first = sum(one.body == request.body for one in server.requests) == 1
        is_bad = request.prompt == 2 or (request.prompt == 3 and is_first)
        return make_completion("I like both.") if is_bad else None

    server.override(dislike_numbers)
    result = study.judge()
    assert (result.code, len(server.requests)) == (0, 10 + 2 + 2)
    assert "no verdict on 1 prompt, because a reply could not be parsed" in result.out
    assert result.means("win") == ["0.80"]  # of five: four won, one the same text
    stored = [line for line in study.scored() if line["prompt"] in (2, 3)]
    both = ["I like both."]
    assert [(line["scores"], line["replies"]) for line in stored if line["prompt"] == 2] == [(None, both * 2)] * 2
    assert all(line["scores"] and line["replies"][:1] == both for line in stored if line["prompt"] == 3)
    assert [line["tokens"] for line in stored] == [[20, 10]] * 4  # of both replies
    study.judge()
    assert len(server.requests) == 14


def test_half_a_surrogate_pair_crashes_nothing(study, server):
    bad = {1: make_error(400, "half \ud800"), 2: make_completion(format_scores(8, 5) + "\ud83d")}
    server.override(lambda request: bad.get(request.prompt))
    result = study.judge()
    assert "HTTP 400: half \ufffd" in result.err
    assert any(line["replies"][0].endswith("so.\ufffd") for line in study.scored())
    rendered = Template("t", "{{ prompt }}{{ first }}{{ second }}").render_message("a\udc00", "\ud83d\ude00", "\ufeffb")
    assert rendered == "a\ufffd\U0001f600\ufeffb"


# Servers that mean harm


def test_a_reply_without_end_is_read_no_further_than_any(study, server):
    """Neither where it never ends nor where it says how long it is; the file keeps nothing of it."""
    server.respond = lambda request: ENDLESS
    result = study.judge("--concurrency", "1", "--prompts", "2")
    assert result.code == 1
    assert "questions failed: reply too long: more than 4,194,304 bytes\n" in result.err
    assert max(server.sent_bytes) < 10 * client.MAX_REPLY_BYTES  # what lies in buffers besides
    long = b'{"a": "' + b"x" * 50_000_000
    server.respond = lambda request: make_response(long, 500 if request.prompt == 2 else 200)
    result = study.judge("--concurrency", "1", "--attempts", "6")
    assert "questions failed: reply too long: more than 4,194,304 bytes\n" in result.err
    assert study.file.stat().st_size < 10_000


def test_a_reply_that_trickles_ends_with_the_time_for_a_request(study, server):
    def trickle() -> Iterator[bytes]:
        while not server.closing.wait(0.02):
            yield b" "

    server.respond = lambda request: make_response(trickle())
    result = study.judge("--prompts", "2", "--attempts", "1", "--timeout", "0.3")
    assert "questions failed: timeout: no reply within 0.3 s\n" in result.err


def test_a_packed_reply_is_not_unpacked(study, server):
    bomb = make_response(gzip.compress(bytes(20_000_000)), Content_Encoding="gzip")
    server.respond = lambda request: bomb
    result = study.judge("--attempts", "1")
    assert "questions failed: no chat completion: a reply encoded as gzip; expected plain JSON\n" in result.err
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_prompt_elsewhere(study, server, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with run_server() as other:
        place = other.url.removeprefix("http://").removesuffix("/v1")
        to = f"http://me:secret@{place}/v1/chat/completions?token=secret"
        server.respond = lambda request: make_response(b"", status, Location=to)
        result = study.judge("--concurrency", "1")
    assert (result.code, other.requests, len(server.requests)) == (1, [], client.MAX_CONSECUTIVE_FAILURES)
    assert f"8 questions failed: HTTP {status}: a redirect to {place}, not followed\n" in result.err
    assert "secret" not in result.err


def test_a_long_reply_is_judged_and_kept_in_part(study, server):
    server.respond = lambda request: make_completion(format_scores(8, 5) + "!" * 1_000_000)
    assert study.judge("--prompts", "2").code == 0
    for row in study.scored():
        assert row["scores"] == [8.0, 5.0]
        assert row["replies"][0].startswith(format_scores(8, 5))
        assert row["replies"][0].endswith(f"!… ({len(format_scores(8, 5)) + 1_000_000:,} characters)")
        assert len(row["replies"][0]) < 70_000


DIGITS = "9" * 5_000
COMPLETION = make_completion(format_scores(8, 5))[2]
HARMFUL: dict[str, Response] = {
    "an index": make_response(COMPLETION.replace(b'"index": 0', f'"index": {DIGITS}'.encode())),
    "an error": make_response(f'{{"error": {{"code": {DIGITS}}}}}'.encode()),
    "nested": make_response(b"[" * 1_000_000),
    "no UTF-8": make_response(b"\xff\xfe{" + bytes(range(256))),
    "a slow code": make_response(b"a-" + b"z9" * 500_000, Content_Type="text/plain; charset=punycode"),
    "an unknown code": make_response(b"hello", Content_Type="text/plain; charset=\xff"),
    "a nested error": make_response(b"[" * 1_000_000, 500),
    "an error of bytes": make_response(b"z9" * 1_000_000, 500, Content_Type="text/plain; charset=punycode"),
    "a wait": make_error(503, "later", Retry_After=DIGITS),
    "a wait below zero": make_error(503, "later", Retry_After=f"-{DIGITS}"),
    "a date": make_error(503, "later", Retry_After=f"Mon, 01 Jan {'9' * 12} 00:00:00 GMT"),
    "a zone": make_error(503, "later", Retry_After="Mon, 01 Jan 0001 00:00:00 +2359"),
    "a header without end": make_error(503, "later", X_Much="x" * 200_000),
    "a redirect": make_response(b"", 302),
}
for place in ("/elsewhere", "http://[", "//:x", "\xff"):
    HARMFUL[f"a redirect to {place}"] = make_response(b"", 302, Location=place)


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_a_server_may_send_is_a_failure_in_one_line(study, server, waits, kind):
    server.respond = lambda request: HARMFUL[kind]
    result = study.judge("--concurrency", "1", "--attempts", "2")
    assert (result.code, len(server.requests)) == (1, 8 if "redirect" in kind else 16)
    assert all(1.0 <= wait <= 450 for wait in waits)
    assert max(map(len, result.err.splitlines())) < 400
    assert study.scored() == []


def test_tokens_that_nobody_can_have_used_are_not_counted(study, server):
    for tokens in ("9" * 4_299, "1e999", "-1", "true", '"5"', str(10**9 + 1)):
        body = COMPLETION.replace(b'"prompt_tokens": 10', f'"prompt_tokens": {tokens}'.encode())
        assert parse_reply(body) == JudgeReply(format_scores(8, 5))
    assert parse_reply(make_completion(format_scores(8, 5), tokens=(10**9, 0))[2]).tokens == (10**9, 0)


@pytest.mark.parametrize("score", [DIGITS, f"0{DIGITS}", f"7.{DIGITS}", "9" * 400, "0" * 400 + "7"])
def test_a_score_of_thousands_of_digits_is_none(score):
    assert parse_scores(JudgeReply(format_scores(score, 5))) is None
    assert parse_scores(JudgeReply(format_scores("7.3333333333333333", 5))) == (7.3333333333333333, 5.0)


def test_reading_a_reply_takes_time_in_proportion_to_its_length():
    """A million characters of every kind that makes a careless expression start again from each of them.

    In a process that is ended where it takes a hundred times as long as it should.
    """
    code = """
from mixpo.judge.replies import JudgeReply, parse_scores
n = 1_000_000
label = "Response 1 Quality Score:"
for text in ("x" * n, " " * n, "x " * n, label + " " * n, label + "9" * n, label + "9." * n, label + "1." + "9" * n,
             "Response " + "1" * n, "Response " * n, "*" * n, label * 40_000, (label + " " * 99) * 8_000, "\\n" * n):
    for cut in (False, True):
        assert parse_scores(JudgeReply(text, cut)) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# Keys


def test_the_key_is_sent_and_stands_nowhere(study, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for this machine
    server.respond = lambda request: make_completion(f"{format_scores(8, 5)} {request.key}")
    server.override(lambda request: make_error(401, f"{'x' * 190}{KEY} is wrong") if request.prompt == 1 else None)
    result = study.judge()
    assert {request.key for request in server.requests} == {f"Bearer {KEY}"}
    written = "".join(path.read_text(errors="replace") for path in study.run.rglob("*") if path.is_file())
    for text in (result.out, result.err, written):
        assert KEY not in text
        assert KEY[:9] not in text  # nor cut in two
    assert "Bearer [OPENAI_API_KEY]" in written


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}é", f"a {KEY}"])
def test_a_key_that_is_none_is_refused_and_not_shown(study, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert study.read_refusal() == (
        "OPENAI_API_KEY: found a line break, a space or a character that no key has; expected the bare key "
        "(not shown here)\n"
    )


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("https://me:secret@api.example/v1", "found a user name or password in it"),
        ("https://secret@api.example/v1", "found a user name or password in it"),
        ("https://api.example/v1?key=secret", "found a query in it"),
        ("https://api.example/v1?", "found a query in it"),
        ("https://api.example/v1#", "found a query in it"),
        ("api.example/v1", "found 'api.example/v1'; expected http(s)://HOST[:PORT]/PATH"),
        ("ftp://api.example", "found 'ftp://api.example'"),
        ("http://", "found 'http://'"),
        ("http://[::1", "found no address"),
        ("http://a.example:port", "found no address"),
        ("http://a.example/v 1", "found 'http://a.example/v 1'"),
    ],
)
def test_endpoints_that_are_refused(endpoint, message):
    with pytest.raises(InputError, match=f"^--endpoint: {re.escape(message)}") as refused:
        normalize_endpoint(endpoint)
    assert "secret" not in str(refused.value)


def test_which_endpoints_are_this_machine():
    assert normalize_endpoint("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    assert [is_loopback_endpoint(f"http://{host}/v1") for host in ("localhost:1", "127.3.0.1", "[::1]:2")] == [True] * 3
    assert not is_loopback_endpoint("http://192.168.0.1/v1")


def test_a_server_that_asks_for_a_key_that_is_not_set(study, server):
    server.respond = lambda request: make_error(401, "no key")
    result = study.judge("--concurrency", "1")
    assert (result.code, len(server.requests)) == (1, 1)
    assert {request.key for request in server.requests} == {""}
    assert result.err.splitlines()[-1] == (
        "stopped: OPENAI_API_KEY: not set, but the server requires a key; set it in the environment; 9 questions are "
        "left; the same command asks them"
    )


def test_a_key_in_the_clear_is_warned_of(study, server, monkeypatch):
    assert is_unencrypted_endpoint("http://192.168.0.1/v1")
    assert not any(map(is_unencrypted_endpoint, ("https://192.168.0.1/v1", "http://127.0.0.1/v1")))
    monkeypatch.setattr("mixpo.judge.endpoint.is_loopback_endpoint", lambda endpoint: False)
    assert study.judge("--prompts", "2").err == ""  # no key
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert study.judge().err == f"--endpoint: {server.url} gets the key in the clear; expected https://\n"


def test_a_key_too_short_for_a_secret_is_left_in_texts(study, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "e")
    study.judge()
    assert study.scored()[0]["replies"] == [format_scores(*map(int, study.scored()[0]["scores"]))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", ""], "--model: found '', empty, repeated or unprintable"),
        (["--model", "tiny"], "--model: found 'tiny', empty, repeated or unprintable"),
        (["--temperature", "warm"], "--temperature: found 'warm'; expected a number from 0, or none"),
        (["--temperature", "-1"], "--temperature: found '-1'"),
        (["--temperature", "nan"], "--temperature: found 'nan'"),
        (["--temperature", "inf"], "--temperature: found 'inf'"),
        (["--reply-tokens", "0"], "--reply-tokens: found '0'; expected a whole number from 1, or none"),
        (["--reply-tokens", "1.5"], "--reply-tokens: found '1.5'"),
        (["--timeout", "inf"], "--timeout: found inf; expected a finite number"),
    ],
)
def test_options_that_are_refused(study, words, message):
    assert study.read_refusal(*words).startswith(message)


def test_models_that_refuse_a_temperature_and_a_limit(study, server):
    study.judge("--temperature", "none", "--reply-tokens", "none")
    assert {frozenset(request.body) for request in server.requests} == {frozenset({"model", "messages"})}
    settings = "the model's default temperature, no limit on the length of replies"
    assert settings in page.render_report(load_runs(study.run), "md")
    study.judge("--temperature", "none")
    assert server.requests[-1].body.keys() == {"model", "messages", "max_tokens"}
    assert len(server.requests) == 20


# Stops, limits, and going on


def test_progress_is_told_in_lines_and_in_a_bar(study, monkeypatch):
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    progress_lines = re.findall(r"judging: (\d)/4, (\d) requests, ([\d,]+) tokens", study.judge("--prompts", "2").out)
    assert progress_lines[-1][:2] == ("4", "4")
    assert int(progress_lines[-1][2]) > 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    bar = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", study.judge("--prompts", "4").out)
    assert re.search(r"judging .*(\d)/\1 .*\1 requests, [\d,]+ tokens", bar)
    assert "judging:" not in bar
    assert "judging:" in study.judge("--prompts", "5", "--quiet").out


def test_ctrl_c_keeps_what_is_done_and_the_next_call_asks_the_rest(study, server):
    respond_well = server.respond

    def interrupt(request: JudgeRequest) -> str | None:
        if request.number != 4:
            return None
        os.kill(os.getpid(), signal.SIGINT)
        return "slow"

    server.override(interrupt)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background are born without
    result = study.judge("--concurrency", "1")
    signal.signal(signal.SIGINT, earlier)
    assert result.code == 130
    assert f"stopped; 4 of 10 questions are done and kept in {study.file}" in result.out
    kept = study.file.read_bytes()
    assert len(study.scored()) == 4
    study.file.write_bytes(kept + b'{"question": "torn')
    server.respond = respond_well
    result = study.judge()
    assert result.code == 0
    assert "4 of 10 questions were asked before" in result.out
    assert len(server.requests) == 5 + 6
    assert study.file.read_bytes().startswith(kept)
    assert len({line["question"] for line in study.scored()}) == len(study.scored()) == 10


LOST, UNCOUNTED = (
    make_response(make_completion("", tokens=tokens)[2].replace(b'"choices"', b'"choice"'))
    for tokens in ((10, 5), None)
)
NO_COUNTS = "--max-tokens: the server reports no token counts; use --max-requests"


@pytest.mark.parametrize(
    ("response", "words", "requests", "done", "why"),
    [
        (None, "--max-requests 3", 3, 3, "--max-requests: 3 requests were made"),
        (None, "--max-tokens 40", 3, 3, "--max-tokens: 45 tokens were spent"),
        (None, "--max-requests 10", 10, 10, ""),
        # retries count as requests, and their tokens as spent
        (LOST, "--max-tokens 40", 3, 0, "--max-tokens: 45 tokens were spent"),
        # tokens that no server counts cannot be held to a limit, neither of verdicts nor of failures
        (make_completion(format_scores(8, 5), tokens=None), "--max-tokens 1000", 1, 1, NO_COUNTS),
        (make_completion(format_scores(8, 5), tokens=None), "--max-requests 10", 10, 10, ""),
        (UNCOUNTED, "--max-tokens 1000", 1, 0, NO_COUNTS),
        (make_response(LOST[2].replace(b"10", b"-5")), "--max-tokens 1000", 1, 0, NO_COUNTS),
        # an unread reply counts as all tokens that it may have
        ("slow", "--max-tokens 150 --reply-tokens 100 --timeout 0.1", 2, 0, "--max-tokens: 200 tokens were spent"),
        ("slow", "--max-tokens 150 --reply-tokens none --timeout 0.1", 1, 0, NO_COUNTS),
        (ENDLESS, "--max-tokens 150 --reply-tokens 100", 2, 0, "--max-tokens: 200 tokens were spent"),
    ],
)
def test_spending_stops_where_it_is_told_to(study, server, response, words, requests, done, why):
    server.override(lambda request: response)
    result = study.judge("--concurrency", "1", *words.split())
    assert (len(server.requests), len(study.scored())) == (requests, done)
    assert f"{requests} requests, " in result.out
    failures = int(response is ENDLESS) * requests
    assert result.code == (1 if failures else 0)
    stopped = f"stopped: {why}; {10 - done - failures} questions are left; the same command asks them"
    assert result.err.splitlines()[bool(failures) :] == ([stopped] if why else [])


def test_a_dry_run_needs_no_key_and_no_network(study, tmp_path):
    result = study.judge("--dry-run", "--endpoint", "https://api.example/v1", "--model", "other")
    assert result.code == 0
    assert "Response 1: answer 1 of mpo\n\nResponse 2: answer 1 of ppo\n" in result.out
    assert result.out.endswith("20 questions, 0 of them asked before: 20 calls\n")
    assert not study.file.exists()
    own = tmp_path / "own.j2"
    own.write_text("\x1b]0;\u202e {{ first }}\r {{ second }}")
    shown = study.judge("--dry-run", "--template", str(own)).out
    assert shown.startswith("␛]0;⟦U+202E⟧ answer 1 of mpo")
    study.judge("--prompts", "6", "--max-requests", "3", "--concurrency", "1")
    assert study.judge("--dry-run").out.endswith("10 questions, 3 of them asked before: 7 calls\n")


def test_one_writes_at_a_time(study):
    with open_verdicts_for_append(study.file):
        assert "found another `mixpo judge` writing it; wait until it ends" in study.read_refusal()


BAD_SCORES = ["[1e999, 1]", "[NaN, 1]", "[1, NaN]", "[11, 5]", "[-1, 5]", f"[{'9' * 4_000}, 1]", "[" * 90_000, "3"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"format": 1, "question": "a", "scores": null}\n{"oops', "2: found no valid verdict (JSONDecodeError: "),
        ('{"format": 2, "question": "a"}', "1: found no valid verdict (ValueError: format 2, not 1)"),
        *((f'{{"format": 1, "question": "a", "scores": {bad}}}', "1: found no valid verdict (") for bad in BAD_SCORES),
    ],
    ids=range(10),
)
def test_a_line_that_is_no_verdict_is_named(study, text, place):
    study.file.parent.mkdir()
    study.file.write_text(f"{text}\n")
    message = study.read_refusal()
    assert message.startswith(f"{study.file}:{place}")
    assert len(message) < 600


def test_a_full_disk_is_one_line_and_leaves_whole_lines(study, server):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(request: JudgeRequest) -> None:
        if request.number == 4:  # the kernel writes 20 bytes of the next line, and then none
            resource.setrlimit(resource.RLIMIT_FSIZE, (study.file.stat().st_size + 20, unlimited[1]))

    server.override(fill_disk)
    try:
        result = study.judge("--concurrency", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert result.code == 2
    assert f"{study.file}: cannot be written (" in result.err
    assert result.err.endswith("; free some disk space\n")
    assert len(study.scored()) == 4
    assert study.judge().code == 0
    assert len({line["question"] for line in study.scored()}) == len(study.scored()) == 10


def test_a_file_that_cannot_be_locked_is_named(study, monkeypatch):
    def lock(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("mixpo.judge.verdicts.fcntl.flock", lock)
    assert "found a file that cannot be locked or shortened (No locks available)" in study.read_refusal()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ first }} {{ second", "own.j2:1: found unexpected end of template"),
        ("{{ first }}", "own.j2: found no {{ second }}; expected both completions; known are prompt, messages, first"),
        ("{{ first }} {{ second }} {{ promt }}", "(UndefinedError: 'promt' is undefined); expected one of the variabl"),
        ("{{ first }} {{ second }} {{ 1 / 0 }}", "(ZeroDivisionError: division by zero)"),
        ("{{ first.__class__.__mro__ }} {{ second }}", "(SecurityError: access to attribute '__class__'"),
        ("{{ first }} {{ second }} {% include '/etc/passwd' %}", "(TypeError: no loader for this environment"),
        ("{{ first }} {{ second }} {% import '/etc/passwd' as x %}", "(TypeError: no loader for this environment"),
        ("{{ first }} {{ second }} {{ lipsum.__globals__.os.environ }}", "(SecurityError: access to attribute '__glo"),
        ("{{ first }} {{ second }} {{ messages.append(1) }}", "(SecurityError: "),
        (None, "--template: found no readable file"),
    ],
)
def test_templates_that_are_refused(study, tmp_path, text, message):
    if text is not None:
        (tmp_path / "own.j2").write_text(text)
    assert message in study.read_refusal("--template", str(tmp_path / "own.j2"))


def test_the_papers_prompt():
    rendered = read_template(None).render_message("Why?", "{{ one }}", "two")
    assert rendered.startswith("Please evaluate the quality of the response according to the given instructions.")
    assert rendered.endswith("Instruction: Why?\n\nResponse 1: {{ one }}\n\nResponse 2: two")
    assert [rendered.count(f"\n{number}. ") for number in range(1, 12)] == [1] * 10 + [0]


# The report


def test_the_report_says_what_the_verdicts_hold(study, server):
    assert judges.build_judges_section(load_runs(study.run)) is None
    study.judge()
    results = load_runs(study.run)
    section, row = study.section(), study.rows()["mpo vs ppo"]
    mean, low, high = map(float, re.findall(r"-?[\d.]+", row[5]))
    assert mean == 0.83
    assert 0.0 < low < mean < high
    assert low == pytest.approx(float(f"{5 / 8 - 1.959964 * (6 - 25 / 8) ** 0.5 / 8:.2f}"))
    assert row[6] == "0.19"  # 2 / 2^5, three rows
    assert "(+0.83, 95% CI [" in section.opening
    assert ", p 0.19)" in section.opening
    said = "tiny prefers mpo on 83% of 6 prompts and ppo on 0%: no significant difference between mpo and ppo"
    assert said in section.opening
    assert "0% of the verdicts flip with the order" in section.opening
    assert ">LLM judges<" in page.render_report(results, "html")
    assert "mpo vs ppo" in page.render_report(results, "md")


def _make_verdicts(outcomes: Sequence[int | None], *, same: int = 0) -> list[Verdict]:
    pairs = [Comparison(number, f"{number}?", None, ("a", "bc")) for number in range(len(outcomes))]
    alike = [Comparison(len(outcomes) + number, "?", None, ("a", "a")) for number in range(same)]
    return [*map(Verdict, pairs, outcomes), *(Verdict(pair, 0) for pair in alike)]


def test_shares_are_wilsons_and_few_wins_prove_nothing():
    two = compute_verdict_shares(_make_verdicts([1, 1]))
    assert (two.win.mean, two.p) == (1.0, 0.5)
    assert two.win.low == pytest.approx(2 / (2 + 1.959964**2), rel=1e-6)
    assert two.tie.high > 0.5
    assert two.difference.low < 0
    many = compute_verdict_shares(_make_verdicts([1] * 15 + [0] * 3 + [-1] * 2))
    assert many.p == pytest.approx(binomtest(15, 17).pvalue)
    assert many.difference == win_minus_loss_rate(15, 3, 2)


def test_the_same_text_is_a_tie_in_the_proportion_in_which_the_others_have_a_verdict():
    """A call that was stopped at a tenth leans to nothing."""
    assert compute_verdict_shares(_make_verdicts([None] * 20, same=10)) is None
    for known in (2, 10, 20):
        found = compute_verdict_shares(_make_verdicts([1] * known + [None] * (20 - known), same=10))
        assert (found.prompts, found.win.mean) == (known * 3 // 2, pytest.approx(2 / 3))
    rounded = compute_verdict_shares(_make_verdicts([1, 1, None, None, None], same=1))
    assert rounded.prompts == 2  # two fifths of one same text are none
    alone = compute_verdict_shares(_make_verdicts([], same=3))
    assert (alone.prompts, alone.tie.mean, alone.flips) == (3, 1.0, None)


def test_verdicts_of_other_completions_are_left_out_and_counted(tmp_path, server, capsys):
    study = Study(write_run(tmp_path), server, capsys)
    study.judge()
    (evaluated,) = (arm.evaluation for arm in load_runs(study.run).arms if arm.arm == "ppo")
    place = Path(str(evaluated)) / "completions.parquet"
    changed = read_table(place)
    for number in (2, 5):
        changed[number]["completion"] += "!"
    write_table(place, changed)
    row = study.rows()["mpo vs ppo"]
    assert (row[1], row[2][:4], row[3][:4]) == ("4", "0.75", "0.25")
    assert "2 prompts are excluded, because the completions changed after judging." in study.section().opening
    reason = "2 prompts excluded, because the completions changed after judging"
    assert reason in page.render_report(load_runs(study.run), "md")
    assert study.judge().code == 0
    assert len(server.requests) == 14  # both orders of the two
    assert study.rows()["mpo vs ppo"][1] == "6"
    assert "excluded" not in study.section().opening
    assert "after judging" not in page.render_report(load_runs(study.run), "md")


def test_an_arm_that_is_there_no_more_and_several_runs(study, tmp_path):
    study.judge()
    other = Writer(tmp_path / "other", name="other", cache="others").run(plain({"sft": SFT_SCORES}))
    (other / "judge").mkdir()
    (other / FILE).write_bytes(study.file.read_bytes())
    alone = judges.build_judges_section(load_runs(other))
    assert alone.opening == "No verdicts on the current completions: those of 6 prompts changed after judging."
    both = judges.build_judges_section(load_runs(study.run, other))
    assert next(iter(rows(table(both, "tiny")))) == "tiny: mpo vs tiny: ppo"
    assert set(read_verdicts(study.file).assignments) == set(read_verdicts(other / FILE).assignments)
