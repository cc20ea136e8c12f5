"""Import-only stand-in for sgl_kernel, of which no CPU wheel exists: every name is a function that raises. None is called on a CPU."""

import sys
import types

__version__ = "0.3.21"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{self.__name__}.{name}")


def _missing(name):
    def function(*arguments, **named):
        raise NotImplementedError(f"{name} was called on a CPU")

    return function


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(f"sgl_kernel.{name}")


sys.modules["sgl_kernel.kvcacheio"] = _Module("sgl_kernel.kvcacheio")
