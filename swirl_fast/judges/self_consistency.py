"""judge.self_consistency=true: an answer is held against those of the other trajectories of its question, without gold labels, by the vote
of self-consistency (arXiv 2203.11171; as a reward of reinforcement learning arXiv 2504.16084).

    GOOD    more trajectories give this answer than any other one, at least two do, and a call gave a result before it: otherwise a policy
            would learn to guess
    BAD     another answer is given by at least twice as many as this one
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

from swirl_fast.formats.format import Action, Format, results_in
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import BY_VOTE, Judge, Refusal
from swirl_fast.judges.recorded_action import text_agreement
from swirl_fast.judges.rules.queries import STOP_WORDS, words, yes_or_no
from swirl_fast.tasks.scoring import same_number
from swirl_fast.tools.characters import same_text, without_accents
from swirl_fast.tools.numerals import MAX_CHARS, Mention, currency_in, number_in
from swirl_fast.tools.search import NOTHING_FOUND
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView, Trajectory
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 1  # of the vote: part of the judge's id
PREFIX = f"self_consistency-v{VERSION}-"  # of its id, before that of the judge behind it
_TURNS = frozenset(  # words that make another answer of those beside them
    "not isnt no never neither nor nobody nothing none or either both".split()
)


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
        return by_vote(action.argument, step.other_answers, informed)


def has_result(action: Action, seen: str | None) -> bool:
    """Whether a call of the turn gave a result. seen: what the environment wrote after it."""
    results = results_in(action.calls, seen or "") if action.calls else ()
    return any(shown and not shown.startswith("ERROR:") and shown != NOTHING_FOUND for shown in results or ())


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
def by_vote(answer: str, others: tuple[str, ...], informed: bool, recorded: bool = False) -> Judgement | None:
    """None where the vote does not decide. others: the answers of the other trajectories. informed: whether a call gave a result before the
    answer. recorded: whether the answer is a recorded one."""
    plain = _plain(tuple(sorted({answer, *others} if recorded else set(others))))
    if recorded and answer not in plain:
        return None
    counts = Counter(other for other in others if other in plain)
    found = {other: (held_in_other if recorded else same_answer)(answer, other) for other in counts}
    against = [other for other in counts if found[other] is False]
    rivals = (sum(counts[other] for other in against if held_in_other(one, other)) for one in against)
    own, rival = 1 + sum(count for other, count in counts.items() if found[other]), max(rivals, default=0)
    given = f"{BY_VOTE}{own - 1} of {len(others)} other answers to the question"
    if own >= 2 and own > rival and informed:
        return Judgement(Verdict.GOOD, f"{given} agree")
    if rival >= 2 * own:
        return Judgement(Verdict.BAD, f"{given} agree, and {rival} are another one")
    return None


@lru_cache(maxsize=64)
def _plain(answers: tuple[str, ...]) -> frozenset[str]:
    """Those that do not agree with two which contradict each other, as one that names several does."""
    agreeing = {answer: [other for other in answers if held_in_other(answer, other)] for answer in answers}
    return frozenset(
        answer
        for answer, others in agreeing.items()
        if not any(same_answer(one, other) is False for one, other in combinations(others, 2))
    )


@lru_cache(maxsize=2**16)  # pairs of one question
def held_in_other(one: str, other: str) -> bool | None:
    """`same_answer`; or the words of one stand in the other, side by side (`Paris`, `It is Paris.`). Not of fresh answers: training would
    teach to name several."""
    found = same_answer(one, other)
    if found is not None or max(len(one), len(other)) > MAX_CHARS or (number_in(one) and number_in(other)):
        return found
    short, long = sorted((words(one), words(other)), key=len)
    if STOP_WORDS.issuperset(short) or _TURNS.isdisjoint(short) != _TURNS.isdisjoint(long):
        return None
    return any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1)) or None


@lru_cache(maxsize=2**16)  # pairs of one question
def same_answer(one: str, other: str) -> bool | None:
    """Whether two answers to a question agree: by the yes or no that they begin with, as numbers, or as texts (`text_agreement`). None
    where that is not plain: words that both hold (`Paris` and `Paris or Rome`, `12 Angry Men` and `12 Years a Slave`), other units, long
    texts that are not alike."""
    left, right = _read(one), _read(other)
    if left.text == right.text:
        return True
    if len(one) > MAX_CHARS or len(other) > MAX_CHARS:
        return None
    if left.closed and right.closed:
        return left.closed == right.closed
    if left.number and right.number:
        units = [left.units != right.units and left.units and right.units]
        currencies = [currency for text in (one, other) if (currency := currency_in(text))]
        return None if any(units) or len(set(currencies)) > 1 else same_number(one, other)
    if text_agreement(one, other) == 1.0:
        return True
    within = left.letters in right.letters or right.letters in left.letters
    return None if within or left.words & right.words else False


@dataclass(frozen=True)
class _Answer:
    """text: without case. closed: yes or no, where it begins with it. letters: text without spaces and punctuation. words: without those
    that say nothing. units: words beside numbers."""

    text: str
    closed: str
    number: Mention | None
    letters: str
    words: frozenset[str]
    units: frozenset[str]


@lru_cache(maxsize=4096)
def _read(answer: str) -> _Answer:
    text = same_text(answer).casefold()
    found = re.findall(r"\w+", without_accents(answer[:MAX_CHARS]))
    units = frozenset(word for word in found if not re.search(r"\d", word))
    return _Answer(text, yes_or_no(text), number_in(answer), "".join(found), frozenset(found) - STOP_WORDS, units)
