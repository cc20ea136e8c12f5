"""Stage 1: the policy answers questions with real tools, many trajectories side by side, every step kept as it is taken.

Used by `collect` (sampled, several trajectories a question) and `evaluate` (the same loop, held-out questions, greedy or sampled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from swirl_fast.config import Config
from swirl_fast.data.store import Store, trajectory_ids
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.formats.format import Call, Format, observation_of, results_in
from swirl_fast.formats.tags import TAGS, parse
from swirl_fast.rendering import Message, Renderer, conversation, message_of, observed
from swirl_fast.seeds import seed_of
from swirl_fast.tasks import ToolsByTask, parts_of
from swirl_fast.tasks.task import Example, Question, Task
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.tools.toolbox import Toolbox, ToolCall
from swirl_fast.trajectory import Finish, Step, Trajectory


def conversation_of(
    config: Config, task: Task, tools: ToolsByTask, form: Format = TAGS
) -> Callable[[Question], list[Message]]:
    """Question -> the messages of s_1. Worked examples that call other tools than those on offer are left out.

    tools: those on offer, by the name of a question's task.
    """
    parts = parts_of(task)

    def messages(question: Question) -> list[Message]:
        part, offered = parts[question.task], tools[question.task]
        examples = [example for example in part.examples if fits(example, offered)]
        return conversation(question.text, offered, config.tasks.max_steps, examples, part.instructions, form)

    return messages


def prompt_of(
    config: Config, task: Task, renderer: Renderer, tools: ToolsByTask, form: Format = TAGS
) -> Callable[[Question], list[int]]:
    """Question -> token ids of s_1, of `conversation_of`."""
    messages = conversation_of(config, task, tools, form)
    return lambda question: renderer.prompt(messages(question), tools[question.task] if form.native else ())


def fits(example: Example, tools: Sequence[ToolSpec]) -> bool:
    """Whether every action of a worked example can be done with these tools."""
    return all(parse(action, tools).kind != "malformed" for action in example.actions)


@dataclass(frozen=True)
class Collector:
    """prompt: question -> token ids of s_1. tools: by the name of the task, opened. max_tokens: a trajectory ends before it could become
    longer; None: the engine's context."""

    engine: Engine
    renderer: Renderer
    tools: Mapping[str, Toolbox]
    prompt: Callable[[Question], list[int]]
    sampling: Sampling
    max_steps: int
    batch: int
    seed: int
    max_tokens: int | None = None
    form: Format = TAGS

    def collect(
        self,
        store: Store,
        questions: Sequence[Question],
        trajectories_per_question: int,
        progress: Callable[[int, int], None] = lambda trajectories, steps: None,
        elsewhere: AbstractSet[str] = frozenset(),
    ) -> None:
        """Fills the store up to `trajectories_per_question` finished trajectories of every question; those that are there are
        continued or left alone. progress: called with the numbers of trajectories finished and steps taken in each round. elsewhere: ids
        that are in another store."""
        store.add_questions(questions)
        waiting = self._waiting(store, questions, trajectories_per_question, elsewhere)
        asked = {question.id: question for question in questions}
        active: list[Trajectory] = []
        while True:
            while len(active) < self.batch and (trajectory := next(waiting, None)) is not None:
                self._begin_tools(trajectory, asked[trajectory.question_id])
                active.append(trajectory)
            if not active:
                return
            steps = self._round(active)
            store.record(active)
            unfinished = [trajectory for trajectory in active if trajectory.finish is None]
            progress(len(active) - len(unfinished), steps)
            active = unfinished

    def complete(self, trajectories: Sequence[Trajectory], questions: Mapping[str, Question]) -> None:
        """Carries all of them on until they are finished, side by side; nothing is stored. questions: by id."""
        active = [trajectory for trajectory in trajectories if trajectory.finish is None]
        for trajectory in active:
            self._begin_tools(trajectory, questions[trajectory.question_id])
        while active:
            for at in range(0, len(active), self.batch):
                self._round(active[at : at + self.batch])
            active = [trajectory for trajectory in active if trajectory.finish is None]

    def begin(self, question: Question, id_: str, prompt: Sequence[int]) -> Trajectory:
        seed, tokens = seed_of(self.seed, id_), np.asarray(prompt, np.int32)
        return Trajectory(id_, question.id, question.task, question.text, seed, len(tokens), tokens)

    def _waiting(
        self, store: Store, questions: Sequence[Question], count: int, elsewhere: AbstractSet[str]
    ) -> Iterator[Trajectory]:
        """Those that are not finished, from where they are."""
        begun, done = set(store.ids(finished=False)), elsewhere | set(store.ids(finished=True))
        for question in questions:
            prompt: list[int] | None = None
            for id_ in trajectory_ids([question], count):
                if id_ in done:
                    continue
                if id_ in begun:
                    yield from store.trajectories([id_])
                    continue
                prompt = prompt or self.prompt(question)
                yield self.begin(question, id_, prompt)

    def _round(self, active: Sequence[Trajectory]) -> int:
        """One action, and its observation, for every trajectory that has room for one. Returns the number of actions taken."""
        limit = min(self.engine.max_context, self.max_tokens or self.engine.max_context)
        room = []
        for trajectory in active:
            if len(trajectory.tokens) + self.sampling.max_new_tokens <= limit:
                room.append(trajectory)
            else:
                trajectory.finish = Finish.CONTEXT_LIMIT
        requests = [
            Request(
                tokens=trajectory.tokens,
                sampling=self.sampling,
                stop_ids=self.renderer.stop_ids,
                seed=seed_of(trajectory.seed, trajectory.num_steps),
                cache_key=trajectory.id,
            )
            for trajectory in room
        ]
        going_on = []
        for trajectory, (completion,) in zip(room, self.engine.generate(requests), strict=True):
            self._act(trajectory, completion)
            if trajectory.finish is None:
                going_on.append(trajectory)
        for trajectory, (text, messages) in zip(going_on, self._observations(going_on), strict=True):
            last = trajectory.steps[-1]
            last.observation = text
            turn = message_of(last.action, self.form, last.text)
            ended = int(trajectory.tokens[-1]) if last.end > last.start else -1
            trajectory.extend(self.renderer.following(turn, messages, ended))
        for trajectory in active:
            if trajectory.finish is not None:
                self.tools[trajectory.task].end(trajectory.id)
        return len(room)

    def _begin_tools(self, trajectory: Trajectory, question: Question) -> None:
        box = self.tools[trajectory.task]
        earlier = []
        for step in trajectory.steps:
            if step.action.kind == "tool" and step.observation is not None:
                calls = self.form.parse(step.text, box.specs).calls
                results = results_in(calls, step.observation) or [step.observation] * len(calls)
                for call, result in zip(calls, results, strict=True):
                    earlier.append((call.tool, call.arguments or {}, result))
        box.begin(trajectory.id, question, earlier)

    def _act(self, trajectory: Trajectory, completion: Completion) -> None:
        text = self.renderer.text(completion.tokens)
        action = self.form.parse(text, self.tools[trajectory.task].specs, truncated=completion.finish != "stop")
        start = len(trajectory.tokens)
        step = Step(start, start + len(completion.tokens), text, action, completion.logprobs, completion.policy_version)
        trajectory.extend(completion.tokens)
        trajectory.steps.append(step)
        if action.kind == "answer":
            trajectory.finish = Finish.ANSWER
        elif trajectory.num_steps == self.max_steps:
            trajectory.finish = Finish.STEP_LIMIT

    def _observations(self, trajectories: Sequence[Trajectory]) -> list[tuple[str, list[Message]]]:
        """What follows the last action of each, as text and as messages; the calls are made beside each other."""
        found: dict[str, tuple[str, list[Message]]] = {}  # by the id of a trajectory
        calling: dict[str, list[Trajectory]] = {}  # task -> those with a call
        for trajectory in trajectories:
            action = trajectory.steps[-1].action
            if action.kind == "malformed":
                text = f"ERROR: {action.error}"
                found[trajectory.id] = text, observed(action, text, self.form)
            else:
                calling.setdefault(trajectory.task, []).append(trajectory)
        for task, of_task in calling.items():
            results = iter(
                self.tools[task].call(
                    [_called(each.id, call) for each in of_task for call in each.steps[-1].action.calls]
                )
            )
            for trajectory in of_task:
                action = trajectory.steps[-1].action
                of_turn = [next(results) for _ in action.calls]
                text = observation_of(action.calls, of_turn)
                found[trajectory.id] = text, observed(action, text, self.form, of_turn)
        return [found[trajectory.id] for trajectory in trajectories]


def _called(trajectory: str, call: Call) -> ToolCall:
    assert call.arguments is not None, "a call that was parsed"
    return ToolCall(trajectory, call.tool, call.arguments)
