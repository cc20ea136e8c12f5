"""What counts as the same text, and what is no text at all. Pure functions; plain ASCII comes back as it is."""

from __future__ import annotations

import re
import unicodedata

_SURROGATE = re.compile("[\ud800-\udfff]")
# accents over and under letters; the vowel signs of Indic, Hebrew and Arabic script are letters and stay
_ACCENT = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_UNDIVIDED = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"}
)


def whole_characters(text: str) -> str:
    """Every half of a surrogate pair becomes U+FFFD: half a character cannot be written as UTF-8, and tokenizers raise for it."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def whole_values(value: object) -> object:
    """`whole_characters` of every text in lists and tables."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [whole_values(one) for one in value]
    if isinstance(value, dict):
        return {whole_characters(key) if isinstance(key, str) else key: whole_values(one) for key, one in value.items()}
    return value


def same_text(text: str) -> str:
    """Equal for texts that look the same: NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def without_accents(text: str) -> str:
    """For searching: compatibility forms, accents and case are no difference (`Beyoncé` is `beyonce`, `Straße` is `strasse`)."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFKC", _ACCENT.sub("", text).translate(_UNDIVIDED))
