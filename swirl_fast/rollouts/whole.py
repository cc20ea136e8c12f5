"""algorithm.reward=outcome, the baseline that step-wise training is compared with: for the questions of the recorded trajectories the
current policy draws whole fresh trajectories, with tools, and every action gets the score of the trajectory's answer. Gold answers are
used; the process judge is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swirl_fast.config import Config, ConfigError
from swirl_fast.engines.engine import Engine, Sampling
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.collector import Collector, prompt_of
from swirl_fast.rollouts.logged import max_trajectory_tokens
from swirl_fast.seeds import seed_of
from swirl_fast.tasks.task import Task
from swirl_fast.tools.toolbox import Toolbox
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement


class WholeRollouts:
    """group_size trajectories a question. They end at tasks.max_steps, and before they would fit neither the engine's
    context nor a micro-batch."""

    def __init__(
        self,
        config: Config,
        task: Task,
        tools: Mapping[str, Toolbox],
        engine: Engine,
        renderer: Renderer,
        form: Format = TAGS,
    ) -> None:
        training, limit = config.training, config.tasks.max_steps
        self._count, self._task = training.group_size, task
        self._questions = {question.id: question for question in task.questions("train")}
        self._prompt = prompt = prompt_of(
            config, task, renderer, {name: box.specs for name, box in tools.items()}, form
        )
        longest = max_trajectory_tokens(config)
        sampling = Sampling(training.max_action_tokens, temperature=training.temperature)
        seed = seed_of(config.run.seed, "outcomes")
        self._collector = Collector(
            engine, renderer, tools, prompt, sampling, limit, config.collect.batch, seed, max_tokens=longest, form=form
        )

    def roll_out(self, recorded: Sequence[Trajectory], seeds: Sequence[int]) -> tuple[list[Trajectory], list[int]]:
        """(fresh trajectories, the place in `recorded` whose question each answers). seeds: one a recorded trajectory.

        Raises ConfigError for a recorded question that the task does not have.
        """
        fresh, places = [], []
        for place, (trajectory, seed) in enumerate(zip(recorded, seeds, strict=True)):
            question = self._questions.get(trajectory.question_id)
            if question is None:
                raise ConfigError(
                    f"algorithm.reward=outcome: the recorded question {trajectory.question_id} is not among the training questions of "
                    f"task {self._task.name}, so its answers cannot be scored; use the settings tasks.* and run.seed of the collection"
                )
            tokens = self._prompt(question)
            fresh += [self._collector.begin(question, f"{question.id}/{seed}/{k}", tokens) for k in range(self._count)]
            places += [place] * self._count
        self._collector.complete(fresh, self._questions)
        return fresh, places

    def judgements(self, fresh: Sequence[Trajectory]) -> list[Judgement]:
        """One a step, trajectory after trajectory: the reward of each is the score of the trajectory's answer."""
        judged = []
        for trajectory in fresh:
            score = self._task.score(self._questions[trajectory.question_id], trajectory.answer).reward
            judged += [Judgement.graded(score, f"the answer's score is {score:g}")] * trajectory.num_steps
        return judged
