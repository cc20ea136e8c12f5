"""Writes docs/python_reference.md from the signatures and docstrings of what is public: `make generated`."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import swirl_fast
import swirl_kernels
from swirl_fast.outputs.run import OpenRun

HEAD = """\
<!-- Written by `make generated` (docs/reference.py) from the docstrings; do not edit it here. -->
# Python reference

What is public: the functions of `swirl_fast` ([a tour](python_api.md)), what `open_run` gives, and `swirl_kernels`
([a tour](../kernels/README.md)).
"""


def document() -> str:
    parts = [HEAD, "## swirl_fast", *_functions(swirl_fast), "## OpenRun", _text(OpenRun)]
    for name, member in inspect.getmembers(OpenRun):
        if not name.startswith("_") and inspect.getdoc(member):
            signature = "" if isinstance(member, property) else _signature(member)
            parts += [f"### OpenRun.{name}", f"```python\n{name}{signature}\n```", _text(member)]
    return "\n\n".join([*parts, "## swirl_kernels", *_functions(swirl_kernels)]) + "\n"


def _functions(module: ModuleType) -> list[str]:
    parts = []
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if callable(value):
            parts += [f"### {name}", f"```python\n{name}{_signature(value)}\n```", _text(value)]
    return parts


def _signature(value: object) -> str:
    """One argument a line where it is long; defaults as they are written."""
    found = inspect.signature(value)  # type: ignore[arg-type]
    whole = re.sub(r"<(?:function|class|module) ([^ >]+)[^>]*>", r"\1", str(found)).replace("'", "")
    if len(whole) < 90 or not found.parameters:
        return whole
    lines = [re.sub(r"<[^>]+>", "…", str(parameter)).replace("'", "") for parameter in found.parameters.values()]
    ends = (
        "" if found.return_annotation is inspect.Signature.empty else f" -> {found.return_annotation}".replace("'", "")
    )
    return "(\n    " + ",\n    ".join(lines) + f",\n){ends}"


def _text(value: object) -> str:
    """A docstring as it is written: it holds formulas and drawings."""
    return f"```text\n{inspect.getdoc(value)}\n```"


if __name__ == "__main__":
    print(document(), end="")
