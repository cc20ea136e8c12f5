"""Does PivotRL teach at held-out states, and what does it save to leave states without a signal?

    python -m benchmarks.pivotrl --quick --out FILE                                  a random model, two steps, one seed
    python -m benchmarks.pivotrl --out benchmarks/results/DATE-pivotrl.json          three seeds

An agent's logs are generated: questions of a price, two tools (price, times), three turns, calls as configs/chat_templates/hermes.jinja
writes them. The embedded model imitates logs with mistakes for some steps (algorithm.name=sft), so that it can do the task now and then.
From it, on logs without mistakes and with judge.kind=recorded_action, three ways learn with the same batches:

    all         every state
    refill      training.refill=true: further states take the place of those whose rewards are all equal
    variance    filter.states=variance before training, and refill

held_out: after so many steps and seconds of training the mean reward of fresh actions at held-out states, with intervals by conversation
(evaluate.states). seconds_to: seconds of training after which it was first at least TARGET; none where it never was. silent_steps: share of
the steps in which no state trained on had a signal, so that there was no gradient; silent_states: share of the states trained on without
one. Ways are compared within a seed: they run one after another, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.environment import environment
from swirl_fast import stages
from swirl_fast.config import EMBEDDED_MODEL, load
from swirl_fast.files import write_json
from swirl_fast.metrics import read_metrics

HERMES = Path(__file__).parents[1] / "configs" / "chat_templates" / "hermes.jinja"
ITEMS = "apples pears plums figs limes nuts eggs buns rolls teas pens caps".split()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "price",
            "description": "The price of one.",
            "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "times",
            "description": "Multiplies.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    },
]
WAYS = {
    "all": (),
    "refill": ("training.refill=true",),
    "variance": ("training.refill=true", "filter.states=variance", "filter.states_group=8"),
}
TARGET = 0.9


def logs(count: int, seed: int, mistakes: float) -> Iterator[dict[str, Any]]:
    """Conversations. mistakes: how often a turn has a number or an item of its own."""
    draw = random.Random(seed)
    for number in range(count):
        item, many, price = draw.choice(ITEMS), draw.randint(2, 9), draw.randint(2, 9)

        def slip(right: Any, others: Any) -> Any:
            return draw.choice(others) if draw.random() < mistakes else right

        calls = [
            ("price", {"item": slip(item, ITEMS)}, str(price)),
            ("times", {"a": slip(many, range(2, 10)), "b": slip(price, range(2, 10))}, str(many * price)),
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"What do {many} {item} cost?"}]
        for i, (name, arguments, result) in enumerate(calls):
            function = {"name": name, "arguments": json.dumps(arguments)}
            call = {"id": f"c{i}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{i}", "content": result})
        messages.append({"role": "assistant", "content": f"{slip(many * price, range(4, 82))}"})
        yield {"id": f"{seed}-{number}", "messages": messages, "tools": TOOLS}


def write_logs(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def random_model(folder: Path) -> Path:
    """A small one, with a tokenizer that was made for the logs. Returns its folder."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.dumps(row, ensure_ascii=False) for row in logs(400, 9, 0.0)] + [
        HERMES.read_text(encoding="utf-8")
    ] * 20
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = HERMES.read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(folder: Path, name: str, model: Path | str, log: Path, *more: str) -> list[str]:
    return [
        f"run.folder={folder}",
        f"run.name={name}",
        f"model.path={model}",
        f"model.chat_template={HERMES}",
        "actions.format=native",
        "actions.answer=message",
        "collect.source=conversations",
        f"collect.path={log}",
        "tasks.limit=0",
        "tasks.eval_limit=20",
        "judge.kind=recorded_action",
        "judge.recorded_action.threshold=1.0",
        "filter.kind=none",
        "algorithm.kl_coef=0",
        "training.token_budget=4096",
        "training.max_action_tokens=40",
        "training.tensorboard=false",
        "training.samples_mb=0",
        "training.checkpoint_every=1000",
        *more,
    ]


def warm_up(folder: Path, model: Path | str, steps: int, count: int) -> Path:
    """The model after it has imitated logs with mistakes. Returns its folder."""
    write_logs(folder / "mistakes.jsonl", logs(count, 1, 0.3))
    config = load(
        None,
        settings(
            folder, "warm", model, folder / "mistakes.jsonl", "algorithm.name=sft", f"training.steps={steps}",
            "training.trajectories_per_step=8", "training.learning_rate=5e-5",
        ),
    )  # fmt: skip
    for stage in (stages.collect, stages.judge, stages.filter, stages.train):
        stage(config)
    return config.folder / "model"


def measure(folder: Path, way: str, seed: int, steps: Sequence[int], model: Path, log: Path) -> dict[str, Any]:
    """steps: after which the held-out states are scored, ascending."""
    overrides = [
        *settings(folder, f"{way}-{seed}", model, log, *WAYS[way]), f"run.seed={seed}", "training.group_size=8",
        "training.trajectories_per_step=2", "training.learning_rate=1e-5", "algorithm.name=grpo", "evaluate.states=true",
        "evaluate.samples=4", "evaluate.temperature=1.0",
    ]  # fmt: skip
    config = load(None, overrides)
    for stage in (stages.collect, stages.judge, stages.filter):
        stage(config)
    held_out = [{"steps": 0, "seconds": 0.0, **_scores(stages.evaluate(config, "base"))}]
    for until in steps:
        stages.train(load(None, [*overrides, f"training.steps={until}"]))
        seconds = sum(entry["seconds"] for entry in read_metrics(config.folder))
        scores = _scores(stages.evaluate_trained(config, f"after-{until}"))
        held_out.append({"steps": until, "seconds": seconds, **scores})
    metrics = read_metrics(config.folder)
    states = sum(entry["states"] for entry in metrics)
    return {
        "way": way,
        "seed": seed,
        "held_out": held_out,
        "seconds_to": next((point["seconds"] for point in held_out if point["reward"] >= TARGET), None),
        "silent_steps": sum(entry["states_without_signal"] >= entry["states"] for entry in metrics) / len(metrics),
        "silent_states": sum(entry["states_without_signal"] for entry in metrics) / max(states, 1),
        "states_drawn": sum(entry["states_drawn"] for entry in metrics),
        "states": states,
        "seconds": [entry["seconds"] for entry in metrics],
        "rewards": [round(entry["reward"], 4) for entry in metrics],
    }


def _scores(summary: dict[str, Any]) -> dict[str, Any]:
    return {"reward": summary["process_label"], "interval": summary["process_label_interval"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 10, 15, 20], help="after which held-out states are scored"
    )
    parser.add_argument("--warm-up", type=int, default=10, help="steps of imitation")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.warm_up, options.ways = 1, [1, 2], 2, ["all", "refill"]
    count = 20 if options.quick else 200
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start: Path | str = random_model(folder / "random") if options.quick else EMBEDDED_MODEL
        model = warm_up(folder, start, options.warm_up, 2 * count)
        write_logs(folder / "right.jsonl", logs(count, 2, 0.0))
        rows = []
        for seed in range(options.seeds):
            for way in options.ways:
                rows.append(measure(folder, way, seed, options.steps, model, folder / "right.jsonl"))
                about = {"warm_up": options.warm_up, "steps": options.steps, "target": TARGET, "ways": WAYS}
                write_json(options.out, {"environment": environment(), "settings": about, "results": rows})
    print(f"{'way':10}{'seed':>5}{'held-out reward':>18}{'silent steps':>14}{'silent states':>15}{'seconds to':>12}")
    for row in rows:
        first, *_, last = (point["reward"] for point in row["held_out"])
        reached = "-" if row["seconds_to"] is None else f"{row['seconds_to']:.1f}"
        print(
            f"{row['way']:10}{row['seed']:>5}{first:>9.3f}{last:>9.3f}{row['silent_steps']:>14.2f}{row['silent_states']:>15.2f}"
            f"{reached:>12}"
        )


if __name__ == "__main__":
    main()
