"""collect.source=conversations: a conversation of an agent's log as a trajectory.

Every turn of the assistant is an action, with the text as the model's chat template writes it; all that lies between two of them is the
observation, and all before the first is the prompt. Log-probs are 0, for nobody here sampled these actions: what training draws, it draws
afresh at the states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jinja2 import TemplateError

from swirl_fast.config import Config
from swirl_fast.formats.format import Format
from swirl_fast.rendering import Message, Renderer, open_format, open_renderer
from swirl_fast.rendering.template import call_id
from swirl_fast.tasks import ToolsByTask
from swirl_fast.tasks.messages import BrokenRow, Conversation
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Step, Trajectory

SHOWN = 3  # conversations that are named where they are skipped
_MARK = "THOUGHTS-HERE"


class LogWriter:
    """Writes conversations as trajectories, and keeps count of what could not be kept.

    tools: of the parts of the log, by which fresh actions are read too. max_tokens: of a trajectory; it ends before the turn that would
    make it longer, or whose state would leave less than max_action_tokens for a fresh action. skip: leave out what the chat template
    refuses.
    """

    def __init__(
        self,
        renderer: Renderer,
        form: Format,
        tools: ToolsByTask,
        max_tokens: int,
        max_action_tokens: int,
        skip: bool = False,
    ) -> None:
        self.renderer, self.form, self._tools = renderer, form, tools
        self._max_tokens, self._max_action_tokens, self._skip = max_tokens, max_action_tokens, skip
        self._refused: list[str] = []
        self._too_long = self._cut = self._steps = self._malformed = self._silent = 0
        self._first_error = ""

    def write(self, conversations: Iterable[tuple[Question, Conversation]]) -> Iterator[Trajectory]:
        """Finished ones, in order, without those of which not even the first action fits. Raises BrokenRow for a conversation that the
        chat template refuses, unless `skip`."""
        for question, conversation in conversations:
            try:
                trajectory = self._written(question, conversation)
            except (TemplateError, TypeError, ValueError) as error:
                refusal = (
                    f"{conversation.where}: the chat template of the model refuses this conversation: {error}; change it, set "
                    "model.chat_template, or leave it out with collect.broken_lines=skip"
                )
                if not self._skip:
                    raise BrokenRow(refusal) from None
                self._refused.append(refusal)
                continue
            if not trajectory.steps:
                self._too_long += 1
                continue
            self._count(trajectory, conversation.where)
            yield trajectory

    def _count(self, trajectory: Trajectory, where: str) -> None:
        self._cut += trajectory.finish is Finish.CONTEXT_LIMIT
        self._steps += trajectory.num_steps
        errors = [step.action.error for step in trajectory.steps if step.action.kind == "malformed"]
        self._malformed += len(errors)
        if errors and not self._first_error:
            self._first_error = f"{where}: {errors[0]}"

    def notes(self) -> list[str]:
        """What was cut or left out, and how many recorded actions count as malformed, in sentences."""
        fits = f"{self._max_tokens} tokens with {self._max_action_tokens} for a fresh action"
        limits = "the model's context, training.max_path_tokens or training.token_budget"
        found = []
        if self._refused:
            more = f" and {len(self._refused) - SHOWN} more" if len(self._refused) > SHOWN else ""
            found.append(f"{len(self._refused)} conversations are skipped: {'; '.join(self._refused[:SHOWN])}{more}")
        if self._too_long:
            found.append(
                f"{self._too_long} conversations are left out: not even their first state fits into {fits} ({limits})"
            )
        if self._cut:
            found.append(f"{self._cut} conversations are cut at the last turn that fits into {fits} ({limits})")
        if self._silent:
            found.append(
                f"{self._silent} turns lose text that the chat template does not write, such as that beside a call"
            )
        if self._malformed:
            found.append(
                f"{self._malformed} of {self._steps} recorded actions would be malformed if the model drew them, and count as BAD; the "
                f"first: {self._first_error} (see actions.format and actions.answer)"
            )
        return found

    def _written(self, question: Question, conversation: Conversation) -> Trajectory:
        specs, messages = self._tools[question.task], _numbered(conversation.messages)
        first = conversation.first_action
        places = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        tokens = np.asarray(self.renderer.prompt(messages[:first], conversation.tools), np.int32)
        trajectory = Trajectory(f"{question.id}/0", question.id, question.task, question.text, 0, len(tokens), tokens)
        for place, until in zip(places, [*places[1:], None], strict=True):
            message = self._turn(messages[place])
            ids = self.renderer.written(message)
            start = len(trajectory.tokens)
            end = start + len(ids)
            if max(end, start + self._max_action_tokens) > self._max_tokens:
                return _cut(trajectory)
            text = self.renderer.text(ids)
            trajectory.extend(ids)
            trajectory.steps.append(Step(start, end, text, self.form.parse(text, specs), [0.0] * len(ids), 0))
            if until is not None:
                between = messages[place + 1 : until]
                trajectory.steps[-1].observation = "\n".join(str(one["content"]) for one in between)
                trajectory.extend(self.renderer.following(message, between, ids[-1]))
        answered = trajectory.steps[-1].action.kind == "answer"
        trajectory.finish = Finish.ANSWER if answered else Finish.STEP_LIMIT
        return trajectory

    def _turn(self, message: Message) -> Message:
        """As the template can write it. One that knows no thoughts drops them: they stay, in the text. What it writes in no form, thoughts
        or the text beside calls, is lost, and counted."""
        message = self._with_objects(message)
        thoughts = str(message.get("reasoning_content") or "").strip()
        bare = {key: value for key, value in message.items() if key != "reasoning_content"}

        def own(thoughts: str) -> Message:
            return {**bare, "reasoning_content": thoughts} if thoughts else bare

        def in_text(thoughts: str) -> Message:
            return {**bare, "content": f"<think>\n{thoughts}\n</think>\n\n{bare['content']}"} if thoughts else bare

        for form in (own, in_text):  # the words of a thought may also stand in a call: a mark does not
            if self._writes(form(thoughts), thoughts) and (not thoughts or self._writes(form(_MARK), _MARK)):
                return form(thoughts)
        if not message.get("tool_calls"):
            self.renderer.template.turn(bare)  # raises where the text is left out
        self._silent += 1
        return bare if self._writes(bare, "") else {**message, "content": ""}

    def _with_objects(self, message: Message) -> Message:
        """Some templates write only arguments that are objects: text that is none becomes the only argument, `arguments`."""
        calls = message.get("tool_calls") or ()
        if not any(isinstance(call["function"]["arguments"], str) for call in calls):
            return message
        try:
            self.renderer.template.turn(message)
            return message
        except (TemplateError, TypeError, ValueError):
            changed = []
            for call in calls:
                function = call["function"]
                if isinstance(function["arguments"], str):
                    function = {**function, "arguments": {"arguments": function["arguments"]}}
                changed.append({**call, "function": function})
            return {**message, "tool_calls": changed}

    def _writes(self, message: Message, thoughts: str) -> bool:
        """Whether the template writes the message with its text, and the thoughts."""
        try:
            return thoughts in self.renderer.template.turn(message)
        except ValueError:  # the text is left out
            return False


def log_writer(config: Config, tools: ToolsByTask, max_action_tokens: int = 0) -> LogWriter:
    """By the settings of a run. max_action_tokens: of a fresh action; 0: that of training."""
    return LogWriter(
        open_renderer(config.model),
        open_format(config.actions, config.model),
        tools,
        max_trajectory_tokens(config),
        max_action_tokens or config.training.max_action_tokens,
        config.collect.broken_lines == "skip",
    )


def max_trajectory_tokens(config: Config) -> int:
    """Of a trajectory, so that its states can be trained on."""
    from swirl_fast.models.exact import context_of
    from swirl_fast.models.load import load_config

    context: int = context_of(load_config(config.model))
    return min(context, config.training.max_path_tokens or context, config.training.token_budget)


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """With the ids that calls and results have in rollouts, in every turn from the first on: Mistral's templates refuse others."""
    ids: dict[str, str] = {}
    found = []
    for message in messages:
        if calls := message.get("tool_calls"):
            ids |= {call["id"]: call_id(i) for i, call in reversed(list(enumerate(calls)))}
            message = {**message, "tool_calls": [{**call, "id": call_id(i)} for i, call in enumerate(calls)]}
        if message["role"] == "tool":
            message = {**message, "tool_call_id": ids[message["tool_call_id"]]}
        found.append(message)
    return found


def _cut(trajectory: Trajectory) -> Trajectory:
    """Up to its last action; without steps where there is none."""
    if trajectory.steps:
        last = trajectory.steps[-1]
        last.observation = None
        trajectory.tokens = trajectory.tokens[: last.end].copy()
    trajectory.finish = Finish.CONTEXT_LIMIT
    return trajectory
