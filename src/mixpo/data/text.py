"""Texts of models as they may safely be shown: nothing hidden, nothing that turns its surroundings around."""

import unicodedata

PLAIN = "\n\t\u200c\u200d"
"""Characters without a shape that stay: line breaks, and what joins or parts letters and emoji."""


def escape_invisible(text: str) -> str:
    """A text in which every control, bidirectional or otherwise invisible character can be seen: ␛, ⟦U+202E⟧."""
    return "".join(map(_shape, text.replace("\r\n", "\n")))


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in a text that `escape_invisible` made."""
    return all(character.isspace() or character in PLAIN for character in text)


def _shape(character: str) -> str:
    if character in PLAIN or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟦U+{code:04X}⟧"
