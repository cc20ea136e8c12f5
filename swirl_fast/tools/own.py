"""A user's function or class as a tool: what it says of itself, checked before any work.

A function needs types and a docstring with Google-style `Args:`; transformers' get_json_schema makes the schema of it. A class, or an
object, has `name`, `description`, `parameters` (a JSON schema) and `call(**arguments)`; and, if it wants, `begin(question)` and `end()` for
state of one question, and `__enter__` and `__exit__` for what all questions share.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.config.references import identity, load
from swirl_fast.tools.arguments import schema_problem
from swirl_fast.tools.tool import BUILT_IN, ToolSpec

KEY = "tasks.tools"
MAX_CHARS = 20_000  # of the text of a call
CONTROL = {"s", "bos", "eos", "pad", "unk", "mask", "start_of_turn", "end_of_turn"}  # tags of tokenizers
RESERVED = CONTROL | {
    "answer",
    "think",
    "thinking",
    "tool_call",
    "tool_response",
    *BUILT_IN,
    *(spec.tag for spec in BUILT_IN.values()),
}


def own_tool(reference: str) -> Any:
    """The function, class or object. Raises ConfigError."""
    found = load(KEY, reference, tuple(BUILT_IN))
    if not (inspect.isroutine(found) or hasattr(found, "call")):
        kind = "class" if inspect.isclass(found) else type(found).__name__
        raise ConfigError(
            f"{KEY}={reference}: must be a function, or a class with a method `call`; this is a {kind} without one"
        )
    return found


def own_spec(reference: str) -> ToolSpec:
    """Raises ConfigError for what the tool forgets, by name."""
    found = own_tool(reference)
    if inspect.isroutine(found):
        name, description, parameters = _of_function(reference, found)
    else:
        name, description, parameters = _of_class(reference, found)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name) or name.lower() in RESERVED:
        raise ConfigError(
            f"{KEY}={reference}: the name {name!r} cannot be a tag: use letters, digits and _, and none of {', '.join(sorted(RESERVED))}"
        )
    parameters = _checked_schema(reference, parameters)
    _check_signature(reference, found, parameters)
    description = " ".join(description.split())
    return ToolSpec(name, description, parameters, name, reference, identity(KEY, reference), MAX_CHARS)


def _of_function(reference: str, function: Any) -> tuple[str, str, Any]:
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(function)["function"]
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, and what typing raises
        raise ConfigError(
            f"{KEY}={reference}: {str(error).rstrip(' .!')}. A tool needs a type for every argument, and a docstring that says what it "
            "does and, below `Args:`, what each argument is"
        ) from None
    return schema["name"], schema["description"], schema["parameters"]


def _of_class(reference: str, found: Any) -> tuple[str, str, Any]:
    lacks = [name for name in ("name", "description") if not isinstance(getattr(found, name, None), str)]
    parameters = getattr(found, "parameters", None)
    if not isinstance(parameters, Mapping):
        lacks.append("parameters")
    if hasattr(found, "begin") != hasattr(found, "end"):
        lacks.append("end" if hasattr(found, "begin") else "begin")
    if lacks:
        raise ConfigError(
            f"{KEY}={reference}: lacks {', '.join(lacks)}: a tool has the texts name and description, a JSON schema parameters, and a "
            "method call; state of one question begins with begin(question) and ends with end()"
        )
    if inspect.isclass(found):
        try:
            inspect.signature(found).bind()
        except (TypeError, ValueError):
            raise ConfigError(f"{KEY}={reference}: the class must be made without arguments") from None
    elif hasattr(found, "begin"):
        raise ConfigError(
            f"{KEY}={reference}: a tool with begin(question) must be a class, for every question has its own object"
        )
    return found.name, found.description, parameters


def _checked_schema(reference: str, parameters: Any) -> dict[str, Any]:
    try:
        schema = json.loads(json.dumps(parameters))
        problem = schema_problem(schema)
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)[:300]
    if problem:
        raise ConfigError(f"{KEY}={reference}: parameters is not a JSON schema: {problem}")
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    if properties is None or schema.get("type", "object") != "object":
        raise ConfigError(
            f'{KEY}={reference}: parameters must be a JSON schema of an object, as {{"type": "object", "properties": {{"value": {{"type": '
            '"number"}}, "required": ["value"]}'
        )
    if unknown := [name for name in schema.get("required", ()) if name not in properties]:
        raise ConfigError(
            f"{KEY}={reference}: parameters requires {', '.join(unknown)}, which are not among its properties"
        )
    for one in properties.values():
        if isinstance(one, dict) and one.pop("nullable", False) and isinstance(one.get("type"), str):
            one["type"] = [one["type"], "null"]
    return {"type": "object", **schema, "properties": properties, "required": list(schema.get("required", ()))}


def _check_signature(reference: str, found: Any, parameters: Mapping[str, Any]) -> None:
    call = found if inspect.isroutine(found) else found.call
    arguments = dict.fromkeys(parameters["properties"])
    try:
        bound = (
            (None,)
            if inspect.isclass(found)
            and not isinstance(inspect.getattr_static(found, "call"), staticmethod | classmethod)
            else ()
        )
        inspect.signature(call).bind(*bound, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{KEY}={reference}: it cannot be called with the arguments of its schema, {', '.join(arguments)}: {error}"
        ) from None
