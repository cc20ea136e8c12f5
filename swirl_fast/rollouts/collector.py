"""Stage 1: the policy answers questions with real tools, many trajectories side by side, every step kept as it is taken.

Used by `collect` (sampled, several trajectories a question) and `evaluate` (the same loop, held-out questions, greedy or sampled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from swirl_fast.config import Config
from swirl_fast.data.store import Store, trajectory_ids
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.formats.tags import Action, parse
from swirl_fast.rendering import Message, Renderer, conversation
from swirl_fast.seeds import seed_of
from swirl_fast.tasks.task import Question, Task
from swirl_fast.tools.tool import Tool, observation
from swirl_fast.trajectory import Finish, Step, Trajectory


def conversation_of(config: Config, task: Task, tools: Mapping[str, Tool]) -> Callable[[str], list[Message]]:
    """Question -> the messages of s_1. Without tools the worked examples, which call them, are left out."""
    examples = task.examples[: config.tasks.examples] if tools else ()
    offered = list(tools.values())
    return lambda question: conversation(question, offered, config.tasks.max_steps, examples)


def prompt_of(config: Config, task: Task, renderer: Renderer, tools: Mapping[str, Tool]) -> Callable[[str], list[int]]:
    """Question -> token ids of s_1, of `conversation_of`."""
    messages = conversation_of(config, task, tools)
    return lambda question: renderer.prompt(messages(question))


@dataclass(frozen=True)
class Collector:
    """prompt: question text -> token ids of s_1. tools: by name, real ones. max_tokens: a trajectory ends before it could become
    longer; None: the engine's context."""

    engine: Engine
    renderer: Renderer
    tools: Mapping[str, Tool]
    prompt: Callable[[str], list[int]]
    sampling: Sampling
    max_steps: int
    batch: int
    seed: int
    max_tokens: int | None = None

    def collect(
        self,
        store: Store,
        questions: Sequence[Question],
        trajectories_per_question: int,
        progress: Callable[[int, int], None] = lambda trajectories, steps: None,
    ) -> None:
        """Fills the store up to `trajectories_per_question` finished trajectories of every question; those that are there are
        continued or left alone. progress: called with the numbers of trajectories finished and steps taken in each round."""
        store.add_questions(questions)
        waiting = self._waiting(store, questions, trajectories_per_question)
        active: list[Trajectory] = []
        while True:
            while len(active) < self.batch and (trajectory := next(waiting, None)) is not None:
                active.append(trajectory)
            if not active:
                return
            steps = self._round(active)
            store.record(active)
            unfinished = [trajectory for trajectory in active if trajectory.finish is None]
            progress(len(active) - len(unfinished), steps)
            active = unfinished

    def complete(self, trajectories: Sequence[Trajectory]) -> None:
        """Carries all of them on until they are finished, side by side; nothing is stored."""
        active = [trajectory for trajectory in trajectories if trajectory.finish is None]
        while active:
            for at in range(0, len(active), self.batch):
                self._round(active[at : at + self.batch])
            active = [trajectory for trajectory in active if trajectory.finish is None]

    def begin(self, question: Question, id_: str, prompt: Sequence[int]) -> Trajectory:
        seed, tokens = seed_of(self.seed, id_), np.asarray(prompt, np.int32)
        return Trajectory(id_, question.id, question.task, question.text, seed, len(tokens), tokens)

    def _waiting(self, store: Store, questions: Sequence[Question], count: int) -> Iterator[Trajectory]:
        """Those that are not finished, from where they are."""
        begun, done = set(store.ids(finished=False)), set(store.ids(finished=True))
        for question in questions:
            prompt: list[int] | None = None
            for id_ in trajectory_ids([question], count):
                if id_ in done:
                    continue
                if id_ in begun:
                    yield from store.trajectories([id_])
                    continue
                prompt = prompt or self.prompt(question.text)
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
                stop_ids=(self.renderer.stop_id,),
                seed=seed_of(trajectory.seed, trajectory.num_steps),
                cache_key=trajectory.id,
            )
            for trajectory in room
        ]
        for trajectory, (completion,) in zip(room, self.engine.generate(requests), strict=True):
            self._take(trajectory, completion)
        return len(room)

    def _take(self, trajectory: Trajectory, completion: Completion) -> None:
        text = self.renderer.text(completion.tokens)
        stopped = completion.finish == "stop"
        action = parse(text, self.tools.keys(), truncated=not stopped)
        start = len(trajectory.tokens)
        step = Step(start, start + len(completion.tokens), text, action, completion.logprobs, completion.policy_version)
        trajectory.extend(completion.tokens)
        trajectory.steps.append(step)
        if action.kind == "answer":
            trajectory.finish = Finish.ANSWER
        elif trajectory.num_steps == self.max_steps:
            trajectory.finish = Finish.STEP_LIMIT
        else:
            step.observation = self._observe(action)
            trajectory.extend(self.renderer.observation(step.observation, stopped))

    def _observe(self, action: Action) -> str:
        if action.kind == "malformed":
            return f"ERROR: {action.error}"
        assert action.tool is not None
        return observation(action.argument, self.tools[action.tool].call(action.argument))
