"""Cases of the whole policy: a transformers model over a comb against the same model over one row at a time, in its own attention."""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.parity.measure import NotRun, Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from benchmarks.step_training.ways import Case

FAMILIES = ("llama", "gemma2")  # tied and plain; soft-caps, sliding windows and norms after the blocks
COARSER = 1.5  # how much more than one row at a time may a comb be off in 16 bits: both round the same operations


def comb_of_a_model(run: Run, family: str, liger: bool = False) -> None:
    """Log-probs and the gradient of every parameter. In float32 against float64; in 16 bits (autocast) the error of the comb against
    that of separate rows, which holds for any model, however many roundings it has. liger: the comb's model with liger-kernel's
    layers, which replace those of all models of the family in this process."""
    if liger and run.device != "cuda":
        raise NotRun("needs a GPU")
    if liger and importlib.util.find_spec("liger_kernel") is None:
        raise NotRun("liger-kernel is not installed")
    from benchmarks.step_training.ways import Shape, make_case
    from swirl_fast.comb.tree import pack
    from swirl_fast.config import TrainingConfig
    from swirl_fast.models.policy import DeviceComb, Policy
    from swirl_fast.training.layers import prepare

    model = _model(family).to(run.device)
    shape = Shape(prompt=9, action=3, result=5) if run.small else Shape(prompt=150, action=40, result=61)
    case = make_case(shape, states=3, samples=3, vocab=model.config.vocab_size)
    exact_logp, exact = _one_row_at_a_time(copy.deepcopy(model).double(), case, None)
    autocast = None if run.dtype == torch.float32 else run.dtype
    rows_logp, rows = _one_row_at_a_time(model, case, autocast)

    model.zero_grad(set_to_none=True)
    comb = pack(list(case.branches))
    policy = Policy(model, autocast=autocast)
    prepare(policy, TrainingConfig(liger=liger))
    logp_N = policy(DeviceComb.of(comb, run.device))
    weight_N = case.weight_A[torch.from_numpy(np.repeat(comb.indices_A, np.diff(comb.offsets))).long()]
    (-(weight_N.to(run.device) * logp_N).sum()).backward()
    order = torch.from_numpy(np.argsort(comb.indices_A))
    logp = torch.cat([logp_N.detach()[comb.offsets[a] : comb.offsets[a + 1]] for a in order.tolist()])
    gradients = _gradients(model)

    if autocast is None:
        run.compare("logp", logp, exact_logp)
        for name, gradient in exact.items():
            run.compare("gradient", gradients[name], gradient)
        return
    for name, ours, theirs, right in (
        ("logp", logp, rows_logp, exact_logp),
        ("gradient", *(torch.cat([x.flatten() for x in xs.values()]) for xs in (gradients, rows, exact))),
    ):
        error, allowed = ((x.double() - right).norm() for x in (ours, theirs))
        run.note(f"{name} beside rows", float(error / allowed), COARSER)


def _model(family: str) -> PreTrainedModel:
    """Random weights, large enough that attention is far from uniform; the same on every call."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

    shape = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 997,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    capped = {
        "sliding_window": 37,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
        "query_pre_attn_scalar": 64,
    }
    if family == "gemma2":
        config: PreTrainedConfig = Gemma2Config(**shape, **capped)
    else:
        config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def _one_row_at_a_time(
    model: PreTrainedModel, case: Case, autocast: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probs of all actions, in order; gradients), by the model's own attention, full logits and log_softmax."""
    model.zero_grad(set_to_none=True)
    logps = []
    for state, action, index in case.rows():
        tokens = torch.from_numpy(np.concatenate([state, action])).long().to(model.device)
        with torch.autocast(model.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(tokens[None], use_cache=False).logits[0]
        exact = logits if logits.dtype == torch.float64 else logits.float()
        predicting = exact[len(state) - 1 : len(tokens) - 1].log_softmax(-1)
        logp = predicting.gather(1, tokens[len(state) :, None])[:, 0]
        (-float(case.weight_A[index]) * logp.sum()).backward()
        logps.append(logp.detach())
    return torch.cat(logps), _gradients(model)


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
