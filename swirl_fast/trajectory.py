"""The one datum: a trajectory is a trunk of tokens and the spans of the actions in it.

    tokens   | prompt          | a_1   | o_1      | a_2   | o_2      | a_3     |
    state    |<---- s_1 ------>|
             |<---- s_2 -------------------------->|
             |<---- s_3 --------------------------------------------->|

State i is `tokens[:steps[i].start]`: a view, never a copy. `s_{i+1} = s_i + a_i + o_i` holds token by token, because the
tokens that were sampled are the tokens that are kept (arXiv 2504.04736, section 3, where a state with its
action is called a sub-trajectory).

Pure Python: imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum

from swirl_fast.formats.tags import Action


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


@dataclass
class Trajectory:
    """tokens: token ids of the whole trunk. steps: in order, non-overlapping, each inside `tokens`."""

    id: str
    question_id: str
    task: str
    question: str
    seed: int
    prompt_length: int
    tokens: list[int]
    steps: list[Step] = field(default_factory=list)
    finish: Finish | None = None  # None: still being collected

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def answer(self) -> str | None:
        """The text inside the last action's answer tag, None when the trajectory has no answer."""
        if self.steps and self.steps[-1].action.kind == "answer":
            return self.steps[-1].action.argument
        return None

    def state(self, i: int) -> list[int]:
        """Tokens the model had read before action i (0-based)."""
        return self.tokens[: self.steps[i].start]

    def view(self, i: int) -> StepView:
        """What a judge sees of step i."""
        history = tuple((step.text, step.observation or "") for step in self.steps[:i])
        return StepView(self.task, self.question, history, self.steps[i].text)

    def views(self) -> list[StepView]:
        return [self.view(i) for i in range(self.num_steps)]

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

    history: (action text, observation text) of every earlier step.
    """

    task: str
    question: str
    history: tuple[tuple[str, str], ...]
    action_text: str

    def content_hash(self) -> str:
        """Hex digest of everything a judge sees; the key under which its verdict is cached."""
        content = json.dumps([self.task, self.question, self.history, self.action_text], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
