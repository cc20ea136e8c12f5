"""Step-wise RL (arXiv 2504.04736, section 3.3): at the states of kept trajectories the current policy draws fresh actions, a process
judge scores each, and a policy gradient learns from them.

One step on every rank: next trajectories -> sample -> judge (rollouts/pipeline.py, beside the training when training.lag=1) -> advantages
-> combs (batch.py) -> loss and backward a micro-batch -> clip, optimizer -> weights to the engine. Started directly or by `torchrun`, with
the same result in float32; in bfloat16 one process without torchrun casts weights in every matrix product (autocast), FSDP gathers all
parameters in bfloat16, norms and embeddings too.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from swirl_fast.config import Config, ConfigError
from swirl_fast.engines.engine import SharedEngine
from swirl_fast.exits import Resumable
from swirl_fast.metrics import PhaseTimer
from swirl_fast.models.exact import context_of
from swirl_fast.models.load import DTYPES
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.objective import Actions, advantages, counts, imitation_advantages, trajectory_advantages, weights
from swirl_fast.ranks import Ranks, shared_store
from swirl_fast.rollouts.at_states import asked_about
from swirl_fast.rollouts.pipeline import RolloutPipeline, SampledBatch
from swirl_fast.training import weight_sync
from swirl_fast.training.backward import backward
from swirl_fast.training.batch import MicroBatch, Packer, to_actions
from swirl_fast.training.checkpoint import Checkpoints
from swirl_fast.training.guards import Guards
from swirl_fast.training.heartbeat import Heartbeat
from swirl_fast.training.interrupt import Interrupts
from swirl_fast.training.metrics_log import MetricsLog
from swirl_fast.training.resume import check_state
from swirl_fast.training.samples import SampleLog
from swirl_fast.training.schedule import learning_rate
from swirl_fast.training.step_metrics import StepSums, gaming_signs, over_ranks, rewards_by_task, step_metrics, trained
from swirl_fast.training.turns import Turns
from swirl_fast.training.utilization import peak_flops, peak_memory
from swirl_fast.verdict import Verdict

Metrics = dict[str, float]


class Trainer:
    """restore() goes to where the newest checkpoint is, run() from there to `training.steps`; train_step() is one step by itself.

    reference: None without a KL term. settings: what the result depends on; a checkpoint of other settings is refused. checked: metrics of
    the model's check, which every row repeats.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        policy: Policy,
        reference: Callable[[DeviceComb], Tensor] | None,
        rollouts: RolloutPipeline,
        settings: dict[str, Any],
        checked: Mapping[str, float] | None = None,
    ) -> None:
        self.config, self.ranks, self.settings = config, ranks, settings
        self.checked = dict(checked or {})
        self.policy, self.reference = policy, reference
        self.rollouts, self.engine = rollouts, rollouts.engine
        training = config.training
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=training.learning_rate,
            betas=(training.betas[0], training.betas[1]),
            weight_decay=training.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.turns: Turns | None = None
        if config.engine.share_gpu and self.engine is not None:
            whole = reference if isinstance(reference, Policy) else None  # not the policy without its adapters
            self.turns = Turns(cast(SharedEngine, self.engine), policy, whole, self.optimizer, ranks)
        if self.engine is not None:
            max_context = self.engine.max_context
        else:
            max_context = context_of(policy.model.config)
        self.packer = Packer(config, ranks, model_size(policy.model), max_context, policy.padded)
        self.peak = peak_flops(training.peak_tflops, ranks.device, DTYPES[config.model.dtype])
        self.step = 0  # batches done; also the policy version
        self.folder = config.folder / "checkpoints"
        self.guards = Guards(ranks, training.max_skipped_steps, training.kl_warning, self.folder)
        self.samples: SampleLog | None = None  # of run
        self.heartbeat = Heartbeat(ranks, training.step_timeout, shared_store())
        self._opened = contextlib.ExitStack()  # by restore, until run is done

    # ---- the whole training

    def restore(self) -> None:
        """Loads the newest checkpoint, if there is any. From here on, until `run` or `close`, the checkpoints are locked and signals ask
        for an orderly stop. Collective.

        Raises ConfigError, with nothing loaded, where a checkpoint was made with other settings or is beyond `training.steps`."""
        training = self.config.training
        with contextlib.ExitStack() as opened:
            self.interrupts = opened.enter_context(Interrupts(self.ranks, training.time_limit))
            self.checkpoints = opened.enter_context(
                Checkpoints(
                    self.folder, self.ranks, training.keep_checkpoints, training.keep_best, training.async_checkpoints
                )
            )
            state = self.checkpoints.load_latest(self.policy, self.optimizer, self._check_restored)
            if state is not None:
                self.step = state["step"]
                self.rollouts.load_state_dict(state["stream"])
                self.guards.load_state_dict(state["guards"])
            self._opened = opened.pop_all()

    def run(self) -> None:
        """Trains to `training.steps`, after `restore`. Collective.

        Raises Resumable, with a checkpoint on disk, when a signal or the time limit stops it before."""
        training, checkpoints = self.config.training, self.checkpoints
        with self._opened:
            self._sync_weights()
            begun, due = self.step, False
            self.samples = SampleLog(self.config.folder, self.step, self.ranks, training.samples_mb)
            with (
                MetricsLog(
                    self.config.folder, self.step, self.ranks.main, training, self.settings, lambda: self.heartbeat.last
                ) as log,
                self.heartbeat,
            ):
                while self.step < training.steps:
                    self._stop_if_asked()
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
                    self.heartbeat.mark("a step and its checkpoint")
                    self.interrupts.measure(time.monotonic() - start)
                if begun < self.step:
                    self._stop_if_asked(
                        last=True
                    )  # what comes after the training would take longer than who asked may wait

    def close(self) -> None:
        """Gives back what `restore` opened where `run` was not called."""
        self._opened.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors; JSON-able, equal on all ranks."""
        return {
            "step": self.step,
            "stream": self.rollouts.state_dict(),
            "guards": self.guards.state_dict(),
            "settings": self.settings,
        }

    def _check_restored(self, state: dict[str, Any]) -> None:
        check_state(self.folder, state, self.settings, self.config.training.steps)

    def _stop_if_asked(self, last: bool = False) -> None:
        """last: no step is left, for which a time limit would have to have room."""
        checkpoints = self.checkpoints
        if not (reason := self.interrupts.reason(reserve=-math.inf if last else checkpoints.seconds)):
            return
        if self.step > max(checkpoints.step, 0):
            checkpoints.save(self.step, self.policy, self.optimizer, self.state(), scheduled=False)
        checkpoints.wait()
        steps = self.config.training.steps
        raise Resumable(f"{reason}: stopped at step {self.step} of {steps}, start it again to go on")

    def _sync_weights(self) -> None:
        if self.engine is not None and self.turns is None:  # which syncs when sampling begins
            weight_sync.sync(self.policy, self.engine, self.step, self.ranks)

    # ---- one step

    def train_step(self) -> Metrics:
        """One batch of sampled actions and `updates_per_batch` optimizer steps on it. Returns the step's metrics, equal on all ranks but
        for seconds of phases."""
        start = time.perf_counter()
        training, algorithm = self.config.training, self.config.algorithm
        turn = PhaseTimer()
        if self.turns is not None:
            self.turns.sample(self.step, turn)
        batch = self.rollouts.take()
        if self.turns is not None:
            self.turns.train(turn)
        self.heartbeat.mark("sampling")
        timer, sums = PhaseTimer({**turn.seconds, **batch.counts.seconds}), StepSums()
        if training.lag and training.on_policy_batches <= self.step < training.steps - 1:
            self.rollouts.begin_next()
        micro_batches = self._pack(batch, sums, timer)
        self.heartbeat.mark("packing")
        signs = gaming_signs(batch, self.rollouts.form)

        with timer.phase("old_logprobs"), torch.no_grad():
            for micro in micro_batches:
                if self.reference is not None:
                    micro.ref_logp_N = self.reference(micro.row)
                if algorithm.updates_per_batch > 1:
                    micro.old_logp_N = self.policy(micro.row)
            self.ranks.wait()
        grad_norm, updates = 0.0, 0
        while updates < algorithm.updates_per_batch and not self.guards.skipped:
            grad_norm = self._update(micro_batches, sums, timer, first=updates == 0)
            self.heartbeat.mark("an update")
            updates += 1
        for micro in micro_batches:
            sums.add_work(micro.computed_tokens, micro.effective_tokens, micro.flops)
        self.step += 1
        with timer.phase("wait_for_rollout"):
            hidden = self.rollouts.wait()  # a batch is sampled with one set of weights
        if self.turns is None:
            with timer.phase("weight_sync"):
                self._sync_weights()
        self.heartbeat.mark("the weight sync")

        sums.seconds, sums.memory_gib = time.perf_counter() - start, peak_memory(self.ranks.device)
        sums.busy_seconds = timer.seconds.get("forward_backward", 0.0)
        together = over_ranks(self.ranks, sums, signs, batch.counts)
        self.guards.signal(self.step, together["states"], together["without_signal"])
        given = {
            "step": self.step,
            "policy_version": self.step,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(training, self.step - 1),
            "skipped_samples": self.rollouts.skipped_samples,
            "skipped_steps": self.guards.counts.skipped_steps,
            "unknown_steps": self.guards.counts.unknown_steps,
            "steps_without_signal": self.guards.counts.steps_without_signal / self.step,
            "seconds_hidden": hidden,
            **{f"seconds_{phase}": seconds for phase, seconds in timer.seconds.items()},
            **self.checked,
            **rewards_by_task(self.ranks, batch, self.rollouts.tasks),
        }
        metrics = step_metrics(together, given, updates, self.peak, self.ranks.size)
        self.guards.end(self.step, metrics["kl"])
        return metrics

    def _pack(self, batch: SampledBatch, sums: StepSums, timer: PhaseTimer) -> Sequence[MicroBatch]:
        """This rank's micro-batches of what all ranks sampled; none when there is nothing to learn from."""
        with timer.phase("gather"):  # here ranks wait for those that sampled and judged longer
            self.guards.begin()
            answered = self._answered(batch)
        with timer.phase("pack"):
            actions = to_actions(batch.sampled, batch.judgements)
            sums.add_batch(batch, actions)
            advantage_A, valid_A = self._advantages(batch, actions)
            if self.config.algorithm.name != "sft":
                sums.add_signal(batch, actions, advantage_A)
            valid_A = valid_A & trained(batch)
            if self.samples is not None:
                self.samples.write(self.step + 1, batch, advantage_A, valid_A)
            with timer.phase("gather"):
                global_counts = self.ranks.sum(counts(actions, valid_A))
            if not answered:
                return []
            weight_A = weights(actions, valid_A, self.config.algorithm.weighting, global_counts)
            mine = self.packer.rank_actions(batch.trajectories, batch.sampled, advantage_A, weight_A)
            with timer.phase("gather"):
                mine = self.packer.shared_out(mine)
            return self.packer.micro_batches(mine)

    def _advantages(self, batch: SampledBatch, actions: Actions) -> tuple[Tensor, Tensor]:
        if batch.judgements is None:
            return imitation_advantages(actions)
        if batch.questions is None:
            return advantages(actions, self.config.algorithm.name)
        return trajectory_advantages(actions, torch.tensor(batch.questions), self.config.algorithm.name)

    def _answered(self, batch: SampledBatch) -> bool:
        """Whether the judge gave verdicts to learn from; imitation asks none."""
        if batch.judgements is None:
            return True
        asked = asked_about(batch.sampled, batch.judgements)
        known = sum(judgement.verdict is not Verdict.UNKNOWN for judgement in asked)
        others, reason = len(batch.sampled) - len(asked), asked[0].reason if asked else ""
        return self.guards.answered(self.step + 1, len(asked), known, others, self.rollouts.judge_id, reason)

    def _update(self, batches: Sequence[MicroBatch], sums: StepSums, timer: PhaseTimer, first: bool) -> float:
        """Forward and backward over the micro-batches, one optimizer step. Returns the global gradient norm before clipping."""
        rate = learning_rate(self.config.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with timer.phase("forward_backward"):
            losses = backward(self.policy, batches, self.config, self.ranks, sums, first)
            if first and self.engine is not None and not self.rollouts.lagged:
                self._check_gap(sums)
        with timer.phase("optimizer"):
            norm = torch.zeros(())
            if batches:
                norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.training.clip_grad_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            grad_norm = float(norm)
            if batches and self.guards.finite(self.step + 1, float(torch.stack(losses).sum()), grad_norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.ranks.wait()
        return grad_norm

    def _check_gap(self, sums: StepSums) -> None:
        """Raises ValueError on every rank, before the weights change, when the engine's log-probs are not those of the policy: it
        would learn from actions of another model."""
        limit = self.config.training.max_engine_gap
        gap, tokens = self.ranks.sum(torch.tensor([sums.gap, sums.tokens], dtype=torch.float64)).tolist()
        if limit and not gap <= limit * tokens:
            raise ValueError(
                f"training step {self.step + 1}: the rollout engine's log-probs differ from the trainer's by {gap / max(tokens, 1):.3g} "
                f"a token (training.max_engine_gap={limit:g}). Look for another model or dtype on the servers, or lossy settings "
                "such as a quantized cache; raise the limit if you know the reason, and then set algorithm.importance_cap=2. The "
                f"newest checkpoint in {self.folder} is intact"
            )
