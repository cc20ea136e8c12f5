"""One optimizer step of TRL's GRPOTrainer and of the comb on the same states, sampled actions, rewards, weights and loss.

    python -m benchmarks.against_trl --quick --out FILE                                       a tiny model, K = 2
    python -m benchmarks.against_trl --out benchmarks/results/DATE-against-trl.json           SmolLM2-135M's shape, K = 3 and 5, G = 8

A trajectory of K states, G actions at each, is K x G rows to TRL: a prompt (the state) and a completion (the action) each. They reach
GRPOTrainer by its public arguments alone: `rollout_func` hands it the recorded rows, `reward_funcs` their rewards; batches, padding,
advantages, forward, loss, backward and AdamW are its own (loss_type="cispo", whose value depends on the policy in a first update;
scale_rewards="none", beta=0, no clipping of gradients, the G rows of a state's worth a micro-batch). The comb computes the
same loss by swirl_kernels.trl_preset over swirl_fast.models.policy, with the same AdamW.

    trl                 with gradient_checkpointing=False, the faster of its two settings
    trl_checkpointing   as it comes: gradient_checkpointing=True
    comb                swirl-fast

A step is everything from the recorded rows to the new weights: laying out or padding too, drawing and judging not. Every way takes a
first step that is not timed, in which loss and gradients are compared, then `--repeats` timed ones; seconds are those of the middle
one, memory (MiB above weights and optimizer state) is the most of any. tokens_computed: rows through the layers, padding too.

summary: by K, how many times the seconds and the memory of the comb `trl` takes, and the largest relative differences between the two of
the loss and of a parameter's gradient (its norm over the gradient's).

Not compared: drawing actions, several devices, TRL's use of vLLM and of Liger's loss.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.environment import environment
from benchmarks.step_training.measure import PeakMemory
from benchmarks.step_training.ways import MODELS, SHAPES, Case, build, make_case
from swirl_fast.comb.micro_batches import micro_batches
from swirl_fast.comb.tree import pack
from swirl_fast.files import write_json
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_kernels import policy_loss, trl_preset

RATE = 1e-6
EPSILON_HIGH = 5.0  # cispo's bound of a ratio, as TRL's own documentation has it
WAYS = ("trl", "trl_checkpointing", "comb")


@dataclass
class Measured:
    """loss and gradients: of the first step. seconds: of each later one; memory_mib: the most of those, None where not known."""

    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    memory_mib: float | None = None
    tokens: int = 0

    def keep_gradients(self, model: PreTrainedModel) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def keep(self, seconds: float, mib: float | None) -> None:
        self.seconds.append(seconds)
        self.memory_mib = mib if mib is None or self.memory_mib is None else max(mib, self.memory_mib)


@dataclass(frozen=True)
class Settings:
    device: str
    bf16: bool
    token_budget: int
    repeats: int


def rewards_of(actions: int) -> np.ndarray:
    """[actions] float32, of both signs about their mean, the same on every call."""
    return np.random.default_rng(1).uniform(0, 1, actions).astype(np.float32)


class _Clock(TrainerCallback):
    """Between a step's begin and its end; the first is for comparing."""

    def __init__(self, found: Measured, device: str) -> None:
        self.found, self.device = found, device

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.memory = PeakMemory(self.device)
        self.started = _now(self.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found.keep_gradients(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = _now(self.device) - self.started
        if state.global_step > 1:
            self.found.keep(seconds, self.memory.mib())


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def by_trl(model: PreTrainedModel, case: Case, states: int, settings: Settings, checkpointing: bool) -> Measured:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = list(case.rows())
    samples = len(rows) // states
    rewards = rewards_of(len(rows))
    found = Measured()

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: Counter[str] = Counter()
        chosen = []
        for prompt in prompts:
            chosen.append(int(prompt) * samples + seen[prompt])
            seen[prompt] += 1
        return {
            "prompt_ids": [rows[i][0].tolist() for i in chosen],
            "completion_ids": [rows[i][1].tolist() for i in chosen],
            "logprobs": [[0.0] * len(rows[i][1]) for i in chosen],  # read with vLLM alone
            "reward": [float(rewards[i]) for i in chosen],
        }

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found.tokens += kwargs["input_ids"].numel()

    # Its ids go to the model as they are; a tokenizer only has to have a padding token and to turn ids into some text.
    vocab = {str(i): i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="0")), pad_token="0", eos_token="0"
    )
    counting = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=settings.device == "cpu",
                bf16=settings.bf16,
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                max_steps=1 + settings.repeats,
                per_device_train_batch_size=samples,
                gradient_accumulation_steps=states,
                num_generations=samples,
                max_completion_length=max(len(row[1]) for row in rows),
                loss_type="cispo",
                epsilon_high=EPSILON_HIGH,
                scale_rewards="none",
                beta=0.0,
                temperature=1.0,
                max_grad_norm=0.0,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                optim="adamw_torch",
                gradient_checkpointing=checkpointing,
            ),  # fmt: skip
            train_dataset=Dataset.from_list([{"prompt": str(k)} for k in range(states)]),
            processing_class=tokenizer,
            reward_funcs=lambda completions, reward, **_: reward,
            rollout_func=recorded,
            callbacks=[_Clock(found, settings.device)],
        )
        trainer.train()
    counting.remove()
    found.loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    found.tokens //= 1 + settings.repeats
    return found


def by_comb(model: PreTrainedModel, case: Case, states: int, settings: Settings) -> Measured:
    """The advantage of an action is its reward less the mean of its state's, as TRL's is."""
    rewards = rewards_of(sum(1 for _ in case.rows())).reshape(states, -1)
    advantages = torch.from_numpy((rewards - rewards.mean(1, keepdims=True)).flatten())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    found = Measured()
    for step in range(1 + settings.repeats):
        model.zero_grad(set_to_none=True)
        memory = PeakMemory(settings.device)
        started = _now(settings.device)
        found.tokens, loss = _comb_gradients(model, case, advantages, settings)
        if step == 0:
            found.loss = loss
            found.keep_gradients(model)
        optimizer.step()
        if step > 0:
            found.keep(_now(settings.device) - started, memory.mib())
    return found


def _comb_gradients(
    model: PreTrainedModel, case: Case, advantages: torch.Tensor, settings: Settings
) -> tuple[int, float]:
    """Leaves the gradient in the model; returns computed tokens and the loss."""
    preset = trl_preset("cispo", epsilon_high=EPSILON_HIGH)
    policy = Policy(model, autocast=torch.bfloat16 if settings.bf16 else None)
    combs = [pack(group.trunks) for group in micro_batches(list(case.branches), settings.token_budget)]
    totals = sum(preset.counts(torch.from_numpy(comb.offsets)) for comb in combs)
    loss_of_batch = torch.zeros((), device=settings.device)
    for comb in combs:
        offsets = torch.from_numpy(comb.offsets)
        weight = preset.weights(offsets, totals).float().to(settings.device)
        logp = policy(DeviceComb.of(comb, settings.device))
        advantage = advantages[torch.from_numpy(comb.indices_A).long()].to(settings.device)
        loss, _ = policy_loss(logp, logp.detach(), advantage, offsets.to(settings.device), preset.spec, weight=weight)
        loss.backward()
        loss_of_batch += loss.detach()
    return sum(comb.computed_tokens for comb in combs), float(loss_of_batch)


def measure(way: str, options: argparse.Namespace, states: int, case: Case, settings: Settings) -> Measured:
    """With weights of its own, the same for every way."""
    model, _ = build(options.model, options.layers, options.device)
    model.train()
    if way == "comb":
        return by_comb(model, case, states, settings)
    return by_trl(model, case, states, settings, way == "trl_checkpointing")


def differences(theirs: Measured, ours: Measured) -> dict[str, float]:
    assert theirs.gradients.keys() == ours.gradients.keys(), "one way reaches parameters that another does not"
    return {
        "loss_difference": abs(ours.loss - theirs.loss) / abs(theirs.loss),
        "gradient_difference": max(
            float((ours.gradients[name] - g).norm() / g.norm()) for name, g in theirs.gradients.items()
        ),
    }


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Each number by K."""
    cells = {row["steps"]: {r["way"]: r for r in results if r["steps"] == row["steps"]} for row in results}

    def ratio(cell: dict[str, dict[str, Any]], key: str) -> float | None:
        known = cell["trl"][key] is not None and cell["comb"][key]
        return cell["trl"][key] / cell["comb"][key] if known else None

    whole = {str(k): cell for k, cell in cells.items() if {"trl", "comb"} <= cell.keys()}
    return {
        "trl_over_comb_seconds": {k: ratio(cell, "seconds") for k, cell in whole.items()},
        "trl_over_comb_memory": {k: ratio(cell, "peak_memory_mib") for k, cell in whole.items()},
        **{
            key: {k: cell["comb"][key] for k, cell in whole.items()}
            for key in ("gradient_difference", "loss_difference")
        },
    }


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="--model tiny --shape math --steps 2 --samples 4 --repeats 1"
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers, its vocabulary in proportion")
    parser.add_argument("--shape", choices=SHAPES, default="search_qa", help="lengths of prompt, action and result")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5], help="values of K, 1 to 10")
    parser.add_argument("--samples", type=int, default=8, help="G, 2 to 16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--token-budget", type=int, default=8192, help="of a micro-batch of the comb")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after every measurement")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.shape, options.steps, options.samples, options.repeats = "tiny", "math", [2], 4, 1
    most_layers = MODELS[options.model].num_hidden_layers
    shape = SHAPES[options.shape]
    longest = shape.state(max(options.steps)) + shape.action
    for name, low, high in (
        ("steps", 1, 10), ("samples", 2, 16), ("repeats", 1, 100), ("layers", 1, most_layers),
        ("token_budget", longest, 10**9),
    ):  # fmt: skip
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                parser.error(f"--{name.replace('_', '-')} {value}: give {low} to {high}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    try:
        import trl  # noqa: F401
    except ImportError as error:
        parser.error(f"TRL cannot be imported ({error}); pip install 'swirl-kernels[trl]'")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    settings = Settings(options.device, options.dtype == "bfloat16", options.token_budget, options.repeats)
    model, called = build(options.model, options.layers, options.device)
    vocab = model.config.vocab_size
    about = {key: value for key, value in vars(options).items() if key != "out"}
    about |= {"model": called, "parameters": model.num_parameters(), "lengths": vars(SHAPES[options.shape])}
    about |= {"trl": version("trl"), "accelerate": version("accelerate"), "loss": "cispo"}
    del model
    print(
        f"{called}, {options.dtype}, {options.device}, TRL {about['trl']}, K = {options.steps}, G = {options.samples}"
    )
    results: list[dict[str, Any]] = []
    for states in options.steps:
        case = make_case(SHAPES[options.shape], states, options.samples, vocab)
        first: Measured | None = None
        for way in options.ways:
            found = measure(way, options, states, case, settings)
            first = first or found
            row = {
                "steps": states,
                "samples": options.samples,
                "way": way,
                "seconds": sorted(found.seconds)[(len(found.seconds) - 1) // 2],
                "seconds_of_each_repeat": found.seconds,
                "peak_memory_mib": found.memory_mib,
                "tokens_effective": case.effective_tokens,
                "tokens_computed": found.tokens,
                "loss": found.loss,
                **differences(first, found),
            }
            results.append(row)
            memory = "" if found.memory_mib is None else f"{found.memory_mib:>9,.0f} MiB"
            print(
                f"K={states} {way:<18}{row['seconds']:>9.2f} s{memory}{found.tokens:>10,} tokens  loss {found.loss:.6f}",
                flush=True,
            )
            write_json(
                options.out,
                {"environment": environment(), "settings": about, "summary": summarize(results), "results": results},
            )
    for key, by_states in summarize(results).items():
        print(f"{key:>24}  " + "  ".join(f"K={k}: {value:.3g}" for k, value in by_states.items() if value is not None))
    print(options.out)


if __name__ == "__main__":
    main()
