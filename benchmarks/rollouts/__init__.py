"""What does the prefix cache save when G actions are sampled at each of K nested states of recorded trajectories?

    python -m benchmarks.rollouts --out benchmarks/results/DATE-rollouts-local.json      some minutes on two CPU cores
    python -m benchmarks.rollouts --quick --out FILE                                     a cut model, below a minute
    python -m benchmarks.rollouts --engine sglang --out FILE engine.launch.python=…      SGLang servers, which it starts
    python -m benchmarks.rollouts --engine local,transformers,llamacpp --llama-python .venv-sglang/bin/python --out FILE
                                                                       engines of others (peers.py) for the same requests

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

Several engines are measured one after the other, with the states that the first one's model sampled; then all is greedy, and each says in
the result how its tokens and log-probs agree with the first one's. One that is not installed is named there (`absent`), and so is what one
does not do (`engines`).

Other work on the same cores distorts the ratio: two full runs on a shared machine found `cached` 6.3 and 18 times as fast
(the first with OMP_WAIT_POLICY=passive, so that threads do not spin). load_average in the result tells of it.

Read with care: the trajectories of one call share their instructions and worked examples, as they do in training. The time
of `uncached` is mostly prefill, and falls with the lengths of the states; sampled actions are shorter in easy tasks.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.environment import environment
from benchmarks.rollouts.peers import LACKS, Absent, LlamaCppEngine, TransformersEngine, float32_gguf, gguf_of
from benchmarks.rollouts.workload import make_task, nested_states
from swirl_fast.config import EMBEDDED_MODEL, ConfigError, EngineConfig, ModelConfig, load
from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.models.load import DTYPES, load_model, local_folder
from swirl_fast.prefixes import cacheable
from swirl_fast.rendering import Renderer, open_renderer
from swirl_fast.seeds import seed_of
from swirl_fast.tasks.task import Task

WAYS = ("cached", "naive_order", "uncached")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # of a log-probability between two ways
QUICK = dict(trajectories=2, states=3, samples=4, new_tokens=8, layers=4, repeats=1)
FULL = dict(trajectories=1, states=5, samples=8, new_tokens=64, layers=None, repeats=2)

Row = tuple[int, int]  # number of the state over all trajectories, number of the sample


@dataclass(frozen=True)
class Measured:
    """An engine with its prefix cache, as used in training and as a client without care uses it, and one without. forget: empties
    the cache. burst: rows that `naive_order` has in one call (0: all). about: what to say of it in the settings. version: of an engine of
    others. counts: whether it says how many tokens its cache spares."""

    cached: Engine
    naive: Engine
    uncached: Engine
    forget: Callable[[], None]
    burst: int
    about: dict[str, Any]
    version: str = ""
    counts: bool = True


def local(options: argparse.Namespace) -> Measured:
    """Two engines in this process, each with its own copy of the model."""

    def build(prefix_cache: bool) -> LocalEngine:
        return LocalEngine(
            _model(options, about),
            max_sequences=options.max_sequences,
            cache_tokens=options.cache_tokens,
            device=options.device,
            prefix_cache=prefix_cache,
        )

    about: dict[str, Any] = {}
    cached, uncached = build(True), build(False)
    # close leaves the engine usable
    return Measured(cached, cached, uncached, cached.close, options.max_sequences, about)


def _model(options: argparse.Namespace, about: dict[str, Any]) -> PreTrainedModel:
    model = load_model(ModelConfig(path=options.model), options.dtype)
    whole = len(model.base_model.layers)
    if options.layers is not None:
        if not 1 <= options.layers <= whole:
            raise ValueError(f"--layers {options.layers}: the model has {whole}; give 1 to {whole}")
        model.base_model.layers = model.base_model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    about.update(layers=len(model.base_model.layers), layers_of_the_model=whole, parameters=model.num_parameters())
    return model


def transformers(options: argparse.Namespace) -> Measured:
    """Continuous batching; every call begins with an empty cache."""
    about: dict[str, Any] = {}
    model = _model(options, about).to(options.device)
    version = importlib.metadata.version("transformers")
    if not hasattr(model, "generate_batch"):
        raise Absent(f"transformers {version} has no continuous batching (generate_batch)")
    cached, uncached = (
        TransformersEngine(model, options.max_sequences, prefix_cache) for prefix_cache in (True, False)
    )
    version = importlib.metadata.version("transformers")
    return Measured(cached, cached, uncached, lambda: None, 0, about, version, counts=False)


def llamacpp(options: argparse.Namespace) -> Measured:
    """Two servers, of which one has no prefix cache."""
    if options.dtype != "float32" or options.device != "cpu":
        raise Absent("it is measured with --dtype float32 --device cpu")
    source = gguf_of(options)
    slots, threads = min(options.samples, options.max_sequences), torch.get_num_threads()

    def start(prefix_cache: bool) -> LlamaCppEngine:
        return LlamaCppEngine(options.llama_python, weights, slots, threads, prefix_cache, folder)

    folder = tempfile.TemporaryDirectory()
    weights = Path(folder.name) / "weights.gguf"
    float32_gguf(source, weights, options.layers)
    cached, uncached = start(True), start(False)
    about = {"gguf": source.name, "slots": slots}
    return Measured(cached, cached, uncached, cached.forget, 0, about, cached.version)


def sglang(options: argparse.Namespace) -> Measured:
    """Two servers, of which one has no radix cache. Greedy, since SGLang takes no seeds: equal tokens can be compared then."""
    if options.layers is not None:
        raise ValueError(f"--layers {options.layers}: a server loads the whole model")
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


ENGINES: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "local": local,
    "sglang": sglang,
    "transformers": transformers,
    "llamacpp": llamacpp,
}


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


def measure(
    engine: Engine, calls: Sequence[Sequence[Request]], counts: bool = True
) -> tuple[dict[str, Any], list[Completion]]:
    """Counts and seconds of these calls, and their completions in order. counts: whether the engine tells what its cache spares."""
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
        "computed_prompt_tokens": spent("prompt_tokens") - spent("cached_tokens") + siblings if counts else None,
        "generated_tokens": sum(len(completion.tokens) for completion in completions),
        "seconds": seconds,
        "seconds_cpu": cpu_seconds,  # of all threads of this process, and so not of servers
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
            differences = [abs(x[1] - y[1]) for x, y in same if not math.isnan(x[1] - y[1])]
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
        way[name] = None if value is None else median([repeat[name] for repeat in repeats])
    computed = way["computed_prompt_tokens"]
    cached = None if computed is None else way["prompt_tokens"] - computed
    seconds = [repeat["seconds"] for repeat in repeats]
    return {
        **way,
        "cached_prompt_tokens": cached,
        "cached_share": None if cached is None else cached / way["prompt_tokens"],
        "hit_rate_of_possible": cached / possible if possible and cached is not None else None,
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
    parser.add_argument(
        "--engine", default="local", help=f"one or several of {', '.join(ENGINES)}, with commas between"
    )
    parser.add_argument("--gguf", type=Path, help="llamacpp: the file of the weights; of the default model it is known")
    parser.add_argument("--llama-python", default=sys.executable, help="llamacpp: the interpreter that has xllamacpp")
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
    names = options.engine.split(",")
    if not set(names) <= set(ENGINES) or len(set(names)) < len(names):
        parser.error(f"--engine {options.engine}: must be one or several of {', '.join(ENGINES)}, each once")
    for name in ("data", "gguf"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name} {path}: no such file")
    if names != ["local"]:
        options.temperature = 0.0  # the others take no seeds of ours
    if "sglang" in names and options.quick:
        options.layers = None  # a server loads the whole model
    if options.temperature < 0 or options.cache_tokens < 0:
        parser.error(f"--temperature {options.temperature} --cache-tokens {options.cache_tokens}: both at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    return options


def _shown(defaults: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items() if value is not None)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement. Raises ConfigError or ValueError for options that cannot work, RuntimeError where the ways disagree, Absent where
    none of the engines is here."""
    where = environment()  # before anything else: the commit must be the code that ran
    task = make_task(options.data, options.trajectories, options.seed)
    renderer = open_renderer(ModelConfig(path=options.model))
    trajectories: list[list[list[int]]] = []
    first: dict[Row, Completion] = {}  # what the first engine says
    about: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    absent: dict[str, str] = {}
    results: dict[str, Any] = {}
    largest, compared, possible = 0.0, 0, 0
    for name in options.engine.split(","):
        try:
            measured = ENGINES[name](options)
        except Absent as error:
            absent[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        try:
            if not trajectories:
                trajectories = _trajectories(options, measured.cached, renderer, task)
                possible = cacheable([state for one in trajectories for state in one for _ in range(options.samples)])
            states = list(itertools.chain.from_iterable(trajectories))
            results[name], found, difference, count = _measure_ways(options, name, measured, states, possible)
        finally:
            for engine in (measured.naive, measured.cached, measured.uncached):
                engine.close()
        largest, compared = max(largest, difference), compared + count
        about |= measured.about
        engines[name] = _described(name, measured, first, found)
        first = first or found
    if not results:
        raise Absent("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    hidden = ("out", "data", "gguf", "llama_python")
    return {
        "environment": where,
        "settings": {
            **{name: value for name, value in vars(options).items() if name not in hidden},
            "data": options.data.name if options.data else None,
            "task": task.name,
            **about,
            "tokens_of_each_state": [[len(state) for state in trajectory] for trajectory in trajectories],
            "possible_cached_tokens": possible,
        },
        "summary": {name: _summary(ways) for name, ways in results.items()},
        "engines": engines,
        "absent": absent,
        "largest_logprob_difference": largest,
        "compared_tokens": compared,
        "results": results,
    }


def _trajectories(options: argparse.Namespace, engine: Engine, renderer: Renderer, task: Task) -> list[list[list[int]]]:
    print("sampling the trajectories", file=sys.stderr, flush=True)
    return nested_states(
        engine,
        renderer,
        task,
        trajectories=options.trajectories,
        states=options.states,
        action=options.action,
        result=options.result,
        room=options.new_tokens,
        seed=options.seed,
    )


def _measure_ways(
    options: argparse.Namespace, name: str, measured: Measured, states: Sequence[list[int]], possible: int
) -> tuple[dict[str, Any], dict[Row, Completion], float, int]:
    """(way -> numbers, what the cached way says, the largest difference between two ways, tokens compared). Raises RuntimeError where ways
    disagree."""
    engines = {"cached": measured.cached, "naive_order": measured.naive, "uncached": measured.uncached}
    for engine in (measured.cached, measured.uncached):  # warm-up
        engine.generate([Request(state, Sampling(2)) for state in states[:2]])
    repeats: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    largest, compared = 0.0, 0
    with tqdm(total=options.repeats * len(WAYS), unit="way", disable=None) as bar:
        for _ in range(options.repeats):
            found: dict[str, dict[Row, Completion]] = {}
            for way in WAYS:
                measured.forget()
                one, completions = measure(
                    engines[way], calls_of(way, states, options, measured.burst), measured.counts
                )
                found[way] = dict(zip(rows_of(way, len(states), options), completions, strict=True))
                repeats[way].append(one)
                bar.update()
                computed = one["computed_prompt_tokens"]
                tqdm.write(
                    f"{name} {way:<12}{'?' if computed is None else f'{computed:,}':>9} of {one['prompt_tokens']:,} prompt tokens "
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
    return {way: combine(repeats[way], possible) for way in WAYS}, found["cached"], largest, compared


def _described(
    name: str, measured: Measured, first: dict[Row, Completion], found: dict[Row, Completion]
) -> dict[str, Any]:
    """Of one engine: its version, what it does not do, and how it agrees with the first one."""
    described: dict[str, Any] = {"version": measured.version} if measured.version else {}
    described |= {"lacks": list(LACKS[name])} if name in LACKS else {}
    if first:
        difference, count = compare({"first": first, name: found})
        equal = sum(first[row].tokens.tolist() == one.tokens.tolist() for row, one in found.items())
        described["beside_the_first"] = {
            "rows_with_equal_tokens": equal,
            "rows": len(found),
            "largest_logprob_difference": difference,
            "compared_tokens": count,
        }
    return described


def _summary(ways: dict[str, Any]) -> dict[str, Any]:
    cached = ways["cached"]
    return {
        "hit_rate_of_possible": cached["hit_rate_of_possible"],
        "cached_vs_uncached": ways["uncached"]["seconds"] / cached["seconds"],
        "generated_tokens_per_second": cached["generated_tokens_per_second"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    try:
        result = run(options)
    except (Absent, ConfigError, ValueError, RuntimeError) as error:
        raise SystemExit(f"benchmarks.rollouts: {error}") from error
    partial = options.out.with_name(options.out.name + ".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.out)
    for engine, ways in result["results"].items():
        for way, row in ways.items():
            share = row["cached_share"]
            print(
                f"{engine:<13}{way:<12}{row['seconds']:>9.2f} s{row['generated_tokens_per_second']:>9.1f} generated tok/s"
                f"{'?' if share is None else f'{share:.1%}':>9} of the prompt tokens cached"
            )
        for name, value in result["summary"][engine].items():
            print(f"{name:>28} {value:.4g}" if value is not None else f"{name:>28} -")
    print(f"{'largest_logprob_difference':>28} {result['largest_logprob_difference']:.2g}")
    print(options.out)
