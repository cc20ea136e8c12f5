"""judge.self_consistency=true: an answer is held against those of the other trajectories of its question, without gold labels, by the vote
of self-consistency (arXiv 2203.11171; as a reward of reinforcement learning arXiv 2504.16084).

    GOOD    more trajectories give this answer than any other one, and at least two do; but not before any call, or a policy would learn to
            guess
    BAD     another answer is given by at least twice as many as this one
    else    what the judge of judge.kind says, as for calls

The vote is of the recorded trajectories, all that the store holds of a question. A fresh answer at a recorded state is held against the
other trajectories, not against the one that the state is of.

Only the verdicts of the judge behind it are stored: a vote is counted whenever verdicts are read, so that trajectories which are collected
later have a say in it, and what the judge has said need not be asked for again.

Limits: what most trajectories get wrong is GOOD, and training learns it; this also goes for a way of saying that nothing was found. The
trajectories stay those of the collection, however much the policy has changed since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import Judge, Refusal
from swirl_fast.judges.rules.queries import words
from swirl_fast.tasks.scoring import same_number
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.numerals import MAX_CHARS, Mention, number_in
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView, Trajectory
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 1  # of the vote: part of the judge's id
PREFIX = f"self_consistency-v{VERSION}-"  # of its id, before that of the judge behind it
_DENIALS = frozenset(("not", "never", "neither", "nor", "nobody", "nothing", "none"))


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
        called = any(self._form.parse(text, tools).kind == "tool" for text, _ in step.history)
        return by_vote(action.argument, step.other_answers, called)


def stored_id(judge_id: str) -> str:
    """The id under which the verdicts behind it are stored."""
    return judge_id.removeprefix(PREFIX)


def votes(judge_id: str) -> bool:
    return judge_id.startswith(PREFIX)


def add_other_answers(trajectories: Iterable[Trajectory], answers: Mapping[str, Sequence[str]]) -> None:
    """To each trajectory, those of the others. answers: of `Store.answers`."""
    for trajectory in trajectories:
        others = Counter(answers.get(trajectory.question_id, ()))
        if trajectory.answer is not None:
            others[trajectory.answer] -= 1
        trajectory.other_answers = tuple(sorted((+others).elements()))


@lru_cache(maxsize=1024)  # trajectories with the same answer have the same others
def by_vote(answer: str, others: tuple[str, ...], called: bool) -> Judgement | None:
    """None where the vote does not decide. others: the answers of the other trajectories. called: whether a call came before the answer."""
    counts = Counter(others)
    same = {other for other in counts if same_answer(answer, other)}
    own = 1 + sum(counts[other] for other in same)
    rivals = [
        sum(count for other, count in counts.items() if other not in same and same_answer(one, other))
        for one in counts
        if one not in same
    ]
    rival = max(rivals, default=0)
    given = f"{own - 1} of the {len(others)} other trajectories with an answer give"
    if own >= 2 and own > rival and called:
        return Judgement(Verdict.GOOD, f"{given} this answer")
    if rival >= 2 * own:
        return Judgement(Verdict.BAD, f"{given} this answer, and {rival} another one")
    return None


@lru_cache(maxsize=2**16)  # pairs of one question
def same_answer(one: str, other: str) -> bool:
    """Whether two answers to a question agree: the same number; both yes or both no; else the words of one within those of the other, side
    by side (`Paris`, `in Paris, France`), where both deny something or neither does. Of long texts only the same agree."""
    left, right = _read(one), _read(other)
    if left.text == right.text:
        return True
    if left.number and right.number:
        return same_number(one, other)
    if not left.words or not right.words:
        return False
    if {left.words[0], right.words[0]} & {"yes", "no"}:
        return left.words[0] == right.words[0]
    return left.denies == right.denies and (_within(left.words, right.words) or _within(right.words, left.words))


@dataclass(frozen=True)
class _Answer:
    text: str
    number: Mention | None = None
    words: tuple[str, ...] = ()
    denies: bool = False


@lru_cache(maxsize=4096)
def _read(answer: str) -> _Answer:
    text = same_text(answer).casefold()
    if len(answer) > MAX_CHARS:
        return _Answer(text)
    found = tuple(words(answer))
    return _Answer(text, number_in(answer), found, not _DENIALS.isdisjoint(found))


def _within(some: tuple[str, ...], more: tuple[str, ...]) -> bool:
    return any(more[at : at + len(some)] == some for at in range(len(more) - len(some) + 1))
