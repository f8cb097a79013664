"""Escapes of invisible and bidirectional characters, for showing model output safely."""

import unicodedata

KEPT_CHARACTERS = "\n\t\u200c\u200d"
"""Invisible characters that are not escaped: line breaks, tabs and the joiners of letters and emoji."""


def escape_invisible(text: str) -> str:
    """Replace control, bidirectional and other invisible characters of a text by visible ones: ␛, ⟦U+202E⟧."""
    return "".join(map(_escape_character, text.replace("\r\n", "\n")))


def is_blank(text: str) -> bool:
    """True if a text from `escape_invisible` has only whitespace and joiners of letters, or nothing."""
    return all(character.isspace() or character in KEPT_CHARACTERS for character in text)


def _escape_character(character: str) -> str:
    """Visible form of an invisible character; any other character unchanged."""
    if character in KEPT_CHARACTERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟦U+{code:04X}⟧"
