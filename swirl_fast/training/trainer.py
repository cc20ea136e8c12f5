"""Step-wise RL (arXiv 2504.04736, section 3.3): at the states of kept trajectories the current policy draws fresh actions, a process
judge scores each, and a policy gradient learns from them.

One step on every rank: next trajectories -> sample -> judge (sampler.py, beside the training when training.lag=1) -> advantages ->
combs -> loss and backward a micro-batch -> clip, optimizer -> weights to the engine. Started alone or by `torchrun`, with the same
result in float32; in bfloat16 one process alone casts weights in every matrix product (autocast), FSDP gathers all parameters in
bfloat16, norms and embeddings too.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swirl_fast.comb.micro_batches import balance, micro_batches
from swirl_fast.comb.tree import Comb, SampledState, Trunk, pack
from swirl_fast.config import Config, ConfigError
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines.engine import Engine
from swirl_fast.exits import Resumable
from swirl_fast.files import describe_changes
from swirl_fast.judges.judge import Judge
from swirl_fast.models.load import DTYPES
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.objective import (
    Actions,
    LossSums,
    advantages,
    counts,
    policy_loss,
    trajectory_advantages,
    weights,
)
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.at_states import SampledAction, to_actions, to_trunks
from swirl_fast.rollouts.gaming import gaming_metrics
from swirl_fast.rollouts.pipeline import RolloutPipeline, SampledBatch
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.training import weight_sync
from swirl_fast.training.checkpoint import Checkpoints
from swirl_fast.training.fsdp import set_gradient_sync
from swirl_fast.training.guards import Guards
from swirl_fast.training.interrupt import Interrupts
from swirl_fast.training.metrics_log import MetricsLog
from swirl_fast.training.resume import completed
from swirl_fast.training.step_metrics import StepSums
from swirl_fast.training.utilization import peak_flops, peak_memory, utilization
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict
from swirl_kernels import PolicyLossMetrics

Metrics = dict[str, float]


@dataclass(frozen=True)
class RankActions:
    """What the ranks tell each other of a rank's sampled actions, so that any of them can train on any. Arrays are float32.

    branches: the actions that are trained on; they are numbered from 0 on every rank. rollout_logp: of each action's tokens.
    """

    branches: list[Trunk]
    advantage_A: np.ndarray
    weight_A: np.ndarray
    rollout_logp: list[np.ndarray]


@dataclass
class MicroBatch:
    """A packed comb and, for its N predicted tokens, what the loss needs; float32 [N] on the policy's device. offsets_A: int64 [A + 1],
    where its actions begin and end."""

    row: DeviceComb
    advantage_N: Tensor
    weight_N: Tensor
    rollout_logp_N: Tensor
    offsets_A: Tensor
    ref_logp_N: Tensor | None = None
    old_logp_N: Tensor | None = None


class Trainer:
    """All collaborators are handed in; `train` runs to `training.steps` from wherever the newest checkpoint stands.

    engine: None for algorithm.name=sft. outcomes: for algorithm.reward=outcome.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        policy: Policy,
        reference: Policy | None,
        engine: Engine | None,
        judge: Judge,
        renderer: Renderer,
        tools: tuple[str, ...],
        stream: TrajectoryStream,
        settings: dict[str, Any],
        outcomes: WholeRollouts | None = None,
    ) -> None:
        self.settings = settings  # a checkpoint of other settings is refused
        self.config, self.ranks = config, ranks
        self.policy, self.reference, self.engine, self.judge = policy, reference, engine, judge
        self.stream = stream
        self.sampler = RolloutPipeline(config, ranks, engine, judge, renderer, tools, stream, outcomes)
        training = config.training
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=training.learning_rate,
            betas=(training.betas[0], training.betas[1]),
            weight_decay=training.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.max_context = (
            engine.max_context if engine else int(policy.model.config.get_text_config().max_position_embeddings)
        )
        self.size = model_size(policy.model)
        self.peak = peak_flops(training.peak_tflops, ranks.device, DTYPES[config.model.dtype])
        self.step = 0  # batches done; also the policy version
        self.checkpoints = config.folder / "checkpoints"
        self.guards = Guards(ranks, training.max_skipped_steps, training.kl_warning, self.checkpoints)

    def train(self, accepted: Callable[[], object] = lambda: None) -> None:
        """accepted: called on rank 0 when no checkpoint speaks against the settings.

        Raises interrupt.Resumable, with a checkpoint on disk, when a signal or the time limit stops it before `training.steps`."""
        training, folder = self.config.training, self.config.folder
        with (
            contextlib.closing(self.sampler),
            Interrupts(self.ranks, training.time_limit) as interrupts,
            Checkpoints(
                self.checkpoints, self.ranks, training.keep_checkpoints, training.keep_best, training.async_checkpoints
            ) as checkpoints,
        ):
            restored = checkpoints.load_latest(self.policy, self.optimizer, self._check_restored)
            if self.ranks.main:
                accepted()
            if restored is not None:
                self.step = restored["step"]
                self.stream.load_state_dict(restored["stream"])
                self.guards.load_state_dict(restored.get("guards", {}))
            self._sync_weights()
            begun, due = self.step, False
            with MetricsLog(folder, self.step, self.ranks.main, training, self.settings) as log:
                while self.step < training.steps:
                    if reason := interrupts.reason(reserve=checkpoints.seconds):
                        if self.step > max(checkpoints.step, 0):
                            checkpoints.save(self.step, self.policy, self.optimizer, self.state(), scheduled=False)
                        checkpoints.wait()
                        raise Resumable(
                            f"{reason}: stopped at step {self.step} of {training.steps}, start it again to go on"
                        )
                    start = time.monotonic()
                    try:
                        metrics = self.train_step()
                    except ConfigError as error:
                        if self.step == begun:
                            raise
                        # of a judge's server that now refuses, say: the settings were right when the training began
                        raise RuntimeError(f"training step {self.step + 1}: {error}") from error
                    log.write(metrics)
                    if not self.guards.skipped:
                        checkpoints.measure(metrics)
                    due = due or self.step % training.checkpoint_every == 0
                    # In a row of skipped steps the last good checkpoints must not be crowded out.
                    if (due and not self.guards.counts.in_a_row) or self.step == training.steps:
                        checkpoints.save(self.step, self.policy, self.optimizer, self.state())
                        due = False
                    interrupts.measure(time.monotonic() - start)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors; JSON-able, equal on all ranks."""
        return {
            "step": self.step,
            "stream": self.sampler.state_dict(),
            "guards": self.guards.state_dict(),
            "settings": self.settings,
        }

    def _check_restored(self, state: dict[str, Any]) -> None:
        steps = self.config.training.steps
        if (recorded := completed(state["settings"], self.settings)) != self.settings:
            raise ConfigError(
                f"{self.checkpoints} was trained with other settings: {describe_changes(recorded, self.settings)}. "
                "Go back to them, or use another run.name"
            )
        if state["step"] > steps:
            raise ConfigError(
                f"training.steps={steps}: {self.checkpoints} stands at step {state['step']} already; ask for at least "
                "as many, or use another run.name"
            )

    def train_step(self) -> Metrics:
        """One batch of sampled actions and `updates_per_batch` optimizer steps on it. Returns the step's metrics, equal on all ranks."""
        start = time.perf_counter()
        config = self.config
        batch = self.sampler.take()
        sampled, judgements, totals = batch.sampled, batch.judgements, batch.totals
        if config.training.lag and config.training.on_policy_batches <= self.step < config.training.steps - 1:
            self.sampler.begin_next()
        with totals.phase("gather"):  # here ranks wait for those that sampled and judged longer
            self.guards.begin()
            answered = self._answered(sampled, judgements)
        with totals.phase("pack"):
            actions = to_actions(sampled, judgements)
            if batch.questions is None:
                advantage_A, valid_A = advantages(actions, config.algorithm.name)
            else:
                advantage_A, valid_A = trajectory_advantages(
                    actions, torch.tensor(batch.questions), config.algorithm.name
                )
            with totals.phase("gather"):
                global_counts = self.ranks.sum(counts(actions, valid_A))
            weight_A = weights(actions, valid_A, config.algorithm.weighting, global_counts)
            batches = self._pack(batch.trajectories, sampled, advantage_A, weight_A, totals) if answered else []
        self._count_rewards(actions, batch.questions is not None, totals)
        totals.actions = len(sampled)
        totals.surprisal = -sum(sum(one.completion.logprobs) for one in sampled)
        totals.malformed = sum(one.action.kind == "malformed" for one in sampled)
        self._observe(batch, totals)

        with totals.phase("old_logprobs"), torch.no_grad():
            for micro in batches:
                if self.reference is not None:
                    micro.ref_logp_N = self.reference(micro.row)
                if config.algorithm.updates_per_batch > 1:
                    micro.old_logp_N = self.policy(micro.row)
            self.ranks.wait()
        grad_norm = 0.0
        for update in range(config.algorithm.updates_per_batch):
            if self.guards.skipped:
                break
            grad_norm = self._update(batches, totals, first=update == 0)
        self.step += 1
        with totals.phase("wait_for_rollout"):
            hidden = self.sampler.wait()  # a batch is sampled with one set of weights
        with totals.phase("weight_sync"):
            self._sync_weights()
        metrics = self._metrics(totals, grad_norm, hidden, time.perf_counter() - start)
        return metrics | self.guards.end(self.step, metrics["kl"])

    def _count_rewards(self, actions: Actions, of_trajectories: bool, totals: StepSums) -> None:
        totals.known = float(actions.known.sum())
        totals.states = len(actions.states[actions.known].unique())
        if self.engine is None:  # imitated: nothing was rewarded
            return
        if of_trajectories:
            for one in actions.trajectories.unique():
                totals.rewards += float(actions.rewards[actions.trajectories == one][0])
                totals.rewarded += 1
            return
        totals.rewards, totals.rewarded = float(actions.rewards[actions.known].sum()), totals.known
        for one in actions.states[actions.known].unique():
            totals.process_label += float(actions.rewards[actions.known & (actions.states == one)].mean())
            totals.judged_states += 1

    def _sync_weights(self) -> None:
        if self.engine is not None:
            weight_sync.sync(self.policy, self.engine, self.step, self.ranks)

    def _observe(self, batch: SampledBatch, totals: StepSums) -> None:
        for one, judgement in zip(batch.sampled, batch.judgements, strict=True):
            earlier = [step.action for step in batch.trajectories[one.trajectory].steps[: len(one.view.history)]]
            totals.observe(one.view.action_text, one.action, len(one.completion.tokens), judgement.verdict, earlier)

    def _answered(self, sampled: Sequence[SampledAction], judgements: Sequence[Judgement]) -> bool:
        asked = [j for s, j in zip(sampled, judgements, strict=True) if s.action.kind != "malformed"]
        known = sum(judgement.verdict is not Verdict.UNKNOWN for judgement in asked)
        reason = asked[0].reason if asked else ""
        return self.guards.answered(self.step + 1, len(asked), known, len(sampled) - len(asked), self.judge.id, reason)

    def _pack(
        self,
        trajectories: list[Trajectory],
        sampled: list[SampledAction],
        advantage_A: Tensor,
        weight_A: Tensor,
        totals: StepSums,
    ) -> list[MicroBatch]:
        """This rank's micro-batches: the ranks put their actions together, cut the same micro-batches from them and deal these out by
        estimated work. All ranks get as many as the busiest one: FSDP's collectives must match, so others run empty ones."""
        device = self.ranks.device
        training = self.config.training
        # without a KL term an action whose advantage is 0 has loss and gradient 0: it need not be computed
        used_A = (weight_A != 0) & ((advantage_A != 0) | (self.config.algorithm.kl_coef > 0))
        mine = RankActions(
            to_trunks(trajectories, sampled, used_A.tolist()),
            advantage_A.numpy(),
            weight_A.numpy(),
            [np.asarray(one.completion.logprobs, np.float32) for one in sampled],
        )
        with totals.phase("gather"):
            shares = self.ranks.gather(mine)
        offsets = np.cumsum([0, *(len(share.weight_A) for share in shares)])
        branches = [
            branch.renumbered(int(offset)) if offset else branch
            for share, offset in zip(shares, offsets, strict=False)
            for branch in share.branches
        ]
        all_advantage_A = np.concatenate([share.advantage_A for share in shares])
        all_weight_A = np.concatenate([share.weight_A for share in shares])
        rollout_logp = [logp for share in shares for logp in share.rollout_logp]
        max_path = training.max_path_tokens or self.max_context
        groups = micro_batches(branches, training.token_budget, max_path, self.ranks.size, self.size)
        windows = dict.fromkeys(window for _, window in self.size.attention)
        jobs = balance([group.flops for group in groups], self.ranks.size)
        batches = []
        for job in jobs[self.ranks.rank]:
            comb = pack(groups[job].branches)
            numbers_N = np.repeat(comb.indices_A, np.diff(comb.offsets))
            logp_N = np.concatenate([rollout_logp[a] for a in comb.indices_A])
            batches.append(
                MicroBatch(
                    DeviceComb.of(comb, device, windows, training.flash_attention),
                    torch.from_numpy(all_advantage_A[numbers_N]).to(device),
                    torch.from_numpy(all_weight_A[numbers_N]).to(device),
                    torch.from_numpy(logp_N).to(device),
                    torch.from_numpy(comb.offsets.astype(np.int64)).to(device),
                )
            )
            totals.computed_tokens += comb.computed_tokens
            totals.effective_tokens += comb.effective_tokens
            totals.flops += comb.flops(self.size)
        for _ in range(max(map(len, jobs)) - len(batches)):
            zero = torch.zeros(1, device=device)
            row = DeviceComb.of(_empty_comb(), device, windows, training.flash_attention)
            batches.append(MicroBatch(row, zero, zero, zero, torch.tensor([0, 1], device=device)))
        return batches

    def _update(self, batches: list[MicroBatch], totals: StepSums, first: bool) -> float:
        """Forward and backward over the micro-batches, one optimizer step. Returns the global gradient norm before clipping."""
        training = self.config.training
        totals.updates += 1
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with totals.phase("forward_backward"):
            metrics: list[PolicyLossMetrics] = []
            losses: list[Tensor] = []
            shown: list[Tensor] = []  # of each micro-batch: its loss, the sum and the largest of the gaps
            for i, batch in enumerate(batches):
                if self.ranks.distributed:
                    set_gradient_sync(self.policy, i == len(batches) - 1, training.shard_accumulated_gradients)
                logp_N = self.policy(batch.row)
                old_N = logp_N.detach() if batch.old_logp_N is None else batch.old_logp_N
                loss, part = policy_loss(
                    logp_N,
                    old_N,
                    batch.advantage_N,
                    batch.weight_N,
                    self.config.algorithm,
                    batch.ref_logp_N,
                    batch.rollout_logp_N,
                    batch.offsets_A,
                )
                (loss * self.ranks.size).backward()  # FSDP averages gradients over ranks; the loss is a global sum
                metrics.append(part)
                seen_N = torch.where(batch.weight_N != 0, logp_N.detach(), 0.0)
                # An importance weight of 0 would hide a log-prob of minus infinity from the loss.
                losses.append(torch.where(seen_N.isfinite().all(), loss.detach(), math.nan))
                if first:
                    # A log-prob that the policy has no number for skips the step, and is no fault of the engine's.
                    counted_N = (batch.weight_N != 0) & seen_N.isfinite()
                    gap_N = torch.where(counted_N, (seen_N - batch.rollout_logp_N).abs(), 0.0)
                    gap_max = gap_N.max() if len(gap_N) else gap_N.sum()
                    nll = -seen_N.sum()
                    shown.append(torch.stack([loss.detach(), gap_N.sum(), gap_max, nll]).double())
            # Read here and not in the loop: the host would wait for the device after every micro-batch.
            if metrics:
                totals.add(LossSums.of(functools.reduce(operator.add, metrics)), first)
            for loss_here, gap_sum, gap_top, nll_sum in torch.stack(shown).tolist() if shown else ():
                totals.loss += loss_here
                totals.nll += nll_sum
                totals.gap += gap_sum
                totals.gap_max = max(totals.gap_max, gap_top)
            if first and self.engine is not None and not self.sampler.lagged:
                self._check_gap(totals)
        with totals.phase("optimizer"):
            norm = (
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), training.clip_grad_norm)
                if batches
                else torch.zeros(())
            )
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            grad_norm = float(norm)
            if batches and self.guards.finite(self.step + 1, float(torch.stack(losses).sum()), grad_norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ranks.wait()
        return grad_norm

    def _check_gap(self, totals: StepSums) -> None:
        """Raises ValueError on every rank, before the weights change, when the engine's log-probs are not those of the policy: it
        would learn from actions of another model."""
        limit = self.config.training.max_engine_gap
        gap, tokens = self.ranks.sum(torch.tensor([totals.gap, totals.tokens], dtype=torch.float64)).tolist()
        if limit and not gap <= limit * tokens:
            raise ValueError(
                f"training step {self.step + 1}: the rollout engine's log-probs differ from the trainer's by {gap / max(tokens, 1):.3g} "
                f"a token (training.max_engine_gap={limit:g}). Look for another model or dtype on the servers, or lossy settings "
                "such as a quantized cache; raise the limit if you know the reason, and then set algorithm.importance_cap=2. The "
                f"newest checkpoint in {self.checkpoints} is intact"
            )

    def _metrics(self, totals: StepSums, grad_norm: float, hidden: float, seconds: float) -> Metrics:
        names = [name for name in vars(totals) if name != "seconds" and not name.endswith("_max")]
        summed = self.ranks.sum(torch.tensor([float(getattr(totals, name)) for name in names], dtype=torch.float64))
        s = dict(zip(names, summed.tolist(), strict=True))
        busy = totals.seconds.get("forward_backward", 0.0)
        peaks = [totals.gap_max, totals.ratio_max, totals.flops, seconds, busy, peak_memory(self.ranks.device)]
        top = self.ranks.max(torch.tensor(peaks, dtype=torch.float64))
        gap_max, ratio_max, flops_max, seconds, busy, memory = top.tolist()
        tokens = max(s["tokens"], 1.0)
        work = s["flops"] * totals.updates
        imbalance = (
            flops_max * self.ranks.size / s["flops"] if s["flops"] else 1.0
        )  # estimated work: the busiest rank's over the mean
        return {
            "step": self.step,
            "policy_version": self.step,
            "reward": s["rewards"] / s["rewarded"] if s["rewarded"] else math.nan,
            "process_label": s["process_label"] / s["judged_states"] if s["judged_states"] else math.nan,
            "unknown": s["actions"] - s["known"],
            "malformed": s["malformed"] / max(s["actions"], 1.0),
            **gaming_metrics(s),
            "loss": s["loss"],
            "nll": s["nll"] / tokens,
            "kl": s["kl"] / tokens,
            "entropy": s["surprisal"] / max(s["generated_tokens"], 1.0) if self.engine is not None else math.nan,
            "clip_fraction": s["clipped"] / max(s["clip_tokens"], 1.0),
            "ratio_max": ratio_max,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "engine_gap_mean": s["gap"] / tokens,
            "engine_gap_max": gap_max,
            "importance_truncated": s["truncated"] / tokens,
            "skipped_samples": self.stream.skipped_samples,
            "states": s["states"],
            "actions": s["actions"],
            "action_tokens": s["generated_tokens"],
            "tokens_computed": s["computed_tokens"],
            "tokens_effective": s["effective_tokens"],
            "tokens_computed_per_second": s["computed_tokens"] / seconds,
            "tokens_effective_per_second": s["effective_tokens"] / seconds,
            "tokens_computed_per_second_per_rank": s["computed_tokens"] / seconds / self.ranks.size,
            "tokens_effective_per_second_per_rank": s["effective_tokens"] / seconds / self.ranks.size,
            "rank_imbalance": imbalance,
            "tflops": work / busy / 1e12 if busy else 0.0,
            **utilization(work, busy, seconds, self.peak, self.ranks.size),
            "memory_gib": memory,
            "cache_hit_rate": s["cached_tokens"] / max(s["prompt_tokens"], 1.0),
            "judge_cache_hit_rate": s["judge_cached_tokens"] / max(s["judge_prompt_tokens"], 1.0),
            "cache_hit_rate_of_possible": s["cached_tokens"] / max(s["cacheable_tokens"], 1.0),
            "seconds": seconds,
            "seconds_hidden": hidden,
            **{f"seconds_{name}": value for name, value in totals.seconds.items()},
        }


def learning_rate(config: Config, step: int) -> float:
    """Of batch `step` (0-based): linear warm-up over `warmup_steps`, then constant, or a cosine down to 0 at `steps`."""
    training = config.training
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _empty_comb() -> Comb:
    """One state, one token, to be used with weight 0."""
    one = np.zeros(1, np.int32)
    return pack([Trunk(one, (SampledState(1, (one,), (0,)),))])
