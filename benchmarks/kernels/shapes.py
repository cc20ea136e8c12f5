"""The sizes that benchmarks.kernels measures, and the inputs made for them.

Legend: N rows or tokens, H hidden size, V vocabulary, A segments; T packed tokens, K states, G actions sampled at each, Hq query heads,
Hkv key heads, D head dimension.

What is counted, whatever an implementation computes again or reads twice (e: bytes of an element of the inputs):

    linear_logprob     FLOP    forward 2NHV        forward_backward 8NHV          logits, and twice the gradients after logits made again
    tree_attention     FLOP    4 Hq D pairs        14 Hq D pairs                  pairs: of query and key that the tree lets see each other
    selective_logprob  bytes   e NV                3 e NV                         logits read; read again and the gradient written
    policy_loss        bytes   3 e N               4 e N                          three log-probs read; the gradient written
    segment_reduce     bytes   e N                 2 e N                          x read; the gradient written
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swirl_kernels import PRESETS, PolicyLossSpec, trl_preset

DIRECTIONS = ("forward", "forward_backward")


@dataclass(frozen=True)
class Shape:
    """A name and its sizes, by the letters of the legend."""

    name: str
    sizes: dict[str, Any]


def head(name: str, N: int, H: int, V: int, softcap: float | None = None) -> Shape:
    return Shape(name, {"N": N, "H": H, "V": V, "softcap": softcap})


def rows(name: str, N: int, V: int) -> Shape:
    return Shape(name, {"N": N, "V": V})


def segments(name: str, N: int, A: int) -> Shape:
    return Shape(name, {"N": N, "A": A})


def comb(name: str, Hq: int, Hkv: int, D: int, K: int = 5, G: int = 8) -> Shape:
    """Lengths of searches that answer a question: prompt, action and result in tokens."""
    return Shape(name, {"Hq": Hq, "Hkv": Hkv, "D": D, "K": K, "G": G, "prompt": 400, "action": 120, "result": 600})


# Heads of a GPU with real sizes; on a CPU fewer rows and, where V is large, a smaller H. "quick" is sized for about a minute on two cores.
# Segments of 128 tokens on average: 65,536 tokens are a large training step, 16 million fill the memory's bandwidth.
SHAPES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cuda": {
        "linear_logprob": (
            head("smollm2-135m", N=8192, H=576, V=49152),
            head("llama-3-8b", N=8192, H=4096, V=128256),
            head("qwen2.5-7b", N=8192, H=3584, V=152064),
            head("qwen3-8b, trl issue 7244", N=8192, H=4096, V=151936),
            head("gemma-2-9b", N=8192, H=3584, V=256000, softcap=30.0),
        ),
        "selective_logprob": (
            rows("llama-3-8b", N=8192, V=128256),
            rows("qwen2.5-7b", N=8192, V=152064),
            rows("qwen3-8b, trl issue 7244", N=8192, V=151936),
        ),
        "policy_loss": (segments("step", N=2**16, A=2**9), segments("stream", N=2**24, A=2**17)),
        "segment_reduce": (segments("step", N=2**16, A=2**9), segments("stream", N=2**24, A=2**17)),
        "tree_attention": (comb("search_qa, llama-3-8b", Hq=32, Hkv=8, D=128),),
    },
    "cuda quick": {
        "linear_logprob": (
            head("smollm2-135m", N=8192, H=576, V=49152),
            head("qwen2.5-7b", N=8192, H=3584, V=152064),
        ),
        "selective_logprob": (rows("qwen2.5-7b", N=8192, V=152064),),
        "policy_loss": (segments("stream", N=2**24, A=2**17),),
        "segment_reduce": (segments("stream", N=2**24, A=2**17),),
        "tree_attention": (comb("search_qa, llama-3-8b", Hq=32, Hkv=8, D=128),),
    },
    "cpu": {
        "linear_logprob": (
            head("smollm2-135m", N=4096, H=576, V=49152),
            head("llama-3-8b, H cut", N=1024, H=512, V=128256),
            head("qwen2.5-7b, H cut", N=1024, H=448, V=152064),
            head("gemma-2-9b, H cut", N=512, H=448, V=256000, softcap=30.0),
        ),
        "selective_logprob": (rows("smollm2-135m", N=4096, V=49152), rows("qwen2.5-7b", N=1024, V=152064)),
        "policy_loss": (segments("step", N=2**16, A=2**9), segments("stream", N=2**22, A=2**15)),
        "segment_reduce": (segments("step", N=2**16, A=2**9), segments("stream", N=2**22, A=2**15)),
        "tree_attention": (comb("search_qa, smollm2-135m", Hq=9, Hkv=3, D=64),),
    },
    "cpu quick": {
        "linear_logprob": (
            head("smollm2-135m", N=1024, H=576, V=49152),
            head("qwen2.5-7b, H cut", N=512, H=128, V=152064),
        ),
        "selective_logprob": (rows("smollm2-135m", N=1024, V=49152),),
        "policy_loss": (segments("stream", N=2**20, A=2**13),),
        "segment_reduce": (segments("stream", N=2**20, A=2**13),),
        "tree_attention": (comb("search_qa, a third of smollm2-135m", Hq=3, Hkv=1, D=64),),
    },
}
# Sides of the square product and MiB of the copy that rates are set beside.
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
COPY_MIB = {"cuda": 1024, "cpu": 256}

# GRPO's loss with TRL's settings of dapo, and a KL term.
POLICY_LOSS: PolicyLossSpec = trl_preset("dapo", beta=0.04).spec
assert POLICY_LOSS.kl == "k3" and PRESETS["trl.dapo"].aggregation == "token_mean", "torch_policy_loss is written for it"


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    inputs: keyword arguments of every backend. leaves: names of those that get a gradient. upstream: the gradient of the output.
    work: FLOP or bytes by direction, and which of the two (unit).
    """

    op: str
    shape: Shape
    dtype: torch.dtype
    inputs: dict[str, Any]
    leaves: tuple[str, ...]
    upstream: Tensor
    unit: str
    work: dict[str, float]


def make_case(op: str, shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """The same on every call. policy_loss and segment_reduce are fp32 whatever the dtype: log-probs are, in every trainer."""
    draw = torch.Generator(device).manual_seed(0)
    return _MAKERS[op](shape, device, dtype, draw)


def _linear_logprob(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Case:
    """Logits as a language model has them. Others are normal with deviation 4, the target's lies about their logsumexp: entropies of
    some nats, no row certain, and no probability so small that it is subnormal (which slows a CPU's matrix product 30 times)."""
    N, H, V, softcap = (shape.sizes[key] for key in ("N", "H", "V", "softcap"))
    weight_VH = torch.randn(V, H, generator=draw, device=device, dtype=dtype).mul_(H**-0.5)
    targets_N = torch.randint(0, V, (N,), generator=draw, device=device)
    hidden_NH = torch.randn(N, H, generator=draw, device=device, dtype=dtype).mul_(4.0)
    hidden_NH += 20.0 * weight_VH[targets_N]
    inputs = {"hidden": hidden_NH, "weight": weight_VH, "targets": targets_N, "softcap": softcap}
    work = {"forward": 2.0 * N * H * V, "forward_backward": 8.0 * N * H * V}
    return Case("linear_logprob", shape, dtype, inputs, ("hidden", "weight"), _advantages(N, draw), "flop", work)


def _selective_logprob(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Case:
    N, V = shape.sizes["N"], shape.sizes["V"]
    logits_NV = torch.randn(N, V, generator=draw, device=device, dtype=dtype).mul_(4.0)
    targets_N = torch.randint(0, V, (N,), generator=draw, device=device)
    logits_NV[torch.arange(N, device=device), targets_N] += 20.0
    size = float(N * V * dtype.itemsize)
    inputs, work = {"logits": logits_NV, "targets": targets_N}, {"forward": size, "forward_backward": 3 * size}
    return Case("selective_logprob", shape, dtype, inputs, ("logits",), _advantages(N, draw), "byte", work)


def _policy_loss(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Case:
    N, A = shape.sizes["N"], shape.sizes["A"]

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=draw, device=device)

    old_N = -normal(N).abs()
    inputs = {
        "logp": old_N + 0.2 * normal(N),  # a third of the ratios are clipped
        "old_logp": old_N,
        "ref_logp": old_N + 0.3 * normal(N),
        "advantage": normal(A),
        "offsets": _offsets(N, A, draw),
        "weight": torch.full((A,), 1 / N, device=device),
    }
    work = {"forward": 3.0 * 4 * N, "forward_backward": 4.0 * 4 * N}
    return Case("policy_loss", shape, torch.float32, inputs, ("logp",), torch.ones((), device=device), "byte", work)


def _segment_reduce(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Case:
    N, A = shape.sizes["N"], shape.sizes["A"]
    inputs = {"x": torch.rand(N, generator=draw, device=device), "offsets": _offsets(N, A, draw)}
    upstream_A = torch.rand(A, generator=draw, device=device)
    work = {"forward": 4.0 * N, "forward_backward": 8.0 * N}
    return Case("segment_reduce", shape, torch.float32, inputs, ("x",), upstream_A, "byte", work)


def _tree_attention(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Case:
    sizes = shape.sizes
    Hq, Hkv, D = sizes["Hq"], sizes["Hkv"], sizes["D"]
    end_T = comb_subtree_end(**{key: sizes[key] for key in ("prompt", "action", "result", "K", "G")})
    T = len(end_T)
    pairs = float((end_T - torch.arange(T)).sum())  # key j is seen by the queries j ... end[j] - 1
    q, k, v = (torch.randn(h, T, D, generator=draw, device=device, dtype=dtype) for h in (Hq, Hkv, Hkv))
    upstream = torch.randn(Hq, T, D, generator=draw, device=device, dtype=dtype)
    shape = Shape(shape.name, {**sizes, "T": T, "pairs": int(pairs)})
    inputs = {"q": q, "k": k, "v": v, "subtree_end": end_T.to(device)}
    work = {"forward": 4 * pairs * D * Hq, "forward_backward": 14 * pairs * D * Hq}
    return Case("tree_attention", shape, dtype, inputs, ("q", "k", "v"), upstream, "flop", work)


def comb_subtree_end(*, prompt: int, action: int, result: int, K: int, G: int) -> Tensor:
    """int32 [T] of a comb (drawn in swirl_fast/comb/tree.py): a trunk of the prompt and K - 1 actions with results, and G teeth at the end
    of the prompt and of every result. An action's last token predicts nothing and is not packed."""
    total = prompt + (K - 1) * (action + result) + K * G * (action - 1)
    ends: list[int] = []
    for k in range(K):
        ends += [total] * (prompt if k == 0 else action + result)
        for _ in range(G):
            ends += [len(ends) + action - 1] * (action - 1)
    assert len(ends) == total, "the trunk and the teeth are the whole row"
    return torch.tensor(ends, dtype=torch.int32)


def _advantages(N: int, draw: torch.Generator) -> Tensor:
    """The gradient of a policy-gradient loss for N log-probs, fp32: different for every row, of both signs."""
    return torch.randn(N, generator=draw, device=draw.device) / N


def _offsets(N: int, A: int, draw: torch.Generator) -> Tensor:
    """int64 [A + 1], cut at random places: lengths spread as an exponential distribution."""
    cuts = torch.randint(0, N + 1, (A - 1,), generator=draw, device=draw.device).sort().values
    return torch.cat([cuts.new_tensor([0]), cuts, cuts.new_tensor([N])])


_MAKERS: dict[str, Callable[[Shape, str, torch.dtype, torch.Generator], Case]] = {
    "linear_logprob": _linear_logprob,
    "selective_logprob": _selective_logprob,
    "policy_loss": _policy_loss,
    "segment_reduce": _segment_reduce,
    "tree_attention": _tree_attention,
}
OPS = tuple(_MAKERS)
