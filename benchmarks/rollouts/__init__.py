"""What does the prefix cache save when G actions are sampled at each of K nested states of recorded trajectories?

    python -m benchmarks.rollouts --out benchmarks/results/DATE-rollouts-local.json      some minutes on two CPU cores
    python -m benchmarks.rollouts --quick --out FILE                                     a cut model, below a minute
    python -m benchmarks.rollouts --engine sglang --out FILE engine.launch.python=…      SGLang servers, which it starts

The same rows, K * G a trajectory, are generated in three ways, each of which begins with an empty cache:

    cached        as in training: one call, one request of n = G a state, the states in order
    naive_order   the cache is on, but every row is a request of its own, and the rows come shuffled: what a client sends
                  that does not know of the cache. The local engine sorts what one call brings, so here it gets the rows
                  in calls of max_sequences, one after the other (one call where all fit)
    uncached      the cache is off: every row's prompt is computed for itself

All rows generate equally many tokens (nothing stops them). Prompt tokens are counted as separate rows, G * length a state;
possible is what an ideal cache would not compute again (swirl_fast.prefixes.cacheable); a hit rate may pass 1 by a
little where rows wait for others, whose sampled tokens a later prompt begins with. A row's random numbers depend
only on its seed, and the first row of every state has the same seed in all ways, so that tokens, and with them log-probs,
can be compared: nothing is written when they differ.

Other work on the same cores distorts the ratio: two full runs on a shared machine found `cached` 6.3 and 18 times as fast
(the first with OMP_WAIT_POLICY=passive, so that threads do not spin). load_average in the result tells of it.

Read with care: the trajectories of one call share their instructions and worked examples, as they do in training. The time
of `uncached` is mostly prefill, and falls with the lengths of the states; sampled actions are shorter in easy tasks.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.rollouts.workload import make_task, nested_states
from swirl_fast.config import EMBEDDED_MODEL, ConfigError, EngineConfig, ModelConfig, load
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.models.load import DTYPES, load_model, local_folder
from swirl_fast.prefixes import cacheable
from swirl_fast.rendering import open_renderer
from swirl_fast.seeds import seed_of

WAYS = ("cached", "naive_order", "uncached")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # of a log-probability between two ways
QUICK = dict(trajectories=2, states=3, samples=4, new_tokens=8, layers=4, repeats=1)
FULL = dict(trajectories=1, states=5, samples=8, new_tokens=64, layers=None, repeats=2)

Row = tuple[int, int]  # number of the state over all trajectories, number of the sample


@dataclass(frozen=True)
class Measured:
    """An engine with its prefix cache, as used in training and as a client without care uses it, and one without. forget: empties
    the cache. burst: rows that `naive_order` has in one call (0: all). about: what to say of it in the settings."""

    cached: Engine
    naive: Engine
    uncached: Engine
    forget: Callable[[], None]
    burst: int
    about: dict[str, Any]


def local(options: argparse.Namespace) -> Measured:
    """Two engines in this process, each with its own copy of the model."""

    def build(prefix_cache: bool) -> LocalEngine:
        model = load_model(ModelConfig(path=options.model), options.dtype)
        whole = len(model.base_model.layers)
        if options.layers is not None:
            if not 1 <= options.layers <= whole:
                raise ValueError(f"--layers {options.layers}: the model has {whole}; give 1 to {whole}")
            model.base_model.layers = model.base_model.layers[: options.layers]
            model.config.num_hidden_layers = options.layers
        about.update(layers=len(model.base_model.layers), layers_of_the_model=whole, parameters=model.num_parameters())
        return LocalEngine(
            model,
            max_sequences=options.max_sequences,
            cache_tokens=options.cache_tokens,
            device=options.device,
            prefix_cache=prefix_cache,
        )

    about: dict[str, Any] = {}
    cached, uncached = build(True), build(False)
    # close leaves the engine usable
    return Measured(cached, cached, uncached, cached.close, options.max_sequences, about)


def sglang(options: argparse.Namespace) -> Measured:
    """Two servers, of which one has no radix cache. Greedy, since SGLang takes no seeds: equal tokens can be compared then."""
    if options.layers is not None and not options.quick:
        raise ValueError(f"--layers {options.layers}: a server loads the whole model")
    options.layers, options.temperature = None, 0.0
    settings = ["engine.kind=sglang", f"engine.dtype={options.dtype}", f"engine.max_sequences={options.max_sequences}"]
    config = load(None, [*settings, *options.overrides]).engine
    off = copy.deepcopy(config)
    off.launch.flags = [*config.launch.flags, "--disable-radix-cache"]
    off.launch.port += config.launch.servers
    off.warm_prefixes = False
    naive = replace(config, warm_prefixes=False)
    folder, logs = local_folder(ModelConfig(path=options.model)).absolute(), Path("runs/rollouts")
    cached = SGLangEngine(config, folder, logs / "cached")
    uncached = SGLangEngine(off, folder, logs / "uncached")
    about = {"overrides": options.overrides}
    same = SGLangEngine(naive, folder, logs / "cached", leader=False, urls=cached.urls, key=cached.key)
    return Measured(cached, same, uncached, cached.flush_cache, 0, about)


ENGINES: dict[str, Callable[[argparse.Namespace], Measured]] = {"local": local, "sglang": sglang}


def calls_of(way: str, states: Sequence[list[int]], options: argparse.Namespace, burst: int) -> list[list[Request]]:
    """The calls to `generate` of one way; `rows_of` says which rows they are."""
    sampling = Sampling(options.new_tokens, options.temperature)
    seeds = [seed_of(options.seed, "state", s) for s in range(len(states))]
    if way == "cached":
        return [[Request(states[s], sampling, n=options.samples, seed=seeds[s]) for s in range(len(states))]]
    rows = rows_of(way, len(states), options)
    requests = [Request(states[s], sampling, seed=seed_of(seeds[s], g) if g else seeds[s]) for s, g in rows]
    size = burst if way == "naive_order" and burst else len(requests)
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def rows_of(way: str, states: int, options: argparse.Namespace) -> list[Row]:
    """All rows in the order in which the way asks for them."""
    rows = list(itertools.product(range(states), range(options.samples)))
    if way == "naive_order":
        random.Random(options.seed).shuffle(rows)
    return rows


def measure(engine: Engine, calls: Sequence[Sequence[Request]]) -> tuple[dict[str, Any], list[Completion]]:
    """Counts and seconds of these calls, and their completions in order."""
    before = engine.stats()
    began, cpu_began = time.perf_counter(), time.process_time()
    completions = [c for call in calls for request in engine.generate(call) for c in request]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    after = engine.stats()

    def spent(name: str) -> Any:
        return getattr(after, name) - getattr(before, name)

    requests = [request for call in calls for request in call]
    # The engine counts a request's prompt once. Its samples share the context; each computes the last token for itself.
    siblings = sum(request.n - 1 for request in requests)
    measured = {
        "calls": len(calls),
        "requests": len(requests),
        "prompt_tokens": sum(request.n * len(request.tokens) for request in requests),
        "computed_prompt_tokens": spent("prompt_tokens") - spent("cached_tokens") + siblings,
        "generated_tokens": sum(len(completion.tokens) for completion in completions),
        "seconds": seconds,
        "seconds_cpu": cpu_seconds,  # of all threads of this process
        "load_average": os.getloadavg()[0],  # of the last minute; above the number of threads others ran beside
        "seconds_prefill": spent("prefill_seconds"),
        "seconds_decode": spent("decode_seconds"),
    }
    return measured, completions


def compare(found: dict[str, dict[Row, Completion]]) -> tuple[float, int]:
    """The largest difference of a log-probability between any two ways, and how many were compared: of each row the tokens
    before the first that differs."""
    largest, compared = 0.0, 0
    for one, other in itertools.combinations(found.values(), 2):
        for row, a in one.items():
            b = other[row]
            same = itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], zip(_pairs(a), _pairs(b), strict=True))
            differences = [abs(x[1] - y[1]) for x, y in same]
            compared += len(differences)
            largest = max([largest, *differences])
    return largest, compared


def _pairs(completion: Completion) -> list[tuple[int, float]]:
    return list(zip(completion.tokens.tolist(), completion.logprobs, strict=True))


def combine(repeats: Sequence[dict[str, Any]], possible: int) -> dict[str, Any]:
    """One way's repeats: medians, and what follows from them. possible: prompt tokens that need not be computed again."""
    way: dict[str, Any] = {}
    for name, value in repeats[0].items():
        median = statistics.median if isinstance(value, float) else statistics.median_low  # counts stay whole
        way[name] = median([repeat[name] for repeat in repeats])
    cached = way["prompt_tokens"] - way["computed_prompt_tokens"]
    seconds = [repeat["seconds"] for repeat in repeats]
    return {
        **way,
        "cached_prompt_tokens": cached,
        "cached_share": cached / way["prompt_tokens"],
        "hit_rate_of_possible": cached / possible if possible else None,
        "generated_tokens_per_second": way["generated_tokens"] / statistics.median(seconds),
        "seconds": statistics.median(seconds),
        "seconds_of_each_repeat": seconds,
    }


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    e = EngineConfig()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"where unset: {_shown(QUICK)}; else {_shown(FULL)}")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a Hugging Face folder or name")
    parser.add_argument("--data", type=Path, help="questions, GSM8K or HotPotQA in the official format; else generated")
    parser.add_argument("--trajectories", type=int)
    parser.add_argument("--states", type=int, help="K, nested states a trajectory")
    parser.add_argument("--samples", type=int, help="G, actions sampled at a state")
    parser.add_argument("--new-tokens", type=int, help="of every sampled action")
    parser.add_argument("--action", type=int, default=120, help="tokens of a recorded action at most")
    parser.add_argument("--result", type=int, default=600, help="tokens of a recorded result, about")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--layers", type=int, help="cut the model to so many")
    parser.add_argument("--dtype", choices=DTYPES, default=e.dtype)
    parser.add_argument("--max-sequences", type=int, default=e.max_sequences, help="rows decoded at a time")
    parser.add_argument("--cache-tokens", type=int, default=e.cache_tokens, help="kept between calls")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written at the end")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="sglang: settings such as engine.launch.python=…"
    )
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("trajectories", "states", "samples", "new_tokens", "action", "result", "max_sequences", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.temperature < 0 or options.cache_tokens < 0:
        parser.error(f"--temperature {options.temperature} --cache-tokens {options.cache_tokens}: both at least 0")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    return options


def _shown(defaults: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items() if value is not None)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement. Raises ConfigError or ValueError for options that cannot work, RuntimeError where the ways disagree."""
    where = environment()  # before anything else: the commit must be the code that ran
    task = make_task(options.data, options.trajectories, options.seed)
    renderer = open_renderer(ModelConfig(path=options.model))
    measured = ENGINES[options.engine](options)
    engines = {"cached": measured.cached, "naive_order": measured.naive, "uncached": measured.uncached}
    print("sampling the trajectories", file=sys.stderr, flush=True)
    trajectories = nested_states(
        measured.cached,
        renderer,
        task,
        trajectories=options.trajectories,
        states=options.states,
        action=options.action,
        result=options.result,
        room=options.new_tokens,
        seed=options.seed,
    )
    states = list(itertools.chain.from_iterable(trajectories))
    possible = cacheable([state for state in states for _ in range(options.samples)])
    for engine in (measured.cached, measured.uncached):  # warm-up
        engine.generate([Request(state, Sampling(2)) for state in states[:2]])
    repeats: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    largest, compared = 0.0, 0
    with tqdm(total=options.repeats * len(WAYS), unit="way", disable=None) as bar:
        for _ in range(options.repeats):
            found: dict[str, dict[Row, Completion]] = {}
            for way in WAYS:
                measured.forget()
                one, completions = measure(engines[way], calls_of(way, states, options, measured.burst))
                found[way] = dict(zip(rows_of(way, len(states), options), completions, strict=True))
                repeats[way].append(one)
                bar.update()
                tqdm.write(
                    f"{options.engine} {way:<12}{one['computed_prompt_tokens']:>9,} of {one['prompt_tokens']:,} prompt tokens "
                    f"computed, {one['generated_tokens']:,} generated, {one['seconds']:.2f} s",
                    file=sys.stderr,
                )
            difference, count = compare(found)
            largest, compared = max(largest, difference), compared + count
    if not compared or not largest < TOLERANCE[options.dtype]:
        raise RuntimeError(
            f"the ways differ by {largest:.2g} in log-probability over {compared} tokens that they have in common "
            f"({TOLERANCE[options.dtype]} is allowed, and there must be some): one of them is wrong; nothing was written"
        )
    for engine in (measured.naive, measured.cached, measured.uncached):
        engine.close()
    ways = {way: combine(repeats[way], possible) for way in WAYS}
    cached = ways["cached"]
    return {
        "environment": where,
        "settings": {
            **{name: value for name, value in vars(options).items() if name not in ("out", "data")},
            "data": options.data.name if options.data else None,
            "task": task.name,
            **measured.about,
            "tokens_of_each_state": [[len(state) for state in trajectory] for trajectory in trajectories],
            "possible_cached_tokens": possible,
        },
        "summary": {
            options.engine: {
                "hit_rate_of_possible": cached["hit_rate_of_possible"],
                "cached_vs_uncached": ways["uncached"]["seconds"] / cached["seconds"],
                "generated_tokens_per_second": cached["generated_tokens_per_second"],
            }
        },
        "largest_logprob_difference": largest,
        "compared_tokens": compared,
        "results": {options.engine: ways},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    try:
        result = run(options)
    except (ConfigError, ValueError, RuntimeError) as error:
        raise SystemExit(f"benchmarks.rollouts: {error}") from error
    partial = options.out.with_name(options.out.name + ".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.out)
    for way, row in result["results"][options.engine].items():
        print(
            f"{way:<12}{row['seconds']:>9.2f} s{row['generated_tokens_per_second']:>9.1f} generated tok/s"
            f"{row['cached_share']:>9.1%} of the prompt tokens cached"
        )
    for name, value in result["summary"][options.engine].items():
        print(f"{name:>28} {value:.4g}" if value is not None else f"{name:>28} -")
    print(f"{'largest_logprob_difference':>28} {result['largest_logprob_difference']:.2g}")
    print(options.out)
