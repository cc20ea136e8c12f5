"""The text of a call -> the arguments of a tool, by its JSON schema; or what is wrong with it, in a sentence for the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from swirl_fast.tools.tool import ToolSpec, type_name

MAX_DEPTH = 64  # of lists and tables in each other
MAX_BITS = 14_000  # of a whole number: Python writes none of more than 4,300 digits


class ArgumentError(ValueError):
    """A sentence addressed to the model."""


def read_arguments(spec: ToolSpec, text: str) -> dict[str, Any]:
    """The arguments by name. Raises ArgumentError."""
    if spec.text_parameter:
        return {spec.text_parameter: text}
    try:
        arguments = strict_json(text or "{}")
    except ValueError as error:
        raise ArgumentError(f"The text in <{spec.tag}> is not valid JSON ({error}). Write {spec.usage}.") from None
    return checked_arguments(spec, arguments)


def checked_arguments(spec: ToolSpec, arguments: Any, usage: str | None = None) -> dict[str, Any]:
    """Arguments that are parsed already. usage: what to write, by default the tag. Raises ArgumentError for missing, surplus and wrong
    ones."""
    usage = usage or spec.usage
    if not isinstance(arguments, dict):
        raise ArgumentError(f"The arguments of {spec.name} must be a JSON object. Write {usage}.")
    try:
        check_json(arguments)
    except ValueError as problem:
        raise ArgumentError(f"The arguments of {spec.name} cannot be read: {problem}. Write {usage}.") from None
    known = spec.parameters.get("properties", {})
    missing = [name for name in spec.parameters.get("required", ()) if name not in arguments]
    surplus = [name for name in arguments if name not in known and not _is_open(spec, name)]
    if missing:
        raise ArgumentError(f"The call of {spec.name} lacks {', '.join(missing)}. Write {usage}.")
    if surplus:
        allowed = ", ".join(known) or "no arguments"
        raise ArgumentError(f"{spec.name} does not know {', '.join(surplus)[:100]}; it takes {allowed}.")
    try:
        error = next(_validator(json.dumps(spec.parameters)).iter_errors(arguments), None)
    except (ArithmeticError, RecursionError) as problem:  # 10**400 is no multiple of 0.01; a schema refers to itself
        raise ArgumentError(f"The arguments of {spec.name} cannot be checked: {problem}.") from None
    if error is not None:
        raise ArgumentError(_said(spec, arguments, error))
    for name, value in arguments.items():
        schema = known.get(name)
        if isinstance(value, float) and isinstance(schema, Mapping) and schema.get("type") == "integer":
            arguments[name] = int(value)  # 3.0 is a whole number to JSON
    return arguments


def _is_open(spec: ToolSpec, name: str) -> bool:
    """Whether a tool takes an argument that is not among its properties: JSON Schema lets all pass where nothing is said of them; here it
    must say so, or say nothing of any argument. What it says of them, the whole schema checks."""
    schema = spec.parameters
    if "properties" not in schema or schema.get("additionalProperties", False) is not False:
        return True
    return any(re.search(pattern, name) for pattern in schema.get("patternProperties", ()))


def fits(spec: ToolSpec, name: str, value: Any) -> bool:
    """Whether an argument may have a value."""
    schema = spec.parameters.get("properties", {}).get(name, True)
    try:
        return next(_validator(json.dumps(spec.parameters)).descend(value, schema), None) is None
    except (ArithmeticError, RecursionError):
        return False


def _said(spec: ToolSpec, arguments: dict[str, Any], error: Any) -> str:
    """A ValidationError in a sentence."""
    path = list(error.absolute_path)
    what, value = (
        (f"argument {path[0]} of {spec.name} is", arguments[path[0]])
        if path
        else (f"arguments of {spec.name} are", arguments)
    )
    named = len(path) == 1 and error.validator in ("type", "enum")
    wanted = f"must be {type_name(error.schema)}" if named else error.message[:200]
    return f"The {what} {json.dumps(value, ensure_ascii=False)[:100]}: {wanted}."


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Of the whole schema, for its parts may refer to its `$defs`; nothing is fetched."""
    from jsonschema import Draft202012Validator  # only where a tool takes more than a text
    from referencing import Registry

    return Draft202012Validator(json.loads(schema), registry=Registry())


def schema_problem(schema: Any) -> str:
    """What is wrong with a JSON schema; empty for one by which arguments can be checked."""
    return _schema_problem(json.dumps(schema))


@lru_cache(maxsize=4096)
def _schema_problem(text: str) -> str:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema, reference = json.loads(text), ""
    try:
        Draft202012Validator.check_schema(schema)
        resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
        for reference in _references(schema):
            Draft202012Validator.check_schema(resolver.lookup(reference).contents)
    except SchemaError as error:
        return str(error.message)[:200]
    except (Unresolvable, ValueError):
        shown = repr(reference)[:100]
        return f"$ref = {shown} names nothing in it, and nothing is fetched; refer to its own parts, as #/$defs/NAME"
    return ""


def _references(schema: Any) -> Iterator[str]:
    """The `$ref`s of a schema and of all its parts."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from (part[key] for key in ("$ref", "$dynamicRef") if isinstance(part.get(key), str))
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def strict_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, has a name twice, or is refused by `check_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_json(value)
    return value


def check_json(value: Any) -> None:
    """Raises ValueError for what is nested more than MAX_DEPTH deep, which not all can write again that can read it, for numbers that JSON
    does not have or nobody can write, and for what is no value of JSON, such as a date."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for one in level:
            if not isinstance(one, dict | list | str | int | float | None):
                raise ValueError(f"{type(one).__name__} is no value of JSON")
            if (
                isinstance(one, float)
                and not math.isfinite(one)
                or isinstance(one, int)
                and one.bit_length() > MAX_BITS
            ):
                raise ValueError("a number is too large")
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for values in inside for one in values]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")
