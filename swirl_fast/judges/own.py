"""judge.kind=FILE.py:NAME: a reward or a judge of a user's own.

A function takes a step and gives a number in [0, 1], true or false, or None where it cannot say (UNKNOWN). One whose parameter is called
`steps` takes a list of them and gives a list; either may be async. A class is made without arguments and has `judge(steps)`, which gives
a list of those or of Judgement objects, and `close()` if it wants.

A step has `task`, `question`, `history` (action text and observation of each turn before), `action_text`, and `action`, with `tool`,
`argument` (the text of the call, or the answer) and `arguments` (by name), and `calls`, all calls of a turn, with the same; and
`recorded`, the text of the recorded trajectory's turn at this state, None in an evaluation of answers. Malformed actions are BAD by the
environment's own rule, and never come here.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import traceback
import warnings
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.config.judge_schema import JUDGES
from swirl_fast.config.references import identity, load, running
from swirl_fast.formats.format import Action, Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import tool_identities
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

KEY = "judge.kind"


@dataclass(frozen=True)
class JudgedStep:
    """One action with the text it followed. history: (action text, observation) of every earlier step. recorded: the text of the recorded
    turn at this state; None where there is none."""

    task: str
    question: str
    history: tuple[tuple[str, str], ...]
    action_text: str
    action: Action
    recorded: str | None = None


class OwnJudge:
    """What raises, or gives anything else than a reward, is UNKNOWN, and the first such error is shown.

    Raises ConfigError for a reference that is no judge; RuntimeError, with the first error, when all steps of a call fail and none before
    did not: a reward that never works would train nothing.
    """

    def __init__(
        self,
        reference: str,
        tools_by_task: Mapping[str, Collection[ToolSpec]],
        form: Format = TAGS,
        key: str = KEY,
        known: Sequence[str] = JUDGES,
    ) -> None:
        """form: how actions are written. key, known: the setting that names it, and the other names that it accepts."""
        self.id = own_judge_id(reference, tools_by_task, form, key, known)
        self._form = form
        self._key, self._reference = key, reference
        self._tools = tools_by_task
        self._judge, self._close = _callable(reference, key, known)
        self._worked = False
        self._warned = False

    def stats(self) -> JudgeStats:
        return JudgeStats()

    def close(self) -> None:
        self._close()

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order."""
        given = [self._step(step) for step in steps]
        judged = [self._judgement(outcome) for outcome in self._judge(given)] if given else []
        failed = [judgement for judgement, error in judged if error is not None]
        self._worked |= len(failed) < len(judged)
        errors = [error for _, error in judged if error is not None]
        if errors and not self._worked:
            raise RuntimeError(
                f"{self._key}={self._reference}: it failed for all of {len(judged)} steps: {_described(errors[0])}. Verdicts until then "
                "are kept"
            ) from errors[0]
        if errors and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._key}={self._reference}: a step has no reward (UNKNOWN): {_described(errors[0])}", stacklevel=2
            )
        return [judgement for judgement, _ in judged]

    def _step(self, step: StepView) -> JudgedStep:
        action = self._form.parse(step.action_text, self._tools.get(step.task, ()))
        return JudgedStep(step.task, step.question, step.history, step.action_text, action, step.recorded)

    def _judgement(self, outcome: Any) -> tuple[Judgement, BaseException | None]:
        if outcome is None:
            return Judgement(Verdict.UNKNOWN, "the judge cannot say"), None
        if not isinstance(outcome, BaseException):
            try:
                return _checked(outcome), None
            except (Exception, SystemExit):  # whatever a stranger's object raises
                remedy = "a reward is a number in [0, 1], true, false or None; a Judgement has a Verdict, a text and such a reward"
                outcome = ValueError(f"it gave {_shown(outcome)}; {remedy}")
        return Judgement(Verdict.UNKNOWN, f"the judge failed: {_described(outcome)}"), outcome


def _checked(outcome: Any) -> Judgement:
    """Of Python's own numbers and texts, whatever those of the outcome are. Raises anything for what is no reward."""
    if isinstance(outcome, str | bytes):
        raise TypeError
    if not isinstance(outcome, Judgement):
        return Judgement.graded(float(outcome), "")
    if not isinstance(outcome.reason, str):
        raise TypeError
    reward = None if outcome.reward is None else float(outcome.reward)
    return Judgement(Verdict(outcome.verdict), str(outcome.reason), reward)


def _shown(outcome: Any) -> str:
    try:
        return f"{outcome!r:.80}"
    except (Exception, SystemExit):  # such as of an int with more digits than Python prints
        return f"a value of type {type(outcome).__name__} that cannot be shown"


def own_judge_id(
    reference: str,
    tools_by_task: Mapping[str, Collection[ToolSpec]],
    form: Format = TAGS,
    key: str = KEY,
    known: Sequence[str] = JUDGES,
) -> str:
    tools = hashlib.sha256(json.dumps(tool_identities(tools_by_task, form)).encode()).hexdigest()[:8]
    return f"own-{identity(key, reference, known)}-tools.{tools}"


def _callable(
    reference: str, key: str, known: Sequence[str]
) -> tuple[Callable[[list[JudgedStep]], list[Any]], Callable[[], None]]:
    """(steps -> an outcome or an exception each, what ends it)."""
    found = load(key, reference, known)
    if inspect.isclass(found):
        if not callable(getattr(found, "judge", None)):
            raise ConfigError(f"{key}={reference}: the class lacks judge(steps)")
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError):
            raise ConfigError(f"{key}={reference}: the class must be made without arguments") from None
        with running(key, reference, "making it"):
            made: Any = found()
        return _batched(made.judge), getattr(made, "close", lambda: None)
    if not callable(found):
        raise ConfigError(
            f"{key}={reference}: must be a function of a step, or a class with judge(steps), not {type(found).__name__}"
        )
    try:
        parameters = list(inspect.signature(found).parameters)
        inspect.signature(found).bind(None)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={reference}: must be a function of one step, or of a list called `steps`") from None
    return (_batched(found) if parameters[0] == "steps" else _single(found)), lambda: None


def _batched(function: Any) -> Callable[[list[JudgedStep]], list[Any]]:
    def judge(steps: list[JudgedStep]) -> list[Any]:
        try:
            outcomes = function(steps)
            if inspect.isawaitable(outcomes):
                outcomes = _run(_awaited(outcomes))
            outcomes = list(outcomes)
        except (Exception, SystemExit) as error:  # whatever a stranger's function raises
            return [error] * len(steps)
        if len(outcomes) != len(steps):
            return [ValueError(f"it gave {len(outcomes)} rewards for {len(steps)} steps")] * len(steps)
        return outcomes

    return judge


def _single(function: Any) -> Callable[[list[JudgedStep]], list[Any]]:
    async def outcome(waiting: Any) -> Any:
        try:
            return await waiting
        except (Exception, SystemExit) as error:
            return error

    async def together(waiting: list[Any]) -> list[Any]:
        return await asyncio.gather(*map(outcome, waiting), return_exceptions=True)

    def judge(steps: list[JudgedStep]) -> list[Any]:
        outcomes: list[Any] = []
        for step in steps:
            try:
                outcomes.append(function(step))
            except (Exception, SystemExit) as error:
                outcomes.append(error)
        places = [i for i, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
        if places:
            for i, outcome in zip(places, _run(together([outcomes[i] for i in places])), strict=True):
                outcomes[i] = outcome
        return outcomes

    return judge


def _run(waiting: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """In a thread of its own: the caller's may run an event loop, as in a notebook."""
    with ThreadPoolExecutor(1, "judge") as pool:
        return pool.submit(asyncio.run, waiting).result()


async def _awaited(outcomes: Any) -> Any:
    return await outcomes


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{traceback.format_exception_only(error)[-1].strip()[:300]}{place}"
