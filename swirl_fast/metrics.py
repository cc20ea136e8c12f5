"""The numbers of a training step, declared once: name, unit, how they come from all ranks, meaning.

From this list come the rows of runs/NAME/metrics.jsonl, TensorBoard and Weights & Biases (training/metrics_log.py), the console line, the
units and explanations of the report, and a glossary:

    python -m swirl_fast.metrics > docs/metrics.md

A rank adds up sums (training/step_metrics.py, rollouts/gaming.py, rollouts/pipeline.py), whose fields say how ranks put theirs together:
`summed()` or `largest()`. A metric is made of these sums (Sum, Max, Mean), or computed by the trainer and handed in by its name (Same,
FirstRank, Computed).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
OVER_RANKS = "over_ranks"  # key of a field's metadata


def summed() -> Any:
    """A field of a dataclass of sums: float, added up over ranks."""
    return dataclasses.field(default=0.0, metadata={OVER_RANKS: "sum"})


def largest() -> Any:
    """A field of a dataclass of sums: float, the largest of all ranks."""
    return dataclasses.field(default=0.0, metadata={OVER_RANKS: "max"})


@dataclass(frozen=True)
class Sum:
    """A sum over all ranks."""

    of: str

    def __call__(self, sums: Mapping[str, float]) -> float:
        return sums[self.of]


@dataclass(frozen=True)
class Max(Sum):
    """The largest of all ranks."""


@dataclass(frozen=True)
class Mean:
    """One sum over all ranks divided by another; empty: where the second one is 0."""

    of: str
    per: str
    empty: float = math.nan

    def __call__(self, sums: Mapping[str, float]) -> float:
        return sums[self.of] / sums[self.per] if sums[self.per] else self.empty


@dataclass(frozen=True)
class Same:
    """Known to every rank, and the same on all."""


@dataclass(frozen=True)
class FirstRank:
    """Measured by each rank, shown of rank 0."""


@dataclass(frozen=True)
class Computed:
    """From sums over all ranks and more. formula: in words."""

    formula: str


@dataclass(frozen=True)
class Metric:
    """unit: "share" for a number in [0, 1], "" where there is none. always: whether every step has it."""

    name: str
    unit: str
    source: Sum | Max | Mean | Same | FirstRank | Computed
    meaning: str
    always: bool = True


# Signs of a policy that plays for the judge instead of the question; evaluation reports them, too.
GAMING = (
    Metric("action_length", "tokens", Mean("observed_tokens", "observed"), "mean length of all sampled actions"),
    Metric(
        "action_length_good",
        "tokens",
        Mean("good_tokens", "good"),
        "mean length of GOOD actions (imitated ones count as GOOD): a judge that pays for length shows here",
    ),
    Metric("action_length_bad", "tokens", Mean("bad_tokens", "bad"), "mean length of BAD actions"),
    Metric("cut_off", "share", Mean("cut_off", "observed"), "actions that hit the length limit"),
    Metric(
        "outside_tag",
        "share",
        Mean("outside", "characters"),
        "characters outside calls, answers and thoughts, among those of well-formed actions",
    ),
    Metric(
        "repeated", "share", Mean("repeated", "observed"), "actions that repeat a call made before in their trajectory"
    ),
)

# Phases of a step, in its order; none counts what another one counts. Those that a step did not have are left out.
PHASES = {
    "data": "reading the next trajectories",
    "rollout": "drawing actions; beside the training with training.lag=1",
    "judge": "judging them; beside the training with training.lag=1",
    "gather": "waiting for the other ranks and exchanging actions with them",
    "pack": "advantages, weights, packing and writing the samples",
    "old_logprobs": "log-probs of the reference and, for algorithm.updates_per_batch above 1, of the policy before the update",
    "forward_backward": "forward and backward of the policy",
    "optimizer": "clipping and the optimizer's step",
    "wait_for_rollout": "waiting for the next batch's actions (training.lag=1)",
    "weight_sync": "handing the new weights to the rollout engine",
    "share_gpu": "moving engine and trainer in and out of the GPU's memory (engine.share_gpu)",
}

METRICS = (
    Metric("step", "", Same(), "optimizer steps done, this one included"),
    Metric("policy_version", "", Same(), "version of the weights after the step: the same number"),
    Metric(
        "reward",
        "share",
        Mean("rewards", "rewarded"),
        "mean reward of the actions with a verdict, or of whole trajectories with algorithm.reward=outcome",
    ),
    Metric(
        "process_label",
        "share",
        Mean("process_label", "judged_states"),
        "mean reward within a state, averaged over states; not measured with algorithm.reward=outcome",
    ),
    Metric(
        "malformed", "share", Mean("malformed", "actions", empty=0.0), "actions that are neither a call nor an answer"
    ),
    Metric("unknown", "actions", Sum("unknown"), "actions without a verdict, left out of baseline and loss"),
    *GAMING,
    Metric("loss", "", Sum("loss"), "the loss before the update, KL term included"),
    Metric("nll", "nats a token", Mean("nll", "tokens", empty=0.0), "negative log-prob of the trained tokens"),
    Metric(
        "kl",
        "nats a token",
        Mean("kl", "tokens", empty=0.0),
        "KL divergence from the reference model (estimator k3); 0 without one",
    ),
    Metric(
        "entropy",
        "nats a token",
        Mean("surprisal", "generated_tokens"),
        "mean of -log-prob of the sampled tokens, an unbiased estimate of the policy's entropy",
    ),
    Metric(
        "clip_fraction",
        "share",
        Mean("clipped", "clip_tokens", empty=0.0),
        "tokens whose ratio was clipped, over all updates on the batch (algorithm.name=ppo)",
    ),
    Metric("ratio_max", "", Max("ratio_max"), "largest probability ratio of new to old policy"),
    Metric("grad_norm", "", Same(), "norm of the whole gradient before clipping"),
    Metric("learning_rate", "", Same(), "the optimizer's, in this step"),
    Metric(
        "engine_gap_mean",
        "nats",
        Mean("gap", "tokens", empty=0.0),
        "mean difference of the rollout engine's log-prob of a token and the trainer's; above training.max_engine_gap training stops",
    ),
    Metric("engine_gap_max", "nats", Max("gap_max"), "largest such difference"),
    Metric(
        "routing_gap",
        "share",
        Computed("choices of other experts / recorded choices, one a token and layer"),
        "tokens that the trainer's router would send to other experts than the rollout engine did (engine.return_routed_experts); with "
        "training.replay_routing they go where the engine sent them",
        always=False,
    ),
    Metric(
        "importance_truncated",
        "share",
        Mean("truncated", "tokens", empty=0.0),
        "tokens whose importance weight was cut at algorithm.importance_cap",
    ),
    Metric("skipped_samples", "trajectories", Same(), "recorded trajectories in damaged shards, which are left out"),
    Metric("states", "states", Sum("states"), "states with an action that can be learned from"),
    Metric(
        "states_without_signal",
        "states",
        Sum("without_signal"),
        "of these, states at which every advantage is 0, as where all rewards are equal: nothing is learned there",
    ),
    Metric(
        "states_drawn",
        "states",
        Sum("drawn"),
        "states at which actions were drawn, with training.refill also those that others took the place of; 0 for algorithm.name=sft",
    ),
    Metric(
        "states_drawn_without_signal",
        "states",
        Sum("drawn_without_signal"),
        "of these, states at which every advantage is 0, or no action has a verdict",
    ),
    Metric("actions", "actions", Sum("actions"), "actions of the batch"),
    Metric("action_tokens", "tokens", Sum("generated_tokens"), "tokens that the rollout engine generated"),
    Metric(
        "tokens_computed",
        "tokens",
        Sum("computed_tokens"),
        "tokens of all combs: equal prefixes once; with training.sharing=false of all rows, their padding included",
    ),
    Metric("tokens_effective", "tokens", Sum("effective_tokens"), "tokens that separate rows would compute"),
    Metric(
        "cache_hit_rate",
        "share",
        Mean("cached_tokens", "prompt_tokens", empty=0.0),
        "prompt tokens that the rollout engine took from its prefix cache",
    ),
    Metric(
        "cache_hit_rate_of_possible",
        "share",
        Mean("cached_tokens", "cacheable_tokens", empty=0.0),
        "the same, among the tokens that an ideal cache would have held",
    ),
    Metric(
        "judge_cache_hit_rate",
        "share",
        Mean("judge_cached_tokens", "judge_prompt_tokens", empty=0.0),
        "prompt tokens that the judge's endpoint took from its prefix cache",
    ),
    Metric(
        "tokens_computed_per_second",
        "tokens a second",
        Mean("computed_tokens", "seconds"),
        "computed tokens over the seconds of the whole step",
    ),
    Metric(
        "tokens_effective_per_second",
        "tokens a second",
        Mean("effective_tokens", "seconds"),
        "effective tokens over the seconds of the whole step",
    ),
    Metric(
        "tokens_computed_per_second_per_rank",
        "tokens a second",
        Mean("computed_tokens", "rank_seconds"),
        "the same, divided by the number of ranks",
    ),
    Metric(
        "tokens_effective_per_second_per_rank",
        "tokens a second",
        Mean("effective_tokens", "rank_seconds"),
        "the same, divided by the number of ranks",
    ),
    Metric(
        "rank_imbalance",
        "",
        Computed("estimated work of the busiest rank / mean of all ranks"),
        "how unevenly micro-batches are dealt; 1 is even",
    ),
    Metric(
        "tflops",
        "1e12 FLOP/s",
        Computed("work of all ranks / longest forward and backward of a rank"),
        "speed of forward and backward by the matrix products of the computed tokens, all ranks together",
    ),
    Metric(
        "mfu",
        "share",
        Computed("tflops / peak of all devices"),
        "model FLOPs utilization of forward and backward; only where the device's peak is known",
        always=False,
    ),
    Metric(
        "mfu_step",
        "share",
        Computed("work / seconds / peak of all devices"),
        "model FLOPs utilization of the whole step",
        always=False,
    ),
    Metric(
        "model_check_logprob",
        "nats a token",
        Same(),
        "before the first step: mean difference of a log-prob over a small tree of prefixes and over separate rows (training.check_model)",
        always=False,
    ),
    Metric(
        "model_check_gradient",
        "",
        Same(),
        "likewise: norm of the difference of the two gradients / norm of the gradient",
        always=False,
    ),
    Metric("memory_gib", "GiB", Max("memory_gib"), "peak since the start: of tensors on a GPU, else of the process"),
    Metric("seconds", "seconds", Max("seconds"), "the whole step"),
    Metric(
        "seconds_hidden",
        "seconds",
        FirstRank(),
        "how long the next batch was sampled beside the training (training.lag=1)",
    ),
    *(Metric(f"seconds_{name}", "seconds", FirstRank(), meaning, always=False) for name, meaning in PHASES.items()),
    Metric(
        "skipped_steps", "steps", Same(), "steps so far without an update for a loss or gradient that was not finite"
    ),
    Metric("unknown_steps", "steps", Same(), "steps so far without an update for a judge that gave no verdict"),
    Metric(
        "steps_without_signal",
        "share",
        Same(),
        "steps so far at none of whose states an action had an advantage, so that the update had no gradient but that of the KL term",
    ),
)

# Of each task, where there are several: the name of the task in place of TASK.
OF_TASK = (
    Metric(
        "reward/TASK", "", Computed("as reward"), "mean reward of the samples of one task, with tasks.mix", always=False
    ),
)

# The console line: formats, each with what separates it from the part before it.
CONSOLE = {
    "reward": "  reward {:.3f}",
    "process_label": "  label {:.3f}",
    "malformed": "  malformed {:.2f}",
    "unknown": "  unknown {:.0f}",
    "kl": "  kl {:.4f}",
    "entropy": "  entropy {:.2f}",
    "grad_norm": "  grad {:.2f}",
    "engine_gap_mean": "  gap {:.1e}",
    "cache_hit_rate": "  cached {:.0%}",
    "tokens_computed_per_second": "  tok/s {:.0f}",
    "tokens_effective_per_second": " ({:.0f} effective)",
    "mfu": "  mfu {:.1%}",
    "mfu_step": " ({:.1%} of the step)",
    "memory_gib": "  memory {:.1f} GiB",
    "seconds": "  {:.1f} s",
}

SPEEDS = ("tokens_computed_per_second", "tokens_effective_per_second", "mfu", "mfu_step")

BY_NAME = {metric.name: metric for metric in METRICS}


def declared(name: str) -> Metric | None:
    """The metric of a name in a row; None where no row has it."""
    family = f"{name.partition('/')[0]}/TASK"
    return BY_NAME.get(name) or next((metric for metric in OF_TASK if metric.name == family), None)


def values(metrics: tuple[Metric, ...], sums: Mapping[str, float], given: Mapping[str, float]) -> dict[str, float]:
    """Name -> value, in the order of `metrics`. sums: of all ranks, by field. given: metrics that are no such sum, by name.

    Raises KeyError for a metric that every step has and that neither gives, and for a name that is not declared.
    """
    row = {}
    for metric in metrics:
        if isinstance(metric.source, Sum | Max | Mean):
            row[metric.name] = metric.source(sums)
        elif metric.always or metric.name in given:
            row[metric.name] = given[metric.name]
    more = {name: given[name] for name in given if name not in row}
    if undeclared := [name for name in more if declared(name) not in OF_TASK]:
        raise KeyError(f"not declared as metrics: {', '.join(sorted(undeclared))}")
    return row | more


class PhaseTimer:
    """Seconds of the phases of a step; seconds: what phases have taken before. A phase inside another one is no part of the outer
    one's seconds."""

    def __init__(
        self, seconds: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds = dict(seconds or {})
        self._clock = clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """name: a key of PHASES. Nothing is recorded of a phase that raises."""
        start, so_far = self._clock(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - so_far
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start - inside


def console_line(row: Mapping[str, float], steps: int) -> str:
    """The console line of a training step. steps: training.steps. What a row does not have is left out, and so is what is not a number: but
    for the gradient's norm, of which that is news. Of a step that computed nothing, since no state had a signal, there is no speed."""
    idle = SPEEDS if row.get("tokens_computed") == 0 else ()
    there = (
        name
        for name in CONSOLE
        if name in row and name not in idle and (name == "grad_norm" or not math.isnan(row[name]))
    )
    shown = (CONSOLE[name].format(row[name]) for name in there)
    return f"step {row['step']:.0f}/{steps}" + "".join(shown)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl in order, NaN where a value is null; a last line cut off by a crash is left out."""
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict):
            row = {name: math.nan if value is None else value for name, value in row.items()}
        rows.append(row)
    return rows


NOTHING_LEARNED = (
    "Read some actions (swirl-fast show): where only some states are so, filter.states=variance leaves them out and training.refill=true "
    "draws others in their place; a model that never or always succeeds needs other data, a warm-up with algorithm.name=sft, or a larger "
    "training.group_size"
)


def without_gradient(rows: Sequence[Mapping[str, float]]) -> str:
    """What to say of a training of which more than half of the steps, rows of metrics.jsonl, had no state where rewards differed. Empty
    for any other."""
    empty = [row for row in rows if 0 < row.get("states", 0) <= row.get("states_without_signal", 0)]
    if 2 * len(empty) <= len(rows):
        return ""
    some = len(rows) - len(empty)
    steps = (
        f"only {some} of {len(rows)} steps had a gradient from rewards: in the others"
        if some
        else "no step had a gradient from rewards:"
    )
    rewards = [row["reward"] for row in empty if not math.isnan(row.get("reward", math.nan))]
    mean = f" ({sum(rewards) / len(rewards):.2f} on average)" if rewards else ""
    return f"{steps} all actions of a state had the same reward{mean}. {NOTHING_LEARNED}"


def glossary() -> str:
    """docs/metrics.md."""
    head = [
        "# Metrics of a training step",
        "",
        "Generated by `python -m swirl_fast.metrics > docs/metrics.md`; do not edit by hand.",
        "",
        "A row of `runs/NAME/metrics.jsonl` has these numbers, and TensorBoard and Weights & Biases show the same ones.",
        "A share is a number from 0 to 1. Over ranks: `x / y` is the sum of x over all ranks, divided by that of y. Where there is",
        "nothing to average a value is null in the file and a gap in the curves.",
        "",
        "| metric | unit | over ranks | meaning |",
        "|---|---|---|---|",
    ]
    rows = [
        f"| `{m.name}` | {m.unit} | {_over_ranks(m.source)} | {m.meaning}{'' if m.always else ' (not in every row)'} |"
        for m in (*METRICS, *OF_TASK)
    ]
    return "\n".join([*head, *rows, ""])


def _over_ranks(source: Sum | Max | Mean | Same | FirstRank | Computed) -> str:
    match source:
        case Max():
            return "largest"
        case Sum():
            return "sum"
        case Mean():
            return f"{_words(source.of)} / {_words(source.per)}"
        case Same():
            return "the same on all"
        case FirstRank():
            return "that of rank 0"
        case Computed():
            return source.formula


def _words(name: str) -> str:
    return name.replace("_", " ")


if __name__ == "__main__":
    print(glossary(), end="")
