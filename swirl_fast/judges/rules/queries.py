"""What is wrong with a query or with an answer after searches, judged only by its words.

Part of the rules judge. What is asked of the form of an answer was measured on the gold answers of 900 questions of HotPotQA,
2WikiMultihopQA and MuSiQue:

    186 are yes or no      all these questions have an auxiliary at the start of a clause, none has "or"; of all, both gold passages
                           together hold every name in the question, and the first passage by itself never does
    178 questions begin with an auxiliary and hold neither "or" nor a question word: all are answered with yes or no
    91 ask for a year or begin with "when": 90 answers hold a digit
    274 ask for a person, a place or a company: no answer is a bare number

Of MuSiQue's 437 sub-questions 99.3 % hold a name of the question or of what was found, or have half of their words from there.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from functools import lru_cache

from swirl_fast.tools.characters import without_accents

MAX_ANSWER_WORDS = 12  # of a span
MAX_QUERY_WORDS = 30
MAX_QUERIES = 5  # in one call

STOP_WORDS = frozenset(
    "a an the of in on at to for from by with and or but not no is are was were be been being am do does did has have "
    "had it its this that these those which what who whom whose when where why how many much as than then there their "
    "his her he she they them him i you we me my your our both also into about between can could will would should may "
    "might".split()
)
_AUXILIARY = "(?:is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|should|may)"
_CLAUSE = re.compile(rf"(?:^|[,;:.?!])\s*{_AUXILIARY}\b", re.I)
_CLOSED = re.compile(
    rf"{_AUXILIARY}\b(?!\s+you\b)(?!.*\b(?:or|who|whom|whose|which|what|when|where|why|how)\b)", re.I | re.S
)
_DATE = re.compile(r"^when\b|\b(?:which|what) year\b", re.I)
_THING = re.compile(
    r"^(?:who|whose|whom|where)\b|\b(?:which|what) (?:\w+ )?(?:person|actor|actress|director|singer|company|country|county|state|"
    r"city|town|village|river|nationality)\b",  # but films and bands may be called by a number
    re.I,
)
_YES_OR_NO = re.compile(r"(yes|no)(?:\s*[,;:!–—]|\s-|\.(?!\s*\d)|$)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words under HotPotQA's normalisation: lower case, no punctuation, no articles; without accents, as the search finds them."""
    return [word for word in without_accents(text).translate(_PUNCTUATION).split() if word not in ("a", "an", "the")]


def asks_yes_or_no(question: str) -> bool:
    return _CLOSED.match(question.strip()) is not None


def yes_or_no(text: str) -> str:
    """The yes or no that a text begins with, in lower case; empty where it is another one, such as "No Doubt" or "No. 5"."""
    found = _YES_OR_NO.match(text.strip().lower())
    return found[1] if found else ""


@lru_cache(maxsize=4096)
def names(text: str) -> frozenset[str]:
    """Normalised words that begin with a capital letter or a digit; no stop words."""
    tokens = [token.strip(string.punctuation) for token in text.split()]
    marked = (token for token in tokens if token[:1].isupper() or token[:1].isdigit())
    return frozenset(word for token in marked for word in words(token)) - STOP_WORDS


def query_fault(query: str, question: str, passages: Sequence[str]) -> str:
    """Why a query that was not made before does not help, "" when it may. It may hold several, parted by semicolons."""
    parts = [words(part) for part in query.split("; ")]
    content = {word for part in parts for word in part} - STOP_WORDS
    longest = max(map(len, parts))
    if not content or longest > MAX_QUERY_WORDS:
        return f"a query needs a content word and at most {MAX_QUERY_WORDS} words; it has {longest} words"
    if len(parts) > MAX_QUERIES:
        return f"one call may hold {MAX_QUERIES} queries; it has {len(parts)}"
    known = content & {word for text in (question, *passages) for word in words(text)}
    if not known:
        return "the query shares no content word with the question or with what was found"
    if 2 * len(known) < len(content) and not any(known & names(text) for text in (question, *passages)):
        return f"most of the query is about something else: of its {len(content)} content words only {_quoted(known)} were read"
    return ""


def answer_fault(answer: str, question: str, passages: Sequence[str]) -> str:
    """Why an answer does not follow from the passages, "" when it may."""
    given = words(answer)
    if not set(given) - STOP_WORDS and given != ["no"] or len(given) > MAX_ANSWER_WORDS:
        return f"the answer needs a content word and at most {MAX_ANSWER_WORDS} words; it has {len(given)} words"
    asked = words(question)
    read = [words(passage) for passage in passages]
    if given in (["yes"], ["no"]):
        return _closed_fault(question, set(asked), {word for passage in read for word in passage})
    if asks_yes_or_no(question):
        return "the question asks for yes or no"
    if _starts(given, asked) and not _offered(given, question):
        return "the answer is copied from the question"
    if not any(_starts(given, passage) for passage in read):
        return "the answer stands in no search result"
    if _DATE.search(question.strip()) and not re.search(r"\d", answer):
        return "the question asks for a date, and the answer holds no number"
    if _THING.search(question.strip()) and all(word.isdigit() for word in given):
        return "the question asks for a person, a place or another thing, and the answer is a number"
    return ""


def _closed_fault(question: str, asked: set[str], read: set[str]) -> str:
    if not _CLAUSE.search(question) or re.search(r"\bor\b", question):  # a title has Or
        return "yes or no, but the question asks for something else"
    if not (asked - STOP_WORDS) & read:
        return "yes or no, but no result shares a content word with the question"
    _, _, rest = question.strip().partition(" ")  # the first word has a capital anyway
    if missing := {name for name in names(rest) - read if not name.isdigit()}:
        return f"yes or no before {_quoted(missing)} was found"
    return ""


def _offered(given: Sequence[str], question: str) -> bool:
    """Whether the question offers the answer as a choice: `A or B`, `between A and B`, `which …, A or B`."""
    marked = re.sub(r"[,?:;]", " , ", question)
    tokens = [token for raw in marked.split() for token in ([","] if raw == "," else words(raw))]
    edges = {",", "or", "and", "between"}
    for at in _starts(given, tokens):
        before, after = tokens[at - 1 : at], tokens[at + len(given) : at + len(given) + 1]
        if edges & {*before, *after} and {"or", "and"} & set(tokens):
            return True
    return False


def _starts(given: Sequence[str], text: Sequence[str]) -> list[int]:
    """Positions at which the words occur in the text, one after the other."""
    n = len(given)
    return [at for at in range(len(text) - n + 1) if text[at] == given[0] and list(text[at : at + n]) == list(given)]


def _quoted(quoted: Collection[str]) -> str:
    return ", ".join(repr(word[:30]) for word in sorted(quoted)[:5])
