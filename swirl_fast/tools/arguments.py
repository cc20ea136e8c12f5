"""The text of a call -> the arguments of a tool, by its JSON schema; or what is wrong with it, in a sentence for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from swirl_fast.tools.tool import ToolSpec, type_name


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
    known = spec.parameters.get("properties", {})
    missing = [name for name in spec.parameters.get("required", ()) if name not in arguments]
    surplus = [name for name in arguments if name not in known]
    if missing:
        raise ArgumentError(f"The call of {spec.name} lacks {', '.join(missing)}. Write {usage}.")
    if surplus and not spec.parameters.get("additionalProperties", False):
        allowed = ", ".join(known) or "no arguments"
        raise ArgumentError(f"{spec.name} does not know {', '.join(surplus)[:100]}; it takes {allowed}.")
    for name, value in arguments.items():
        schema = known.get(name, {})
        error = next(iter(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value)), None)
        if error is not None:
            shown = json.dumps(value, ensure_ascii=False)
            wanted = f"must be {type_name(schema)}" if error.validator in ("type", "enum") else error.message[:200]
            raise ArgumentError(f"The argument {name} of {spec.name} is {shown[:100]}: {wanted}.")
        if isinstance(value, float) and schema.get("type") == "integer":
            arguments[name] = int(value)  # 3.0 is a whole number to JSON
    return arguments


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator  # only where a tool takes more than a text

    return Draft202012Validator(json.loads(schema))


def strict_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, is nested too deeply, has a name twice, or numbers that JSON does not have."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")
