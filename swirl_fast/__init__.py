"""swirl-fast: Step-Wise Reinforcement Learning (arXiv 2504.04736) of language models that use tools over many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swirl_fast.api import load_config, open_run, run

__version__ = "0.1.0"
__all__ = ["__version__", "load_config", "open_run", "run"]


def __getattr__(name: str) -> Any:
    """The functions of swirl_fast/api.py, loaded when they are first asked for."""
    if name in ("load_config", "open_run", "run"):
        from swirl_fast import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
