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
from swirl_kernels.linear_logprob.autograd import LinearLogprob, Settings
from swirl_kernels.linear_logprob.targets import wide_targets


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
    workspace_mb: float = ...,
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
    workspace_mb: float = ...,
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
    workspace_mb: float = 256,
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
    workspace_mb: MiB of logits that may exist at any moment: working tiles, and tiles held from forward to backward.

    Returns logp [N], natural logarithm, fp32 (float64 for float64 inputs), or (logp, entropy). Gradients for hidden,
    weight and bias through both; a frozen input costs nothing, and rows whose upstream gradient is exactly zero are
    skipped exactly.

    Precision: sums over the vocabulary and over rows are fp32 (float64 for float64). In bf16 and fp16 the torch path's
    logits carry the rounding of the matrix product's output, except the target's own logit, which is computed in fp32;
    Triton's are the product's fp32 accumulator, and dz is rounded once to the compute dtype.
    Repeatability: where the vocabulary is cut depends on the settings and dtypes, never on N, and rows never mix. In
    Triton the bits of logp and entropy therefore do not depend on permutation or packing. Elsewhere (torch's forward,
    both gradients) the matrix library may round differently for another number of rows: in fp32 a row's results agree
    to 1e-6 (relative, and 2e-6 absolute).

    Raises ValueError for wrong shapes, dtypes, devices or settings, and for a target outside the vocabulary (row and
    value named).

    Cost in floating-point operations: 2NHV forward, 6NHV backward, of which 2NHV compute the logits again. The torch
    path holds tiles that fit into workspace_mb instead, so that there a small N costs 6NHV in all (as full logits do,
    besides the passes over them). Scheme: Wijmans et al., "Cut Your Losses", arXiv 2411.09009; unlike theirs, no entry of the softmax is
    dropped for being small.
    """
    targets = wide_targets(targets)
    settings = _checked(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        logit_scale,
        valid_vocab,
        entropy,
        ignore_index,
        workspace_mb,
    )
    backend = choose_backend("linear_logprob", hidden, settings.compute_dtype)
    per_row = temperature.detach() if isinstance(temperature, Tensor) else None
    if per_row is not None and logit_scale != 1.0:
        per_row = per_row.to(settings.statistics) / logit_scale
    logp, entropies = LinearLogprob.apply(hidden, weight, bias, targets, per_row, settings, backend)
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
    entropy: bool,
    ignore_index: int,
    workspace_mb: float,
) -> Settings:
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; use a positive number, or None for no cap")
    if isinstance(logit_scale, Tensor) or not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale is {logit_scale}; use a positive finite float (it has no gradient)")
    if not workspace_mb > 0:
        raise ValueError(f"workspace_mb is {workspace_mb}; use a positive number of MiB")
    live = targets != ignore_index
    wrong = torch.nonzero(live & ((targets < 0) | (targets >= valid_vocab)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {valid_vocab}); rows to leave out "
            f"carry ignore_index={ignore_index}"
        )
    if isinstance(temperature, Tensor):
        if temperature.shape != (rows,) or not temperature.is_floating_point() or temperature.requires_grad:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}, dtype {temperature.dtype}, requires_grad="
                f"{temperature.requires_grad}; give a float, or a floating tensor [{rows}] without gradient"
            )
        wrong = torch.nonzero(live & ~((temperature > 0) & temperature.isfinite()))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"temperature[{row}] is {float(temperature[row])}; it must be positive and finite")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite (greedy has no distribution)")
    return Settings(
        compute_dtype=_compute_dtype(hidden, weight),
        temperature=1.0 if isinstance(temperature, Tensor) else float(temperature) / logit_scale,
        softcap=None if softcap is None else softcap / logit_scale,
        valid_vocab=valid_vocab,
        entropy=entropy,
        ignore_index=ignore_index,
        workspace_mb=float(workspace_mb),
    )


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that the matrix products compute in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or call under torch.autocast")
    return hidden.dtype
