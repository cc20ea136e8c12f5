"""The first half of a training step: fresh actions at recorded states, and their rewards. Tools are never called here.

The baselines fill the same data: `recorded_actions` for algorithm.name=sft, whole.py for algorithm.reward=outcome. Their actions are
spans of the trajectory itself, which the comb merges into its trunk: a comb without teeth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from swirl_fast.config import ConfigError, TrainingConfig
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.formats.format import Action, Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import BY_VOTE, Judge, judge_actions
from swirl_fast.rendering import Renderer
from swirl_fast.seeds import seed_of
from swirl_fast.tasks import ToolsByTask
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView, Trajectory
from swirl_fast.verdict import Judgement


@dataclass(frozen=True)
class SampledAction:
    """state, trajectory: numbers local to the batch. completion: tokens and log-probs of the engine."""

    trajectory: int
    state: int
    completion: Completion
    action: Action
    view: StepView


def sample_actions(
    trajectories: Sequence[Trajectory],
    engine: Engine,
    renderer: Renderer,
    tools: ToolsByTask,
    training: TrainingConfig,
    seeds: Sequence[int],
    kept: Sequence[Sequence[bool]] | None = None,
    form: Format = TAGS,
    routed_experts: bool = False,
) -> list[SampledAction]:
    """`group_size` actions at every state of every trajectory, or at those that are kept (data/shards.py: StepSample), grouped by state,
    states in order.

    tools: those on offer, by the name of a trajectory's task. seeds: one a trajectory; a trajectory that comes twice in a batch comes
    with two seeds, and so draws other actions. form: how actions are written. routed_experts: whether completions have theirs.
    """
    sampling = Sampling(training.max_action_tokens, temperature=training.temperature)
    places = [
        (t, i)
        for t, trajectory in enumerate(trajectories)
        for i in range(trajectory.num_steps)
        if kept is None or kept[t][i]
    ]
    requests = [
        Request(
            tokens=trajectories[t].state(i),
            sampling=sampling,
            n=training.group_size,
            stop_ids=renderer.stop_ids,
            seed=seed_of(seeds[t], i),
            cache_key=trajectories[t].id,
            routed_experts=routed_experts,
        )
        for t, i in places
    ]
    sampled = []
    for state, ((t, i), completions) in enumerate(zip(places, engine.generate(requests), strict=True)):
        specs, view = tools_for(trajectories[t].task, tools), state_view(trajectories[t], i)
        for completion in completions:
            text = renderer.text(completion.tokens)
            action = form.parse(text, specs, truncated=completion.finish == "length")
            sampled.append(SampledAction(t, state, completion, action, replace(view, action_text=text)))
    return sampled


def state_view(trajectory: Trajectory, i: int) -> StepView:
    """What a judge sees of a fresh action at state i; its text is to be put into `action_text`."""
    return replace(trajectory.view(i), action_text="", recorded=trajectory.steps[i].recorded)


def tools_for(task: str, tools: ToolsByTask) -> Sequence[ToolSpec]:
    """Raises ConfigError for a task that is not among those of the settings."""
    if task not in tools:
        raise ConfigError(
            f"the recorded trajectories hold some of the task {task}, and the settings tasks.* name {', '.join(tools)}; use those of the "
            "collection"
        )
    return tools[task]


def recorded_actions(
    trajectories: Sequence[Trajectory], stop_ids: Collection[int], kept: Sequence[Sequence[bool]] | None = None
) -> list[SampledAction]:
    """The actions of the trajectories themselves, or those at states that are kept, in order, each a state's only one. stop_ids: one of
    them ends an action that was not cut off."""
    sampled: list[SampledAction] = []
    for t, trajectory in enumerate(trajectories):
        for i, (step, view) in enumerate(zip(trajectory.steps, trajectory.views(), strict=True)):
            if kept is not None and not kept[t][i]:
                continue
            tokens = trajectory.tokens[step.start : step.end]
            finish: Literal["stop", "length"] = "stop" if len(tokens) and int(tokens[-1]) in stop_ids else "length"
            completion = Completion(np.asarray(tokens, np.int32), step.logprobs, finish, step.policy_version)
            sampled.append(SampledAction(t, len(sampled), completion, step.action, view))
    return sampled


def asked_about(sampled: Sequence[SampledAction], judgements: Sequence[Judgement]) -> list[Judgement]:
    """The judgements that a judge was asked for: of well-formed actions that no vote decided."""
    pairs = zip(sampled, judgements, strict=True)
    return [one for s, one in pairs if s.action.kind != "malformed" and not one.reason.startswith(BY_VOTE)]


def judge_sampled(sampled: Sequence[SampledAction], judge: Judge) -> list[Judgement]:
    return judge_actions(judge, [s.view for s in sampled], [s.action for s in sampled])
