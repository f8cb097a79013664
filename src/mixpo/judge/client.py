"""Asking: many questions at once, each until there are scores, within what may be spent."""

import asyncio
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2

from mixpo.judge.endpoint import KEY, hider, is_loopback
from mixpo.judge.questions import Judge, Question, whole
from mixpo.judge.replies import Reply, read_error, read_reply, scores, total
from mixpo.judge.verdicts import Keep, scores_row

ATTEMPTS_TO_PARSE = 2
"""Replies to a question until it counts as unparsed."""
FAILURES_IN_A_ROW = 8
"""Questions that fail one after the other until a judge is asked nothing more."""
QUESTIONS_OWN = ("HTTP 400", "HTTP 413", "HTTP 422")
"""What may be the fault of one question, such as a prompt that is too long, once the judge has replied to others."""
LARGEST_REPLY = 2**22
"""Bytes of a reply that are read; a longer one is a failure, whatever it says."""
LONGEST_KEPT = 2**16
"""Characters of a reply that are kept in the file."""
LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 300.0
"""Seconds that a server may have us wait."""
RETRIED = (408, 409, 425, 429)
"""Statuses below 500 after which the same question may be asked again."""


@dataclass(frozen=True)
class Limits:
    """How much is asked at once, how often, how long, and what may be spent in all."""

    concurrency: int = 8
    attempts: int = 6
    """At a question that no reply comes to."""
    timeout: float = 120.0
    """Seconds until a request counts as lost."""
    requests: int | None = None
    tokens: int | None = None


@dataclass
class Progress:
    """What became of the questions so far."""

    questions: int
    done: int = 0
    """Of them, unparsed ones included."""
    requests: int = 0
    tokens: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    """By kind: what was said of every question that failed."""
    stopped: list[str] = field(default_factory=list)
    """Why some were not asked."""

    @property
    def left(self) -> int:
        """Questions that nothing became of."""
        return self.questions - self.done - sum(map(len, self.failures.values()))


class _Failure(Exception):
    """A request that brought no chat completion."""

    def __init__(self, kind: str, said: str, *, again: bool = True, after: float | None = None) -> None:
        self.kind, self.said, self.again, self.after = kind, said, again, after


@dataclass
class _Standing:
    """How it goes with a judge."""

    proven: bool
    """Whether it has ever replied: neither its name nor its settings are wrong then."""
    failed_in_a_row: int = 0
    halted: asyncio.Event = field(default_factory=asyncio.Event)


def shuffled(questions: Sequence[Question]) -> list[Question]:
    """Prompts in another order at every call, so that those that always fail stand in nobody's way for good."""
    places = {number: random.random() for number in {question.number for question in questions}}
    return sorted(questions, key=lambda question: places[question.number])


def ask(
    questions: Sequence[Question],
    key: str,
    limits: Limits,
    keep: Keep,
    watch: Callable[[Progress], None],
    *,
    proven: Collection[Judge] = (),
) -> Progress:
    """Ask all questions at their endpoint, and keep what is said when it comes; `watch` is told of every request.

    `proven`: judges that replied in an earlier call.
    """
    return asyncio.run(_Asking(questions, key, limits, keep, watch, proven).all())


class _Asking:
    def __init__(
        self,
        questions: Sequence[Question],
        key: str,
        limits: Limits,
        keep: Keep,
        watch: Callable[[Progress], None],
        proven: Collection[Judge],
    ) -> None:
        self.questions, self.key, self.limits, self.keep, self.watch = questions, key, limits, keep, watch
        self.hide = hider(key)
        self.progress = Progress(len(questions))
        self.standings = {judge: _Standing(judge in proven) for judge in {question.judge for question in questions}}

    async def all(self) -> Progress:
        endpoint = self.questions[0].judge.endpoint
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", **authorization},  # what is packed may be a thousand times as long
            follow_redirects=False,  # prompts and key go where the endpoint is, and nowhere else
            trust_env=not is_loopback(endpoint),  # no proxy to this machine
            timeout=None,
            limits=httpx2.Limits(max_connections=None),
        ) as self.client:
            waiting = iter(shuffled(self.questions))
            workers = min(self.limits.concurrency, len(self.questions))
            await asyncio.gather(*(self._work(waiting) for _ in range(workers)))
        return self.progress

    async def _work(self, waiting: Iterator[Question]) -> None:
        for question in waiting:
            await self._ask(question)

    async def _ask(self, question: Question) -> None:
        """Until there are scores or none are to be had."""
        standing, lost, replies = self.standings[question.judge], 0, list[Reply]()
        while self._may_ask(standing):
            try:
                replies.append(await self._request(question))
            except _Failure as failure:
                lost += 1
                if not failure.again or lost == self.limits.attempts:
                    return self._give_up(question.judge, failure)
                await pause(_seconds(lost, failure.after), standing.halted)
                continue
            standing.proven, standing.failed_in_a_row = True, 0
            found = scores(replies[-1])
            if found is not None or len(replies) == ATTEMPTS_TO_PARSE:
                said = [_cut(self.hide(whole(reply.text or ""))) for reply in replies]
                self.keep(scores_row(question, found, said, total(replies)))
                self.progress.done += 1
                return self.watch(self.progress)
        return None

    def _may_ask(self, standing: _Standing) -> bool:
        """Whether another request may be made, which is counted."""
        limits, progress = self.limits, self.progress
        if limits.requests is not None and progress.requests >= limits.requests:
            self._halt(f"--max-requests: {progress.requests} requests were made")
        if limits.tokens is not None and progress.tokens >= limits.tokens:
            self._halt(f"--max-tokens: {progress.tokens} tokens were spent")
        if standing.halted.is_set():
            return False
        progress.requests += 1
        self.watch(progress)
        return True

    async def _request(self, question: Question) -> Reply:
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
            self._spend_unknown(judge)
            raise _Failure("no reply in time", f"after {self.limits.timeout:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Failure("no connection", self._line(f"{type(error).__name__}: {error}")) from None
        if body is None:
            self._spend_unknown(judge)
            raise _Failure("a reply without end", f"more than {LARGEST_REPLY:,} bytes", again=False)
        if response.is_error:
            again = response.status_code >= 500 or response.status_code in RETRIED
            after = retry_after(response.headers.get("retry-after"))
            said = self._line(read_error(body)) or "no message"
            raise _Failure(f"HTTP {response.status_code}", said, again=again, after=after)
        reply = read_reply(body)
        self._spend(None if reply.tokens is None else sum(reply.tokens))
        if reply.text is None:
            raise _Failure("no chat completion", self._line(body.decode(errors="replace")) or "an empty reply")
        return reply

    async def _read_body(self, response: httpx2.Response) -> bytes | None:
        """A reply's body as it is sent; None if it is too long. Raises `_Failure` on what is not read at all."""
        if 300 <= response.status_code < 400:
            to = self._line(_host(response.headers.get("location", "")))
            raise _Failure(f"HTTP {response.status_code}", f"a redirect to {to}, not followed", again=False)
        if (encoding := response.headers.get("content-encoding", "identity").lower()) != "identity":
            raise _Failure("no chat completion", self._line(f"a reply packed as {encoding}; expected plain JSON"))
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > LARGEST_REPLY:
                return None
        return bytes(body)

    def _spend_unknown(self, judge: Judge) -> None:
        """The tokens of a reply that nobody read to its end: the server may have written as many as it may."""
        if self.limits.tokens is not None:
            self._spend(judge.reply_tokens)

    def _spend(self, tokens: int | None) -> None:
        self.progress.tokens += tokens or 0
        if tokens is None and self.limits.tokens is not None:
            self._halt("--max-tokens: the server does not say how many tokens it used; use --max-requests")

    def _give_up(self, judge: Judge, failure: _Failure) -> None:
        standing = self.standings[judge]
        self.progress.failures.setdefault(failure.kind, []).append(failure.said)
        standing.failed_in_a_row += not (standing.proven and failure.kind in QUESTIONS_OWN)
        if failure.kind == "HTTP 401" and not self.key:
            self._halt(f"{KEY}: not set, and the server asks for a key; put it into the environment")
        elif standing.failed_in_a_row == FAILURES_IN_A_ROW:
            self._halt(
                f"{judge.model}: {FAILURES_IN_A_ROW} questions failed one after the other, the last with "
                f"{failure.kind}: {failure.said}",
                standing,
            )
        self.watch(self.progress)

    def _halt(self, why: str, only: _Standing | None = None) -> None:
        """Ask one judge nothing more, or nobody."""
        standings = [one for one in self.standings.values() if only in (None, one) and not one.halted.is_set()]
        if standings:
            self.progress.stopped.append(why)
        for standing in standings:
            standing.halted.set()

    def _line(self, text: str) -> str:
        """What was said elsewhere as one printable line without the key."""
        words = self.hide(whole(text)).split()
        return "".join(one if one.isprintable() else "\ufffd" for one in " ".join(words)[:200])


def _cut(text: str) -> str:
    """A reply as it is kept: its beginning, and how long it was."""
    return text if len(text) <= LONGEST_KEPT else f"{text[:LONGEST_KEPT]}… ({len(text):,} characters)"


def _host(location: str) -> str:
    """The host that a Location header names, and nothing else of it, since more may be a secret."""
    try:
        return urlsplit(location).netloc.rpartition("@")[2] or "the same host"
    except ValueError:
        return "no address"


async def pause(seconds: float, halted: asyncio.Event) -> None:
    """Wait, but not where nothing more is asked."""
    with suppress(TimeoutError):
        await asyncio.wait_for(halted.wait(), seconds)


def _seconds(lost: int, after: float | None) -> float:
    """To wait before the next attempt: twice as long each time, as long as the server asks for; up to half more."""
    backoff = min(2.0 ** (lost - 1), LONGEST_BACKOFF)
    return max(backoff, min(after or 0.0, LONGEST_RETRY_AFTER)) * random.uniform(1.0, 1.5)


def retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None where it says nothing."""
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
