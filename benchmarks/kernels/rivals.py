"""The implementations that benchmarks.kernels sets beside each other, all with one signature: a case's inputs -> one tensor.

A loader prepares what is made once per batch (an attention plan, a mask) and returns the call, or raises Absent with the reason. `torch`
and its like come first and are the reference. Foreign functions are called, not copied, with their defaults:

    trl                      TRL's own functions: tiles of 4,096 tokens x 32,768 words, recomputed in the backward
    verl_style               the scheme of verl's FusedLinearForPPO: blocks of 512 tokens, recomputed in the backward, the weight's gradient
                             summed in its own dtype. Without the entropy that verl computes along with it in the forward.
    liger                    LigerFusedLinearCrossEntropyFunction with reduction="none". Its fast path ("sum", "mean": gradients made in
                             the forward) weighs all tokens alike, which a policy gradient does not.
    cut_cross_entropy        with its filter, which leaves out small probabilities in the backward
    cut_cross_entropy_exact  the same with filter_eps=None

swirl_kernels' policy_loss returns its metrics from the same pass; the plain formula computes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import swirl_kernels
from benchmarks.kernels.shapes import POLICY_LOSS, Case

Call = Callable[..., Tensor]
VERL_BLOCK = 512  # rows, verl's default
SAME_BITS = 5  # runs that must agree
TRL_TILE = 32768  # columns, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


# Of relative_error. Sums of thousands of products, rounded at different places: fp32 shows 1e-6 to 1e-5,
# 16-bit types their 2^-9 (2^-12) some times over, as gradients are summed in the inputs' dtype by some.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Absent(Exception):
    """This backend cannot run here; the text says why."""


def load(case: Case) -> tuple[dict[str, Call], list[dict[str, str]]]:
    """The backends that can run, in the order of BACKENDS, and one entry {op, shape, backend, reason} for each that cannot."""
    calls: dict[str, Call] = {}
    absent = []
    for name, loader in BACKENDS[case.op].items():
        try:
            calls[name] = loader(case)
        except Exception as error:  # whatever a foreign package raises while it loads is the reason
            reason = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"
            absent.append({"op": case.op, "shape": case.shape.name, "backend": name, "reason": reason.splitlines()[0]})
    return calls, absent


def run(call: Call, case: Case, direction: str) -> tuple[Tensor, ...]:
    """The value, and in "forward_backward" the gradients of case.leaves."""
    if direction == "forward":
        with torch.no_grad():
            return (call(**case.inputs),)
    leaves = {name: case.inputs[name].detach().requires_grad_() for name in case.leaves}
    value = call(**{**case.inputs, **leaves})
    gradients = torch.autograd.grad(value, list(leaves.values()), case.upstream.to(value.dtype))
    return (value.detach(), *gradients)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm; inf where shapes differ or something is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = norm = 0.0
    for a, b in zip(found.flatten().split(2**26), wanted.flatten().split(2**26), strict=True):  # fp32 copies of a part
        difference += float((a.float() - b.float()).double().square().sum())
        norm += float(b.double().square().sum())
    error = (difference / norm) ** 0.5 if norm else difference**0.5
    return error if error < float("inf") else float("inf")  # NaN is not below


def largest_error(case: Case, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> tuple[float, str]:
    """Of the results of `run`, and which of them has it."""
    parts = ("value", *(f"gradient of {leaf}" for leaf in case.leaves))
    return max((relative_error(a, b), part) for a, b, part in zip(found, wanted, parts, strict=False))


def same_bits(call: Call, case: Case, times: int = SAME_BITS) -> bool:
    """Whether so many further runs of forward and backward repeat the first one's bits."""
    first = run(call, case, "forward_backward")
    return all(all(map(torch.equal, run(call, case, "forward_backward"), first)) for _ in range(times - 1))


def torch_linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits_NV = F.linear(hidden, weight).float()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return torch_selective_logprob(logits_NV, targets)


def torch_selective_logprob(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def torch_policy_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor, offsets: Tensor, weight: Tensor
) -> Tensor:
    lengths = offsets.diff()
    advantage_N, weight_N = (x.repeat_interleave(lengths, output_size=len(logp)) for x in (advantage, weight))
    ratio = (logp - old_logp).exp()
    low, high = POLICY_LOSS.ratio_bounds
    objective = torch.minimum(ratio * advantage_N, ratio.clamp(low, high) * advantage_N)
    log_ratio = ref_logp - logp
    kl = log_ratio.exp() - 1 - log_ratio
    return (weight_N * (POLICY_LOSS.kl_coef * kl - objective)).sum()


def torch_segment_reduce(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True)


def torch_index_add(x: Tensor, offsets: Tensor) -> Tensor:
    lengths = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    return x.new_zeros(len(lengths)).index_add(0, owner, x)


def verl_style(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp: Tensor = _BlocksOfTokens.apply(hidden, weight, targets)
    return logp


class _BlocksOfTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden, weight, targets)
        logp = hidden.new_empty(len(hidden))
        for begin in range(0, len(hidden), VERL_BLOCK):
            block = slice(begin, begin + VERL_BLOCK)
            logp[block] = torch_selective_logprob(hidden[block] @ weight.T, targets[block])
        return logp

    @staticmethod
    def backward(ctx, dlogp):  # type: ignore[no-untyped-def]
        hidden, weight, targets = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for begin in range(0, len(hidden), VERL_BLOCK):
            block = slice(begin, begin + VERL_BLOCK)
            g = dlogp[block, None].float()
            dz = (hidden[block] @ weight.T).float().softmax(-1) * -g
            dz = dz.scatter_add_(1, targets[block, None], g).to(hidden.dtype)
            dhidden[block] = dz @ weight
            dweight += dz.T @ hidden[block]
        return dhidden, dweight, None


def _always(call: Call) -> Callable[[Case], Call]:
    return lambda case: call


def _our_policy_loss(case: Case) -> Call:
    return lambda **inputs: swirl_kernels.policy_loss(spec=POLICY_LOSS, **inputs)[0]


def _our_segment_reduce(case: Case) -> Call:
    return lambda x, offsets: swirl_kernels.segment_reduce(x, offsets, "sum")


def _our_tree_attention(case: Case) -> Call:
    plan = swirl_kernels.tree_plan(case.inputs["subtree_end"])
    return lambda q, k, v, subtree_end: swirl_kernels.tree_attention(q, k, v, None, plan=plan)


def _sdpa(case: Case) -> Call:
    end_T = case.inputs["subtree_end"]
    position_T = torch.arange(len(end_T), device=end_T.device)
    visible_TT = (position_T <= position_T[:, None]) & (position_T[:, None] < end_T)

    def call(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor) -> Tensor:
        k, v = (
            x.repeat_interleave(len(q) // len(x), 0) for x in (k, v)
        )  # its fused kernels know no shared key heads with a mask
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible_TT)[0]

    return call


def _flex(case: Case) -> Call:
    if not case.inputs["q"].is_cuda:
        raise Absent("FlexAttention has no backward on a CPU")
    from benchmarks.kernels.flex import flex_tree_attention, flex_tree_mask

    mask = flex_tree_mask(case.inputs["subtree_end"])
    return lambda q, k, v, subtree_end: flex_tree_attention(q, k, v, subtree_end, block_mask=mask)


def _trl_linear(case: Case) -> Call:
    import trl.trainer.utils  # noqa: F401  its backward imports it, which is not to be timed
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        logp: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_TILE, softcap, 1.0, ())[0]
        return logp

    return call


def _trl_selective(case: Case) -> Call:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, targets: selective_log_softmax(logits, targets)


def _verl_style(case: Case) -> Call:
    if case.inputs["softcap"] is not None:
        raise Absent("verl's blocks of tokens know no soft-cap")
    return lambda hidden, weight, targets, softcap: verl_style(hidden, weight, targets)


def _liger(case: Case) -> Call:
    if not case.inputs["hidden"].is_cuda:
        raise Absent("its kernels need CUDA")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        # bias, class weights, ignore_index, z-loss, label smoothing, reduction, soft-cap
        found = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "none", softcap
        )
        return -found[0]

    return call


def _cut_cross_entropy(**options: Any) -> Callable[[Case], Call]:
    def loader(case: Case) -> Call:
        if not case.inputs["hidden"].is_cuda:
            raise Absent("its kernels need CUDA")
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, targets, softcap: (
            -linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", **options)
        )

    return loader


BACKENDS: dict[str, dict[str, Callable[[Case], Call]]] = {
    "linear_logprob": {
        "torch": _always(torch_linear_logprob),
        "swirl_kernels": _always(swirl_kernels.linear_logprob),
        "trl": _trl_linear,
        "verl_style": _verl_style,
        "liger": _liger,
        "cut_cross_entropy": _cut_cross_entropy(),
        "cut_cross_entropy_exact": _cut_cross_entropy(filter_eps=None),
    },
    "selective_logprob": {
        "torch": _always(torch_selective_logprob),
        "swirl_kernels": _always(swirl_kernels.selective_logprob),
        "trl": _trl_selective,
    },
    "policy_loss": {"torch": _always(torch_policy_loss), "swirl_kernels": _our_policy_loss},
    "segment_reduce": {
        "torch": _always(torch_segment_reduce),
        "swirl_kernels": _our_segment_reduce,
        "torch_index_add": _always(torch_index_add),
    },
    "tree_attention": {"sdpa_dense_mask": _sdpa, "swirl_kernels": _our_tree_attention, "flex": _flex},
}
