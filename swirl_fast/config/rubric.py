"""judge.model.rubric: a text file of criteria in plain words."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swirl_fast.config.error import ConfigError

KEY = "judge.model.rubric"
MAX_CHARS = 20_000  # it comes with every prompt


def rubric_hash(text: str) -> str:
    """Of the contents, for the ids of judges and for reports: 8 hex digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def read_rubric(path: str) -> str:
    """The criteria, with the line ends of Unix, so that a copy from another system is the same. path: empty for none, then the text is
    empty too. Raises ConfigError for a file that cannot be read, is not UTF-8, is empty, or has more than MAX_CHARS characters."""
    if not path:
        return ""
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").strip()
    except FileNotFoundError:
        raise ConfigError(f"{KEY}={path}: no such file; give the path of a text file of criteria") from None
    except IsADirectoryError:
        raise ConfigError(f"{KEY}={path}: this is a folder; give the path of a text file of criteria") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{KEY}={path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{KEY}={path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ConfigError(f"{KEY}={path}: holds zero bytes, so it is not UTF-8 text; save it as such")
    if not text:
        raise ConfigError(
            f"{KEY}={path}: is empty; write the criteria into it, or leave {KEY} out for the built-in ones"
        )
    if len(text) > MAX_CHARS:
        raise ConfigError(
            f"{KEY}={path}: has {len(text):,} characters, and it comes with every prompt; shorten it to at most {MAX_CHARS:,}"
        )
    return text
