"""Measurements on one GPU that decide how kernels and trainer are set up: each part prints its rows and what follows from them.

    python -m benchmarks.gpu_check.decisions PART --out FILE [--device cpu]        `make gpu-check` runs all of them

products    a product of 16-bit matrices into fp32 beside one into 16 bits, by columns: whether linear_logprob's chunks cost anything, how
            wide they should be, and whether forbidding reduced-precision sums does
head        linear_logprob with room for none, a quarter, half and all of the tiles, and invariant, beside plain torch
attention   tree_attention of a comb at three sets of heads, kernel by kernel, beside FlexAttention and a causal SDPA of as many tokens
step        training steps by token budget and with compiled layers; then one under the profiler: share of the time in which the GPU is
            busy, launches, the costliest kernels
layer       a decoder layer of 0.5B forward and backward, called and replayed as a CUDA graph

Random data, the L2 cache emptied before each call, medians; variants in turns, for their spread is several percent. The device cpu is a
test of this program: tiny sizes, and no decision means anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import environment
from benchmarks.kernels import matmul_tflops, seconds_of
from benchmarks.kernels.flex import flex_tree_attention, flex_tree_mask
from benchmarks.kernels.shapes import comb_subtree_end, head, make_case
from swirl_kernels.linear_logprob import linear_logprob
from swirl_kernels.tree_attention import tree_attention, tree_plan

ROOT = Path(__file__).resolve().parents[2]
REPEATS = {"cuda": 20, "cpu": 1}
Row = dict[str, Any]
Found = tuple[list[Row], str]  # rows, the decision


def milliseconds(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Medians, in turns. The first call of each is not counted: it compiles."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS[device] + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if turn:
                taken[name].append(1000 * seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def products(device: str) -> Found:
    rows: list[Row] = []
    sizes = [(8192, 3584), (8192, 576)] if device == "cuda" else [(32, 16)]
    columns = (512, 4096, 8448, 16896, 33792) if device == "cuda" else (64,)
    for N, H in sizes:
        a = torch.randn(N, H, device=device, dtype=torch.bfloat16)
        for C in columns:
            b = torch.randn(C, H, device=device, dtype=torch.bfloat16).t()
            small, wide = a.new_empty(N, C), torch.empty(N, C, device=device)
            calls = {"to_16_bits": lambda a=a, b=b, out=small: torch.mm(a, b, out=out)}
            for word, allowed in (("to_fp32", False), ("to_fp32_reduced", True)):
                calls[word] = lambda a=a, b=b, out=wide, allowed=allowed: _into_fp32(a, b, out, allowed)
            ms = milliseconds(calls, device)
            rows.append({"N": N, "H": H, "C": C, "ms": ms, "tflops": 2e-9 * N * H * C / ms["to_fp32"]})
    large = [row for row in rows if row["N"] == sizes[0][0] and row["H"] == sizes[0][1]]
    best = max(large, key=lambda row: row["tflops"])
    share = best["ms"]["to_16_bits"] / best["ms"]["to_fp32"]
    lost = best["ms"]["to_fp32"] / best["ms"]["to_fp32_reduced"] - 1
    return rows, (
        f"fp32 output has {share:.0%} of the speed of 16 bits at C = {best['C']}, the widest rate ({best['tflops']:.0f} TFLOP/s): "
        f"chunks {'stay' if share >= 0.95 else 'should not be'} the default; forbidding reduced sums costs {lost:.1%}"
    )


def _into_fp32(a: Tensor, b: Tensor, out: Tensor, reduced: bool) -> Tensor:
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    flags = torch.backends.cuda.matmul
    before, flags.allow_bf16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction, reduced
    try:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def head_log_probs(device: str) -> Found:
    shapes = [head("qwen2.5-7b", 8192, 3584, 152064), head("smollm2-135m", 8192, 576, 49152)]
    if device == "cpu":
        shapes = [head("tiny", 16, 8, 100)]
    rows: list[Row] = []
    for shape in shapes:
        case = make_case("linear_logprob", shape, device, torch.bfloat16)
        inputs = {key: case.inputs[key] for key in ("hidden", "weight", "targets")}
        working, tiles = 1024.0, inputs["hidden"].shape[0] * inputs["weight"].shape[0] * 2 / 2**20
        ways: dict[str, dict[str, Any]] = {
            f"{share:.0%} kept": {"workspace_mb": working + share * tiles, "rows": "all"} for share in (0, 0.25, 0.5, 1)
        }
        if device == "cuda":
            ways["invariant"] = {"invariant": True}
        calls: dict[str, Callable[[], Any]] = {
            name: lambda options=options, inputs=inputs, case=case: _both(
                lambda h, w: linear_logprob(h, w, inputs["targets"], **options), inputs, case.upstream
            )
            for name, options in ways.items()
        }
        calls["torch"] = lambda inputs=inputs, case=case: _both(
            lambda h, w: F.linear(h, w).float().log_softmax(-1).gather(1, inputs["targets"][:, None])[:, 0],
            inputs,
            case.upstream,
        )
        exact = F.linear(inputs["hidden"][:512].double(), inputs["weight"].double()).log_softmax(-1)
        exact_logp = exact.gather(1, inputs["targets"][:512, None])[:, 0]
        for name, ms in milliseconds(calls, device).items():
            row = {"shape": shape.name, "way": name, "forward_backward_ms": ms}
            row["tflops"] = case.work["forward_backward"] / ms / 1e9
            if name in ways:
                with torch.no_grad():
                    logp = linear_logprob(**inputs, **ways[name])[:512]
                row["error"] = float((logp - exact_logp).abs().max())
            rows.append(row)
    first = {row["way"]: row["forward_backward_ms"] for row in rows if row["shape"] == shapes[0].name}
    saved = first["0% kept"] - first["100% kept"]
    return rows, (
        f"nothing kept {first['0% kept']:.1f} ms, all kept {first['100% kept']:.1f} ms, torch {first['torch']:.1f} ms: a GiB kept saves "
        f"{saved / (tiles_gib(shapes[0].sizes)):.1f} ms; {'keep' if saved > 0 else 'do not keep'} them where memory is free"
    )


def tiles_gib(sizes: Mapping[str, Any]) -> float:
    """Of all exponentials of a head in 16 bits."""
    return float(sizes["N"] * sizes["V"] * 2 / 2**30)


def _both(value: Callable[[Tensor, Tensor], Tensor], inputs: Mapping[str, Tensor], upstream: Tensor) -> Any:
    hidden, weight = (inputs[key].detach().requires_grad_() for key in ("hidden", "weight"))
    return torch.autograd.grad(value(hidden, weight), (hidden, weight), upstream)


def attention(device: str) -> Found:
    rows: list[Row] = []
    heads = [(32, 8, 128), (12, 2, 128), (14, 2, 64)] if device == "cuda" else [(2, 1, 16)]
    lengths = {"prompt": 400, "action": 120, "result": 600, "K": 5, "G": 8}
    if device == "cpu":
        lengths = {"prompt": 4, "action": 3, "result": 2, "K": 2, "G": 2}
    end = comb_subtree_end(**lengths).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plan, mask = tree_plan(end), flex_tree_mask(end)
    for Hq, Hkv, D in heads:
        q, k, v = (torch.randn(h, len(end), D, device=device, dtype=dtype) for h in (Hq, Hkv, Hkv))
        upstream = torch.randn_like(q)
        ways: dict[str, Callable[..., Tensor]] = {
            "tree": lambda q, k, v: tree_attention(q, k, v, None, plan=plan),
            "causal_sdpa": lambda q, k, v: F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )[0],
        }
        if device == "cuda":  # which has no backward elsewhere
            ways["flex"] = lambda q, k, v, end=end: flex_tree_attention(q, k, v, end, block_mask=mask)

        def both(way: Callable[..., Tensor], inputs: Sequence[Tensor] = (q, k, v), upstream: Tensor = upstream) -> Any:
            leaves = [x.detach().requires_grad_() for x in inputs]
            return torch.autograd.grad(way(*leaves), leaves, upstream)

        ms = milliseconds({name: lambda way=way: both(way) for name, way in ways.items()}, device)
        rows.append({"heads": [Hq, Hkv, D], "forward_backward_ms": ms})
        rows[-1]["kernels_ms"] = _profiled(lambda way=ways["tree"]: both(way), device)["kernels"]
    if device == "cpu":
        return rows, "none on a CPU"
    ratios = [row["forward_backward_ms"]["flex"] / row["forward_backward_ms"]["tree"] for row in rows]
    found = ", ".join(f"{row['heads']} {ratio:.2f}" for row, ratio in zip(rows, ratios, strict=True))
    return (
        rows,
        f"FlexAttention takes so many times as long: {found}; {'all' if min(ratios) >= 1.2 else 'not all'} at least 1.2",
    )


def _profiled(call: Callable[[], Any], device: str, most: int = 25) -> Row:
    """busy: share of the time between the first kernel's start and the last one's end in which one ran (they run one at a time here)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    call()
    with profile(activities=activities) as seen:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    kernels = (e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    on_device = [
        e for e in kernels if not getattr(e, "is_user_annotation", False)
    ]  # those span kernels that are there themselves
    if not on_device:
        return {"busy": None, "launches": 0, "kernels": {}}
    spent: Counter[str] = Counter()
    for event in on_device:
        spent[event.name] += event.time_range.elapsed_us() / 1000
    whole = (max(e.time_range.end for e in on_device) - min(e.time_range.start for e in on_device)) / 1000
    return {
        "busy": sum(spent.values()) / whole,
        "launches": len(on_device),
        "kernels": {name[:120]: round(ms, 4) for name, ms in spent.most_common(most)},
    }


def step(device: str) -> Found:
    """By benchmarks.train_throughput, in processes of their own; the profile of one step by itself."""
    rows: list[Row] = []
    ranked = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]  # FSDP: all activations in bfloat16
    cases: list[tuple[str, list[str]]] = [("quick", ["--quick", "--ways", "comb"])]
    if device == "cuda":
        common = ["--compute-dtype", "bfloat16", "--trajectories", "2", "--steps", "3"]
        budgets = [["--token-budget", n, "--ways", "comb"] for n in ("8192", "16384", "32768")]
        more = [
            ["--token-budget", "16384", "--ways", "comb,rows"],
            ["--token-budget", "16384", "--ways", "comb", "--compile", "--warm-up", "3"],
            ["--torchrun", "--token-budget", "16384", "--ways", "comb"],
        ]
        cases = [
            (" ".join([shape, *extra]), ["--shape", shape, *common, *extra])
            for shape in ("0.5b", "1.5b")
            for extra in (*budgets, *more)
        ]
    else:
        cases.append(("quick, torchrun", ["--torchrun", *cases[0][1]]))
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in cases:
            out = Path(folder) / "found.json"
            under = [*ranked, "-m"] if "--torchrun" in arguments else []
            own = [one for one in arguments if one != "--torchrun"]
            command = [sys.executable, "-m", *under, "benchmarks.train_throughput", *own, "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            row: Row = {"case": name}
            if done.returncode:
                row["failure"] = done.stderr.strip().splitlines()[-1:]
            else:
                row |= json.loads(out.read_text(encoding="utf-8"))["summary"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    from benchmarks.step_training.ways import SHAPES
    from benchmarks.train_throughput import config_of, options_of
    from benchmarks.train_throughput.setup import MODELS, llama, make_batch, make_trainer
    from swirl_fast.ranks import Ranks

    for shape in ("0.5b", "1.5b") if device == "cuda" else ("135m",):
        chosen = ["--shape", shape, "--compute-dtype", "bfloat16", "--token-budget", "16384"]
        options = options_of(
            [*(chosen if device == "cuda" else ["--quick"]), "--warm-up", "2", "--steps", "2", "--out", "unused"], 1
        )
        ranks, lengths = Ranks(0, 1, torch.device(device)), SHAPES[options.trajectory]
        cut = MODELS[options.shape]._replace(layers=options.layers, vocab=options.vocab)
        sizes = (options.states, options.samples, options.trajectories)
        batches = [make_batch(lengths, *sizes, cut.vocab, ranks, number, rows=False) for number in range(4)]
        model = llama(cut, lengths.state(options.states) + lengths.action)
        trainer, _ = make_trainer(config_of(options, 1), ranks, model, batches)
        trainer.train_step()
        rows.append({"case": f"profile {shape}", **_profiled(trainer.train_step, device)})
        del trainer
    busy = [row["busy"] for row in rows if row.get("busy") is not None]
    if not busy:
        return rows, "none on a CPU"
    bound = "launches: build CUDA graphs" if min(busy) < 0.8 else "kernels, not launches: no CUDA graphs"
    speed = {row["case"]: row["tokens_per_second_per_rank"] for row in rows if "tokens_per_second_per_rank" in row}
    ratios = [
        f"{name.split()[0]} {speed[name] / speed[name.replace('--torchrun ', '')]:.2f}"
        for name in speed
        if "--torchrun" in name and name.replace("--torchrun ", "") in speed
    ]
    return rows, (
        f"the GPU is busy {', '.join(f'{share:.0%}' for share in busy)} of a step: bound by {bound}; bfloat16 throughout "
        f"(one rank under torchrun) is so many times as fast as casts in every product: {', '.join(ratios) or 'not measured'}"
    )


def layer(device: str) -> Found:
    if device == "cpu":
        return [], "none on a CPU"
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from benchmarks.train_throughput.setup import MODELS, llama

    config = llama(MODELS["0.5b"], 8192)
    config._attn_implementation = "sdpa"
    x = torch.randn(1, 8192, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    turns = LlamaRotaryEmbedding(config, device=device)(x, torch.arange(8192, device=device)[None])

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LlamaDecoderLayer(config, 0).to(device, torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x, position_embeddings=turns)
            return found

    wide = Layer()
    graphed = torch.cuda.make_graphed_callables(Layer(), (x,))
    ms = milliseconds({"eager": lambda: wide(x).sum().backward(), "graph": lambda: graphed(x).sum().backward()}, device)
    gain = ms["eager"] / ms["graph"] - 1
    return [{"ms": ms}], f"a graph is {gain:.0%} faster: {'worth' if gain > 0.1 else 'not worth'} building"


PARTS: dict[str, Callable[[str], Found]] = {
    "products": products,
    "head": head_log_probs,
    "attention": attention,
    "step": step,
    "layer": layer,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.decisions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args(arguments)
    about = {
        "part": options.part,
        "matmul_tflops": matmul_tflops(options.device, torch.bfloat16, 3) if options.device == "cuda" else None,
    }
    rows, decision = PARTS[options.part](options.device)
    result = {"environment": environment(), **about, "rows": rows, "decision": decision}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row)[:400])
    print(f"{options.part}: {decision}")


if __name__ == "__main__":
    main()
