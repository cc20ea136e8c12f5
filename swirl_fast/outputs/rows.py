"""Trajectories as rows of data sets that other trainers read.

    messages   {"messages": [{"role", "content"}, …]}                          conversations, as for supervised fine-tuning
    steps      {"prompt", "completions": [str, …], "labels": [bool, …]}        TRL's stepwise supervision
    prm        the same with labels in [0, 1]: the rewards
    pairs      {"prompt": [messages], "chosen": [message], "rejected": [message]}   TRL's preferences, conversational
    jsonl      all that is recorded

A step without a verdict (UNKNOWN, or not judged) never gets a label, and no label is lost through it: in steps and prm the trajectory goes
on in a further row, with that step in its prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swirl_fast.outputs.readings import Reading
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict

Message = dict[str, str]
Opening = Callable[[Question], Sequence[Message]]  # question -> the messages up to it, itself included

NO_VERDICT = "steps without a verdict (UNKNOWN, or not judged)"


def from_question(question: Question) -> list[Message]:
    """The opening of a conversation without system message and worked examples."""
    return [{"role": "user", "content": question.text}]


def question_of(trajectory: Trajectory) -> Question:
    """Without its gold answers."""
    return Question(trajectory.question_id, trajectory.task, trajectory.question, ())


def turns(trajectory: Trajectory, count: int) -> list[Message]:
    """The first `count` actions as turns of the assistant, their results as turns of the user; none after the trajectory's last action."""
    messages: list[Message] = []
    for i, step in enumerate(trajectory.steps[:count]):
        messages.append({"role": "assistant", "content": step.text})
        if step.observation is not None and i + 1 < trajectory.num_steps:
            messages.append({"role": "user", "content": step.observation})
    return messages


def conversation_row(reading: Reading, opening: Opening) -> dict[str, Any]:
    """A trajectory as a conversation that ends with its last action."""
    one = reading.trajectory
    return {
        "messages": [*opening(question_of(one)), *turns(one, one.num_steps)],
        "trajectory": one.id,
        "question_id": one.question_id,
        "right": reading.matches,
    }


def stepwise_rows(reading: Reading, graded: bool, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row for every run of steps with verdicts. A completion is the result of the action before it, a line end, and the action: the
    label is that of the action at its end. The prompt ends with a line end: trainers put one after each completion, and none before the
    first.

    graded: labels are rewards in [0, 1]; else whether the verdict is GOOD. left_out: counts the steps without a verdict.
    """
    one = reading.trajectory
    texts = _completions(one)
    labels = [_label(judgement, graded) for judgement in reading.judgements]
    left_out[NO_VERDICT] += sum(label is None for label in labels)
    at = 0
    while at < len(labels):
        if labels[at] is None:
            at += 1
            continue
        end = next((i for i in range(at, len(labels)) if labels[i] is None), len(labels))
        yield {
            "prompt": "".join(f"{text}\n" for text in (one.question, *texts[:at])),
            "completions": texts[at:end],
            "labels": labels[at:end],
            "trajectory": one.id,
            "question_id": one.question_id,
            "first_step": at,
        }
        at = end


def _completions(trajectory: Trajectory) -> list[str]:
    before = [None, *(step.observation for step in trajectory.steps)]
    return [
        step.text if result is None else f"{result}\n{step.text}"
        for result, step in zip(before, trajectory.steps, strict=False)
    ]


def _label(judgement: Judgement | None, graded: bool) -> bool | float | None:
    if judgement is None or judgement.verdict is Verdict.UNKNOWN:
        return None
    return judgement.reward if graded else judgement.verdict is Verdict.GOOD


@dataclass(frozen=True)
class Sibling:
    """One of several actions at the same state. reward: None without a verdict."""

    text: str
    good: bool
    reward: float | None


def preference_rows(siblings: Sequence[Sibling], prompt: Sequence[Message], **more: Any) -> Iterator[dict[str, Any]]:
    """Pairs of a GOOD and a BAD action, every different text in one pair at most: the best with the worst, and so on inward."""
    known = {one.text: one for one in siblings if one.reward is not None}.values()
    good = sorted((one for one in known if one.good), key=lambda one: -(one.reward or 0.0))
    bad = sorted((one for one in known if not one.good), key=lambda one: one.reward or 0.0)
    for chosen, rejected in zip(good, bad, strict=False):
        yield {
            "prompt": list(prompt),
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "chosen_reward": chosen.reward,
            "rejected_reward": rejected.reward,
            **more,
        }


def recorded_pairs(readings: Iterable[Reading], opening: Opening, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Pairs among the recorded trajectories of one question: at the first step, and wherever they went the same way until then."""
    states: dict[tuple[tuple[str, str | None], ...], list[tuple[Reading, int]]] = {}
    for reading in readings:
        history = tuple((step.text, step.observation) for step in reading.trajectory.steps)
        for i in range(len(history)):
            states.setdefault(history[:i], []).append((reading, i))
    for members in states.values():
        judged = [(reading.trajectory.steps[i].text, reading.judgements[i]) for reading, i in members]
        left_out[NO_VERDICT] += sum(_label(judgement, False) is None for _, judgement in judged)
        siblings = [Sibling(text, one.verdict is Verdict.GOOD, one.reward) for text, one in judged if one is not None]
        reading, i = members[0]
        one = reading.trajectory
        more = {
            "source": "recorded",
            "question_id": one.question_id,
            "trajectory": one.id,
            "state": i,
            "training_step": None,
        }
        yield from preference_rows(siblings, [*opening(question_of(one)), *turns(one, i)], **more)


def sampled_pairs(
    actions: Sequence[Mapping[str, Any]], prompt: Sequence[Message], left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Pairs among the actions that a training step sampled at one state, whose conversation is `prompt` (data/samples.py)."""
    left_out[NO_VERDICT] += sum(row["reward"] is None for row in actions)
    siblings = [Sibling(row["text"], row["verdict"] == Verdict.GOOD.value, row["reward"]) for row in actions]
    more = {key: actions[0][key] for key in ("question_id", "trajectory", "state")}
    yield from preference_rows(siblings, prompt, source="training", **more, training_step=actions[0]["step"])


def whole_row(reading: Reading) -> dict[str, Any]:
    """Everything of a trajectory. tokens: ids of the whole trunk; start, end of a step: its action's span in it. logprobs: of the
    action's tokens under the policy that sampled it."""
    one = reading.trajectory
    return {
        "id": one.id,
        "question_id": one.question_id,
        "task": one.task,
        "question": one.question,
        "answers": list(reading.gold),
        "answer": one.answer,
        "right": reading.matches,
        "finish": one.finish and one.finish.value,
        "prompt_length": one.prompt_length,
        "tokens": one.tokens.tolist(),
        "steps": [
            {
                "text": step.text,
                "kind": step.action.kind,
                "tool": step.action.tool,
                "argument": step.action.argument,
                "error": step.action.error,
                "observation": step.observation,
                "verdict": judgement and judgement.verdict.value,
                "reward": judgement and judgement.reward,
                "reason": judgement and judgement.reason,
                "start": step.start,
                "end": step.end,
                "logprobs": list(step.logprobs),
                "policy_version": step.policy_version,
            }
            for step, judgement in zip(one.steps, reading.judgements, strict=True)
        ],
    }
