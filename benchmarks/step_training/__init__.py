"""What does one optimizer step cost when a trajectory's K states with G sampled actions each are padded, packed, or a comb?

    python -m benchmarks.step_training --quick --out benchmarks/results/DATE-step-training.json --plot docs/step_training.svg
    python -m benchmarks.step_training --quick --shards runs/NAME/shards --out FILE    the trajectories of a run, an agent's log for one

One step is: lay out the tokens, forward, backward, AdamW; micro-batches under one token budget for all ways, the gradient
accumulated. All ways get the same trajectory and actions (random tokens, nothing equal among the actions of a state), the same
random weights (put back before every step) and the same loss; that they agree is measured along the way. --quick is the SmolLM2-135M
shape cut to 2 layers with real lengths, sized for a few minutes on two CPU cores.

Read with care: `padded` keeps the logits of its positions for the backward and, in the few micro-batches that mix lengths, is handed
a mask by transformers; `packed` is without either, so that `comb_vs_packed` is the closest to what only sharing gives.

Not measured: drawing and judging the actions, the reference model, more than one device. Random tokens share less than real ones,
where actions of one state often begin alike. One trajectory a step, but for
--shards: at small K and G a GPU is not filled by any of the ways.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.step_training.measure import Comparison, Settings, compare_in_float32, forward_backward, measure_way
from benchmarks.step_training.plot import draw, require_matplotlib
from benchmarks.step_training.ways import MODELS, SHAPES, WAYS, Case, Shape, build, make_case, recorded_case
from swirl_fast.files import write_text


def fitted_steps(steps: Sequence[int]) -> list[int]:
    """The K that growth is read from: those of at least 2 where there are two such (one state has nothing earlier to share or to
    repeat), else all."""
    several = [k for k in steps if k >= 2]
    return several if len(set(several)) >= 2 else list(steps)


def growth_exponent(steps: Sequence[int], costs: Sequence[float]) -> float | None:
    """b of the least-squares line log(cost) = a + b log(K) over `fitted_steps`; None for fewer than two different K."""
    used = fitted_steps(steps)
    if len(set(used)) < 2:
        return None
    points = [(k, cost) for k, cost in zip(steps, costs, strict=True) if k in used]
    k, cost = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(k, cost, 1)[0])


def summarize(results: list[dict[str, Any]], equality: dict[str, Any] | None) -> dict[str, Any]:
    """The largest cell measured; the exponents over K at its G. None where a way was left out."""
    largest = max(results, key=lambda row: row["tokens_effective"])
    cell = {row["way"]: row for row in results if _key(row) == _key(largest)}
    comb = cell.get("comb", {})
    seconds = {way: row["seconds"] for way, row in cell.items()}

    def faster(way: str) -> float | None:
        return seconds[way] / seconds["comb"] if {"comb", way} <= seconds.keys() else None

    def exponent(way: str, cost: str) -> float | None:
        rows = [row for row in results if row["way"] == way and row["samples"] == largest["samples"]]
        return growth_exponent([row["steps"] for row in rows], [row[cost] for row in rows])

    differences = {
        key: equality[key] if equality else max((row[key] for row in cell.values() if key in row), default=None)
        for key in ("max_relative_gradient_difference", "loss_difference")
    }
    return {
        "steps": largest["steps"],
        "samples": largest["samples"],
        "token_ratio": largest["tokens_effective"] / comb["tokens_computed"] if comb else None,
        "comb_vs_padded": faster("padded"),
        "comb_vs_packed": faster("packed"),
        "pack_share": comb["seconds_pack"] / comb["seconds"] if comb else None,
        "exponent_fitted_to_steps": fitted_steps(sorted({row["steps"] for row in results})),
        **{f"exponent_{way}": exponent(way, "seconds") for way in WAYS},
        **{f"token_exponent_{way}": exponent(way, "tokens_computed") for way in WAYS},
        **differences,
    }


def _key(row: dict[str, Any]) -> tuple[int, int]:
    return row["steps"], row["samples"]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="2 layers and one repeat where --layers, --repeats are unset"
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers, its vocabulary in proportion")
    parser.add_argument("--shape", choices=SHAPES, default="search_qa", help="lengths of prompt, action and result")
    parser.add_argument(
        "--shards",
        type=Path,
        help="a folder of recorded trajectories, as filter writes it, in place of --shape and --steps",
    )
    parser.add_argument("--trajectories", type=int, default=8, help="of --shards, all in one step")
    parser.add_argument("--steps", default="1,2,3,5", help="values of K, 1 to 10")
    parser.add_argument("--samples", default="8", help="values of G, 1 to 16")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--repeats", type=int, help="steps timed at least, default 3; short ones up to 5 times")
    parser.add_argument(
        "--token-budget", type=int, default=8192, help="of a micro-batch; raise it to what memory allows"
    )
    parser.add_argument("--rows", type=int, default=8, help="most rows of a padded micro-batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after every measurement")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    options = parser.parse_args(arguments)
    for name, low, high in (("steps", 1, 10), ("samples", 1, 16)):
        text = getattr(options, name)
        try:
            values = sorted({int(part) for part in text.split(",")})
        except ValueError:
            parser.error(f"--{name} {text}: give whole numbers with commas between, such as 1,2,5")
        if values[0] < low or values[-1] > high:
            parser.error(f"--{name} {text}: every value must lie in [{low}, {high}]")
        setattr(options, name, values)
    chosen = options.ways.split(",")
    if strange := set(chosen) - set(WAYS):
        parser.error(f"--ways {options.ways}: {', '.join(sorted(strange))} is none of {', '.join(WAYS)}")
    options.ways = [way for way in WAYS if way in chosen]
    most_layers = MODELS[options.model].num_hidden_layers
    if options.layers is None:
        options.layers = 2 if options.quick else most_layers
    if not 1 <= options.layers <= most_layers:
        parser.error(f"--layers {options.layers}: {options.model} has {most_layers}; give 1 to {most_layers}")
    if options.repeats is None:
        options.repeats = 1 if options.quick else 3
    if options.repeats < 1 or options.rows < 1:
        parser.error(f"--repeats {options.repeats} --rows {options.rows}: both must be at least 1")
    shape = SHAPES[options.shape]
    longest = shape.state(options.steps[-1]) + shape.action
    if options.shards and (not options.shards.is_dir() or options.trajectories < 1):
        parser.error(
            f"--shards {options.shards} --trajectories {options.trajectories}: give a folder with shards, and 1 or more"
        )
    if options.token_budget < longest and not options.shards:
        parser.error(f"--token-budget {options.token_budget}: the longest row has {longest} tokens; give at least that")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    for path in filter(None, (options.out, options.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if options.plot and options.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot {options.plot}: the name must end in .svg or .png")
    if options.plot:
        try:
            require_matplotlib()
        except ImportError as error:
            parser.error(f"--plot {options.plot}: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    autocast = torch.bfloat16 if options.dtype == "bfloat16" else None
    settings = Settings(options.device, autocast, options.token_budget, options.rows)
    model, called = build(options.model, options.layers, options.device)
    vocab, shape = model.config.vocab_size, SHAPES[options.shape]
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {
            **{key: value for key, value in vars(options).items() if key not in ("out", "plot", "shards")},
            **({"shards": str(options.shards)} if options.shards else {}),
            "model": called,
            "parameters": model.num_parameters(),
            **({} if options.shards else {"lengths": vars(shape)}),
        },
    }
    print(f"{called}: {model.num_parameters():,} parameters, {options.dtype}, {options.device}")
    cases = _cases(options, vocab)
    if options.shards:
        of = next(iter(cases.values())).branches
        print(f"{options.shards}: {len(of)} trajectories, {sum(len(one.states) for one in of)} states (K)")
    else:
        print(f"{options.shape}: prompt {shape.prompt}, action {shape.action}, result {shape.result} tokens")
    print(f"{'K':>3}{'G':>4}{'effective':>12}" + "".join(f"{way:>12}" for way in options.ways) + "   tokens computed")
    work = 0
    for (k, g), case in cases.items():
        tokens = [
            sum(batch.tokens for batch in WAYS[way].batches(case, options.token_budget, options.rows, "cpu"))
            for way in options.ways
        ]
        work += sum(tokens) * options.repeats
        print(f"{k:>3}{g:>4}{case.effective_tokens:>12,}" + "".join(f"{n:>12,}" for n in tokens), flush=True)

    warm_up = make_case(Shape(prompt=64, action=16, result=48), 2, 2, vocab)
    for way in options.ways:
        forward_backward(model, way, warm_up, settings)
    equality = None
    if autocast is not None:
        k, g = next((cell for cell in cases if cell[0] >= 2), next(iter(cases)))
        equality = compare_in_float32(model, options.ways, cases[k, g], settings)
        result["equality"] = {"steps": k, "samples": g, "dtype": "float32", **equality}
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows: list[dict[str, Any]] = []
    with tqdm(total=work, unit="tok", unit_scale=True, disable=None) as bar:
        for (k, g), case in cases.items():
            comparison = Comparison()
            for way in options.ways:
                found = measure_way(model, initial, way, case, settings, options.repeats, comparison, bar)
                rows.append({"steps": k, "samples": g, "way": way, **found})
                result["summary"] = summarize(rows, equality)
                result["results"] = rows
                _write(options.out, result)
                first = next(row for row in rows if _key(row) == (k, g))
                memory = "" if found["peak_memory_mib"] is None else f"{found['peak_memory_mib']:>9,.0f} MiB"
                tqdm.write(
                    f"K={k} G={g} {way:<7}{found['tokens_effective']:>9,} effective {found['tokens_computed']:>9,} computed"
                    f"{found['seconds']:>9.3f} s{memory}, {first['seconds'] / found['seconds']:.2f} x as fast as {first['way']}"
                )
    for key, value in result["summary"].items():
        print(f"{key:>34} {f'{value:.4g}' if isinstance(value, float) else value}")
    print(options.out)
    if options.plot:
        draw(result, options.plot)
        print(options.plot)


def _cases(options: argparse.Namespace, vocab: int) -> dict[tuple[int, int], Case]:
    """(K, G) -> what is trained on."""
    if not options.shards:
        return {(k, g): make_case(SHAPES[options.shape], k, g, vocab) for k in options.steps for g in options.samples}
    found = {}
    for g in options.samples:
        case, states = recorded_case(options.shards, options.trajectories, g, vocab, options.token_budget)
        found[states, g] = case
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all, so that an interrupted run leaves what it measured."""
    write_text(path, json.dumps(result, indent=1) + "\n")
