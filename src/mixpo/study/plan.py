"""Random question orders of a study, digests of its content, and CSRF tokens of its forms."""

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Sequence

from mixpo.experiments.comparisons import Comparison, MissingError, pair_completions
from mixpo.experiments.results import Results

CHOICES = ("left", "right", "tie", "skip")
REASONS = {
    "unreadable": "I cannot read one of the texts",
    "knowledge": "It takes knowledge that I lack",
    "upsetting": "I would rather not read this",
    "broken": "Something is wrong with this page",
    "other": "Another reason",
}
"""Why a question may be skipped: form value and label."""
COMMENT_LENGTH = 2_000
IDLE_SECONDS = 600.0
"""The most seconds that are recorded for a judgement; a longer one is marked idle."""


def draw_question_order(item_count: int, *, draw: int, secret: str, annotator: str) -> list[tuple[int, bool]]:
    """Draw an annotator's question order: for each question its item index and whether the arms are swapped.

    Swapped means that the second arm is on the left; each arm is on the left of half of the questions, or of one more.
    The draw depends on the study's secret, which is revealed when the study closes: the seed alone tells no side.
    """
    generator = random.Random(f"{draw} {secret} {annotator}")
    item_indexes = generator.sample(range(item_count), item_count)
    offset = generator.randrange(2)
    swapped = [(index + offset) % 2 == 1 for index in range(item_count)]
    generator.shuffle(swapped)
    return list(zip(item_indexes, swapped, strict=True))


def are_completions_unchanged(
    results: Results, arms: tuple[str, str], *, seed: int, prompts: int, draw: int, content: str
) -> bool:
    """Check that a run's compared completions still have the digest `content` that a study recorded."""
    try:
        return compute_content_digest(pair_completions(results, arms, seed=seed, prompts=prompts, draw=draw)) == content
    except MissingError:
        return False


def compute_content_digest(comparisons: Sequence[Comparison]) -> str:
    """SHA-256 of all compared prompts and completions of a study."""
    rows = [[one.number, one.category, one.prompt, one.completions] for one in comparisons]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def clean_comment(text: str) -> str:
    """Normalize a comment before it is stored: line breaks, zero characters, surrounding blanks."""
    return text.replace("\r\n", "\n").replace("\0", "").strip()


def compute_question_digest(secret: str, *parts: object) -> str:
    """Keyed digest (HMAC) of a question and its texts, which identifies it in an export without revealing the arms.

    It covers annotator, number and all texts at once: digests of single texts would show where an arm repeats itself.
    """
    text = json.dumps(parts, sort_keys=True)
    return hmac.new(secret.encode(), f"question {text}".encode(), hashlib.sha256).hexdigest()[:32]


def hash_token(token: str) -> str:
    """SHA-256 of an annotator's link token, the only form in which the store holds it."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_csrf_token(secret: str, annotator: int, number: int, *, now: float) -> str:
    """Make the CSRF token of a form: serving time and nonce, signed for one annotator and one question."""
    nonce = f"{round(now * 1000)}.{secrets.token_hex(8)}"
    return f"{nonce}.{_sign_nonce(secret, annotator, number, nonce)}"


def verify_csrf_token(csrf_token: str, secret: str, annotator: int, number: int) -> tuple[str, float] | None:
    """Verify a form's CSRF token; return its nonce and serving time, or None if it is for another question."""
    nonce, _, signature = csrf_token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign_nonce(secret, annotator, number, nonce).encode()):
        return None
    return nonce, int(nonce.partition(".")[0]) / 1000


def _sign_nonce(secret: str, annotator: int, number: int, nonce: str) -> str:
    return hmac.new(secret.encode(), f"form {annotator} {number} {nonce}".encode(), hashlib.sha256).hexdigest()
