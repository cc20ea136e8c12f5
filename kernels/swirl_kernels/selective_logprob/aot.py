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


def aot_cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        for entropy in (False, True):
            suffix = f"{dtype}{' entropy' if entropy else ''}"
            constants = {"ENTROPY": entropy, "BLOCK": FORWARD_BLOCK}
            options = dict.fromkeys(constants, "constexpr")
            statistics = ("inverse_temperature", "tops", "others", "weighted", "target_logits")
            signature = {"logits": f"*{dtype}", "targets": "*i64", "live": "*u8", **dict.fromkeys(statistics, "*fp32")}
            signature |= {"V": "i32", "stride": "i32"} | options
            aligned = ("logits", "stride", "V")
            name = f"selective_logprob forward {suffix}"
            each = FORWARD_BLOCK // (32 * WARPS)
            stream = Stream("loops", bits=128, apart=True, elements=each, limit=None if entropy else 10)
            cases.append(
                AotCase(name, _statistics_kernel, signature, constants, WARPS, 3, aligned=aligned, stream=stream)
            )
            rows = ("inverse_temperature", "largest", "log_total", "entropy", "at_target", "g")
            signature = {"out": f"*{dtype}", "logits": f"*{dtype}", "targets": "*i64", "flows": "*u8"}
            signature |= {**dict.fromkeys(rows, "*fp32"), "h": "*fp32" if entropy else "constexpr"}
            signature |= dict.fromkeys(("V", "W", "blocks", "out_stride", "stride"), "i32") | options
            gradient = {"ENTROPY": entropy, "BLOCK": BACKWARD_BLOCK} | ({} if entropy else {"h": None})
            pointers = ("out", "logits", "out_stride", "stride", "V", "W")
            name = f"selective_logprob backward {suffix}"
            stream = Stream("kernel", bits=128, narrow=1)  # one byte a row says whether a gradient flows
            cases.append(AotCase(name, _dlogits_kernel, signature, gradient, WARPS, 3, aligned=pointers, stream=stream))
    return cases
