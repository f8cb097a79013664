"""Web application of a study: one question a page, plain HTML forms, no trace of the arms."""

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
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixpo.data.errors import InputError
from mixpo.data.rows import convert_to_messages
from mixpo.data.text import escape_invisible, is_blank
from mixpo.study.plan import (
    COMMENT_LENGTH,
    IDLE_SECONDS,
    REASONS,
    clean_comment,
    hash_token,
    make_csrf_token,
    verify_csrf_token,
)
from mixpo.study.store import Answer, StudyClosedError, StudyStore, format_current_time
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
    400: ("The form was not complete", "Nothing was saved. Go back, load the page again and try once more."),
    403: ("Access denied", "Open your complete personal link in this browser."),
    404: ("Page not found", "The link below leads to the next question."),
    405: ("Page not found", "The link below leads to the next question."),
    413: ("The text is too long", "Nothing was saved. Go back and shorten your comment."),
    421: ("Wrong address", "Open your complete personal link exactly as it is written."),
    429: ("Too many requests", "Nothing was saved. Wait a minute, then continue."),
    500: ("Something went wrong", "Earlier judgements are saved. Load the page again in a moment."),
    503: ("The judgement could not be saved", "Earlier judgements are saved. Go back and try again in a moment."),
}
log = logging.getLogger("mixpo.study")
templates = jinja2.Environment(
    loader=jinja2.PackageLoader("mixpo.study"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters["visible"] = escape_invisible
templates.tests["blank"] = is_blank
QuestionNumber = Annotated[int, Path(ge=1, lt=2**31)]
SavedNumber = Annotated[int | None, Query(ge=1, lt=2**31)]


@dataclass
class TokenBucket:
    """Rate limiter: `burst` requests at once, and `rate` more per second."""

    rate: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    tokens: float = field(init=False)
    updated: float = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tokens, self.updated = self.burst, self.clock()

    def take_token(self) -> bool:
        """Take a token for a request and return True; return False if there is none."""
        with self.lock:
            now = self.clock()
            self.tokens = min(self.burst, self.tokens + self.rate * (now - self.updated))
            self.updated = now
            if self.tokens < 1.0:
                return False
            self.tokens -= 1.0
            return True


class SecurityMiddleware:
    """ASGI middleware: rejects wrong hosts, cross-site posts and large bodies, and adds security headers.

    `Origin: null` is accepted, since browsers send it from pages without a referrer, which ours are; the CSRF token and
    the SameSite cookie protect against cross-site posts.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], scheme: str) -> None:
        self.app, self.hosts, self.scheme = app, frozenset(hosts), scheme

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: reject it, or pass it on with its body read."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        status, body = self._find_refusal_status(request.method, request.headers), b""
        try:
            if status is None:
                async for part in request.stream():
                    body += part
                    if len(body) > BODY_LIMIT:
                        status = 413
                        break
        except ClientDisconnect:
            return
        if status is not None:
            await _render_message(status)(scope, receive, send_with_headers)
            return
        pending = [body]

        async def replay_body() -> Message:
            return {"type": "http.request", "body": pending.pop(), "more_body": False} if pending else await receive()

        await self.app(scope, replay_body, send_with_headers)

    def _find_refusal_status(self, method: str, headers: Headers) -> int | None:
        """Return the HTTP status with which a request is rejected by its headers; None if it may pass."""
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
    store: StudyStore,
    study: StudyRow,
    *,
    hosts: Sequence[str],
    scheme: str = "http",
    rate: float = 5.0,
    burst: float = 60.0,
    clock: Callable[[], float] = time.time,
) -> ASGIApp:
    """Make the ASGI application of a study; each annotator may send `burst` requests, then `rate` a second.

    The limit is not by address, since several annotators may share one.
    """
    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, telemetry={"tracing": False, "metrics": False, "logs": False}
    )
    app.mount("/static", StaticFiles(packages=[("mixpo.study", "static")]))
    annotators = store.load_annotators()
    buckets = {annotator.id: TokenBucket(rate, burst) for annotator in annotators}
    unknown_bucket = TokenBucket(1.0, 20.0)
    cookie = f"study-{hash_token(study.secret)[:8]}"  # one per study: a browser may hold cookies of several

    def find_annotator(token: str) -> AnnotatorRow:
        """Return the annotator of a link token, in constant time. Raises HTTP 403 if unknown, 429 above the rate."""
        token_hash = hash_token(token)
        matches = [annotator for annotator in annotators if hmac.compare_digest(annotator.token, token_hash)]
        if not matches:
            raise HTTPException(403 if unknown_bucket.take_token() else 429)
        return matches[0]

    def authenticate(request: Request) -> AnnotatorRow:
        """Return the annotator of the request's cookie. Raises HTTP 403 without one, 429 above the rate."""
        annotator = find_annotator(request.cookies.get(cookie, ""))
        if not buckets[annotator.id].take_token():
            raise HTTPException(429)
        return annotator

    AuthenticatedAnnotator = Annotated[AnnotatorRow, Depends(authenticate)]

    def make_progress_context(annotator: AnnotatorRow, saved_number: int | None) -> dict[str, Any]:
        """Return template values: the annotator's progress, and the question just saved, None if it has no answer."""
        question = None if saved_number is None else store.load_question(annotator.id, saved_number)
        return {
            "progress": store.count_progress(annotator.id)[0],
            "saved": saved_number if question and question.answer else None,
        }

    @app.get("/a/{token}")
    def sign_in(token: str) -> Response:
        """Open an annotator's link: put the token into a cookie and redirect, so that it leaves the address bar."""
        find_annotator(token)
        response = RedirectResponse("/start", 303)
        secure = scheme == "https"
        response.set_cookie(cookie, token, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", secure=secure)
        return response

    @app.get("/start")
    def show_guidelines() -> Response:
        """Show the guidelines. Needs no cookie: browsers send none along a link from another site."""
        return _render_page("start", guidelines=study.guidelines)

    @app.get("/")
    def redirect_to_open_question(annotator: AuthenticatedAnnotator) -> Response:
        """Redirect to the annotator's first unanswered question."""
        return _redirect_to_next_question(store, annotator.id)

    @app.get("/done")
    def show_thanks(annotator: AuthenticatedAnnotator, saved: SavedNumber = None) -> Response:
        return _render_page("done", closed=store.is_study_closed(), **make_progress_context(annotator, saved))

    @app.get("/q/{number}")
    def show_question(
        annotator: AuthenticatedAnnotator, number: QuestionNumber, saved: SavedNumber = None, unchanged: bool = False
    ) -> Response:
        question = store.load_question(annotator.id, number)
        if question is None:
            raise HTTPException(404)
        if store.is_study_closed():
            return RedirectResponse("/done", 303)
        return _render_page(
            "question",
            question=question,
            turns=convert_to_messages(question.item.prompt),
            **make_progress_context(annotator, saved),
            unchanged=unchanged,
            reasons=REASONS,
            guidelines=study.guidelines,
            comment_length=COMMENT_LENGTH,
            csrf_token=make_csrf_token(study.secret, annotator.id, number, unix_seconds=clock()),
        )

    @app.post("/q/{number}")
    def submit_judgement(
        annotator: AuthenticatedAnnotator,
        number: QuestionNumber,
        form: Annotated[str, Form()],
        choice: Annotated[str, Form(pattern="^(left|right|tie|skip)$")],
        reason: Annotated[str, Form()] = "",
        comment: Annotated[str, Form()] = "",
    ) -> Response:
        """Save the judgement of a submitted form and redirect to the next question."""
        verified = verify_csrf_token(form, study.secret, annotator.id, number)
        if verified is None:
            raise HTTPException(403)
        comment = clean_comment(comment)
        if choice != "skip":
            reason = ""
        elif reason not in REASONS:
            raise HTTPException(400)
        if len(comment) > COMMENT_LENGTH:
            raise HTTPException(413)
        nonce, served = verified
        seconds = max(0.0, clock() - served)
        idle = seconds > IDLE_SECONDS
        answer = Answer(choice, reason, comment, round(min(seconds, IDLE_SECONDS), 1), idle, format_current_time())
        try:
            is_current = store.save_answer(annotator.id, number, answer, nonce)
        except StudyClosedError:
            return _render_message(
                403, "The study is closed", "It accepts no more judgements. Thank you for your help."
            )
        if is_current:
            return _redirect_to_next_question(store, annotator.id, number)
        # a form that was used before with another answer: the page marks the current one
        return RedirectResponse(f"/q/{number}?unchanged=1#question", 303)

    @app.exception_handler(StarletteHTTPException)
    def render_http_error(_: Request, error: Any) -> Response:
        return _render_message(error.status_code)

    @app.exception_handler(RequestValidationError)
    def render_validation_error(_: Request, error: Any) -> Response:
        return _render_message(404 if error.errors()[0]["loc"][0] == "path" else 400)

    @app.exception_handler(InputError)
    def render_store_error(_: Request, error: Any) -> Response:
        log.error("%s", error)
        return _render_message(503)

    @app.exception_handler(Exception)
    def render_unexpected_error(_: Request, __: Any) -> Response:
        return _render_message(500)

    return SecurityMiddleware(app, hosts, scheme)


def _redirect_to_next_question(store: StudyStore, annotator_id: int, judged_number: int = 0) -> Response:
    """Redirect to the next unanswered question, or to the last page if there is none."""
    number = store.find_unanswered_question(annotator_id, judged_number)
    saved = f"?saved={judged_number}" if judged_number else ""
    return RedirectResponse(f"/done{saved}" if number is None else f"/q/{number}{saved}#question", 303)


def _render_page(template_name: str, status: int = 200, **template_values: Any) -> Response:
    return HTMLResponse(templates.get_template(f"{template_name}.html.j2").render(**template_values), status)


def _render_message(status: int, title: str | None = None, text: str | None = None) -> Response:
    """Render the page of an HTTP status as a response, with its usual title and text where None is given."""
    default = MESSAGES.get(status, MESSAGES[500])
    return _render_page("message", status, title=title or default[0], text=text or default[1])
