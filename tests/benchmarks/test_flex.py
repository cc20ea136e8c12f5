import pytest
import torch

from benchmarks.kernels.flex import flex_tree_attention, flex_tree_mask
from swirl_kernels import naive_tree_attention

#                     trunk      a long tooth  a short one  the trunk goes on    a second tree
END = torch.tensor([300] * 100 + [200] * 100 + [210] * 10 + [300] * 90 + [333] * 33, dtype=torch.int32)
DEPTH = torch.tensor([*range(100), *range(100, 200), *range(100, 110), *range(100, 190), *range(33)])


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"window": 40}, {"window": 40, "depth": 2 * DEPTH}, {"scale": 0.7}],
    ids=["plain", "softcap", "window", "depth", "scale"],
)
@pytest.mark.parametrize("mask", ["made here", "passed"])
def test_forward_equals_naive(options, mask) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 333, 16), torch.randn(2, 333, 16), torch.randn(2, 333, 16)
    expected = naive_tree_attention(q.double(), k.double(), v.double(), END, **options)
    if mask == "passed":
        for_mask = {name: options.get(name) for name in ("depth", "window")}
        rest = {name: value for name, value in options.items() if name not in for_mask}
        got = flex_tree_attention(q, k, v, END, block_mask=flex_tree_mask(END, **for_mask), **rest)
    else:
        got = flex_tree_attention(q, k, v, END, **options)
    error, size = (got - expected).norm(dim=-1), expected.norm(dim=-1)
    assert error.norm() <= 1e-6 * size.norm()
    assert (error <= 4e-6 * size).all()


def test_blocks_nobody_sees_are_left_out() -> None:
    mask = flex_tree_mask(torch.tensor([512] * 128 + [256] * 128 + [512] * 256))
    assert mask.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
