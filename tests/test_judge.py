"""LLM judges before a server on loopback that behaves well and badly: what is asked, kept, said, spent, and hidden."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judge_server import Answer, Asked, Server, completion, error, said, serving
from mixpo.algorithms.agreement import cohen_kappa, krippendorff_alpha
from mixpo.algorithms.statistics import holm
from mixpo.cli import main as cli
from mixpo.data.errors import InputError
from mixpo.experiments.results import load
from mixpo.judge import asking
from mixpo.judge.endpoint import checked, is_loopback
from mixpo.judge.questions import Template, read_template
from mixpo.judge.replies import Reply, read_reply, scores
from mixpo.judge.verdicts import FILE, appending, read
from mixpo.report import judges, page
from mixpo.stages.rows import read_table, write_table
from report_runs import SFT_SCORES, Arm, Writer, plain, rows, table

KINDS = ["helpful", None, "harmless", "helpful", None, "harmless"]
KEY = "sk-very-secret-0123456789"
ARMS = ("mpo", "ppo")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        one.prefer(lambda asked: "of mpo" in asked.shown[0])
        yield one


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited for: no test waits."""
    waited: list[float] = []

    async def pause(seconds: float, halted: asyncio.Event) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asking, "pause", pause)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return waited


@dataclass
class Printed:
    code: int
    out: str
    err: str

    def row(self, heading: str) -> str:
        """A line of the table."""
        return next(line for line in self.out.splitlines() if re.match(rf"\s*{re.escape(heading)}\s", line))


class Study:
    """A run folder and the command on it."""

    def __init__(self, run: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.server, self.capsys = run, server, capsys
        self.file = self.run / FILE

    def judge(self, *words: str, arms: tuple[str, str] = ARMS, model: str = "tiny") -> Printed:
        argv = ["mixpo", "judge", str(self.run), "--arms", *arms, "--model", model, "--endpoint", self.server.url]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*argv, *words])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        printed = self.capsys.readouterr()
        assert "Traceback" not in printed.err
        return Printed(int(stopped.value.code or 0), printed.out, printed.err)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def answers(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if "question" in line]


def write_run(folder: Path) -> Path:
    return Writer(folder / "run", categories=KINDS).run(plain(dict.fromkeys([*ARMS, "mpo-sft-kl"], SFT_SCORES)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def study(written: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> Study:
    """A run of one's own, whose stages are shared."""
    return Study(Path(shutil.copytree(written, tmp_path / "run")), server, capsys)


def about(asked: Asked) -> int:
    """The number of the prompt that a request is about."""
    found = re.match(r"answer (\d)", asked.shown[0])
    assert found
    return int(found[1])


# Replies


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (said(8, 5), (8.0, 5.0)),
        (said(0, 10), (0.0, 10.0)),
        (said("7.5", "8/10"), (7.5, 8.0)),
        ("Response 1 Quality Score: 3 Explanation: a. Response 2 Quality Score: 4", (3.0, 4.0)),
        ("**Response 1 Quality Score: 3**\r\nwhy\r\n**Response 2 Quality Score:** 4\r\n", (3.0, 4.0)),
        (said("8/100", 5), None),
        (said("7/5", 5), None),
        (said("7.", 5), None),
        (said(8, "10.5"), None),
        (said(11, 5), None),
        (said(-1, 5), None),
        (said("NaN", 5), None),
        (said("8 9", 5), None),
        (said("8 or 9", 5), None),
        (said("٣", 5), None),
        (said(8, 5) + "\n" + said(5, 8), None),
        ("Response 1 Quality Score: 8\n", None),
        ("Response 2 Quality Score: 8\nResponse 1 Quality Score: 5", None),
        (said(8, 5) + "\nResponse 3 Quality Score: 5", None),
        ("8 5", None),
        ("", None),
    ],
)
def test_scores_are_those_that_the_papers_prompt_asks_for_or_none(
    text: str, expected: tuple[float, float] | None
) -> None:
    assert scores(Reply(text)) == expected


def test_a_number_that_was_cut_is_no_score() -> None:
    whole = "Response 1 Quality Score: 9\nExplanation: a\nResponse 2 Quality Score: 10"
    assert scores(Reply(whole)) == (9.0, 10.0)
    assert scores(Reply(whole[:-1], cut=True)) is None
    assert scores(Reply(whole + "\nExplanation: it was good beca", cut=True)) == (9.0, 10.0)
    assert read_reply(completion("9", finish="length")[2]).cut


# What is asked, and what it says


def test_both_orders_of_every_pair_are_asked_once_and_kept(study: Study, server: Server) -> None:
    printed = study.judge()
    assert printed.code == 0
    pairs = {tuple(asked.shown) for asked in server.asked}
    expected = {(f"answer {n} of {one}", f"answer {n} of {other}") for n in range(1, 6) for one, other in
                (ARMS, ARMS[::-1])}  # fmt: skip
    assert pairs == expected
    assert len(server.asked) == len(study.answers()) == 10
    assert {asked.key for asked in server.asked} == {"Bearer none"}
    body = server.asked[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 1024)
    assert "Assistant: a reply\n\nUser: question" in body["messages"][0]["content"]
    assert "0.83 [" in printed.row("win")
    assert "0.17 [" in printed.row("tie")
    assert "0.00 [" in printed.row("lose")
    assert "mpo vs ppo: the same text on 1 prompt, a tie that nobody was asked." in printed.out
    assert "10 requests, 150 tokens, 10 of 10 questions answered" in printed.out
    row = next(line for line in study.answers() if line["prompt"] == 3 and line["arms"] == ["ppo", "mpo"])
    assert (row["scores"], row["tokens"], row["category"], row["seed"]) == ([4.0, 9.0], [10, 5], "helpful", 0)
    assert "because" in row["reply"]

    again = study.judge()
    assert len(server.asked) == 10
    assert again.row("win") == printed.row("win")
    assert "10 of 10 questions were answered before" in again.out
    turned = study.judge(arms=ARMS[::-1])
    assert turned.row("lose").split()[1:4] == printed.row("win").split()[1:4]
    assert len(server.asked) == 10
    for words in (["--temperature", "0.5"], ["--reply-tokens", "99"], ["--seed", "0", "--prompts", "6"]):
        study.judge(*words)
    assert len(server.asked) == 30  # another temperature, another limit; the last asks nothing new


def test_a_judge_that_always_answers_first_is_all_flips_and_ties(study: Study, server: Server) -> None:
    server.prefer(lambda asked: True)
    printed = study.judge()
    assert "1.00 [" in printed.row("tie")
    assert "1.00 [" in printed.row("flips")


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie_and_no_flip(study: Study, server: Server) -> None:
    server.prefer(lambda asked: True if "of mpo" in asked.shown[0] else None)
    printed = study.judge()
    assert "1.00 [" in printed.row("tie")
    assert "0.00 [" in printed.row("flips")


def test_a_judge_that_prefers_the_longer(study: Study, server: Server) -> None:
    server.prefer(lambda asked: len(asked.shown[0]) > len(asked.shown[1]))
    printed = study.judge(arms=("mpo", "mpo-sft-kl"))
    assert "0.83 [" in printed.row("lose")
    assert "1.00 [" in printed.row("longer wins")
    assert printed.row("win at equal length").split()[4:7] == ["cannot", "be", "told"]


def test_only_the_prompts_asked_for_count(study: Study, server: Server) -> None:
    printed = study.judge("--prompts", "2", "--draw", "1")
    asked = {about(one) for one in server.asked}
    same = "the same text on 1 prompt" in printed.out
    assert len(asked) + same == 2
    assert printed.row("prompts").split()[1] == "2"
    study.judge("--prompts", "5")
    assert len(server.asked) <= 10


def test_categories_and_a_template_of_ones_own(study: Study, server: Server, tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    own.write_text("{{ messages[-1].content }}\n\nResponse 1: {{ first }}\n\nResponse 2: {{ second }}")
    server.prefer(lambda asked: ("of mpo" in asked.shown[0]) == (about(asked) in (2, 5)))
    printed = study.judge("--template", str(own))
    assert server.asked[0].body["messages"][0]["content"].startswith("question ")
    made = table(judges.section(load(study.run)), "tiny")
    found = rows(made)
    assert list(found) == ["mpo vs ppo", "mpo vs ppo: helpful", "mpo vs ppo: harmless"]
    # helpful: 0 (same text) and 3 (lost); harmless: 2 and 5 (won); of none: 1 and 4 (lost)
    counts = {name: [row[1], *(cell.split()[0] for cell in row[2:6])] for name, row in found.items()}
    assert counts == {
        "mpo vs ppo": ["6", "0.33", "0.17", "0.50", "-0.17"],
        "mpo vs ppo: helpful": ["2", "0.00", "0.50", "0.50", "-0.50"],
        "mpo vs ppo: harmless": ["2", "1.00", "0.00", "0.00", "1.00"],
    }
    assert "harmless" in printed.out
    study.judge()
    assert len(server.asked) == 20  # other words, other questions


def test_two_judges_and_their_agreement(study: Study, server: Server) -> None:
    server.prefer(lambda asked: ("of mpo" in asked.shown[0]) == (asked.model == "one" or about(asked) < 4))
    printed = study.judge("--model", "two", model="one")
    assert len(server.asked) == 20
    # by hand: one says 1 five times; two says 1 three times and -1 twice
    one, two = np.array([2] * 5), np.array([2, 2, 2, 0, 0])
    counts = np.stack([np.bincount(pair, minlength=3) for pair in np.stack([one, two], axis=1)])
    found = rows(table(judges.section(load(study.run)), "Agreement of judges"))
    assert found["one and two"][1:] == ["mpo vs ppo", "5", f"{cohen_kappa(one, two):.2f}"]
    assert found["one and two"][3] == "0.00"  # observed 0.6, by chance 0.6
    assert found["all 2"][2] == "5"
    assert found["all 2"][3].startswith(f"{krippendorff_alpha(counts):.2f}")
    assert "Agreement of judges" in printed.out
    each = [rows(table(judges.section(load(study.run)), name))["mpo vs ppo"] for name in ("one", "two")]
    assert [row[2].split()[0] for row in each] == ["0.83", "0.50"]


def test_p_is_corrected_for_every_row_of_every_judge(study: Study, server: Server) -> None:
    study.judge()
    (alone,) = [row.difference.p for row in _rows(study) if row.category is None]
    server.prefer(lambda asked: None)
    study.judge(model="other")
    shown = _rows(study)
    assert len(shown) == 6
    corrected = next(row.difference.p for row in shown if row.judged.judge.model == "tiny" and row.category is None)
    raw = [judges.estimated([(*ARMS, row.tally.outcomes[None])])[0].p for row in shown]
    assert [row.difference.p for row in shown] == pytest.approx(holm(raw))
    assert corrected > alone


def _rows(study: Study) -> list[judges.Row]:
    return judges.rows_of(judges.judged_runs(load(study.run)))


# Servers that behave badly

BAD: dict[str, Answer | str] = {
    "slow": "slow",
    "cut": "cut",
    "500": error(500, "oh no"),
    "429": error(429, "slow down"),
    "malformed JSON": (200, {"Content-Type": "application/json"}, b'{"choices": [{"mess'),
    "a page": (200, {"Content-Type": "text/html"}, b"<html>it works</html>"),
    "nothing": (200, {"Content-Type": "application/json"}, b""),
    "a list": (200, {"Content-Type": "application/json"}, b"[1]"),
    "no choices": (200, {"Content-Type": "application/json"}, b'{"choices": []}'),
    "choices of null": (200, {"Content-Type": "application/json"}, b'{"choices": null, "usage": 3}'),
    "content of null": completion(None),
    "content in parts": completion([{"type": "text", "text": said(8, 5)}]),
    "content a number": completion(8),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_fails_is_asked_again_and_nothing_is_unparsed(
    study: Study, server: Server, waits: list[float], kind: str
) -> None:
    well = server.behave
    server.behave = lambda asked: BAD[kind] if asked.number < 2 else well(asked)
    printed = study.judge("--concurrency", "1", "--timeout", "0.3" if kind == "slow" else "20")
    assert (printed.code, len(server.asked)) == (0, 12)
    assert "0.83 [" in printed.row("win")
    assert "parsed" not in printed.out
    assert len(waits) == 2
    assert 1.0 <= waits[0] <= 1.5
    assert 2.0 <= waits[1] <= 3.0


def test_a_server_says_how_long_to_wait(study: Study, server: Server, waits: list[float]) -> None:
    well, date = server.behave, datetime.now(UTC) + timedelta(seconds=90)
    after = ["20", format_datetime(date, usegmt=True), "100000", "soon"]
    server.behave = lambda asked: (
        error(429, "slow down", Retry_After=after[asked.number]) if asked.number < 4 else well(asked)
    )
    assert study.judge("--concurrency", "1").code == 0
    assert 20 <= waits[0] <= 30
    assert 80 <= waits[1] <= 135
    assert 300 <= waits[2] <= 450
    assert 8 <= waits[3] <= 12  # the fourth in turn: 2 ** 3
    assert asking.retry_after("nan") is None
    assert asking.retry_after("-3") == 0.0


def test_questions_that_fail_are_counted_by_kind_and_asked_by_the_next_call(study: Study, server: Server) -> None:
    well = server.behave

    def behave(asked: Asked) -> Answer | str:
        if about(asked) == 2:
            return error(500, "no <memory>\n on \x1b[31mthe device")
        return error(400, "too long") if about(asked) == 4 else well(asked)

    server.behave = behave
    printed = study.judge("--attempts", "3")
    assert printed.code == 1
    assert len(server.asked) == 6 + 2 * 3 + 2  # a bad request is not asked again
    assert "2 questions failed: HTTP 500: no <memory> on \ufffd[31mthe device\n" in printed.err
    assert "2 questions failed: HTTP 400: too long\n" in printed.err
    assert "0.75 [" in printed.row("win")
    assert "no answer yet on 2 prompts" in printed.out
    server.behave, before = well, len(server.asked)
    assert study.judge().code == 0
    assert {about(asked) for asked in server.asked[before:]} == {2, 4}
    assert len(server.asked) == before + 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_run_of_refusals_stops_with_one_line(study: Study, server: Server, status: int) -> None:
    server.behave = lambda asked: error(status, "The model `tiny` does not exist")
    printed = study.judge("--concurrency", "1")
    assert printed.code == 1
    assert len(server.asked) == asking.RUN == 8
    assert printed.err.splitlines()[-1] == (
        f"stopped: 8 questions failed one after the other, the last with HTTP {status}: The model `tiny` does not "
        "exist; 2 questions are left; the same command asks them"
    )


def test_failures_with_an_answer_between_them_are_no_run(study: Study, server: Server) -> None:
    well = server.behave
    server.behave = lambda asked: well(asked) if about(asked) == 3 else error(400, "too long")
    printed = study.judge("--concurrency", "1")
    assert len(server.asked) == 10
    assert printed.err == "8 questions failed: HTTP 400: too long\n"


def test_what_cannot_be_parsed_is_asked_again_once_and_counted(study: Study, server: Server) -> None:
    well, seen = server.behave, set[str]()

    def behave(asked: Asked) -> Answer | str:
        text = asked.body["messages"][0]["content"]
        first = text not in seen
        seen.add(text)
        if about(asked) == 2 or (about(asked) == 3 and first):
            return completion("I like both.")
        return well(asked)

    server.behave = behave
    printed = study.judge()
    assert printed.code == 0
    assert len(server.asked) == 10 + 2 + 2
    assert "no verdict on 1 prompt, a reply to which could not be parsed" in printed.out
    assert "0.80 [" in printed.row("win")  # of five: four won, one the same text
    kept = [line for line in study.answers() if line["scores"] is None]
    assert [(line["prompt"], line["reply"]) for line in kept] == [(2, "I like both.")] * 2
    study.judge()
    assert len(server.asked) == 14


def test_half_a_surrogate_pair_crashes_nothing(study: Study, server: Server) -> None:
    well = server.behave
    server.behave = lambda asked: (
        error(400, "half \ud800") if about(asked) == 1 else completion(said(8, 5) + "\ud83d") if about(asked) == 2
        else well(asked)
    )  # fmt: skip
    printed = study.judge()
    assert "HTTP 400: half \ufffd" in printed.err
    assert any(line["reply"].endswith("so.\ufffd") for line in study.answers())
    filled = Template("t", "{{ prompt }}{{ first }}{{ second }}").filled("a\udc00", "\ud83d\ude00", "\ufeffb")
    assert filled == "a\ufffd\U0001f600\ufeffb"


# Keys


def test_the_key_is_sent_and_stands_nowhere(study: Study, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for this machine
    server.behave = lambda asked: (
        error(401, f"{'x' * 190}{KEY} is wrong") if about(asked) == 1 else completion(f"{said(8, 5)} {asked.key}")
    )
    printed = study.judge()
    assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
    written = "".join(path.read_text(errors="replace") for path in study.run.rglob("*") if path.is_file())
    for text in (printed.out, printed.err, written):
        assert KEY not in text
        assert KEY[:9] not in text  # nor cut in two
    assert "Bearer [OPENAI_API_KEY]" in written


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}é", f"a {KEY}"])
def test_a_key_that_is_none_is_refused_and_not_shown(
    study: Study, server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    printed = study.judge()
    assert printed.code == 2
    assert printed.err.startswith("OPENAI_API_KEY: found a line break, a space or a character that no key has; ")
    assert KEY not in printed.err + printed.out
    assert not server.asked


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("https://me:secret@api.example/v1", "found a user name or password in it"),
        ("https://secret@api.example/v1", "found a user name or password in it"),
        ("https://api.example/v1?key=secret", "found a query in it"),
        ("api.example/v1", "found 'api.example/v1'; expected http(s)://HOST[:PORT]/PATH"),
        ("ftp://api.example", "found 'ftp://api.example'"),
        ("http://", "found 'http://'"),
        ("http://[::1", "found no address"),
        ("http://a.example:port", "found no address"),
        ("http://a.example/v 1", "found 'http://a.example/v 1'"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--endpoint: {re.escape(message)}") as refused:
        checked(endpoint)
    assert "secret" not in str(refused.value)


def test_which_endpoints_need_no_key(study: Study) -> None:
    assert checked("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    assert [is_loopback(f"http://{host}/v1") for host in ("localhost:1", "127.3.0.1", "[::1]:2")] == [True] * 3
    assert not is_loopback("http://192.168.0.1/v1")
    printed = study.judge("--endpoint", "https://api.example/v1")
    assert printed.code == 2
    assert printed.err == (
        "OPENAI_API_KEY: not set; expected the key for https://api.example/v1; put it into the environment\n"
    )
    assert study.lines() == []


# Stops, limits, and going on


def test_ctrl_c_keeps_what_is_answered_and_the_next_call_asks_the_rest(study: Study, server: Server) -> None:
    well = server.behave

    def behave(asked: Asked) -> Answer | str:
        if asked.number == 4:
            os.kill(os.getpid(), signal.SIGINT)
            return "slow"
        return well(asked)

    server.behave = behave
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background are born without
    printed = study.judge("--concurrency", "1")
    signal.signal(signal.SIGINT, earlier)
    assert printed.code == 130
    assert f"stopped; 4 answers of 10 are kept in {study.file}" in printed.out
    kept = study.file.read_bytes()
    assert len(study.answers()) == 4
    study.file.write_bytes(kept + b'{"question": "torn')
    server.behave = well
    printed = study.judge()
    assert printed.code == 0
    assert "4 of 10 questions were answered before" in printed.out
    assert len(server.asked) == 5 + 6
    assert study.file.read_bytes().startswith(kept)
    assert len({line["question"] for line in study.answers()}) == len(study.answers()) == 10


@pytest.mark.parametrize(
    ("words", "requests", "why"),
    [
        (["--max-requests", "3"], 3, "--max-requests: 3 requests were made; 7 questions are left"),
        (["--max-tokens", "40"], 3, "--max-tokens: 45 tokens were spent; 7 questions are left"),
        (["--max-requests", "10"], 10, ""),
    ],
)
def test_spending_stops_where_it_is_told_to(
    study: Study, server: Server, words: list[str], requests: int, why: str
) -> None:
    printed = study.judge("--concurrency", "1", *words)
    assert printed.code == 0
    assert len(server.asked) == len(study.answers()) == requests
    assert printed.err == (f"stopped: {why}; the same command asks them\n" if why else "")
    study.judge()
    assert len(server.asked) == 10


def test_tokens_that_no_server_counts_cannot_be_held_to_a_limit(study: Study, server: Server) -> None:
    server.behave = lambda asked: completion(said(8, 5), tokens=None)
    assert study.judge("--prompts", "2").code == 0
    printed = study.judge("--concurrency", "1", "--max-tokens", "1000")
    assert "the server does not say how many tokens it used; use --max-requests; " in printed.err


def test_retries_count_as_requests_and_lost_tokens_as_spent(study: Study, server: Server) -> None:
    server.behave = lambda asked: completion(None)
    printed = study.judge("--concurrency", "1", "--max-tokens", "40")
    assert len(server.asked) == 3
    assert "3 requests, 45 tokens, 0 of 10 questions answered" in printed.out


def test_a_dry_run_needs_no_key_and_no_network(study: Study, server: Server) -> None:
    printed = study.judge("--dry-run", "--endpoint", "https://api.example/v1", "--model", "other")
    assert printed.code == 0
    assert "Response 1: answer 1 of mpo\n\nResponse 2: answer 1 of ppo\n" in printed.out
    assert printed.out.endswith("20 questions, 0 of them answered: 20 calls\n")
    assert not study.file.exists()
    study.judge("--prompts", "6", "--max-requests", "3", "--concurrency", "1")
    assert study.judge("--dry-run").out.endswith("10 questions, 3 of them answered: 7 calls\n")


def test_one_writes_at_a_time_and_damage_is_named(study: Study) -> None:
    with appending(study.file):
        printed = study.judge()
    assert printed.code == 2
    assert "found another `mixpo judge` that writes it; wait for its end" in printed.err
    study.file.write_text('{"question": "a", "scores": null}\n{"oops\n')
    printed = study.judge()
    assert printed.code == 2
    assert f"{study.file}:2: found no verdict (JSONDecodeError)" in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ first }} {{ second", "own.j2:1: found unexpected end of template"),
        ("{{ first }}", "own.j2: found no {{ second }}; expected both completions; known are prompt, messages, first"),
        ("{{ first }} {{ second }} {{ promt }}", "(UndefinedError: 'promt' is undefined); expected one of the variabl"),
        ("{{ first }} {{ second }} {{ 1 / 0 }}", "(ZeroDivisionError: division by zero)"),
        ("{{ first.__class__.__mro__ }} {{ second }}", "(SecurityError: access to attribute '__class__'"),
        (None, "--template: found no readable file"),
    ],
)
def test_templates_that_are_refused(study: Study, server: Server, tmp_path: Path, text: str, message: str) -> None:
    own = tmp_path / "own.j2"
    if text is not None:
        own.write_text(text)
    printed = study.judge("--template", str(own))
    assert (printed.code, printed.err.count("\n")) == (2, 1)
    assert message in printed.err
    assert not server.asked


def test_the_papers_prompt() -> None:
    filled = read_template(None).filled("Why?", "{{ one }}", "two")
    assert filled.startswith("Please evaluate the quality of the response according to the given instructions.")
    assert filled.endswith("Instruction: Why?\n\nResponse 1: {{ one }}\n\nResponse 2: two")
    assert [filled.count(f"\n{number}. ") for number in range(1, 12)] == [1] * 10 + [0]


def test_a_missing_package_is_named(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "mixpo.judge.asking")
    printed = study.judge()
    assert (printed.code, printed.err.count("\n")) == (2, 1)
    assert "pip install 'mixpo[judge]'" in printed.err


# The report


def test_the_report_says_what_the_verdicts_hold(study: Study, server: Server) -> None:
    assert judges.section(load(study.run)) is None
    study.judge()
    results = load(study.run)
    section = judges.section(results)
    assert section is not None
    row = rows(table(section, "tiny"))["mpo vs ppo"]
    mean, low, high = map(float, re.findall(r"-?[\d.]+", row[5]))
    assert mean == 0.83
    assert 0.0 < low < mean < high
    said = "difference 0.83 [" in section.opening and ("above zero" in section.opening) == (float(row[6]) < 0.05)
    assert said
    assert "tiny scores mpo higher than ppo on 83% of 6 prompts and lower on 0%" in section.opening
    assert "0% of those asked flip with the order" in section.opening
    assert "What does an LLM judge say?" in page.text(results, "html")
    assert "mpo vs ppo" in page.text(results, "md")


def test_the_report_claims_nothing_where_the_interval_holds_zero(study: Study, server: Server) -> None:
    server.prefer(lambda asked: ("of mpo" in asked.shown[0]) == (about(asked) < 4))
    study.judge()
    section = judges.section(load(study.run))
    assert section is not None
    assert "does not tell the two apart" in section.opening
    assert not re.search(r"\b(wins?|better|beats?|prefers)\b", section.opening)


def test_verdicts_of_other_completions_are_left_out_and_counted(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(write_run(tmp_path), server, capsys)
    study.judge()
    (evaluated,) = (arm.evaluation for arm in load(study.run).arms if arm.arm == "ppo")
    place = Path(str(evaluated)) / "completions.parquet"
    changed = read_table(place)
    for number in (2, 5):
        changed[number]["completion"] += "!"
    write_table(place, changed)
    section = judges.section(load(study.run))
    row = rows(table(section, "tiny"))["mpo vs ppo"]
    assert (row[1], row[2][:4], row[3][:4]) == ("4", "0.75", "0.25")
    assert section is not None
    assert "2 prompts judged before completions changed are left out." in section.opening
    assert study.judge().code == 0
    assert len(server.asked) == 14  # both orders of the two
    assert rows(table(judges.section(load(study.run)), "tiny"))["mpo vs ppo"][1] == "6"


def test_an_arm_that_is_there_no_more_and_several_runs(study: Study, tmp_path: Path) -> None:
    study.judge()
    other = Writer(tmp_path / "other", name="other", cache="others").run(
        [Arm("sft", {0: plain({"sft": SFT_SCORES})[0].done[0]})]
    )
    (other / "judge").mkdir()
    (other / FILE).write_bytes(study.file.read_bytes())
    alone = judges.section(load(other))
    assert alone is not None
    assert alone.opening == "No verdict is known of these completions; 6 prompts had others when they were judged."
    both = judges.section(load(study.run, other))
    assert next(iter(rows(table(both, "tiny")))) == "tiny: mpo vs tiny: ppo"
    assert set(read(study.file).panels) == set(read(other / FILE).panels)
