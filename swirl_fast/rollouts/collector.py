"""Stage 1: the policy answers questions with real tools, many trajectories side by side, every step kept as it is taken.

Used by `collect` (sampled, several trajectories a question) and `evaluate` (the same loop, held-out questions, greedy or sampled). The
fingerprint says what the trajectories of a store were made with, so that others are never mixed with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swirl_fast.config import Config
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.formats.tags import Action, parse
from swirl_fast.rendering import Renderer, conversation
from swirl_fast.seeds import seed_of
from swirl_fast.tasks.task import Question, Task
from swirl_fast.tools.tool import Tool, observation
from swirl_fast.trajectory import Finish, Step, Trajectory

PROBE = "Probe: how many of 1,234 naïve “tokens” are 56.78 % of {x}?\n"  # tokenizers split these differently
LATER = ("prompt",)  # keys of a fingerprint that earlier versions did not write


def trajectory_ids(questions: Sequence[Question], trajectories_per_question: int) -> list[str]:
    """The ids a collection is made of; a store may hold more, from a time when more were asked for."""
    return [f"{question.id}/{k}" for question in questions for k in range(trajectories_per_question)]


def prompt_of(config: Config, task: Task, renderer: Renderer, tools: Mapping[str, Tool]) -> Callable[[str], list[int]]:
    """Question -> token ids of s_1. Without tools the worked examples, which call them, are left out."""
    examples = task.examples[: config.tasks.examples] if tools else ()
    offered = list(tools.values())
    return lambda question: renderer.prompt(conversation(question, offered, config.tasks.max_steps, examples))


def fingerprint(config: Config, sampling: Sampling) -> dict[str, Any]:
    """What the trajectories of a store depend on, beside the prompt (`prompt_hash`); the number of questions may grow."""
    from swirl_fast.models.load import model_fingerprint

    tasks = asdict(config.tasks)
    for name in ("limit", "eval_limit"):
        del tasks[name]
    search: dict[str, Any] = {"top_k": config.search.top_k, "passage_chars": config.search.passage_chars}
    if config.search.kind == "dense":
        from swirl_fast.tools.search.dense import folder_hash, model_folder

        search |= {name: getattr(config.search, name) for name in ("kind", "query_prefix", "passage_prefix", "index")}
        assert config.search.model, "refused by the check of the config"
        search["model"] = f"{config.search.model} {folder_hash(model_folder(config.search.model))}"
    return {
        "model": model_fingerprint(config.model),
        "chat_template": config.model.chat_template,
        "engine_dtype": config.engine.dtype,
        "tasks": tasks,
        "search": search,
        "sampling": asdict(sampling),
        "max_steps": config.tasks.max_steps,
        **({"source": config.collect.source} if config.collect.source != "policy" else {}),
        "seed": config.run.seed,
    }


def prompt_hash(renderer: Renderer, prompt: Callable[[str], list[int]]) -> str:
    """Hex digest of the tokens that a probe question and an observation become: of the chat template, the tokenizer, the wording of the
    instructions and the worked examples, none of which the settings name by their contents."""
    tokens = [prompt(PROBE), renderer.observation(PROBE, stopped=False)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def provenance(config: Config, task: Task, offered: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    """The fingerprint of a collection or an evaluation, with a hash of what `prompt_of` makes of a probe."""
    from swirl_fast.models.load import dateless, load_tokenizer

    renderer = Renderer(dateless(load_tokenizer(config.model)), config.model.path)
    prompt = prompt_of(config, task, renderer, _described(offered))
    return fingerprint(config, sampling) | {"prompt": prompt_hash(renderer, prompt)}


def _described(offered: Sequence[str]) -> dict[str, Any]:
    """The tools' classes, which have name and description: a prompt needs no index, which may take minutes to build."""
    from swirl_fast.tools.calculator import Calculator

    described: dict[str, Any] = {"calculator": Calculator}
    if "search" in offered:
        from swirl_fast.tools.search import Search

        described["search"] = Search
    return {name: tool for name, tool in described.items() if name in offered}


def as_told(stored: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted` as far as the fingerprint `stored` can tell. What an earlier version did not write down is no difference: its stores
    could not be gone on with."""
    if not isinstance(stored, dict):
        return dict(wanted)
    return {key: value for key, value in wanted.items() if key in stored or key not in LATER}


def check_provenance(store: Store, key: str, wanted: Mapping[str, Any]) -> None:
    """Remembers the fingerprint under `key` the first time. Raises ValueError, naming what differs, for a store of another one."""
    store.check_meta(key, as_told(store.meta().get(key), wanted))


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
        begun = {trajectory.id: trajectory for trajectory in store.trajectories(finished=False)}
        done = {trajectory.id for trajectory in store.trajectories(finished=True)}
        waiting = self._waiting(questions, trajectories_per_question, begun, done)
        active: list[Trajectory] = []
        while True:
            while len(active) < self.batch and (trajectory := next(waiting, None)) is not None:
                active.append(trajectory)
            if not active:
                return
            steps = self._round(active)
            store.record(active)
            still = [trajectory for trajectory in active if trajectory.finish is None]
            progress(len(active) - len(still), steps)
            active = still

    def complete(self, trajectories: Sequence[Trajectory]) -> None:
        """Carries all of them on until they are finished, side by side; nothing is stored."""
        active = [trajectory for trajectory in trajectories if trajectory.finish is None]
        while active:
            for at in range(0, len(active), self.batch):
                self._round(active[at : at + self.batch])
            active = [trajectory for trajectory in active if trajectory.finish is None]

    def begin(self, question: Question, id_: str, prompt: Sequence[int]) -> Trajectory:
        seed = seed_of(self.seed, id_)
        return Trajectory(id_, question.id, question.task, question.text, seed, len(prompt), list(prompt))

    def _waiting(
        self, questions: Sequence[Question], count: int, begun: dict[str, Trajectory], done: set[str]
    ) -> Iterator[Trajectory]:
        for question in questions:
            prompt: list[int] | None = None
            for id_ in trajectory_ids([question], count):
                if id_ in done:
                    continue
                if id_ in begun:
                    yield begun[id_]
                    continue
                prompt = prompt or self.prompt(question.text)
                yield self.begin(question, id_, prompt)

    def _round(self, active: Sequence[Trajectory]) -> int:
        """One action, and its observation, for every trajectory that has room for one. Returns the number of actions taken."""
        limit = min(self.engine.max_context, self.max_tokens or self.engine.max_context)
        room = [t for t in active if len(t.tokens) + self.sampling.max_new_tokens <= limit]
        for trajectory in active:
            if trajectory not in room:
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
        trajectory.tokens = [*trajectory.tokens, *completion.tokens]
        trajectory.steps.append(step)
        if action.kind == "answer":
            trajectory.finish = Finish.ANSWER
        elif trajectory.num_steps == self.max_steps:
            trajectory.finish = Finish.STEP_LIMIT
        else:
            step.observation = self._observe(action)
            trajectory.tokens += self.renderer.observation(step.observation, stopped)

    def _observe(self, action: Action) -> str:
        if action.kind == "malformed":
            return f"ERROR: {action.error}"
        assert action.tool is not None
        return observation(action.argument, self.tools[action.tool].call(action.argument))
