"""Random question orders of a study, digests of its content, and CSRF tokens of its forms."""

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Sequence

from mixpo.experiments.comparisons import Comparison, NotInRunError, pair_completions
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
    """Draw an annotator's questions in order: for each its item index, and whether the second arm is on the left.

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
    results: Results, arms: tuple[str, str], *, seed: int, prompt_count: int, draw_seed: int, content_digest: str
) -> bool:
    """Return True if a run's compared completions still have the digest that a study recorded."""
    try:
        comparisons = pair_completions(results, arms, seed=seed, prompt_count=prompt_count, draw_seed=draw_seed)
    except NotInRunError:
        return False
    return compute_content_digest(comparisons) == content_digest


def compute_content_digest(comparisons: Sequence[Comparison]) -> str:
    """Return the SHA-256 of all compared prompts and completions of a study."""
    rows = [[one.number, one.category, one.prompt, one.completions] for one in comparisons]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def clean_comment(text: str) -> str:
    """Return a comment as it is stored: line breaks as \\n, without zero characters and surrounding blanks."""
    return text.replace("\r\n", "\n").replace("\0", "").strip()


def compute_question_digest(secret: str, *texts: object) -> str:
    """Return an HMAC of a question's texts, which identifies it in an export without revealing the arms.

    It covers annotator, number and all texts at once: digests of single texts would show where an arm repeats itself.
    """
    text = json.dumps(texts, sort_keys=True)
    return hmac.new(secret.encode(), f"question {text}".encode(), hashlib.sha256).hexdigest()[:32]


def hash_token(token: str) -> str:
    """Return the SHA-256 of an annotator's link token, the only form in which the store holds it."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_csrf_token(secret: str, annotator_id: int, number: int, *, unix_seconds: float) -> str:
    """Make the CSRF token of a form: serving time and nonce, signed for one annotator and one question."""
    nonce = f"{round(unix_seconds * 1000)}.{secrets.token_hex(8)}"
    return f"{nonce}.{_sign_nonce(secret, annotator_id, number, nonce)}"


def verify_csrf_token(csrf_token: str, secret: str, annotator_id: int, number: int) -> tuple[str, float] | None:
    """Return the nonce and the serving time (Unix seconds) of a form's CSRF token; None if its signature is wrong."""
    nonce, _, signature = csrf_token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _sign_nonce(secret, annotator_id, number, nonce).encode()):
        return None
    return nonce, int(nonce.partition(".")[0]) / 1000


def _sign_nonce(secret: str, annotator_id: int, number: int, nonce: str) -> str:
    return hmac.new(secret.encode(), f"form {annotator_id} {number} {nonce}".encode(), hashlib.sha256).hexdigest()
