"""`streaming.base` of mosaicml-streaming, which shards are compared with; only tests use it.

The package's own `__init__` imports vision data sets and so torchvision: an empty package takes its place during the import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def streaming() -> Any:
    if "streaming.base" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        assert spec is not None, "pip install --no-deps mosaicml-streaming, as `make install` does"
        sys.modules["streaming"] = importlib.util.module_from_spec(spec)
        try:
            importlib.import_module("streaming.base")
        finally:
            del sys.modules["streaming"]
    return sys.modules["streaming.base"]
