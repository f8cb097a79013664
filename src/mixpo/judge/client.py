"""Client of the judges' API: concurrent questions, retries, parsing, and limits on requests and tokens."""

import asyncio
import math
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2

from mixpo.judge.endpoint import KEY_VARIABLE, is_loopback_endpoint, make_key_redactor
from mixpo.judge.questions import Judge, JudgeQuestion, replace_surrogates
from mixpo.judge.replies import JudgeReply, parse_error_message, parse_reply, parse_scores, sum_token_counts
from mixpo.judge.verdicts import RowWriter, make_scores_row

PARSE_ATTEMPTS = 2
"""Replies to a question until it counts as unparsed."""
MAX_CONSECUTIVE_FAILURES = 8
"""Consecutive failed questions until a judge is halted."""
QUESTION_ERRORS = ("HTTP 400", "HTTP 413", "HTTP 422")
"""Errors that a single question may cause, such as by a too long prompt, once the judge has replied to others."""
MAX_REPLY_BYTES = 2**22
"""Size limit of a reply; a longer one is a failure."""
MAX_STORED_CHARACTERS = 2**16
"""Characters of a reply that are stored in the file."""
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 300.0
"""Longest wait that a server can ask for."""
RETRYABLE_STATUSES = (408, 409, 425, 429)
"""HTTP statuses below 500 after which a question is sent again."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits of requests to a judge: at once, failures a question, seconds each, and requests and tokens in all."""

    concurrency: int = 8
    attempts: int = 6
    """Failed requests until a question is given up."""
    timeout: float = 120.0
    """Seconds until a request counts as failed."""
    requests: int | None = None
    tokens: int | None = None


@dataclass
class JudgingProgress:
    """Counts of questions, requests, tokens and failures so far, and why judges were halted."""

    questions: int
    done: int = 0
    """Questions with a stored result, unparsed ones included."""
    requests: int = 0
    tokens: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    """By kind of error: the message of every failed question."""
    stop_reasons: list[str] = field(default_factory=list)
    """Why judges were halted before all questions were asked."""

    @property
    def remaining_questions(self) -> int:
        """Number of questions that neither have a result nor failed."""
        return self.questions - self.done - sum(map(len, self.failures.values()))


class _RequestError(Exception):
    """Raised without a chat completion: kind of error, message, and whether and after how many seconds to retry."""

    def __init__(self, kind: str, message: str, *, is_retryable: bool = True, retry_after: float | None = None) -> None:
        self.kind, self.message, self.is_retryable, self.retry_after = kind, message, is_retryable, retry_after


@dataclass
class _JudgeState:
    """State of one judge: whether it ever replied, its failures in a row, and whether it is halted."""

    has_replied: bool
    """Whether it has ever replied: its name and settings are then right."""
    consecutive_failures: int = 0
    halt_event: asyncio.Event = field(default_factory=asyncio.Event)


def shuffle_by_prompt(questions: Sequence[JudgeQuestion]) -> list[JudgeQuestion]:
    """Return the questions in random order, grouped by prompt; another order each time, so that none always waits."""
    sort_keys = {number: random.random() for number in {question.number for question in questions}}
    return sorted(questions, key=lambda question: sort_keys[question.number])


def ask_questions(
    questions: Sequence[JudgeQuestion],
    api_key: str,
    limits: RequestLimits,
    append_row: RowWriter,
    on_progress: Callable[[JudgingProgress], None],
    *,
    working_judges: Collection[Judge] = (),
) -> JudgingProgress:
    """Ask all questions, append each result by `append_row` when it arrives, and return the final progress.

    `working_judges`: judges that replied in an earlier call.
    """
    return asyncio.run(_JudgeClient(questions, api_key, limits, append_row, on_progress, working_judges).ask_all())


@dataclass
class _JudgeClient:
    """Client that asks questions concurrently, retries, and halts judges that fail or exceed a limit."""

    questions: Sequence[JudgeQuestion]
    key: str
    limits: RequestLimits
    append_row: RowWriter
    on_progress: Callable[[JudgingProgress], None]
    working_judges: Collection[Judge]

    def __post_init__(self) -> None:
        self.redact = make_key_redactor(self.key)
        self.progress = JudgingProgress(len(self.questions))
        judges = {question.judge for question in self.questions}
        self.states = {judge: _JudgeState(judge in self.working_judges) for judge in judges}

    async def ask_all(self) -> JudgingProgress:
        """Ask all questions with `concurrency` workers, and return the final progress."""
        endpoint = self.questions[0].judge.endpoint
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", **authorization},  # a compressed reply may expand a thousandfold
            follow_redirects=False,  # prompts and key go to the endpoint alone
            trust_env=not is_loopback_endpoint(endpoint),  # no proxy to this machine
            timeout=None,
            limits=httpx2.Limits(max_connections=None),
        ) as self.client:
            pending = iter(shuffle_by_prompt(self.questions))

            async def ask_pending() -> None:
                for question in pending:
                    await self._ask_until_scored(question)

            workers = min(self.limits.concurrency, len(self.questions))
            await asyncio.gather(*(ask_pending() for _ in range(workers)))
        return self.progress

    async def _ask_until_scored(self, question: JudgeQuestion) -> None:
        """Ask until a reply has scores or attempts are used up, and store it; a failed request stores nothing."""
        state, failed_attempts, replies = self.states[question.judge], 0, list[JudgeReply]()
        while self._reserve_request(state):
            try:
                replies.append(await self._send_request(question))
            except _RequestError as failure:
                failed_attempts += 1
                if not failure.is_retryable or failed_attempts == self.limits.attempts:
                    return self._count_failed_question(question.judge, failure)
                await sleep_unless_halted(_compute_retry_delay(failed_attempts, failure.retry_after), state.halt_event)
                continue
            state.has_replied, state.consecutive_failures = True, 0
            scores = parse_scores(replies[-1])
            if scores is not None or len(replies) == PARSE_ATTEMPTS:
                texts = [_truncate_reply(self.redact(replace_surrogates(reply.text or ""))) for reply in replies]
                self.append_row(make_scores_row(question, scores, texts, sum_token_counts(replies)))
                self.progress.done += 1
                return self.on_progress(self.progress)
        return None

    def _reserve_request(self, state: _JudgeState) -> bool:
        """Count a request and return True, or return False if the judge is halted.

        Halts every judge once a limit on requests or tokens is reached.
        """
        limits, progress = self.limits, self.progress
        if limits.requests is not None and progress.requests >= limits.requests:
            self._halt_judges(f"--max-requests: {progress.requests} requests were made")
        if limits.tokens is not None and progress.tokens >= limits.tokens:
            self._halt_judges(f"--max-tokens: {progress.tokens} tokens were spent")
        if state.halt_event.is_set():
            return False
        progress.requests += 1
        self.on_progress(progress)
        return True

    async def _send_request(self, question: JudgeQuestion) -> JudgeReply:
        """Send a question and return the parsed reply. Raises `_RequestError` without a chat completion."""
        judge = question.judge
        settings = {"temperature": judge.temperature, "max_tokens": judge.reply_tokens}
        content = {
            "model": judge.model,
            "messages": [{"role": "user", "content": question.text}],
            **{name: value for name, value in settings.items() if value is not None},
        }
        try:
            async with (
                asyncio.timeout(self.limits.timeout),
                self.client.stream("POST", f"{judge.endpoint}/chat/completions", json=content) as response,
            ):
                body = await self._read_body(response)
        except TimeoutError:
            self._count_max_reply_tokens(judge)
            raise _RequestError("timeout", f"no reply within {self.limits.timeout:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _RequestError("no connection", self._redact_to_line(f"{type(error).__name__}: {error}")) from None
        if body is None:
            self._count_max_reply_tokens(judge)
            raise _RequestError("reply too long", f"more than {MAX_REPLY_BYTES:,} bytes", is_retryable=False)
        if response.is_error:
            status = response.status_code
            is_retryable = status >= 500 or status in RETRYABLE_STATUSES
            retry_after = parse_retry_after(response.headers.get("retry-after"))
            message = self._redact_to_line(parse_error_message(body)) or "no message"
            raise _RequestError(f"HTTP {status}", message, is_retryable=is_retryable, retry_after=retry_after)
        reply = parse_reply(body)
        self._count_tokens(None if reply.tokens is None else sum(reply.tokens))
        if reply.text is None:
            message = self._redact_to_line(body.decode(errors="replace")) or "an empty reply"
            raise _RequestError("no chat completion", message)
        return reply

    async def _read_body(self, response: httpx2.Response) -> bytes | None:
        """Read a reply's body; None if it is too long. Raises `_RequestError` on redirects and compressed replies."""
        if 300 <= (status := response.status_code) < 400:
            host = self._redact_to_line(_parse_host(response.headers.get("location", "")))
            raise _RequestError(f"HTTP {status}", f"a redirect to {host}, not followed", is_retryable=False)
        if (encoding := response.headers.get("content-encoding", "identity").lower()) != "identity":
            message = self._redact_to_line(f"a reply encoded as {encoding}; expected plain JSON")
            raise _RequestError("no chat completion", message)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                return None
        return bytes(body)

    def _count_max_reply_tokens(self, judge: Judge) -> None:
        """Add a judge's limit of a reply to the token count, for an unread reply: the server may have generated it."""
        if self.limits.tokens is not None:
            self._count_tokens(judge.reply_tokens)

    def _count_tokens(self, tokens: int | None) -> None:
        """Add tokens to the count; unknown ones (None) halt every judge if tokens are limited."""
        self.progress.tokens += tokens or 0
        if tokens is None and self.limits.tokens is not None:
            self._halt_judges("--max-tokens: the server reports no token counts; use --max-requests")

    def _count_failed_question(self, judge: Judge, failure: _RequestError) -> None:
        """Record a failed question; halts the judge after too many in a row, all judges if the key is missing."""
        state = self.states[judge]
        self.progress.failures.setdefault(failure.kind, []).append(failure.message)
        state.consecutive_failures += not (state.has_replied and failure.kind in QUESTION_ERRORS)
        if failure.kind == "HTTP 401" and not self.key:
            self._halt_judges(f"{KEY_VARIABLE}: not set, but the server requires a key; set it in the environment")
        elif state.consecutive_failures == MAX_CONSECUTIVE_FAILURES:
            self._halt_judges(
                f"{judge.model}: {MAX_CONSECUTIVE_FAILURES} questions in a row failed, the last with "
                f"{failure.kind}: {failure.message}",
                state,
            )
        self.on_progress(self.progress)

    def _halt_judges(self, reason: str, only: _JudgeState | None = None) -> None:
        """Halt the judge of one state, or all judges, and record the reason."""
        states = [state for state in self.states.values() if only in (None, state) and not state.halt_event.is_set()]
        if states:
            self.progress.stop_reasons.append(reason)
        for state in states:
            state.halt_event.set()

    def _redact_to_line(self, text: str) -> str:
        """Return a server's text as one printable line without the API key, at most 200 characters."""
        words = self.redact(replace_surrogates(text)).split()
        return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(words)[:200])


def _truncate_reply(text: str) -> str:
    """Return a reply's text as it is stored: if it is long, its beginning and its length."""
    return text if len(text) <= MAX_STORED_CHARACTERS else f"{text[:MAX_STORED_CHARACTERS]}… ({len(text):,} characters)"


def _parse_host(location_header: str) -> str:
    """Return the host of a Location header alone, since other parts may hold secrets."""
    try:
        return urlsplit(location_header).netloc.rpartition("@")[2] or "the same host"
    except ValueError:
        return "no address"


async def sleep_unless_halted(seconds: float, halt_event: asyncio.Event) -> None:
    """Wait for some seconds, or until the judge is halted."""
    with suppress(TimeoutError):
        await asyncio.wait_for(halt_event.wait(), seconds)


def _compute_retry_delay(failed_attempts: int, retry_after: float | None) -> float:
    """Return the seconds before the next attempt: exponential backoff or Retry-After, plus up to half at random."""
    backoff = min(2.0 ** (failed_attempts - 1), MAX_BACKOFF_SECONDS)
    return max(backoff, min(retry_after or 0.0, MAX_RETRY_AFTER_SECONDS)) * random.uniform(1.0, 1.5)


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or a date; None if missing or invalid."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
