"""The one datum: a trajectory is a trunk of tokens and the spans of the actions in it.

    tokens   | prompt          | a_1   | o_1      | a_2   | o_2      | a_3     |
    state    |<---- s_1 ------>|
             |<---- s_2 -------------------------->|
             |<---- s_3 --------------------------------------------->|

State i is `tokens[:steps[i].start]`: a view, never a copy. `s_{i+1} = s_i + a_i + o_i` holds token by token, because the
tokens that were sampled are the tokens that are kept (arXiv 2504.04736, section 3, where a state with its
action is called a sub-trajectory).

Tokens are one int32 array from here to the comb. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from swirl_fast.formats.format import Action


class Finish(str, Enum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # the last action carries an answer tag
    STEP_LIMIT = "step_limit"  # max_steps actions were taken without an answer
    CONTEXT_LIMIT = "context_limit"  # the next action would not fit into the model's context


@dataclass
class Step:
    """One action and what the environment answered.

    start, end: the action's span in `Trajectory.tokens`, end exclusive; the stop token, when sampled, lies inside.
    logprobs: natural log-probability of each action token under the policy that sampled it, at the sampling temperature.
    observation: text of the tool's result as the model reads it (`QUERY -> RESULT`), None after an answer or at a limit.
    """

    start: int
    end: int
    text: str
    action: Action
    logprobs: list[float]
    policy_version: int
    observation: str | None = None

    @property
    def recorded(self) -> str | None:
        """The text that fresh actions may be compared with; None for a turn that was cut off, whose text says something else."""
        return None if self.action.cut_off else self.text


@dataclass(eq=False)
class Trajectory:
    """tokens: int32 [length of the trunk], token ids; a list becomes an array here. steps: in order, non-overlapping, each inside
    `tokens`. other_answers: those of the other trajectories of its question, where judge.self_consistency asks for them. Two trajectories
    are equal when all their fields are."""

    id: str
    question_id: str
    task: str
    question: str
    seed: int
    prompt_length: int
    tokens: NDArray[np.int32]
    steps: list[Step] = field(default_factory=list)
    finish: Finish | None = None  # None: still being collected
    other_answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, np.int32)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        names = [each.name for each in fields(self) if each.name != "tokens"]
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and np.array_equal(self.tokens, other.tokens)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def answer(self) -> str | None:
        """The text inside the last action's answer tag, None when the trajectory has no answer."""
        if self.steps and self.steps[-1].action.kind == "answer":
            return self.steps[-1].action.argument
        return None

    def extend(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Appends tokens. Makes a new array: states that were handed out keep theirs."""
        self.tokens = np.concatenate([self.tokens, np.asarray(tokens, np.int32)])

    def state(self, i: int) -> NDArray[np.int32]:
        """Tokens the model had read before action i (0-based): a view of `tokens`."""
        return self.tokens[: self.steps[i].start]

    def view(self, i: int) -> StepView:
        """What a judge sees of step i."""
        return StepView(self.task, self.question, self._turns(i), self.steps[i].text, None, self.other_answers)

    def views(self, recorded: bool = False) -> list[StepView]:
        """What a judge sees of each step; the turns in their histories are shared. recorded: with the step as the recorded one of its
        state."""
        turns = self._turns(self.num_steps)
        return [
            StepView(
                self.task, self.question, turns[:i], step.text, step.recorded if recorded else None, self.other_answers
            )
            for i, step in enumerate(self.steps)
        ]

    def content_hashes(self) -> list[str]:
        """`content_hash` of every view. The histories nest, so each text is encoded and hashed once, not once for each later step."""
        state = hashlib.sha256(_encode(json.dumps([self.task, self.question], ensure_ascii=False)[:-1] + ", ["))
        hashes = []
        for i, (action_text, observation) in enumerate(self._turns(self.num_steps)):
            whole = state.copy()
            whole.update(_encode(f"], {json.dumps(action_text, ensure_ascii=False)}]"))
            hashes.append(whole.hexdigest())
            turn = json.dumps([action_text, observation], ensure_ascii=False)
            state.update(_encode(f", {turn}" if i else turn))
        return hashes

    def _turns(self, count: int) -> tuple[tuple[str, str], ...]:
        """(action text, observation text) of the first `count` steps."""
        return tuple((step.text, step.observation or "") for step in self.steps[:count])

    def check(self) -> None:
        """Raises ValueError when spans overlap, leave the tokens, or log-probs do not match the action's length."""
        at = self.prompt_length
        for i, step in enumerate(self.steps):
            if not at <= step.start <= step.end <= len(self.tokens):
                raise ValueError(
                    f"trajectory {self.id}: step {i} spans [{step.start}, {step.end}), outside [{at}, {len(self.tokens)})"
                )
            if len(step.logprobs) != step.end - step.start:
                raise ValueError(
                    f"trajectory {self.id}: step {i} has {len(step.logprobs)} log-probs for {step.end - step.start} tokens"
                )
            at = step.end


@dataclass(frozen=True)
class StepView:
    """One action with the text it followed: all that a process judge may look at (no gold answer, no later observation).

    history: (action text, observation text) of every earlier step. recorded: what was done at this state in the recorded trajectory, for
    rewards that compare an action with it; None where nothing is recorded, as in an evaluation. other_answers: of the other trajectories
    of the question, for judge.self_consistency; not part of `content_hash`, for verdicts are stored without the vote.
    """

    task: str
    question: str
    history: tuple[tuple[str, str], ...]
    action_text: str
    recorded: str | None = None
    other_answers: tuple[str, ...] = ()

    def content_hash(self) -> str:
        """Hex digest of everything a judge sees; the key under which its verdict is cached.

        A recorded step has itself as the recorded one, and so the hash that it has without: `action_text` says it already. An evaluation,
        whose steps have none, keeps its verdicts in a file of its own.
        """
        seen: list[object] = [self.task, self.question, self.history, self.action_text]
        if self.recorded not in (None, self.action_text):
            seen.append(self.recorded)
        return hashlib.sha256(_encode(json.dumps(seen, ensure_ascii=False))).hexdigest()


def _encode(text: str) -> bytes:
    """UTF-8; lone surrogates, which models write, become three bytes each."""
    return text.encode("utf-8", "surrogatepass")
