"""Native calls: what is read of a turn in each syntax, and what is said of a turn that is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.formats.format import Action, Call, observation_of, results_in, without_thoughts
from swirl_fast.formats.native import NativeFormat
from swirl_fast.formats.syntaxes import SYNTAXES
from swirl_fast.formats.tags import TagsFormat
from swirl_fast.tools.tool import CALCULATOR, SEARCH, ToolSpec

CONVERT = ToolSpec(
    "convert",
    "converts",
    {
        "type": "object",
        "properties": {"value": {"type": "number"}, "to": {"type": "string", "enum": ["m", "ft"]}},
        "required": ["value", "to"],
    },
    "convert",
    "convert",
    "convert",
)
TOOLS = (CONVERT, CALCULATOR)
# name of a syntax -> (a call of `convert`, made with {} for its arguments; arguments as it writes them)
FORMS = {
    "hermes": ('<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>', '{"value": 3, "to": "m"}'),
    "qwen_xml": (
        "<tool_call>\n<function=NAME>\nARGS\n</function>\n</tool_call>",
        "<parameter=value>\n3\n</parameter>\n<parameter=to>\nm\n</parameter>",
    ),
    "glm": (
        "\n<tool_call>NAME\nARGS\n</tool_call>",
        "<arg_key>value</arg_key>\n<arg_value>3</arg_value>\n<arg_key>to</arg_key>\n<arg_value>m</arg_value>",
    ),
    "llama": ('{"name": "NAME", "parameters": ARGS}', '{"value": 3, "to": "m"}'),
    "mistral": ('[TOOL_CALLS][{"name": "NAME", "arguments": ARGS, "id": "123456789"}]', '{"value": 3, "to": "m"}'),
    "python": ("<|tool_call_start|>[NAME(ARGS)]<|tool_call_end|>", "value=3, to='m'"),
    "gemma": ("<|tool_call>call:NAME{ARGS}<tool_call|>", 'value:3,to:<|"|>m<|"|>'),
    "harmony": ("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGS", '{"value": 3, "to": "m"}'),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGS\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '{"value": 3, "to": "m"}',
    ),
    "actions": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "NAME", "parameters": ARGS}]<|END_ACTION|>',
        '{"value": 3, "to": "m"}',
    ),
    "phi": ('<|tool_call|>[{"name": "NAME", "arguments": ARGS}]<|/tool_call|>', '{"value": 3, "to": "m"}'),
    "atem": (
        ' to=convert<|message|><atem:function_calls>\n<atem:invoke name="NAME">\nARGS\n</atem:invoke>\n</atem:function_calls>',
        '<atem:parameter name="value">3</atem:parameter>\n<atem:parameter name="to">m</atem:parameter>',
    ),
}  # fmt: skip
OTHER = {  # the same with another unit
    name: arguments.replace('"m"', '"mile"')
    .replace("\nm\n", "\nmile\n")
    .replace(">m<", ">mile<")
    .replace("'m'", "'mile'")
    for name, (_, arguments) in FORMS.items()
}
BY_NAME = {syntax.name: syntax for syntax in SYNTAXES}


def written(syntax: str, name: str = "convert", arguments: str | None = None) -> str:
    form, usual = FORMS[syntax]
    return form.replace("NAME", name).replace("ARGS", usual if arguments is None else arguments)


def parse(syntax: str, text: str, answer: str = "tag", truncated: bool = False, parallel: bool = True) -> Action:
    return NativeFormat(BY_NAME[syntax], answer, parallel).parse(text, TOOLS, truncated)  # type: ignore[arg-type]


def test_every_syntax_is_here() -> None:
    assert FORMS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("syntax", FORMS)
def test_a_call_is_read(syntax: str) -> None:
    before = "" if syntax in ("llama", "harmony", "atem") else "I convert it."
    action = parse(syntax, before + written(syntax))
    assert action == Action("tool", "convert", '{"value": 3, "to": "m"}'), action.error
    assert action.arguments == {"value": 3, "to": "m"}


@pytest.mark.parametrize("syntax", FORMS)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("unknown", "There is no tool 'nothing' here"),
        ("missing", "lacks value, to"),
        ("wrong", 'The argument to of convert is "mile": must be "m" or "ft"'),
    ],
)
def test_what_is_wrong_with_a_call_is_said(syntax: str, what: str, said: str) -> None:
    empty = "{}" if FORMS[syntax][1].startswith("{") else ""
    text = {
        "unknown": written(syntax, name="nothing"),
        "missing": written(syntax, arguments=empty),
        "wrong": written(syntax, arguments=OTHER[syntax]),
    }[what]
    action = parse(syntax, text)
    assert action.kind == "malformed" and said in action.error, action


@pytest.mark.parametrize("syntax", sorted(set(FORMS) - {"llama", "harmony", "atem"}))
def test_broken_calls_are_malformed(syntax: str) -> None:
    whole = written(syntax)
    for text in (whole[: len(whole) // 2], whole[:-4], whole.replace("3", "3, 4}", 1) if "{" in whole else whole[8:]):
        action = parse(syntax, text, "message")
        assert action.kind != "tool", (text, action)
    broken = parse(syntax, whole[: whole.index("3") + 1], "tag")
    assert broken.kind == "malformed" and broken.error


@pytest.mark.parametrize(
    ("syntax", "text", "said"),
    [
        (
            "hermes",
            '<tool_call>{"name": "convert", "arguments": {"value": 3, "to": "m"}}',
            "not closed with </tool_call>",
        ),
        ("hermes", '{"name": "convert"}</tool_call>', "not opened with <tool_call>"),
        ("hermes", "<tool_call>{'name': 1}</tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>{"name": "convert", "name": "x", "arguments": {}}</tool_call>', "a name comes twice"),
        ("hermes", '<tool_call>{"name": "convert", "arguments": {"value": NaN}}</tool_call>', "NaN is not a number"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "must name its tool"),
        ("hermes", '<tool_call>{"name": "convert", "arguments": [1]}</tool_call>', "must be a JSON object"),
        (
            "hermes",
            '<tool_call>{"name": "convert", "arguments": {"value": 1, "to": "m", "x": 2}}</tool_call>',
            "does not know x",
        ),
        (
            "hermes",
            '<tool_call>{"name": "calculator", "arguments": {"expression": " "}}</tool_call>',
            "The call of calculator is empty",
        ),
        ("hermes", '<tool_call>{"name": "calculator", "arguments": {"expression": 3}}</tool_call>', "must be text"),
        ("hermes", written("hermes") + "<answer>3</answer>", "both a call and an answer"),
        ("hermes", "<answer>3</answer> or <answer>4</answer>", "more than one answer"),
        ("hermes", "<answer>3", "not opened and closed exactly once"),
        ("hermes", "</answer><answer>", "not opened and closed exactly once"),
        ("hermes", "<answer> </answer>", "The answer is empty"),
        ("hermes", "just words", "neither a call nor an answer"),
        ("hermes", "", "neither a call nor an answer"),
        (
            "qwen_xml",
            "<tool_call><function=convert><parameter=value>3</function></tool_call>",
            "not written as they should be",
        ),
        ("qwen_xml", "<tool_call><function=convert></tool_call>", "does not end with </function>"),
        (
            "qwen_xml",
            "<tool_call><function=convert><parameter=to>m</parameter><parameter=to>m</parameter></function></tool_call>",
            "comes twice",
        ),
        ("glm", "<tool_call>convert<arg_key>value</arg_key></tool_call>", "not written as they should be"),
        ("python", "<|tool_call_start|>[convert(3, 'm')]<|tool_call_end|>", "not written as [NAME(KEY=VALUE)]"),
        ("python", "<|tool_call_start|>[convert(value=open('x'))]<|tool_call_end|>", "not plain values"),
        ("python", "<|tool_call_start|>[convert(**{})]<|tool_call_end|>", "not plain values"),
        *(
            ("python", f"<|tool_call_start|>[convert(value={value})]<|tool_call_end|>", "not plain values")
            for value in ("{[1]}", "{1}", "[{{}: 1}]", "1j", "b'x'", "-'x'")
        ),
        ("python", "<|tool_call_start|>[convert(value=1e999, to='m')]<|tool_call_end|>", "a number is too large"),
        (
            "python",
            f"<|tool_call_start|>[convert(value=0x{'f' * 9000}, to='m')]<|tool_call_end|>",
            "a number is too large",
        ),
        ("gemma", '<|tool_call>call:convert{to:<|"|>m}<tool_call|>', "is not closed"),
        ("mistral", "[TOOL_CALLS]convert[ARGS]{", "not valid JSON"),
        ("llama", '{"name": "convert", "parameters": {"value": 3', "not valid JSON"),
    ],
)
def test_malformed_turns_say_why(syntax: str, text: str, said: str) -> None:
    action = parse(syntax, text)
    assert action.kind == "malformed" and said in action.error, action


@pytest.mark.parametrize("syntax", ["hermes", "llama", "mistral", "harmony", "phi", "qwen_xml", "glm", "atem"])
@pytest.mark.parametrize(
    "value", ["1e999", "-1e999", "9" * 5000, "[" * 200 + "]" * 200, '{"a":' * 100 + "1" + "}" * 100]
)
def test_values_that_nobody_could_write_again_are_malformed(syntax: str, value: str) -> None:
    arguments = FORMS[syntax][1].replace("3", value)
    action = parse(syntax, written(syntax, arguments=arguments))
    assert action.kind == "malformed" and len(action.error) < 500


@pytest.mark.parametrize("form", [TagsFormat(), NativeFormat(BY_NAME["hermes"])])
@pytest.mark.parametrize(
    ("schema", "value", "kind"),
    [
        ({"type": "number", "multipleOf": 0.01}, "1" + "0" * 400, "malformed"),
        ({"$ref": "#/properties/x"}, "1", "malformed"),
        ({"items": {"$ref": "#/properties/x"}}, "[" * 60 + "]" * 60, "tool"),
        ({"additionalProperties": {"$ref": "#"}, "type": "object"}, '{"x":' * 60 + "{}" + "}" * 60, "tool"),
        ({}, "1e400", "malformed"),
        ({}, "[" * 100 + "]" * 100, "malformed"),
    ],
)
def test_no_schema_makes_a_parser_raise(form: TagsFormat | NativeFormat, schema: dict, value: str, kind: str) -> None:
    spec = replace(CONVERT, parameters={"type": "object", "properties": {"x": schema}, "required": ["x"]})
    call = f'<convert>{{"x": {value}}}</convert>'
    if form.native:
        call = f'<tool_call>{{"name": "convert", "arguments": {{"x": {value}}}}}</tool_call>'
    action = form.parse(call, [spec])
    assert action.kind == kind, action


def test_a_turn_that_was_cut_off_is_malformed_whatever_it_holds() -> None:
    action = parse("hermes", written("hermes"), truncated=True)
    assert action.kind == "malformed" and action.cut_off


def test_several_calls_in_a_turn() -> None:
    text = written("hermes") + '<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 2"}}</tool_call>'
    action = parse("hermes", text)
    assert [(call.tool, call.argument) for call in action.calls] == [
        ("convert", '{"value": 3, "to": "m"}'),
        ("calculator", "1 + 2"),
    ]
    assert "one call a turn" in parse("hermes", text, parallel=False).error
    assert "are the most" in parse("hermes", written("hermes") * 33).error


def test_an_answer_is_a_tag_or_the_turn_without_a_call() -> None:
    assert parse("hermes", "So: <answer> 5 m </answer>") == Action("answer", argument="5 m")
    assert parse("hermes", "It is <answer>5</answer>.", "message") == Action(
        "answer", argument="It is <answer>5</answer>."
    )
    assert parse("llama", '{"length": 5}', "message") == Action("answer", argument='{"length": 5}')
    assert parse("hermes", "Let me see." + written("hermes"), "message").kind == "tool"
    assert TagsFormat("message").parse("It is 5.", TOOLS) == Action("answer", argument="It is 5.")
    assert TagsFormat("message").parse("<math_exp>1+2</math_exp>", TOOLS).kind == "tool"


@pytest.mark.parametrize("form", [TagsFormat(), NativeFormat(BY_NAME["hermes"])])
def test_a_call_or_an_answer_inside_a_thought_is_none(form: TagsFormat | NativeFormat) -> None:
    for thought in (
        "<think>maybe <answer>4</answer> or " + written("hermes") + "</think>",
        "so <answer>4</answer>?\n</think>",
    ):
        assert form.parse(f"{thought}\n\n<answer>5</answer>", TOOLS) == Action("answer", argument="5")
    assert without_thoughts("<think>a</think>b<think>c</think>d") == "bd"
    harmony = "<|channel|>analysis<|message|>to=functions.convert? No.<|end|><|start|>assistant<|channel|>final<|message|>It is 5."
    assert parse("harmony", harmony, "message") == Action("answer", argument="It is 5.")


def test_texts_get_the_types_of_the_schema() -> None:
    text = written("qwen_xml", "calculator", "<parameter=expression>\n12\n</parameter>")
    assert parse("qwen_xml", text).arguments == {"expression": "12"}
    assert parse("qwen_xml", written("qwen_xml")).arguments == {"value": 3, "to": "m"}
    spaced = written("qwen_xml", "calculator", "<parameter=expression>\n  1\n+ 2 \n</parameter>")
    assert parse("qwen_xml", spaced).arguments == {"expression": "  1\n+ 2 "}, (
        "one line break on either side is the template's"
    )


REFERRED = {"$ref": "#/$defs/Code"}


@pytest.mark.parametrize("syntax", ["qwen_xml", "glm", "atem"])
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12345", "12345"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"type": ["string", "null"]}, "12345", "12345"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, '"a"', '"a"'),
        ({"type": ["string", "integer"]}, "12345", 12345),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"enum": ["a", "b"]}, '"a"', "a"),
        ({"const": "true"}, "true", "true"),
        (REFERRED, "007", "007"),
        (REFERRED, "7", "7"),
        (True, "7", 7),
        ({}, "[7]", [7]),
        ({"type": "string", "maxLength": 9}, "7", "7"),
        ({"type": "array", "items": {"type": "string"}}, '["7"]', ["7"]),
    ],
)
def test_a_text_stays_one_where_only_a_text_fits(syntax: str, schema: Any, text: str, value: Any) -> None:
    parameters = {"type": "object", "properties": {"value": schema}, "$defs": {"Code": {"type": "string"}}}
    form = {
        "qwen_xml": f"<parameter=value>\n{text}\n</parameter>",
        "glm": f"<arg_key>value</arg_key>\n<arg_value>{text}</arg_value>",
        "atem": f'<atem:parameter name="value">{text}</atem:parameter>',
    }
    turn = written(syntax, arguments=form[syntax])
    action = NativeFormat(BY_NAME[syntax]).parse(turn, [replace(CONVERT, parameters=parameters)])
    assert action.arguments == {"value": value} and type(action.arguments["value"]) is type(value), action.error


@pytest.mark.parametrize(
    ("parameters", "arguments", "said"),
    [
        ({"type": "object"}, '{"x": 1}', ""),
        ({}, '{"x": 1}', ""),
        ({"properties": {}}, '{"x": 1}', "does not know x; it takes no arguments"),
        ({"properties": {}, "additionalProperties": {}}, '{"x": 1}', ""),
        ({"properties": {}, "additionalProperties": True}, '{"x": 1}', ""),
        (
            {"properties": {}, "additionalProperties": {"type": "string"}},
            '{"x": 1}',
            "The argument x of convert is 1: must be text",
        ),
        ({"properties": {}, "additionalProperties": False}, '{"x": 1}', "does not know x"),
        ({"additionalProperties": False}, '{"x": 1}', "'x' was unexpected"),
        ({"properties": {"y": {}}, "patternProperties": {"^x": {"type": "integer"}}}, '{"x1": 1, "y": 2}', ""),
        (
            {"properties": {"y": {}}, "patternProperties": {"^x": {"type": "integer"}}},
            '{"x1": "1"}',
            "must be whole number",
        ),
        ({"properties": {"y": {}}, "patternProperties": {"^x": {}}}, '{"z": 1}', "does not know z; it takes y"),
        ({"$ref": "#/$defs/All", "$defs": {"All": {"required": ["x"]}}}, '{"y": 1}', "'x' is a required property"),
        ({"properties": {"x": {}, "y": {}}, "minProperties": 1}, "{}", "The arguments of convert are {}"),
    ],
)
def test_which_arguments_a_schema_lets_pass(parameters: dict, arguments: str, said: str) -> None:
    turn = written("hermes", arguments=arguments)
    action = NativeFormat(BY_NAME["hermes"]).parse(turn, [replace(CONVERT, parameters=parameters)])
    assert action.kind == ("malformed" if said else "tool") and said in action.error, action


def test_what_stands_outside_calls_answers_and_thoughts_is_counted() -> None:
    form = NativeFormat(BY_NAME["hermes"])
    for text, outside in (
        (written("hermes"), 0),
        ("padding" + written("hermes"), 7),
        ("<think>long</think><answer>5</answer>", 0),
        ("well <answer>5</answer>", 5),
    ):
        assert form.outside(text, form.parse(text, TOOLS)) == outside


@given(st.sampled_from(sorted(FORMS)), st.text(max_size=60), st.integers(0, 200), st.integers(0, 200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_never_raises_whatever_the_text(syntax: str, noise: str, start: int, end: int, message: bool) -> None:
    whole = written(syntax)
    text = whole[: start % len(whole)] + noise + whole[end % len(whole) :]
    action = parse(syntax, text, "message" if message else "tag")
    assert action.kind in ("tool", "answer", "malformed")
    assert bool(action.error) == (action.kind == "malformed")
    if action.kind == "tool":
        assert all(call.tool in ("convert", "calculator") and call.arguments is not None for call in action.calls)


@pytest.mark.parametrize("syntax", FORMS)
@pytest.mark.parametrize(
    "piece", ["<tool_call>", "{", "<answer>", "<|channel|>analysis<|message|>", "to=functions.", "[", "<think>", "'='"]
)
def test_a_megabyte_is_parsed(syntax: str, piece: str) -> None:
    parse(syntax, piece * (1_000_000 // len(piece)))


@pytest.mark.parametrize(
    ("syntax", "around", "piece"),
    [
        ("hermes", ("</think>", ""), "<think>"),
        ("gemma", ("", ""), "<|channel>thought\n"),
        ("qwen_xml", ("<tool_call><function=f>", "</function></tool_call>"), "<parameter=a>"),
        ("qwen_xml", ("<tool_call><function=f>", "</function></tool_call>"), "</parameter><parameter=a>"),
        ("glm", ("<tool_call>f", "</tool_call>"), "<arg_key>a"),
        ("glm", ("<tool_call>f", "</tool_call>"), "<arg_key>a</arg_key>"),
        ("atem", ('<atem:invoke name="f">', "</atem:invoke>"), '<atem:parameter name="a">'),
        (
            "deepseek",
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>a\n```json\n",
        ),
        ("deepseek", ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), "<｜tool▁call▁begin｜>a<｜tool▁sep｜>"),
        ("harmony", ("to=functions.f<|channel|>x", ""), " "),
        ("harmony", ("to=functions.f<|channel|>", ""), "x"),
        ("harmony", ("", ""), "<|start|>assistantto=functions.f"),
        ("python", ("<|tool_call_start|>[f(x", "<|tool_call_end|>"), "='"),
        ("python", ("<|tool_call_start|>[f(x='", "')]<|tool_call_end|>"), '<a href="x" '),
    ],
)
def test_marks_that_are_not_closed_are_parsed(syntax: str, around: tuple[str, str], piece: str) -> None:
    """Patterns that look for their end from every beginning would take minutes, or years."""
    before, after = around
    assert parse(syntax, before + piece * (200_000 // len(piece)) + after).kind == "malformed"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'a'", "a"),
        ("'it's'", "it's"),
        ("""'say "hi", y'""", 'say "hi", y'),
        (r"'a\'b'", "a'b"),
        ("""'<a href="x">'""", '<a href="x">'),
        ("'a='b''", "a='b'"),
        ('"two\nlines"', "two\nlines"),
    ],
)
def test_texts_in_quotes_that_the_template_does_not_escape(written: str, value: str) -> None:
    turn = f"<|tool_call_start|>[calculator(expression={written}), calculator(expression='1')]<|tool_call_end|>"
    action = parse("python", turn)
    assert [call.arguments for call in action.calls] == [{"expression": value}, {"expression": "1"}], action.error


def test_results_of_several_calls_are_found_again() -> None:
    calls = (Call("calculator", "1 + 2"), Call("search", "who"), Call("calculator", "3"))
    for results in (["3", "a\nb -> c", "3"], ["", "", ""]):
        assert results_in(calls, observation_of(calls, results)) == results
    assert results_in(calls, "ERROR: no") is None and results_in(calls[:1], "1 + 2 -> 3") == ["3"]
    assert SEARCH.schema["function"]["parameters"]["required"] == ["query"]
