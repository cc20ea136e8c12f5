"""tasks.mix: several tasks in one run. Each keeps its name, tools, examples and score; a question knows the task that it is of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.task import Question, Score, Split, Task, TaskDefaults
from swirl_fast.tools.characters import same_text


class Mixture(TaskDefaults):
    """Of tasks.limit and tasks.eval_limit every task has the share that its weight gives it, all of its own limit where it sets one. Their
    questions follow each other in turns, so that a part of them has the same shares. What one of them holds out, none trains on."""

    def __init__(self, config: TasksConfig, seed: int, load: Callable[[TasksConfig, int], Task]) -> None:
        """load: makes the task of settings without a mixture."""
        total = sum(entry.get("weight", config.weight) for entry in config.mix)
        parts: dict[str, Task] = {}
        weights: dict[str, float] = {}
        for i, entry in enumerate(config.mix):
            settings = replace(config, **{"mix": [], **entry})
            for name in ("limit", "eval_limit"):
                if name not in entry:
                    setattr(settings, name, math.ceil(getattr(config, name) * settings.weight / total))
            try:
                part = load(settings, seed)
            except ConfigError as error:
                raise ConfigError(f"tasks.mix[{i}]: {error}") from None
            if part.name in parts:
                raise ConfigError(
                    f"tasks.mix[{i}]: two tasks are called {part.name}; give one of them another name, with tasks.mix[{i}].name"
                )
            parts[part.name], weights[part.name] = part, settings.weight
        self.parts: Mapping[str, Task] = parts
        self.name = "+".join(parts)
        self._weights = weights
        self.held_out = frozenset().union(*(part.held_out for part in parts.values()))
        self._questions: dict[Split, list[Question]] = {
            "train": self._in_turns("train"),
            "eval": self._in_turns("eval"),
        }

    def _in_turns(self, split: Split) -> list[Question]:
        """Question k of a task of weight w comes at the time (k + 1/2) / w."""
        timed = [
            ((k + 0.5) / self._weights[name], place, question)
            for place, (name, part) in enumerate(self.parts.items())
            for k, question in enumerate(part.questions(split))
            if split == "eval" or same_text(question.text) not in self.held_out
        ]
        found: dict[str, Question] = {}
        for _, _, question in sorted(timed, key=lambda one: one[:2]):
            if question.id in found:
                raise ConfigError(
                    f"tasks.mix: {found[question.id].task} and {question.task} both have a question with the id {question.id}"
                )
            found[question.id] = question
        return list(found.values())

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        return self.parts[question.task].solution(question)

    def demonstration(self, question: Question) -> tuple[str, ...]:
        return self.parts[question.task].demonstration(question)

    def passages(self) -> Sequence[tuple[str, str]]:
        return [passage for part in self.parts.values() for passage in part.passages()]

    def score(self, question: Question, answer: str | None) -> Score:
        return self.parts[question.task].score(question, answer)
