"""What `python -m swirl_kernels.aot` compiles of selective_logprob."""

from __future__ import annotations

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.selective_logprob.triton import (
    BACKWARD_BLOCK,
    FORWARD_BLOCK,
    WARPS,
    _dlogits_kernel,
    _statistics_kernel,
)

LIMITS = {False: 9, True: 13}  # instructions a logit of the forward, without and with entropy
STATISTICS = ("inverse_temperature", "tops", "others", "weighted", "target_logits")
ROWS = ("inverse_temperature", "largest", "log_total", "entropy", "at_target", "g")


def aot_cases() -> list[AotCase]:
    """Rows on 16-byte boundaries, V a multiple of 16 and not; rows whose stride is odd, which are read 2 bytes at a time."""
    cases = []
    for rows in ("", "odd V", "odd stride"):
        for dtype in ("bf16", "fp32"):
            for entropy in (False, True):
                if not rows or (dtype == "bf16" and not entropy):
                    words = [dtype, *(["entropy"] if entropy else []), *filter(None, [rows])]
                    cases += [_forward(dtype, entropy, rows, " ".join(words)), _backward(dtype, entropy, rows, " ".join(words))]
    return cases


def _forward(dtype: str, entropy: bool, rows: str, words: str) -> AotCase:
    width = 8 if dtype == "bf16" else 4
    constants = {"ENTROPY": entropy, "WIDTH": width, "BLOCK": FORWARD_BLOCK}
    signature = {"logits": f"*{dtype}", "targets": "*i64", "live": "*u8", **dict.fromkeys(STATISTICS, "*fp32")}
    signature |= {"V": "i32", "stride": "i32"} | dict.fromkeys(constants, "constexpr")
    stream = Stream(bits=128, apart=True, elements=FORWARD_BLOCK // (32 * WARPS), limit=LIMITS[entropy])
    return AotCase(
        f"selective_logprob forward {words}",
        _statistics_kernel,
        signature,
        constants,
        WARPS,
        3,
        aligned=_aligned(("logits", "targets", "live", *STATISTICS), ("stride",), ("V",), rows),
        stream=None if rows == "odd stride" else stream,
    )


def _backward(dtype: str, entropy: bool, rows: str, words: str) -> AotCase:
    constants = {"ENTROPY": entropy, "BLOCK": BACKWARD_BLOCK} | ({} if entropy else {"h": None})
    signature = {"out": f"*{dtype}", "logits": f"*{dtype}", "targets": "*i64", "flows": "*u8"}
    signature |= {**dict.fromkeys(ROWS, "*fp32"), "h": "*fp32" if entropy else "constexpr"}
    signature |= dict.fromkeys(("V", "W", "blocks", "out_stride", "stride"), "i32")
    signature |= {"ENTROPY": "constexpr", "BLOCK": "constexpr"}
    pointers = ("out", "logits", "targets", "flows", *ROWS, *(("h",) if entropy else ()))
    each = BACKWARD_BLOCK // (32 * WARPS)
    # Of the tail, one load, a store with a gradient and one without an element; a byte a row says whether there is any.
    narrow = 1 + (3 * each if rows == "odd V" else 0)
    return AotCase(
        f"selective_logprob backward {words}",
        _dlogits_kernel,
        signature,
        constants,
        WARPS,
        3,
        aligned=_aligned(pointers, ("stride", "out_stride"), ("V", "W"), rows),
        stream=None if rows == "odd stride" else Stream("kernel", bits=128, narrow=narrow),
    )


def _aligned(pointers: tuple[str, ...], strides: tuple[str, ...], sizes: tuple[str, ...], rows: str) -> tuple[str, ...]:
    """Whatever torch has just made begins on a boundary."""
    return (*pointers, *(strides if rows != "odd stride" else ()), *(sizes if not rows else ()))
