"""A process judge and an outcome judge that ask a model at one or several OpenAI-compatible chat endpoints.

The prompts of one trajectory nest (prompts.py). The longest is asked first and by itself, the others when it is answered: a server with a
prefix cache then reads the trunk once, which it would not if all came together (swirl_fast/prefixes.py).

A failure of any kind is UNKNOWN, never BAD; but an endpoint that refuses the key, the path or the model raises (endpoint.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from swirl_fast.config import EndpointConfig
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import Refusal, tool_identities
from swirl_fast.judges.model.endpoint import Call, Failed, Refused, Reply, completions_url, describe_refusal
from swirl_fast.judges.model.logprobs import VERSION as LOGPROBS_VERSION
from swirl_fast.judges.model.logprobs import Words, read_probability
from swirl_fast.judges.model.prompts import (
    ANSWER_PROMPT_VERSION,
    ANSWER_VERDICTS,
    PROMPT_VERSION,
    STEP_VERDICTS,
    UNEXPLAINED,
    Criteria,
    GivenAnswer,
    answer_prompt,
    opening,
    read_score,
    read_verdict,
    said_of,
    step_prompt,
)
from swirl_fast.judges.model.replicas import Endpoints
from swirl_fast.prefixes import WarmGroup, warm_order
from swirl_fast.tools.tool import BUILT_IN, ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import REWARDS, Judgement, JudgeStats, Verdict

__all__ = ["GivenAnswer", "ModelJudge", "model_answer_judge_id", "model_step_judge_id"]
VERDICT_TOKENS = 8  # of a reply that is the verdict alone and read by its log-probs; what follows is not read
SHARED_CHARS = 1500  # prompts that share less, beside the preface, are not worth waiting for each other

T = TypeVar("T")
ToolsByTask = Mapping[str, Collection[ToolSpec]]


def model_step_judge_id(config: EndpointConfig, tools_by_task: ToolsByTask | None = None, form: Format = TAGS) -> str:
    """Names the model, the version of the step prompt, and what else its verdicts depend on: the contents of a rubric, the scale, the tools
    and what own ones say of themselves. Raises ConfigError for a rubric or a scale that cannot work."""
    return _step_judge_id(config, Criteria.of(config), tools_by_task or {}, form)


def _step_judge_id(config: EndpointConfig, criteria: Criteria, tools_by_task: ToolsByTask, form: Format) -> str:
    identities = tool_identities(tools_by_task, form)
    own = [spec for specs in tools_by_task.values() for spec in specs if spec.name not in BUILT_IN]
    shown = sorted({(spec.identity, said_of(spec, form)) for spec in own})
    hashed = _hash_text(json.dumps([identities, shown] if shown else identities))
    suffix = f"-tools.{hashed}" if identities else ""
    return f"model-{config.model}-v{PROMPT_VERSION}{criteria.suffix}{_model_suffix(config)}{suffix}"


def model_answer_judge_id(config: EndpointConfig) -> str:
    return (
        f"outcome-{config.model}-v{ANSWER_PROMPT_VERSION}{'' if config.explain else UNEXPLAINED}{_model_suffix(config)}"
    )


def _model_suffix(config: EndpointConfig) -> str:
    # The default names no model: it is whatever this address serves. The replicas serve the same, by what they are declared to be, and
    # check() warns where they say otherwise; so adding one to a run loses no verdict.
    address = f"-{_hash_text(completions_url(config.url))}" if config.model == EndpointConfig().model else ""
    read = f"-logprobs.v{LOGPROBS_VERSION}-{config.margin:g}" if config.read == "logprobs" else ""
    return address + (f"-t{config.temperature:g}" if config.temperature else "") + read


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class _Reading:
    """beginning: of the replies, which the judge goes on with."""

    read: Callable[[Reply], Judgement]
    beginning: str = ""


class ModelJudge:
    """Judges steps and answers with a chat model.

    tools_by_task: task name -> the tools on offer there; the prompt of a step says what a call of these must be. Steps of other tasks are
    judged as if all were on offer.

    Thread-safe; at most `config.concurrency` requests are under way at a time, at all endpoints together. clock: seconds, by which an
    endpoint that failed is tried again. Raises ConfigError for an impossible address or key, and for a rubric or a scale that cannot
    work.
    """

    def __init__(
        self,
        config: EndpointConfig,
        tools_by_task: ToolsByTask | None = None,
        clock: Callable[[], float] = time.monotonic,
        form: Format = TAGS,
    ) -> None:
        self._config = config
        self._criteria = Criteria.of(config)
        self._tools, self._form = tools_by_task or {}, form
        self.id = _step_judge_id(config, self._criteria, self._tools, form)
        self.outcome_id = model_answer_judge_id(config)
        self._endpoints = Endpoints(config, clock)
        self._verdict_alone = config.read == "logprobs" and not config.explain
        self._max_tokens = min(config.max_tokens, VERDICT_TOKENS) if self._verdict_alone else config.max_tokens

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order; equal steps are asked about once. With a scale the rewards are (score - 1) / (scale - 1);
        with judge.model.read=logprobs they are probabilities, or the mean of the scores (logprobs.py).

        UNKNOWN, with the reason, where the endpoint fails `config.retries` times more, cuts the reply off or ends it
        without a verdict; and for all that are left when GIVE_UP_AFTER prompts failed and none was answered. Raises Refusal, which
        is a ConfigError, when the endpoint refuses the key, the path or the model (401, 403, 404).
        """
        criteria = self._criteria
        prompts = [step_prompt(step, self._tools.get(step.task, ()), criteria, self._form) for step in steps]
        groups = {prompt: f"{step.task}\n{step.question}" for prompt, step in zip(prompts, steps, strict=True)}
        reading = self._score_reading() if criteria.scale else self._verdict_reading(STEP_VERDICTS)
        return self._ask_all(prompts, groups, reading, len(opening(criteria)))

    def judge_answers(self, given: Sequence[GivenAnswer]) -> list[Judgement]:
        """Outcome judge: GOOD where an answer agrees with the key, BAD where not or none was given. Otherwise as `judge`."""
        asked = [answer for answer in given if answer.answer is not None]
        prompts = [answer_prompt(answer, self._config.explain) for answer in asked]
        groups = {prompt: answer.question for prompt, answer in zip(prompts, asked, strict=True)}
        try:
            judged = self._ask_all(prompts, groups, self._verdict_reading(ANSWER_VERDICTS))
            return _with_missing_answers(given, judged)
        except Refusal as error:
            raise Refusal(str(error), _with_missing_answers(given, error.answered)) from None

    def _verdict_reading(self, verdicts: dict[str, Verdict]) -> _Reading:
        if self._config.read == "text":
            return _Reading(lambda reply: read_verdict(reply.text, verdicts))
        rewards = {line.removeprefix("VERDICT: "): float(REWARDS[verdict] or 0) for line, verdict in verdicts.items()}
        return self._logprob_reading(Words("VERDICT:", rewards, self._config.margin))

    def _score_reading(self) -> _Reading:
        scale = self._criteria.scale
        if self._config.read == "text":
            return _Reading(lambda reply: read_score(reply.text, scale))
        return self._logprob_reading(Words("SCORE:", {f"{k}": (k - 1) / (scale - 1) for k in range(1, scale + 1)}))

    def _logprob_reading(self, words: Words) -> _Reading:
        explained = self._config.explain
        return _Reading(
            lambda reply: read_probability(reply.text, reply.tokens, words, explained), "" if explained else words.mark
        )

    def check(self) -> None:
        """Asks every endpoint for a few tokens. Raises ConfigError with the remedy when none answers, or one refuses; warns of one that
        does not answer where others do."""
        self._endpoints.check()

    def stats(self) -> JudgeStats:
        """A server reports on its cache only when asked to; SGLang with --enable-cache-report."""
        return self._endpoints.stats()

    def close(self) -> None:
        self._endpoints.close()

    def _ask_all(
        self, prompts: Sequence[str], groups: Mapping[str, str], reading: _Reading, opening: int = 0
    ) -> list[Judgement]:
        """groups: prompt -> what it shares its beginning by. opening: characters that all prompts share."""
        call = Call()
        requests = _NestedRequests(
            list(groups),
            lambda prompt: self._ask(prompt, groups[prompt], reading, call),
            self._config.concurrency,
            opening,
        )
        try:
            judged = requests.run()
        except Refused as error:
            requests.close()
            known = {prompt: j for prompt, j in requests.answers().items() if j.verdict is not Verdict.UNKNOWN}
            message = describe_refusal(self._config, error)
            raise Refusal(message, [known.get(prompt) for prompt in prompts]) from None
        finally:
            call.stop("the call was broken off")
            requests.close()
        return [judged[prompt] for prompt in prompts]

    def _ask(self, prompt: str, group: str, reading: _Reading, call: Call) -> Judgement:
        """Raises Refused for what is not about the prompt."""
        try:
            reply = self._endpoints.complete(prompt, call, self._max_tokens, group, reading.beginning)
        except Failed as error:
            call.failed(str(error))
            return Judgement(Verdict.UNKNOWN, str(error))
        except Refused as error:
            if error.about_prompt:
                call.answered()
                return Judgement(Verdict.UNKNOWN, f"the endpoint refused this prompt: {error}")
            call.stop("stopped after the endpoint refused another request")
            raise
        call.answered()
        if reply.finish == "length" and not self._verdict_alone:
            return Judgement(
                Verdict.UNKNOWN, f"the reply was cut off at {self._config.max_tokens} tokens (judge.model.max_tokens)"
            )
        return reading.read(reply)


def _with_missing_answers(given: Sequence[GivenAnswer], judged: Sequence[T]) -> list[T | Judgement]:
    """judged: one for each answer that was given."""
    rest = iter(judged)
    return [Judgement(Verdict.BAD, "no answer was given") if one.answer is None else next(rest) for one in given]


class _NestedRequests:
    """Different prompts under way, each group that shares much after the first of it (prefixes.warm_order).

    ask: prompt -> judgement; called in at most `concurrency` threads. opening: characters that all share; they are no reason to wait, for
    only the first requests meet a cache without them.
    """

    def __init__(self, prompts: list[str], ask: Callable[[str], Judgement], concurrency: int, opening: int) -> None:
        self._prompts = prompts
        self._ask = ask
        self._opening = opening
        self._pool = ThreadPoolExecutor(max(1, min(concurrency, len(prompts))), "judge")
        # the request, and the group that waits for it
        self._pending: dict[Future[Judgement], tuple[int, WarmGroup | None]] = {}
        self._judged: dict[str, Judgement] = {}

    def run(self) -> dict[str, Judgement]:
        """Prompt -> judgement, for all. Raises the first error of `ask`."""
        letters = [np.frombuffer(prompt[self._opening :].encode("utf-32-le"), np.uint32) for prompt in self._prompts]
        for group in warm_order(letters, [1] * len(letters), [0] * len(letters), SHARED_CHARS):
            self._begin(group)
        while self._pending:
            for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
                number, waiting = self._pending.pop(future)
                self._judged[self._prompts[number]] = future.result()
                if waiting is not None:
                    self._go_on(waiting)
        return self._judged

    def _begin(self, group: WarmGroup) -> None:
        if group.warm is not None:
            self._submit(group.warm, group)
        else:
            for number, _ in group.ready:
                self._submit(number)

    def _go_on(self, group: WarmGroup) -> None:
        for number, _ in group.ready:
            if number != group.warm:
                self._submit(number)
        for later in group.later:
            self._begin(later)

    def _submit(self, number: int, group: WarmGroup | None = None) -> None:
        self._pending[self._pool.submit(self._ask, self._prompts[number])] = (number, group)

    def close(self) -> None:
        """Waits for those under way; the rest is not asked."""
        self._pool.shutdown(cancel_futures=True)

    def answers(self) -> dict[str, Judgement]:
        """Prompt -> judgement of those that were answered, after `close` also of those that were under way."""
        for future, (number, _) in self._pending.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self._judged[self._prompts[number]] = future.result()
        return self._judged
