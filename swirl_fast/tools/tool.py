"""What a tool is to everybody but itself: its name, what it does, the arguments of a call; and the form in which a result becomes the next
user turn. Prompt, parser, judges, demonstrations and report take all of it from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_ARGUMENT_CHARS = 2_000


@dataclass(frozen=True)
class ToolSpec:
    """What a model is told of a tool, and how its calls are read.

    description: what to give it and what comes back, for the prompt. parameters: JSON schema of the arguments, an object. tag: what a call
    stands between, `<tag>…</tag>`. max_chars: of the text of a call. source: the built-in name, or the reference that it is loaded from.
    identity: names the tool in fingerprints and in the ids of judges; a built-in name, or NAME@HASH.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    tag: str
    source: str
    identity: str
    max_chars: int = MAX_ARGUMENT_CHARS

    @property
    def text_parameter(self) -> str | None:
        """The parameter that takes the text of a call as it is, where there is only one and it is any text; else arguments are JSON."""
        properties = self.parameters.get("properties", {})
        if len(properties) != 1 or self.parameters.get("required") != list(properties):
            return None
        ((name, schema),) = properties.items()
        text = isinstance(schema, Mapping) and schema.get("type") == "string" and "enum" not in schema
        return name if text else None

    @property
    def usage(self) -> str:
        """The form of a call, such as `<math_exp>…</math_exp>` or `<convert>{"value": …, "to": …}</convert>`."""
        return f"<{self.tag}>{'…' if self.text_parameter else self.arguments_form}</{self.tag}>"

    @property
    def arguments_form(self) -> str:
        """Such as `{"value": …, "to": …}`."""
        entries = ", ".join(f"{json.dumps(name)}: …" for name in self.parameters.get("properties", {}))
        return f"{{{entries}}}"

    @property
    def schema(self) -> dict[str, Any]:
        """What a chat template is given of a tool."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    @property
    def arguments(self) -> str:
        """What the arguments are, in words: `value (number): the length; to ("m" or "ft"): the unit`; empty for a tool that takes plain
        text and says no more of it."""
        properties, required = self.parameters.get("properties", {}), self.parameters.get("required", ())
        parts = []
        for name, schema in properties.items():
            kind = type_name(schema) + ("" if name in required else ", optional")
            described = isinstance(schema, Mapping) and schema.get("description")
            meaning = f": {schema['description']}" if described else ""
            if self.text_parameter:
                return meaning.removeprefix(": ")
            parts.append(f"{name} ({kind}){meaning}")
        return "; ".join(parts)


def type_name(schema: Any) -> str:
    """A JSON schema in a few words."""
    if not isinstance(schema, Mapping):
        return "any value"
    if "enum" in schema:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    kind = schema.get("type")
    names = {
        "string": "text",
        "integer": "whole number",
        "boolean": "true or false",
        "array": "list",
        "object": "table",
        "null": "null",
    }
    if kind == "array" and isinstance(schema.get("items"), Mapping) and "type" in schema["items"]:
        return f"list of {type_name(schema['items'])}"
    if isinstance(kind, list):
        return " or ".join(names.get(one, str(one)) for one in kind)
    return names.get(str(kind), "number" if kind == "number" else "any value")


def text_tool(name: str, tag: str, parameter: str, description: str) -> ToolSpec:
    """A built-in tool whose call is one text."""
    parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return ToolSpec(name, description, parameters, tag, name, name)


CALCULATOR = text_tool(
    "calculator",
    "math_exp",
    "expression",
    "a calculator: write one arithmetic expression with + - * / ^ ( ) and numbers; it gives back the value",
)
SEARCH = text_tool(
    "search",
    "search_query",
    "query",
    "a search engine: write a few words about one fact; it gives back the passage that fits them best",
)
BUILT_IN = {spec.name: spec for spec in (CALCULATOR, SEARCH)}


def observation(argument: str, result: str) -> str:
    """`QUERY -> RESULT`, the form of an observation."""
    return f"{argument} -> {result}"
