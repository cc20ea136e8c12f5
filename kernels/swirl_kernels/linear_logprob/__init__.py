"""Log-probability of target tokens straight from hidden states: the [N, V] logits never exist.

Legend: N predicted rows, H hidden size, V vocabulary.

    logits z = capped(logit_scale (hidden weight^T + bias)) / temperature
    logp     = z[target] - logsumexp(z)             d logp / dz    = onehot(target) - p
    entropy  = logsumexp(z) - sum(p z)              d entropy / dz = -p (log p + entropy)

A soft-cap c of scaled logits is s (c / s) tanh(x / (c / s)): a logit scale s is a soft-cap c / s and a temperature divided by s, so
that no kernel knows of it.

Left out: label smoothing, gradients through temperature and logit scale, double backward.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from swirl_kernels.backend import choose_backend
from swirl_kernels.linear_logprob.ops import linear_logprob_forward
from swirl_kernels.linear_logprob.targets import wide_targets

WORKSPACE_MB, WORKSPACE_MB_CUDA = 256.0, 1024.0


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    valid_vocab: int | None = ...,
    entropy: Literal[False] = ...,
    ignore_index: int = ...,
    workspace_mb: float | None = ...,
    rows: Literal["live", "all"] = ...,
    invariant: bool = ...,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    valid_vocab: int | None = ...,
    entropy: Literal[True],
    ignore_index: int = ...,
    workspace_mb: float | None = ...,
    rows: Literal["live", "all"] = ...,
    invariant: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    rows: Literal["live", "all"] = "live",
    invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T)[targets] without the logits.

    hidden: floating [N, H], any strides; row n predicts targets[n]. weight: [V, H] in the same dtype. bias: [V] or
    None. Under autocast the matrix products run in the autocast dtype; gradients come back in each input's own dtype.
    targets: integer [N] of any width, in [0, valid_vocab), or ignore_index.
    temperature: positive float, or a floating tensor [N] with one per row (no gradient). Divides the logits.
    softcap: logits become softcap * tanh(logits / softcap) before the temperature (Gemma 2: 30). None: no cap.
    logit_scale: positive float that the model multiplies hidden weight^T + bias with, before the cap (Cohere: logit_scale;
        Granite: 1 / logits_scaling). No gradient.
    valid_vocab: only the first so many rows of weight are tokens, the rest is padding without probability or gradient.
    entropy: also return the entropy of each row's distribution in nats.
    ignore_index: rows with this target return 0 and pass back exactly zero, whatever they hold (NaN included).
    workspace_mb: MiB of logits that may exist at any moment: chunks in work, and tiles held from forward to backward.
        None: 1024 on CUDA, 256 elsewhere.
    rows: "live" computes the rows that are not ignored, in the backward those with an upstream gradient, and looks at targets and
        temperatures first: on CUDA the host waits for the device, twice in a forward and once or twice in a backward. "all" computes
        every row, gives those that do not count zeros all the same, and never waits; targets and temperatures are then the
        caller's to check: a target that is neither a token nor ignore_index gives NaN as its logp.
    invariant: the bits of a row's logp and entropy depend on its hidden state, target and temperature, not on N, its neighbours
        or its place (Triton kernels alone; slower than the default, which leaves the products to cuBLAS).

    Returns logp [N], natural logarithm, fp32 (float64 for float64 inputs), or (logp, entropy). Gradients for hidden,
    weight and bias through both; a frozen input costs nothing, and rows whose upstream gradient is exactly zero are
    skipped exactly (with rows="all": computed, and add exactly zero).

    Precision: sums over the vocabulary and over rows are fp32 (float64 for float64). In bf16 and fp16 the torch path's
    logits carry the rounding of the matrix product's output, except the target's own logit, which is computed in fp32;
    on CUDA they are fp32 sums, and dz is rounded once to the compute dtype. fp32 inputs follow torch's TF32 setting there,
    with invariant=True they do not.
    Repeatability: a call repeated gives the same bits. Rows never mix, but a matrix library may round differently
    for another number of rows: in fp32 a row's results agree to 1e-6 (relative, and 2e-6 absolute). With invariant=True logp and entropy
    agree to the bit; gradients come from the matrix library all the same.

    An operator of torch.library: torch.compile(fullgraph=True) takes it into its graph, and another N needs no other graph.

    Raises ValueError for wrong shapes, dtypes, devices or settings; with rows="live" for a target outside the vocabulary (row and
    value named); for invariant=True where no Triton kernel runs.

    Cost in floating-point operations: 2NHV forward, 6NHV backward, of which 2NHV compute the logits again. Tiles that find room in
    workspace_mb are held instead: in fp32 on a CPU the logits (so that a small N costs 6NHV in all, as full logits do, besides the passes
    over them), on CUDA in bf16 and fp32 the exponentials (not in fp16, nor used where an entropy is differentiated). Scheme: Wijmans et
    al., "Cut Your Losses", arXiv 2411.09009; unlike theirs, no entry of the softmax is dropped for being small.
    """
    targets = wide_targets(targets)
    dtype, valid_vocab, workspace_mb = _checked(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, valid_vocab, workspace_mb, rows, invariant
    )
    per_row = temperature.detach() if isinstance(temperature, Tensor) else None
    if per_row is not None and logit_scale != 1.0:
        per_row = per_row.to(torch.promote_types(dtype, torch.float32)) / logit_scale
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    logp, _, entropies, *_ = linear_logprob_forward(
        hidden,
        weight,
        bias,
        targets,
        per_row,
        compute_dtype=dtype,
        temperature=1.0 if isinstance(temperature, Tensor) else float(temperature) / logit_scale,
        softcap=None if softcap is None else softcap / logit_scale,
        valid_vocab=valid_vocab,
        entropy=entropy,
        ignore_index=ignore_index,
        workspace_mb=float(workspace_mb),
        all_rows=rows == "all",
        invariant=invariant,
        keep=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
    )
    return (logp, entropies) if entropy else logp


def naive_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same from full logits; the reference to check by eye."""
    targets = wide_targets(targets)
    live = targets != ignore_index
    logits = F.linear(hidden[live], weight, bias)
    logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[live][:, None] if isinstance(temperature, Tensor) else temperature)
    logp_all = logits[:, :valid_vocab].log_softmax(-1)
    zeros = logits.new_zeros(len(targets))
    logp = zeros.masked_scatter(live, logp_all.gather(1, targets[live][:, None])[:, 0])
    if not entropy:
        return logp
    return logp, zeros.masked_scatter(live, -(logp_all.exp() * logp_all).sum(-1))


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    workspace_mb: float | None,
    choice: str,
    invariant: bool,
) -> tuple[torch.dtype, int, float]:
    """The type that the products compute in, the tokens of the vocabulary and the workspace."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; give [N, H] and [V, H] "
            "(select the rows that predict something and flatten a batch dimension first)"
        )
    rows, vocab = hidden.shape[0], weight.shape[0]
    if targets.shape != (rows,):
        raise ValueError(f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; give integers [{rows}]")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight has {vocab} rows, so it must be [{vocab}]")
    devices = {t.device for t in (hidden, weight, targets, bias, temperature) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(
            f"hidden, weight, targets, bias, temperature lie on {sorted(map(str, devices))}; use one device"
        )
    valid_vocab = vocab if valid_vocab is None else valid_vocab
    if not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab is {valid_vocab}; weight has {vocab} rows, so it must lie in [1, {vocab}]")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; use a positive finite number, or None for no cap")
    if isinstance(logit_scale, Tensor) or not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale is {logit_scale}; use a positive finite float (it has no gradient)")
    if workspace_mb is None:
        workspace_mb = WORKSPACE_MB_CUDA if hidden.is_cuda else WORKSPACE_MB
    if not 0 < workspace_mb < float("inf"):
        raise ValueError(f"workspace_mb is {workspace_mb}; use a positive finite number of MiB")
    if choice not in ("live", "all"):
        raise ValueError(f"rows is {choice!r}; use 'live', or 'all' for targets that have been checked")
    if isinstance(temperature, Tensor):
        if temperature.shape != (rows,) or not temperature.is_floating_point() or temperature.requires_grad:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}, dtype {temperature.dtype}, requires_grad="
                f"{temperature.requires_grad}; give a float, or a floating tensor [{rows}] without gradient"
            )
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite (greedy has no distribution)")
    dtype = _compute_dtype(hidden, weight)
    backend = choose_backend("linear_logprob", hidden, dtype)
    if invariant and backend != "triton":
        raise ValueError(
            f"invariant=True is what the Triton kernels do, and {dtype} on {hidden.device} takes the torch path; leave it out, "
            "or use CUDA tensors in float32, bfloat16 or float16"
        )
    return dtype, valid_vocab, workspace_mb


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that the matrix products compute in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or call under torch.autocast")
    return hidden.dtype
