"""judge.self_consistency=true: an answer is held against those of the other trajectories of its question, without gold labels, by the vote
of self-consistency (arXiv 2203.11171; as a reward of reinforcement learning arXiv 2504.16084).

    GOOD    more trajectories give this answer than any other one, at least two do, and a call gave a result before it: otherwise a policy
            would learn to guess
    BAD     another answer is given by at least twice as many as this one, itself counted
    else    what the judge of judge.kind says, as for calls

Whether two answers agree is not always plain, and then neither counts for or against the other (`same_answer`). A recorded answer also
agrees with one that holds it, for models explain; a fresh one does not, for training would teach it to name several.

The vote is of the recorded trajectories, all that the store holds of a question. A fresh answer at a recorded state is held against the
other trajectories, not against the one that the state is of.

Only the verdicts of the judge behind it are stored: a vote is counted whenever verdicts are read, so that trajectories which are collected
later have a say in it, and the judge need not be asked again. Evaluations are without the vote: answers of one model would be held against
each other, and so every model's by another measure.

Limits: what most trajectories get wrong is GOOD, and training learns it; this also goes for a way of saying that nothing was found. The
trajectories stay those of the collection, however much the policy has changed since.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Action, Format, results_in
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import BY_VOTE, Judge, Refusal
from swirl_fast.judges.recorded_action import formal, text_agreement
from swirl_fast.judges.rules.queries import STOP_WORDS, asks_yes_or_no, words, yes_or_no
from swirl_fast.tasks.scoring import same_number
from swirl_fast.tools.characters import same_text, without_accents
from swirl_fast.tools.numerals import Mention, currency_in, number_in
from swirl_fast.tools.search import NOTHING_FOUND
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView, Trajectory
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 1  # of the vote: part of the judge's id
MAX_CHARS = 500  # longer answers agree only where they are alike
PREFIX = f"self_consistency-v{VERSION}-"  # of its id, before that of the judge behind it
_TURNS = frozenset(  # words that make another answer of those beside them
    "not no never neither nor nobody nothing none or either both rather instead".split()
)
_SPELLED = {
    **{word: n for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())},
    **{word: n for n, word in enumerate("first second third fourth fifth sixth seventh eighth ninth tenth".split(), 1)},
    **{word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)},
    "once": 1, "twice": 2, "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6,
}  # fmt: skip


class SelfConsistentJudge:
    """judge: the one behind it. tools_by_task: task name -> the tools on offer there, by which answers are read."""

    def __init__(self, judge: Judge, tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS) -> None:
        self.id = PREFIX + judge.id
        self._judge, self._tools, self._form = judge, tools_by_task, form

    def stats(self) -> JudgeStats:
        return self._judge.stats()

    def close(self) -> None:
        close = getattr(self._judge, "close", None)
        if close is not None:
            close()

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order. The judge behind it is asked about those that the vote does not decide."""
        judged = [self._vote(step) for step in steps]
        rest = [i for i, judgement in enumerate(judged) if judgement is None]
        try:
            answered: Sequence[Judgement | None] = self._judge.judge([steps[i] for i in rest])
        except Refusal as error:
            for i, judgement in zip(rest, error.answered, strict=False):
                judged[i] = judgement
            raise Refusal(str(error), judged) from error
        for i, judgement in zip(rest, answered, strict=True):
            judged[i] = judgement
        return [judgement for judgement in judged if judgement is not None]

    def _vote(self, step: StepView) -> Judgement | None:
        if not step.other_answers or step.task not in self._tools:
            return None
        tools = self._tools[step.task]
        action = self._form.parse(step.action_text, tools)
        if action.kind != "answer":
            return None
        informed = any(has_result(self._form.parse(text, tools), seen) for text, seen in step.history)
        return by_vote(action.argument, step.other_answers, step.question, informed)


def has_result(action: Action, seen: str | None) -> bool:
    """Whether a call of the turn gave a result. seen: what the environment wrote after it."""
    results = results_in(action.calls, seen or "") if action.calls else ()
    return any(shown and not shown.startswith("ERROR:") and shown != NOTHING_FOUND for shown in results or ())


def check_tools(tools_by_task: Mapping[str, Collection[ToolSpec]]) -> None:
    """Raises ConfigError for a task without tools."""
    if bare := [task for task, tools in tools_by_task.items() if not tools]:
        raise ConfigError(
            f"judge.self_consistency=true: task {bare[0]} has no tools, and no vote makes an answer GOOD before a call; leave it out"
        )


def stored_id(judge_id: str) -> str:
    """The id under which the verdicts behind it are stored."""
    return judge_id.removeprefix(PREFIX)


def votes(judge_id: str) -> bool:
    return judge_id.startswith(PREFIX)


def with_other_answers(
    trajectories: Iterable[Trajectory], answers: Mapping[str, Sequence[str]]
) -> Iterator[Trajectory]:
    """Each with the answers of the others. answers: of `Store.answers`."""
    for trajectory in trajectories:
        others = Counter(answers.get(trajectory.question_id, ()))
        if trajectory.answer is not None:
            others[trajectory.answer] -= 1
        trajectory.other_answers = tuple(sorted((+others).elements()))
        yield trajectory


@lru_cache(maxsize=1024)  # trajectories with the same answer have the same others
def by_vote(
    answer: str, others: tuple[str, ...], question: str, informed: bool, recorded: bool = False
) -> Judgement | None:
    """None where the vote does not decide. others: the answers of the other trajectories. informed: whether a call gave a result before the
    answer. recorded: whether the answer is a recorded one, which has a vote itself."""
    closed = asks_yes_or_no(question)
    pool = tuple(sorted({answer, *others} if recorded else set(others)))
    agreeing = _agreeing(pool, closed)
    counts = Counter(other for other in others if other in agreeing)
    found = {other: _agree(answer, other, closed, recorded) for other in counts}
    with_it = [other for other in counts if found[other]]
    if recorded:
        unsure = answer not in agreeing
    else:
        unsure = any(same_answer(one, other, closed) is not True for one, other in combinations(with_it, 2))
    if unsure:
        return None
    votes_for = sum(counts[other] for other in with_it)
    against = {other for other in counts if found[other] is False}
    rivals = (sum(counts[same] for same in agreeing[other] if same in against) for other in against)
    rival = max(rivals, default=0)
    given = f"{BY_VOTE}{votes_for} of {len(others)} other answers to the question agree"
    if votes_for + recorded >= 2 and votes_for + recorded > rival and informed:
        return Judgement(Verdict.GOOD, given)
    if rival >= 2 * (votes_for + 1):
        return Judgement(Verdict.BAD, f"{given}, and {rival} are another one")
    return None


@lru_cache(maxsize=64)
def _agreeing(answers: tuple[str, ...], closed: bool) -> Mapping[str, Sequence[str]]:
    """Each recorded answer with those that agree with it, itself among them. Without answers that agree with two which contradict each
    other, as one that names several does."""
    found = {one: [other for other in answers if _agree(one, other, closed, recorded=True)] for one in answers}
    several = {
        one
        for one, others in found.items()
        if any(same_answer(*pair, closed) is False for pair in combinations(others, 2))
    }
    return {
        one: [other for other in others if other not in several] for one, others in found.items() if one not in several
    }


def _agree(one: str, other: str, closed: bool, recorded: bool) -> bool | None:
    """`same_answer`; or, of recorded answers, the words of one stand in the other, side by side (`Paris`, `It is Paris.`). Not of fresh
    answers: training would teach to name several."""
    found = same_answer(one, other, closed)
    if found is not None or not recorded:
        return found
    both = (one, other)
    if max(map(len, both)) > MAX_CHARS or all(map(number_in, both)) or any(map(formal, both)):
        return None
    few, many = sorted((words(one), words(other)), key=len)
    if STOP_WORDS.issuperset(few) or _turned(one, few) != _turned(other, many):
        return None
    return any(many[at : at + len(few)] == few for at in range(len(many) - len(few) + 1)) or None


def _turned(text: str, its_words: Sequence[str]) -> bool:
    return not _TURNS.isdisjoint(its_words) or re.search(r"n['’]t\b", text) is not None


@lru_cache(maxsize=2**16)
def same_answer(one: str, other: str, closed: bool = False) -> bool | None:
    """Whether two answers to a question agree: as numbers, as texts (`text_agreement`), or, to one for yes or no (closed), by that which
    they begin with. None where it is not plain: words that both hold (`Paris` and `Paris or Rome`, `12 Angry Men` and `12 Years a Slave`),
    other units, a number in figures and one in words, initials, long texts that are not alike."""
    left, right = _read(one), _read(other)
    if left.text == right.text:
        return True
    if max(len(one), len(other)) > MAX_CHARS:
        return None
    if closed and (said := (yes_or_no(one), yes_or_no(other))) != ("", ""):
        return said[0] == said[1] if all(said) else None
    if left.number and right.number:
        currencies = {currency for text in (one, other) if (currency := currency_in(text))}
        other_units = left.units != right.units and left.units and right.units
        return None if other_units or len(currencies) > 1 else same_number(one, other)
    if left.bare or right.bare or left.figures & right.spelled or right.figures & left.spelled:
        return None
    if text_agreement(one, other) == 1.0:
        return True
    within = left.letters in right.letters or right.letters in left.letters
    initials = left.letters == right.initials or right.letters == left.initials
    return None if within or initials or left.words & right.words else False


@dataclass(frozen=True)
class _Answer:
    """text: without case. letters: text without spaces and punctuation. initials: of its words. words: without those that say nothing.
    units: letters beside numbers. bare: there are digits in every word. figures, spelled: numbers in
    digits and in words."""

    text: str
    number: Mention | None
    letters: str
    initials: str
    words: frozenset[str]
    units: frozenset[str]
    bare: bool
    figures: frozenset[int]
    spelled: frozenset[int]


@lru_cache(maxsize=4096)
def _read(answer: str) -> _Answer:
    plain = without_accents(answer[: MAX_CHARS + 1])
    found = re.findall(r"\w+", plain)
    spelled = [_SPELLED[word] for word in found if word in _SPELLED]
    return _Answer(
        same_text(answer).casefold(),
        number_in(answer),
        "".join(found),
        "".join(word[0] for word in found),
        frozenset(found) - STOP_WORDS,
        frozenset(re.findall(r"[^\W\d_]+", plain)),
        bare=bool(found) and all(re.search(r"\d", word) for word in found),
        figures=frozenset(int(digits) for digits in re.findall(r"\d{1,9}", plain)),
        spelled=frozenset((*spelled, sum(spelled))) if spelled else frozenset(),
    )
