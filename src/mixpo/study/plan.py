"""What a study draws and signs: every annotator's own order and sides, digests, and the word on every form."""

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
"""Why a question may be skipped."""
COMMENT_LENGTH = 2_000
IDLE_SECONDS = 600.0
"""Who has a question before him for longer was away: his time counts as this, and as idle."""


def order(items: int, *, draw: int, secret: str, annotator: str) -> list[tuple[int, bool]]:
    """An annotator's questions: which item comes when, and whether its second arm stands on the left.

    Each arm stands on the left of half of the questions, or of one more. Without the secret, which is made once a study
    and revealed when it is closed, nobody can draw the same from the seed.
    """
    generator = random.Random(f"{draw} {secret} {annotator}")
    places = generator.sample(range(items), items)
    first = generator.randrange(2)
    swapped = [(place + first) % 2 == 1 for place in range(items)]
    generator.shuffle(swapped)
    return list(zip(places, swapped, strict=True))


def unchanged(results: Results, arms: tuple[str, str], *, seed: int, prompts: int, draw: int, content: str) -> bool:
    """Whether a run still has the prompts and completions that a study is of."""
    try:
        return content_digest(pair_completions(results, arms, seed=seed, prompts=prompts, draw=draw)) == content
    except MissingError:
        return False


def content_digest(drawn: Sequence[Comparison]) -> str:
    """All prompts and completions that were drawn."""
    rows = [[one.number, one.category, one.prompt, one.completions] for one in drawn]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def comment_from(text: str) -> str:
    """A comment as it is kept."""
    return text.replace("\r\n", "\n").replace("\0", "").strip()


def question_digest(secret: str, *parts: object) -> str:
    """What stands for a question and its texts in an export: nobody without the secret can tell an arm by it.

    It covers all at once, and whose question it is: digests of texts would show where an arm repeats itself.
    """
    text = json.dumps(parts, sort_keys=True)
    return hmac.new(secret.encode(), f"question {text}".encode(), hashlib.sha256).hexdigest()[:32]


def token_digest(token: str) -> str:
    """What the store keeps of an annotator's token."""
    return hashlib.sha256(token.encode()).hexdigest()


def form_word(secret: str, annotator: int, number: int, *, now: float) -> str:
    """The word on a form: when it was served, and a nonce, signed for one annotator and one question."""
    nonce = f"{round(now * 1000)}.{secrets.token_hex(8)}"
    return f"{nonce}.{_signature(secret, annotator, number, nonce)}"


def read_form_word(word: str, secret: str, annotator: int, number: int) -> tuple[str, float] | None:
    """The nonce on a form and when the form was served; None where it was not served for this question."""
    nonce, _, signature = word.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(secret, annotator, number, nonce).encode()):
        return None
    return nonce, int(nonce.partition(".")[0]) / 1000


def _signature(secret: str, annotator: int, number: int, nonce: str) -> str:
    return hmac.new(secret.encode(), f"form {annotator} {number} {nonce}".encode(), hashlib.sha256).hexdigest()
