"""Asking: many questions at once, each until it is answered, within what may be spent."""

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from mixpo.data.errors import InputError
from mixpo.judge.endpoint import hider, is_loopback
from mixpo.judge.questions import Question, whole
from mixpo.judge.replies import Reply, read_reply, scores
from mixpo.judge.verdicts import Keep, answer_row

try:
    import openai
except ImportError as missing:
    raise InputError("openai: found no such package, which talks to judges; pip install 'mixpo[judge]'") from missing

READINGS = 2
"""Replies to a question until it counts as unparsed."""
RUN = 8
"""Questions that fail one after the other until nothing more is asked."""
LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 300.0
"""Seconds that a server may have us wait."""
AGAIN = (408, 409, 425, 429)
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
    answered: int = 0
    """Of them, unparsed ones included."""
    requests: int = 0
    tokens: int = 0
    failures: dict[str, list[str]] = field(default_factory=dict)
    """By kind: what was said of every question that failed."""
    stopped: str = ""
    """Why nothing more is asked; empty where all was."""

    @property
    def left(self) -> int:
        """Questions that nothing became of."""
        return self.questions - self.answered - sum(map(len, self.failures.values()))


class _Failure(Exception):
    """A request that brought no chat completion."""

    def __init__(self, kind: str, said: str, *, again: bool = True, after: float | None = None) -> None:
        self.kind, self.said, self.again, self.after = kind, said, again, after


def ask(
    questions: Sequence[Question], key: str, limits: Limits, keep: Keep, watch: Callable[[Progress], None]
) -> Progress:
    """Ask all questions at their endpoint, and keep every answer when it comes; `watch` is told of every request."""
    return asyncio.run(_Asking(questions, key, limits, keep, watch).all())


class _Asking:
    def __init__(
        self,
        questions: Sequence[Question],
        key: str,
        limits: Limits,
        keep: Keep,
        watch: Callable[[Progress], None],
    ) -> None:
        self.questions, self.key, self.limits, self.keep, self.watch = questions, key, limits, keep, watch
        self.hide = hider(key)
        self.progress = Progress(len(questions))
        self.failed_in_a_row = 0
        self.halted = asyncio.Event()

    async def all(self) -> Progress:
        endpoint = self.questions[0].judge.endpoint
        here = openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(endpoint))  # no proxy to this machine
        async with openai.AsyncOpenAI(
            base_url=endpoint, api_key=self.key or "none", max_retries=0, timeout=None, http_client=here
        ) as self.client:
            waiting = iter(self.questions)
            await asyncio.gather(*(self._work(waiting) for _ in range(self.limits.concurrency)))
        return self.progress

    async def _work(self, waiting: Iterator[Question]) -> None:
        for question in waiting:
            await self._ask(question)
            if self.halted.is_set():
                return

    async def _ask(self, question: Question) -> None:
        """Until there is an answer or none is to be had."""
        lost, unread = 0, 0
        while self._may_ask():
            try:
                reply = await self._request(question)
            except _Failure as failure:
                lost += 1
                if not failure.again or lost == self.limits.attempts:
                    return self._give_up(failure)
                await pause(_seconds(lost, failure.after), self.halted)
                continue
            self.failed_in_a_row = 0
            found = scores(reply)
            unread += found is None
            if found is not None or unread == READINGS:
                self.keep(answer_row(question, found, self.hide(whole(reply.text or "")), reply.tokens))
                self.progress.answered += 1
                return self.watch(self.progress)
        return None

    def _may_ask(self) -> bool:
        """Whether another request may be made, which is counted."""
        limits, progress = self.limits, self.progress
        if limits.requests is not None and progress.requests >= limits.requests:
            self._halt(f"--max-requests: {progress.requests} requests were made")
        if limits.tokens is not None and progress.tokens >= limits.tokens:
            self._halt(f"--max-tokens: {progress.tokens} tokens were spent")
        if self.halted.is_set():
            return False
        progress.requests += 1
        self.watch(progress)
        return True

    async def _request(self, question: Question) -> Reply:
        judge = question.judge
        try:
            async with asyncio.timeout(self.limits.timeout):
                raw = await self.client.chat.completions.with_raw_response.create(
                    model=judge.model,
                    messages=[{"role": "user", "content": question.text}],
                    temperature=judge.temperature,
                    max_tokens=judge.reply_tokens,
                )
        except TimeoutError:
            raise _Failure("no reply in time", f"after {self.limits.timeout:g} s") from None
        except openai.APIStatusError as error:
            again = error.status_code >= 500 or error.status_code in AGAIN
            after = retry_after(error.response.headers.get("retry-after"))
            raise _Failure(f"HTTP {error.status_code}", self._said(error), again=again, after=after) from None
        except openai.OpenAIError as error:
            cause = error.__cause__ or error
            raise _Failure("no connection", self._line(f"{type(cause).__name__}: {cause}")) from None
        reply = read_reply(raw.http_response.content)
        self._spend(reply)
        if reply.text is None:
            raise _Failure("no chat completion", self._line(raw.http_response.text) or "an empty reply")
        return reply

    def _spend(self, reply: Reply) -> None:
        if reply.tokens is not None:
            self.progress.tokens += sum(reply.tokens)
        elif self.limits.tokens is not None and reply.text is not None:
            self._halt("--max-tokens: the server does not say how many tokens it used; use --max-requests")

    def _give_up(self, failure: _Failure) -> None:
        self.progress.failures.setdefault(failure.kind, []).append(failure.said)
        self.failed_in_a_row += 1
        if self.failed_in_a_row == RUN:
            self._halt(f"{RUN} questions failed one after the other, the last with {failure.kind}: {failure.said}")
        self.watch(self.progress)

    def _halt(self, why: str) -> None:
        self.progress.stopped = self.progress.stopped or why
        self.halted.set()

    def _said(self, error: openai.APIStatusError) -> str:
        """A server's message."""
        message = error.body.get("message") if isinstance(error.body, dict) else None
        return self._line(message if isinstance(message, str) else error.response.text) or "no message"

    def _line(self, text: str) -> str:
        """What was said elsewhere as one printable line without the key."""
        words = self.hide(whole(text)).split()
        return "".join(one if one.isprintable() else "\ufffd" for one in " ".join(words)[:200])


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
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else max(0.0, seconds)
