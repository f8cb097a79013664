"""The pages of a study: one question a page, plain forms, and not a word that tells an arm."""

import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import jinja2
from fastapi import Depends, FastAPI, Form, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixpo.data.errors import InputError
from mixpo.data.rows import as_messages
from mixpo.data.text import escape_invisible, is_blank
from mixpo.study.plan import (
    COMMENT_LENGTH,
    IDLE_SECONDS,
    REASONS,
    comment_from,
    form_word,
    read_form_word,
    token_digest,
)
from mixpo.study.store import ClosedError, Said, Store, now
from mixpo.study.tables import AnnotatorRow, StudyRow

BODY_LIMIT = 64 * 1024
COOKIE_SECONDS = 30 * 24 * 3600
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
MESSAGES = {
    400: ("This could not be understood", "The form was not complete. Go back, load the page again and try once more."),
    403: ("This page is not open to you", "Open the link that you were given, whole, in this browser."),
    404: ("There is no such page", "Go on to the next question with the link below."),
    405: ("There is no such page", "Go on to the next question with the link below."),
    413: ("That is too much text", "Nothing was saved. Go back and shorten your comment."),
    421: ("This is not the study's address", "Open the link that you were given, whole, as it is written."),
    429: ("That was very fast", "Nothing was saved. Wait a minute, then go on."),
    500: ("Something went wrong", "What was saved before is safe. Load the page again in a moment."),
    503: ("This could not be saved", "What was saved before is safe. Go back and try again in a moment."),
}
log = logging.getLogger("mixpo.study")
pages = jinja2.Environment(
    loader=jinja2.PackageLoader("mixpo.study"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
pages.filters["visible"] = escape_invisible
pages.tests["blank"] = is_blank
Number = Annotated[int, Path(ge=1, lt=2**31)]
Saved = Annotated[int | None, Query(ge=1, lt=2**31)]


@dataclass
class Bucket:
    """Lets `burst` requests through at once, and `rate` more a second."""

    rate: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    last: float = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.left, self.last = self.burst, self.clock()

    def take(self) -> bool:
        """Whether one more may pass."""
        with self.lock:
            at = self.clock()
            self.left = min(self.burst, self.left + self.rate * (at - self.last))
            self.last = at
            if self.left < 1.0:
                return False
            self.left -= 1.0
            return True


class Guard:
    """Stands before all pages: refuses other hosts, other origins and large bodies, and gives every page its headers.

    Browsers send `Origin: null` from pages without a referrer, which ours are; the form's word and a cookie that is
    not sent across sites stand behind this check, so that it need not refuse that.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], scheme: str) -> None:
        self.app, self.hosts, self.scheme = app, frozenset(hosts), scheme

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        problem, body = self._problem(request.method, request.headers), b""
        try:
            if problem is None:
                async for part in request.stream():
                    body += part
                    if len(body) > BODY_LIMIT:
                        problem = 413
                        break
        except ClientDisconnect:
            return
        if problem is not None:
            await _message(problem)(scope, receive, answer)
            return
        left = [body]

        async def again() -> Message:
            return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

        await self.app(scope, again, answer)

    def _problem(self, method: str, headers: Headers) -> int | None:
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return 421
        if method not in ("GET", "HEAD"):
            if headers.get("origin", "null") not in ("null", f"{self.scheme}://{host}"):
                return 403
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403
        length = headers.get("content-length", "0")
        return 413 if length.isdecimal() and int(length) > BODY_LIMIT else None


def make_app(
    store: Store,
    study: StudyRow,
    *,
    hosts: Sequence[str],
    scheme: str = "http",
    rate: float = 5.0,
    burst: float = 60.0,
    clock: Callable[[], float] = time.time,
) -> ASGIApp:
    """The application of a study: `rate` and `burst` hold for every annotator, since several may share an address."""
    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, telemetry={"tracing": False, "metrics": False, "logs": False}
    )
    app.mount("/static", StaticFiles(packages=[("mixpo.study", "static")]))
    annotators = store.annotators()
    buckets = {one.id: Bucket(rate, burst) for one in annotators}
    strangers = Bucket(1.0, 20.0)
    cookie = f"study-{token_digest(study.secret)[:8]}"  # of this study: a browser may hold those of several

    def holder(token: str) -> AnnotatorRow | None:
        """Whose token it is; takes as long whoever's it is."""
        given = token_digest(token)
        return next(iter([one for one in annotators if hmac.compare_digest(one.token, given)]), None)

    def known(request: Request) -> AnnotatorRow:
        """Who asks."""
        found = holder(request.cookies.get(cookie, ""))
        if found is None:
            raise HTTPException(403 if strangers.take() else 429)
        if not buckets[found.id].take():
            raise HTTPException(429)
        return found

    Known = Annotated[AnnotatorRow, Depends(known)]

    def progress(me: AnnotatorRow, saved: int | None) -> dict[str, Any]:
        """How far somebody is, and which question was just saved, if it was."""
        there = None if saved is None else store.question(me.id, saved)
        return {"progress": store.progress(me.id)[0], "saved": saved if there and there.said else None}

    @app.get("/a/{token}")
    def enter(token: str) -> Response:
        """The link that an annotator was given: keeps the token in a cookie, and out of what is seen from then on."""
        if holder(token) is None:
            raise HTTPException(403 if strangers.take() else 429)
        response = RedirectResponse("/start", 303)
        secure = scheme == "https"
        response.set_cookie(
            cookie, token, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", secure=secure, path="/"
        )
        return response

    @app.get("/start")
    def start() -> Response:
        """The guidelines. No cookie is asked for: browsers send none along a link from another site."""
        return _page("start", guidelines=study.guidelines)

    @app.get("/")
    def go_on(me: Known) -> Response:
        """To the first question that is open."""
        return _next(store, me.id)

    @app.get("/done")
    def done(me: Known, saved: Saved = None) -> Response:
        """Thanks."""
        return _page("done", closed=store.closed(), **progress(me, saved))

    @app.get("/q/{number}")
    def ask(me: Known, number: Number, saved: Saved = None, unchanged: bool = False) -> Response:
        """A question."""
        question = store.question(me.id, number)
        if question is None:
            raise HTTPException(404)
        if store.closed():
            return RedirectResponse("/done", 303)
        return _page(
            "question",
            question=question,
            turns=as_messages(question.item.prompt),
            **progress(me, saved),
            unchanged=unchanged,
            reasons=REASONS,
            guidelines=study.guidelines,
            comment_length=COMMENT_LENGTH,
            word=form_word(study.secret, me.id, number, now=clock()),
        )

    @app.post("/q/{number}")
    def judge(
        me: Known,
        number: Number,
        form: Annotated[str, Form()],
        choice: Annotated[str, Form(pattern="^(left|right|tie|skip)$")],
        reason: Annotated[str, Form()] = "",
        comment: Annotated[str, Form()] = "",
    ) -> Response:
        """Keep what is said of a question, then on to the next one."""
        read = read_form_word(form, study.secret, me.id, number)
        if read is None:
            raise HTTPException(403)
        comment = comment_from(comment)
        if choice != "skip":
            reason = ""
        elif reason not in REASONS:
            raise HTTPException(400)
        if len(comment) > COMMENT_LENGTH:
            raise HTTPException(413)
        nonce, served = read
        seconds = max(0.0, clock() - served)
        said = Said(
            choice, reason, comment, round(min(seconds, IDLE_SECONDS), 1), idle=seconds > IDLE_SECONDS, at=now()
        )
        try:
            stands = store.judge(me.id, number, said, nonce)
        except ClosedError:
            return _message(403, "The study is closed", "Nothing is judged any more. Thank you for your help.")
        # a form that had said something else before: what stands is marked there
        return _next(store, me.id, number) if stands else RedirectResponse(f"/q/{number}?unchanged=1#question", 303)

    @app.exception_handler(AnyHTTPException)
    def refuse(_: Request, error: Any) -> Response:
        return _message(error.status_code)

    @app.exception_handler(RequestValidationError)
    def refuse_form(_: Request, error: Any) -> Response:
        return _message(404 if error.errors()[0]["loc"][0] == "path" else 400)

    @app.exception_handler(InputError)
    def refuse_store(_: Request, error: Any) -> Response:
        log.error("%s", error)
        return _message(503)

    @app.exception_handler(Exception)
    def fail(_: Request, __: Any) -> Response:
        return _message(500)

    return Guard(app, hosts, scheme)


def _next(store: Store, annotator: int, judged: int = 0) -> Response:
    """On to the next open question; the fragment puts the focus on its heading without any script."""
    number = store.next_open(annotator, judged)
    saved = f"?saved={judged}" if judged else ""
    return RedirectResponse(f"/done{saved}" if number is None else f"/q/{number}{saved}#question", 303)


def _page(name: str, status: int = 200, **content: Any) -> Response:
    return HTMLResponse(pages.get_template(f"{name}.html.j2").render(**content), status)


def _message(status: int, title: str | None = None, text: str | None = None) -> Response:
    usual = MESSAGES.get(status, MESSAGES[500])
    return _page("message", status, title=title or usual[0], text=text or usual[1])
