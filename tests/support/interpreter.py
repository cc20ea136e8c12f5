"""Triton's interpreter without the work that it repeats in every call of a device function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def patch_once_a_launch() -> None:
    """The interpreter replaces the functions of triton.language by its own when a kernel is launched, and all of them again whenever the
    kernel calls a function that is @triton.jit itself, of which tl.zeros, tl.sum and tl.max are some: three quarters of the time of most
    kernels. Here a call finds what the launch has replaced. Does nothing without triton.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    replace: Callable[[Any], Any] = interpreter._patch_lang

    @functools.cache
    def languages(fn: Any) -> tuple[Any, ...]:
        return tuple(x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))

    def replace_once(fn: Any) -> Any:
        if all(not tl.core.is_builtin(language.load) for language in languages(fn)):
            return interpreter._LangPatchScope()  # nothing to put back
        return replace(fn)

    interpreter._patch_lang = replace_once
