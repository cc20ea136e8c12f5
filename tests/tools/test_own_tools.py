"""A user's functions and classes as tools: what is made of them, and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swirl_fast.config import ConfigError
from swirl_fast.formats.tags import parse, render
from swirl_fast.rendering import instructions
from swirl_fast.tools import describe_tools
from swirl_fast.tools.tool import BUILT_IN

CONVERT = '''
from typing import Literal

def convert(value: float, to: Literal["m", "ft"], digits: int = 2, note: str | None = None) -> str:
    """Converts a length.

    Args:
        value: the length
        to: the unit
        digits: after the point
        note: anything
    """

def lookup(query: str) -> str:
    """Looks something up.

    Args:
        query: a few words
    """

def now() -> str:
    """The time."""
'''


def tools(tmp_path: Path, *names: str, text: str = CONVERT):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return describe_tools([name if name in BUILT_IN else f"{path}:{name}" for name in names])


def test_a_typed_function_says_all_that_is_needed(tmp_path: Path) -> None:
    convert, lookup, now = tools(tmp_path, "convert", "lookup", "now")
    assert (convert.name, convert.tag, convert.description) == ("convert", "convert", "Converts a length.")
    assert convert.usage == '<convert>{"value": …, "to": …, "digits": …, "note": …}</convert>'
    assert convert.arguments == (
        'value (number): the length; to ("m" or "ft"): the unit; digits (whole number, optional): after the point; '
        "note (text or null, optional): anything"
    )
    assert (lookup.usage, lookup.arguments, lookup.text_parameter) == ("<lookup>…</lookup>", "a few words", "query")
    assert now.usage == "<now>{}</now>" and now.arguments == ""
    prompt = instructions([convert, *tools(tmp_path, "calculator")], 5)
    assert (
        'To use convert, write <convert>{"value": …' in prompt
        and "Converts a length. Arguments: value (number)" in prompt
    )
    assert "To use the calculator, write <math_exp>…</math_exp>: a calculator: write" in prompt


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('<convert>{"value": 3, "to": "m"}</convert>', {"value": 3, "to": "m"}),
        (
            'a thought\n<convert> {"value": -1e3, "to": "ft", "digits": 2.0} </convert>',
            {"value": -1000.0, "to": "ft", "digits": 2},
        ),
        ('<convert>{"value": 1, "to": "m", "note": null}</convert>', {"value": 1, "to": "m", "note": None}),
        ("<lookup>{not json}</lookup>", {"query": "{not json}"}),
        ("<now></now>", {}),
        ("<now>{}</now>", {}),
    ],
)
def test_calls_are_read(tmp_path: Path, text: str, arguments: dict) -> None:
    offered = tools(tmp_path, "convert", "lookup", "now")
    action = parse(text, offered)
    assert action.kind == "tool" and action.arguments == arguments
    assert [type(value) for value in action.arguments.values()] == [type(value) for value in arguments.values()]
    assert parse(render(action), offered).arguments == arguments


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<convert>value=3</convert>", "is not valid JSON"),
        ('<convert>{"value": 3, "value": 4, "to": "m"}</convert>', "a name comes twice"),
        ('<convert>{"value": NaN, "to": "m"}</convert>', "NaN is not a number in JSON"),
        (f"<convert>{'[' * 5000}</convert>", "not valid JSON"),
        ("<convert>[3]</convert>", "must be a JSON object"),
        ("<convert></convert>", "The tag <convert> is empty"),
        ('<convert>{"value": 3}</convert>', "The call of convert lacks to. Write <convert>"),
        ('<convert>{"value": 3, "to": "m", "from": "ft"}</convert>', "convert does not know from; it takes value, to"),
        ('<convert>{"value": "3", "to": "m"}</convert>', 'The argument value of convert is "3": must be number'),
        ('<convert>{"value": true, "to": "m"}</convert>', "The argument value of convert is true: must be number"),
        ('<convert>{"value": 3, "to": "km"}</convert>', 'The argument to of convert is "km": must be "m" or "ft"'),
        ('<convert>{"value": 3, "to": "m", "digits": 1.5}</convert>', "digits of convert is 1.5: must be whole number"),
        ("<now>{}</now><answer>3</answer>", "more than one tag"),
        ("<lookup> </lookup>", "The tag <lookup> is empty"),
        ("<math_exp>1+1</math_exp>", "There is no tool <math_exp> here. Use <convert>"),
        ("<other>1</other>", "The turn has no tag. End it with <convert>"),
        (f"<lookup>{'x' * 20_001}</lookup>", "longer than 20000 characters"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_to_the_model(tmp_path: Path, text: str, error: str) -> None:
    action = parse(text, tools(tmp_path, "convert", "lookup", "now"))
    assert action.kind == "malformed" and error in action.error


CLASS = """
class Table:
    name = "table"
    description = "Rows of a table."
    parameters = {"type": "object", "properties": {"row": {"type": "integer", "minimum": 0}}, "required": ["row"]}

    def call(self, row):
        return row

class Open(Table):
    name = "open"
    parameters = {"properties": {}, "additionalProperties": True}

    def call(self, **anything):
        return anything

class Place(Table):
    name = "place"
    parameters = {
        "properties": {"where": {"$ref": "#/$defs/Where"}, "note": True, "kind": {"$ref": "#/$defs/Kind"}},
        "required": ["where"],
        "$defs": {
            "Where": {"type": "object", "properties": {"town": {"type": "string"}, "in": {"$ref": "#/$defs/Where"}}},
            "Kind": {"enum": ["a", "b"]},
        },
    }

    def call(self, where, note, kind):
        return where

instance = Table()
"""


def test_a_class_or_an_object_is_a_tool(tmp_path: Path) -> None:
    table, open_ = tools(tmp_path, "Table", "Open", text=CLASS)
    assert table.usage == '<table>{"row": …}</table>' and table.identity.startswith("Table@")
    assert "-1 is less than the minimum of 0" in parse('<table>{"row": -1}</table>', [table]).error
    assert parse('<open>{"whatever": [1]}</open>', [open_]).arguments == {"whatever": [1]}
    assert tools(tmp_path, "instance", text=CLASS)[0].name == "table"


def test_references_inside_a_schema_and_schemas_that_are_true(tmp_path: Path) -> None:
    """As pydantic writes nested models."""
    (place,) = tools(tmp_path, "Place", text=CLASS)
    assert place.text_parameter is None and place.arguments.startswith("where (any value); note (any value, optional)")
    for text in ('{"where": {"town": "Bonn", "in": {"town": "NRW"}}}', '{"where": {}, "note": [1], "kind": "a"}'):
        assert parse(f"<place>{text}</place>", [place]).arguments == json.loads(text)
    for text, said in (
        ('{"where": "Bonn"}', 'The argument where of place is "Bonn": must be table.'),
        ('{"where": {"in": {"town": 3}}}', "3 is not of type 'string'"),
        ('{"where": {}, "kind": "c"}', 'The argument kind of place is "c": must be "a" or "b".'),
    ):
        action = parse(f"<place>{text}</place>", [place])
        assert action.kind == "malformed" and said in action.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (
                CLASS
                + f"class thing(Table):\n    parameters = {{'properties': {{'row': {{'$ref': {reference!r}}}}}}}\n",
                f"parameters is not a JSON schema: \\$ref = '{reference}' names nothing in it, and nothing is fetched",
            )
            for reference in ("http://127.0.0.1:9/x", "file:///etc/passwd", "#/definitions/Row", "other.json")
        ),
        (
            CLASS
            + "class thing(Table):\n    parameters = {'properties': {'row': {'items': {'$ref': '#/required'}}}, 'required': ['row']}\n",
            "parameters is not a JSON schema: .*'row'",
        ),
        (
            "def thing(a):\n    'Doc.'\n",
            "Argument a is missing a type hint .*A tool needs a type for every argument, and a docstring",
        ),
        ("def thing(a: int): pass\n", "no docstring"),
        ("def thing(a: int):\n    'Doc.'\n", "no description for the argument 'a'"),
        ("thing = 3\n", "must be a function, or a class with a method `call`; this is a int without one"),
        (
            "class thing:\n    name = 'x'\n",
            "must be a function, or a class with a method `call`; this is a class without one",
        ),
        ("class thing:\n    def call(self): pass\n", "lacks name, description, parameters"),
        (
            CLASS + "class thing(Table):\n    parameters = {'type': 'nothing'}\n",
            "parameters is not a JSON schema: 'nothing' is not",
        ),
        (CLASS + "class thing(Table):\n    parameters = {'type': 'array'}\n", "must be a JSON schema of an object"),
        (
            CLASS + "class thing(Table):\n    parameters = {'required': ['z']}\n",
            "parameters requires z, which are not among",
        ),
        (
            CLASS + "class thing(Table):\n    parameters = {'properties': {'x': {1}}}\n",
            "parameters is not a JSON schema",
        ),
        (
            CLASS + "class thing(Table):\n    def call(self, other): pass\n",
            "cannot be called with the arguments of its schema, row",
        ),
        (CLASS + "class thing(Table):\n    def __init__(self, path): pass\n", "must be made without arguments"),
        (CLASS + "class thing(Table):\n    def begin(self, question): pass\n", "lacks end"),
        (CLASS + "class thing(Table):\n    name = 'answer'\n", "the name 'answer' cannot be a tag"),
        (CLASS + "class thing(Table):\n    name = 'two words'\n", "the name 'two words' cannot be a tag"),
        (CLASS + "class thing(Table):\n    name = 'math_exp'\n", "the name 'math_exp' cannot be a tag"),
    ],
)
def test_what_a_tool_forgets_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"tasks.tools=.*mine.py:thing: .*{message}"):
        tools(tmp_path, "thing", text=text)


def test_two_tools_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mine.py:Table and .*mine.py:instance are both called table; rename one"):
        tools(tmp_path, "Table", "instance", text=CLASS)
