"""Reading a verdict as a probability: from the log-probs of the tokens that could have stood in its place (judge.model.read=logprobs).

    P(GOOD) = p(GOOD) / (p(GOOD) + p(BAD))

where p(WORD) is the sum over the listed alternatives that say the word or begin it, in whatever case, after blanks and marks: " GOOD",
"Good", "**GOOD" and " G" are all GOOD, "Goods" is none. So a word that is split into several tokens has the probability of its first one.
An alternative that could begin two of the words counts for neither. A word that is not listed has at most the probability of the least one
that is, and at most what the listed ones leave; it is taken to have that, so that an endpoint that lists few alternatives gives no more
certainty than it has. The token that was drawn is no least one: it is listed however improbable it was.

A score is read in the same way: the mean of the scores' rewards, weighted by their probabilities (Liu et al. 2023, arXiv 2303.16634).

The place is the first token of the word behind `VERDICT:`, found in the tokens themselves: servers tell no offsets, and a reply that goes
on with a given beginning comes back with it (llama.cpp) or without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swirl_fast.judges.model.prompts import MAX_REASON_CHARS
from swirl_fast.verdict import Judgement, Verdict

VERSION = 2  # of the reading: part of the judge's id
LEAST_MASS = 0.01  # of all words together; with less the model says something else there
LINE = 100  # characters of a line with a verdict at most

_MARKS = r"[\W_ĠĊ]*"  # blanks and Markdown; Ġ and Ċ: how byte-level vocabularies write a blank and a line break


@dataclass(frozen=True)
class Words:
    """What may stand behind a mark. mark: in capitals, with its colon. rewards: of each word, in capitals. margin: a verdict whose
    probability is nearer to 1/2 is UNKNOWN; 0 for scores."""

    mark: str
    rewards: Mapping[str, float]
    margin: float = 0.0


@dataclass(frozen=True)
class Token:
    """One token of a reply. alternatives: text -> log-prob (natural) of what could have stood there, itself included."""

    text: str
    alternatives: Mapping[str, float]


def read_tokens(choice: Mapping[str, Any]) -> tuple[Token, ...]:
    """Those of a chat completion's choice; empty where the endpoint gives none. Raises TypeError, ValueError, LookupError or AttributeError
    for what is not as OpenAI describes it."""
    content = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        Token(_text(entry), {_text(one): _logprob(one) for one in (*(entry.get("top_logprobs") or ()), entry)})
        for entry in content
    )


def _text(entry: Mapping[str, Any]) -> str:
    text = entry["token"]
    if not isinstance(text, str):
        raise TypeError("a token is no text")
    return text


def _logprob(entry: Mapping[str, Any]) -> float:
    logprob = float(entry["logprob"])
    if math.isnan(logprob):
        raise ValueError("a log-prob is nan")
    return min(logprob, 0.0)


def read_probability(text: str, tokens: Sequence[Token], words: Words, explained: bool) -> Judgement:
    """The reward of a reply: P(GOOD), or the mean score. text: as the endpoint gives it; the reason is what comes before its last line.

    explained: the last line must be the mark and one word; which word was drawn does not matter. Else the reply begins with the word, with
    the mark before it or without. UNKNOWN where it does not, where the words have no probability there, or where that of a verdict
    is within the margin.
    """
    before, _, last = text.rstrip().rpartition("\n")
    place = _place(tokens, words.mark, explained)
    line = last if len(last) <= LINE else ""
    one_word = re.fullmatch(rf"{_MARKS}{words.mark}{_MARKS}\w+{_MARKS}", line, re.IGNORECASE) is not None
    if place is None or (explained and not one_word):
        what = f"with {words.mark} and one word" if explained else "where a verdict could be read"
        ends = f"the reply does not end {what}, but with {last[-200:]!r}"
        return Judgement(Verdict.UNKNOWN, ends if last else "the reply is empty")
    listed = tokens[place].alternatives
    mass = _masses(listed, words.rewards)
    if sum(mass.values()) < LEAST_MASS:
        named = ", ".join(words.rewards)
        return Judgement(
            Verdict.UNKNOWN, f"none of {named} is probable in the verdict's place; the reply ends with {last[-200:]!r}"
        )
    reward = _mean(mass, words.rewards, tokens[place])
    if abs(reward - 0.5) < words.margin:
        return Judgement(
            Verdict.UNKNOWN, f"a probability of {reward:.3f}, nearer to 1/2 than judge.model.margin={words.margin:g}"
        )
    return Judgement.graded(reward, before.strip()[-MAX_REASON_CHARS:] if explained else "")


def _place(tokens: Sequence[Token], mark: str, explained: bool) -> int | None:
    """The number of the token that the word begins in; None where there is no token, or the mark is missing, which replies without an
    explanation need not have: of such a one without any letter it is the first token."""
    # without blanks, of which some servers lose those that a token begins with
    letters = [(number, letter) for number, token in enumerate(tokens) for letter in token.text if not letter.isspace()]
    joined = "".join(letter for _, letter in letters)
    if explained:
        found = list(re.finditer(rf"{mark}{_MARKS}", joined, re.IGNORECASE))
        at = found[-1].end() if found else len(letters)
        return letters[at][0] if at < len(letters) else None
    at = re.compile(rf"{_MARKS}(?:{mark})?{_MARKS}", re.IGNORECASE).match(joined).end()  # type: ignore[union-attr]
    return letters[at][0] if at < len(letters) else (0 if tokens else None)


def _masses(listed: Mapping[str, float], rewards: Mapping[str, float]) -> dict[str, float]:
    """Word -> probability, of those that are listed."""
    mass: dict[str, float] = {}
    for text, logprob in listed.items():
        said = [word for word in rewards if _says(text, word)]
        if len(said) == 1:
            mass[said[0]] = mass.get(said[0], 0.0) + math.exp(logprob)
    return mass


def _says(text: str, word: str) -> bool:
    """Whether a token says the word, or begins it."""
    said = re.sub(rf"^{_MARKS}", "", text).upper()
    return bool(said) and (word.startswith(said) or re.match(rf"{word}(?!\w)", said) is not None)


def _mean(mass: Mapping[str, float], rewards: Mapping[str, float], token: Token) -> float:
    listed = token.alternatives
    unlisted = len(rewards) - len(mass)
    rest = max(0.0, 1.0 - sum(map(math.exp, listed.values())))
    others = [logprob for text, logprob in listed.items() if text != token.text]
    bound = min(math.exp(min(others or listed.values())), rest / unlisted) if unlisted else 0.0
    weights = {word: mass.get(word, bound) for word in rewards}
    return sum(weights[word] * reward for word, reward in rewards.items()) / sum(weights.values())
