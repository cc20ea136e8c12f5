"""linear_logprob as an operator of torch.library: what torch checks of one, and compiled callers."""

from typing import Any

import pytest
import torch
from support.linear_logprob_cases import inputs, results, upstream
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from swirl_kernels import linear_logprob
from swirl_kernels.linear_logprob.ops import linear_logprob_backward, linear_logprob_forward


@pytest.mark.parametrize("dtype, keep, all_rows", [(torch.float32, True, True), (torch.bfloat16, False, False)])
def test_torch_finds_nothing_wrong_with_the_operators(dtype: torch.dtype, keep: bool, all_rows: bool) -> None:
    """Schema, fake tensors, autograd, compiled with sizes that vary."""
    hidden, weight, bias, targets = inputs(6, 10, 4, ignored=0.3)
    hidden, weight, bias = (x.detach().to(dtype).requires_grad_(keep) for x in (hidden, weight, bias))
    temperatures = torch.rand(6) + 0.5
    tensors = hidden, weight, bias, targets, temperatures
    options: tuple[Any, ...] = dtype, 1.0, 2.0, 9, True, -100, 256.0, all_rows, False
    targets.clamp_(max=8)
    torch.library.opcheck(linear_logprob_forward, (*tensors, *options, keep))
    made = linear_logprob_forward(*(x.detach() for x in tensors), *options, keep)
    g, h = (upstream(6, seed, 0.3).float() for seed in (1, 2))
    torch.library.opcheck(
        linear_logprob_backward, (g, h, *(x.detach() for x in tensors), *made, *options, True, True, True)
    )


@pytest.mark.parametrize("chosen", ["live", "all"])
def test_a_compiled_caller_is_one_graph_for_all_lengths(chosen: Any) -> None:
    hidden, weight, bias, targets = inputs(33, 60, 8, ignored=0.2)
    hidden, weight, bias = (x.detach().float().requires_grad_() for x in (hidden, weight, bias))

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        logp, entropies = linear_logprob(
            2 * hidden, weight, targets, bias=bias, entropy=True, temperature=0.7, softcap=5.0, rows=chosen
        )
        return logp.exp().log(), entropies

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for rows in (33, 17, 8, 2):
        arguments = hidden.detach()[:rows].clone().requires_grad_(), weight, targets[:rows].clone()
        options = dict(bias=bias, g=upstream(rows, 1, 0.3), h=upstream(rows, 2))
        got, expected = results(compiled, *arguments, **options), results(head, *arguments, **options)
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, msg=lambda m, n=name: f"{n}: {m}")
        compilations.add(counter.frame_count)  # torch counts a float that it specialises on as one more, the first time
    assert len(compilations) == 1


@pytest.mark.parametrize("workspace_mb, made_again", [(256.0, 0), (1e-6, 1)])
def test_its_products_are_counted(workspace_mb: float, made_again: int) -> None:
    """Forward and gradient of hidden, and the logits once more where none were kept."""
    hidden, weight, targets = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4), torch.randint(0, 10, (6,))
    with FlopCounterMode(display=False) as counter:
        logp = linear_logprob(hidden, weight, targets, workspace_mb=workspace_mb)
        assert counter.get_total_flops() == 2 * 6 * 4 * 10
        logp.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 4 * 10 * (2 + made_again)
