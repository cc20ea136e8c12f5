"""A user's own Python by its name, `FILE.py:NAME` or `MODULE:NAME`: tools, tasks, judges, score functions.

What a setting names so runs as code, with all rights of the process; nothing else in a config does. Its identity is a hash of its source
and of what it imports from its own folder or package, so that changed code never meets results of earlier code.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from swirl_fast.config.error import ConfigError
from swirl_fast.files import is_file

FORM = "FILE.py:NAME or MODULE:NAME of your own"
_loaded: dict[Path, tuple[str, ModuleType]] = {}  # file -> digest of its sources, module


def is_reference(text: str) -> bool:
    return ":" in text


def absolute(text: str, folder: str | Path | None) -> str:
    """`FILE.py:NAME` with the whole path. FILE lies in `folder`, where the YAML file that names it is, or else in the working directory."""
    place, separator, name = text.rpartition(":")
    if not separator or not place.endswith(".py"):
        return text
    path = Path(place).expanduser()
    if folder is not None and is_file(Path(folder) / path):
        path = Path(folder) / path
    return f"{os.path.abspath(path)}:{name}"


def load(key: str, text: str, known: Sequence[str] = ()) -> Any:
    """The object that `text` names. key: the setting, for messages. known: the built-in names that the setting accepts as well.

    Raises ConfigError where there is no such file, module or name, and where importing it fails.
    """
    place, name = _split(key, text, known)
    source = _source(key, text, place)
    try:
        found: Any = _module(place, source)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        if isinstance(error.obj, ModuleType) and _loaded.get(source, ("", None))[1] is error.obj:
            raise ConfigError(f"{key}={text}: {source} has no {name}; {_names(error.obj)}") from None
        raise ConfigError(f"{key}={text}: {_last_line(error)}") from error
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises when it is imported
        raise ConfigError(f"{key}={text}: {source} cannot be imported: {_last_line(error)}") from error
    return found


def identity(key: str, text: str, known: Sequence[str] = ()) -> str:
    """`NAME@HASH`, which another place of the same source does not change; a built-in name as it is. Raises ConfigError as `load` does, but
    runs nothing."""
    if text in known:
        return text
    place, name = _split(key, text, known)
    return f"{name}@{_digest(_source(key, text, place))}"


@contextlib.contextmanager
def running(key: str, text: str, what: str) -> Iterator[None]:
    """Around what a reference names where it must work before anything else can: raises ConfigError, with the place, for whatever it
    raises."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}={text}: {what} fails: {_last_line(error)}") from error


def _split(key: str, text: str, known: Sequence[str]) -> tuple[str, str]:
    place, separator, name = text.rpartition(":")
    if not separator or not place or not all(part.isidentifier() for part in name.split(".")):
        choices = f"one of {', '.join(known)}, or {FORM}" if known else FORM
        raise ConfigError(f"{key}={text}: must be {choices}, such as mine.py:{key.rpartition('.')[2]}")
    return place, name


def _source(key: str, text: str, place: str) -> Path:
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not is_file(path):
            raise ConfigError(f"{key}={text}: there is no file {path}")
        return path.resolve()
    try:
        _make_importable(Path.cwd())
        with contextlib.redirect_stdout(sys.stderr):
            spec = importlib.util.find_spec(place)
    except (Exception, SystemExit) as error:  # find_spec imports the packages around a module
        raise ConfigError(f"{key}={text}: {place} cannot be imported: {_last_line(error)}") from error
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"{key}={text}: there is no Python module {place}; install it, or name its file, such as "
            f"path/to/{place.rpartition('.')[2]}.py:NAME"
        )
    return Path(spec.origin).resolve()


def _module(place: str, source: Path) -> ModuleType:
    digest = _digest(source)
    if source in _loaded and _loaded[source][0] == digest:
        return _loaded[source][1]
    for name, module in list(sys.modules.items()):  # imported by an earlier version of it
        if source in _loaded and Path(getattr(module, "__file__", None) or "") in _sources(source):
            del sys.modules[name]
    # What it prints goes where messages go: the output of a command may be read by a program.
    _make_importable(source.parent)
    with contextlib.redirect_stdout(sys.stderr):
        module = _from_file(source, digest) if place.endswith(".py") else importlib.import_module(place)
    _loaded[source] = (digest, module)
    return module


def _from_file(source: Path, digest: str) -> ModuleType:
    name = f"{source.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    """The modules of a folder can be imported, also later, when functions of one are called; an installed module of the same name wins."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _digest(source: Path) -> str:
    hashed = hashlib.sha256()
    for path in _sources(source):
        hashed.update(path.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def _sources(source: Path) -> list[Path]:
    """The file, and those of its own folder or package that it imports, directly or through others."""
    root = source.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    installed = {"site-packages", "dist-packages"} & set(root.parts)
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        found[path] = None
        for name in _imports(path, root):
            if installed and name.partition(".")[0] != source.relative_to(root).parts[0]:
                continue
            place = root.joinpath(*name.split("."))
            waiting += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return list(found)


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names that a file imports, relative ones as they are seen from `root`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing it says what is wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(path.relative_to(root).parts[: -node.level]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names if alias.name != "*")


def _names(module: ModuleType) -> str:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return f"it defines {', '.join(own)}" if own else "it defines nothing that could be meant"


def _last_line(error: BaseException) -> str:
    """Such as `ZeroDivisionError: division by zero (mine.py, line 3)`."""
    text = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"{text} ({Path(error.filename or '').name}, line {error.lineno})"
    if frames and "importlib" not in frames[-1].filename:
        text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return text
