"""How families of models write calls: text of a turn -> names and arguments. Which one a model has is found by what its chat template
writes (rendering.py), never by its name.

    hermes      <tool_call>{"name": "f", "arguments": {…}}</tool_call>                        Hermes, Qwen2.5, Qwen3
    qwen_xml    <tool_call><function=f><parameter=x>1</parameter></function></tool_call>      Qwen3-Coder, Qwen3.5, Nemotron 3
    glm         <tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>          GLM-4.5 and later
    llama       {"name": "f", "parameters": {…}}, perhaps after <|python_tag|>                Llama 3.1 and later
    mistral     [TOOL_CALLS] [{"name": "f", "arguments": {…}}] or [TOOL_CALLS]f[ARGS]{…}       Mistral
    python      <|tool_call_start|>[f(x=1), g()]<|tool_call_end|>                             LFM2
    gemma       <|tool_call>call:f{x:1,y:<|"|>text<|"|>}<tool_call|>                          Gemma 4
    harmony     to=functions.f<|channel|>commentary json<|message|>{…}<|call|>                gpt-oss
    deepseek    <｜tool▁call▁begin｜>function<｜tool▁sep｜>f```json{…}```<｜tool▁call▁end｜>       DeepSeek
    actions     <|START_ACTION|>[{"tool_name": "f", "parameters": {…}}]<|END_ACTION|>          Command
    phi         <|tool_call|>[{"name": "f", "arguments": {…}}]<|/tool_call|>                  Phi-4-mini, Granite
    atem        <atem:invoke name="f"><atem:parameter name="x">1</atem:parameter></atem:invoke>

For a syntax that is none of these, a tokenizer may have a `response_schema`, by which transformers' `parse_response` reads turns
(schema_syntax).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swirl_fast.formats.format import blocks, without_thoughts
from swirl_fast.tools.arguments import strict_json


class CallError(ValueError):
    """What is wrong with a call, in a sentence addressed to the model."""


@dataclass(frozen=True)
class WrittenCall:
    """typed: whether `arguments` are values; where not, they are texts, whose types the tool's schema tells."""

    name: str
    arguments: dict[str, Any]
    typed: bool = True


@dataclass(frozen=True)
class Syntax:
    """find: visible text of a turn -> (its calls, the text around them); raises CallError. visible: a turn without its thoughts."""

    name: str
    find: Callable[[str], tuple[list[WrittenCall], str]]
    visible: Callable[[str], str] = without_thoughts


def read_json(text: str) -> Any:
    """Raises CallError for what is no JSON, names that come twice and numbers that JSON does not have."""
    try:
        return strict_json(text)
    except ValueError as error:
        raise CallError(f"The call is not valid JSON ({error}).") from None


def _call_of(value: Any) -> WrittenCall:
    """A call from a JSON object with a name and arguments, under the words that templates use."""
    if not isinstance(value, dict):
        raise CallError("A call must be a JSON object with a name and arguments.")
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name = next((value[key] for key in ("name", "tool_name", "function") if isinstance(value.get(key), str)), None)
    if name is None:
        raise CallError("A call must name its tool.")
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):
        arguments = read_json(arguments)  # as OpenAI writes them
    if not isinstance(arguments, dict):
        raise CallError(f"The arguments of {name[:100]} must be a JSON object.")
    return WrittenCall(name, arguments)


def _calls_of(value: Any) -> list[WrittenCall]:
    return [_call_of(one) for one in (value if isinstance(value, list) else [value])]


# ---- calls between two marks


def _between(
    opening: str, closing: str, read: Callable[[str], list[WrittenCall]]
) -> Callable[[str], tuple[list[WrittenCall], str]]:
    """Of calls between two marks, several of them perhaps."""

    def find(text: str) -> tuple[list[WrittenCall], str]:
        calls: list[WrittenCall] = []
        around, at = [], 0
        while (start := text.find(opening, at)) >= 0:
            around.append(text[at:start])
            inside = start + len(opening)
            end = text.find(closing, inside)
            following = text.find(opening, inside)
            if end < 0 or 0 <= following < end:
                raise CallError(f"A call is opened with {opening} and not closed with {closing}.")
            calls += read(text[inside:end].strip())
            at = end + len(closing)
        around.append(text[at:])
        if closing in (rest := "".join(around)):
            raise CallError(f"A call is closed with {closing} and not opened with {opening}.")
        return calls, rest

    return find


def _json_calls(text: str) -> list[WrittenCall]:
    return _calls_of(read_json(text))


def _tagged_call(
    head: re.Pattern[str], argument: re.Pattern[str], foot: str, shown: str
) -> Callable[[str], list[WrittenCall]]:
    """Of a call whose arguments are texts between tags. head: its name, at the start. argument: with the blanks after it. foot: what may
    stand at the end."""

    def read(text: str) -> list[WrittenCall]:
        match = head.match(text)
        if match is None:
            raise CallError(f"The call does not name its tool. Write {shown}.")
        body = text[match.end() :].strip()
        if foot and not body.endswith(foot):
            raise CallError(f"The call does not end with {foot}. Write {shown}.")
        body = body.removesuffix(foot)
        pairs, at = [], 0
        while at < len(body):
            found = argument.match(body, at)
            if found is None:
                raise CallError(
                    f"The arguments of {match['name'][:100]} are not written as they should be. Write {shown}."
                )
            pairs.append((found["key"].strip(), found["value"]))
            at = found.end()
        if len(dict(pairs)) < len(pairs):
            raise CallError(f"An argument of {match['name'][:100]} comes twice.")
        return [WrittenCall(match["name"].strip(), dict(pairs), typed=False)]

    return read


_QWEN_XML = _tagged_call(
    re.compile(r"<function=(?P<name>[^>\n]+)>"),
    re.compile(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>\s*", re.DOTALL),
    "</function>",
    "<function=NAME><parameter=KEY>VALUE</parameter></function>",
)
_GLM = _tagged_call(
    re.compile(r"(?P<name>[^\s<]+)"),
    re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*", re.DOTALL),
    "",
    "NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>",
)
_ATEM = _tagged_call(
    re.compile(r'<atem:invoke name="(?P<name>[^"\n]+)">'),
    re.compile(r'<atem:parameter name="(?P<key>[^"\n]+)">(?P<value>.*?)</atem:parameter>\s*', re.DOTALL),
    "</atem:invoke>",
    '<atem:invoke name="NAME"><atem:parameter name="KEY">VALUE</atem:parameter></atem:invoke>',
)


def _python_calls(text: str) -> list[WrittenCall]:
    """`[f(x=1, y='text'), g()]`, with the words of JSON for true, false and null too."""
    try:
        tree = ast.parse(_with_escapes(text), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CallError("The calls are not written as [NAME(KEY=VALUE)].") from None
    calls = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise CallError("The calls are not written as [NAME(KEY=VALUE)].")
        try:
            arguments = {str(one.arg): _literal(one.value) for one in node.keywords if one.arg}
        except (ValueError, TypeError, RecursionError):
            raise CallError(f"The arguments of {node.func.id[:100]} are not plain values.") from None
        if len(arguments) < len(node.keywords):
            raise CallError(f"The arguments of {node.func.id[:100]} are not plain values, or one comes twice.")
        calls.append(WrittenCall(node.func.id, arguments))
    return calls


# A text in quotes, which the template does not escape: it ends with a quote before the next argument, the next call or the end.
_OPENED = re.compile(r"(?<==)['\"]")
_CLOSED = re.compile(r"['\"](?=\s*(?:,\s*\w+\s*=|\)\s*(?:,\s*\w+\s*\(|\]|$)))")


def _with_escapes(text: str) -> str:
    ends: dict[str, list[int]] = {"'": [], '"': []}
    for closed in _CLOSED.finditer(text):
        ends[closed[0]].append(closed.end())
    pieces, at = [], 0
    for opened in _OPENED.finditer(text):
        places = ends[opened[0]]
        first = bisect_right(places, opened.end())
        if opened.start() >= at and first < len(places):
            pieces += [text[at : opened.start()], _escaped(text[opened.start() : places[first]])]
            at = places[first]
    return "".join([*pieces, text[at:]])


def _escaped(written: str) -> str:
    try:
        if isinstance(ast.literal_eval(written), str):  # it was escaped, or need not be
            return written
    except (SyntaxError, ValueError):
        pass
    return repr(written[1:-1])


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {_text_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no value of JSON")
    return value


def _text_key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no text")


_GEMMA_NAME = re.compile(r"call:(?P<name>[^\s{]+)\s*(?P<arguments>\{.*\})", re.DOTALL)
_GEMMA_KEY = re.compile(r"(?P<before>[{,]\s*)(?P<key>[^\s{}\[\],:\"]+)\s*:")
_GEMMA_QUOTE = '<|"|>'


def _gemma_call(text: str) -> list[WrittenCall]:
    match = _GEMMA_NAME.fullmatch(text)
    if match is None:
        raise CallError('The call is not written as call:NAME{KEY:<|"|>VALUE<|"|>}.')
    pieces = match["arguments"].split(_GEMMA_QUOTE)
    if len(pieces) % 2 == 0:
        raise CallError(f"A text in the arguments of {match['name'][:100]} is not closed.")
    pieces[::2] = [_GEMMA_KEY.sub(r'\g<before>"\g<key>":', piece) for piece in pieces[::2]]
    pieces[1::2] = [json.dumps(piece) for piece in pieces[1::2]]
    return [_call_of({"name": match["name"], "arguments": read_json("".join(pieces))})]


_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n(?P<arguments>.*)\n```"
    r"|(?P<name2>[^\n<]+)<｜tool▁sep｜>(?P<arguments2>.*))",
    re.DOTALL,
)


def _deepseek_calls(text: str) -> list[WrittenCall]:
    *written, rest = text.split("<｜tool▁call▁end｜>")
    found = [_DEEPSEEK_CALL.fullmatch(one.strip()) for one in written]
    if not found or rest.strip():
        raise CallError("The calls are not written as they should be.")
    calls = []
    for match in found:
        if match is None:
            raise CallError("The calls are not written as they should be.")
        name, arguments = match["name"] or match["name2"], match["arguments"] or match["arguments2"]
        calls.append(_call_of({"name": name.strip(), "arguments": arguments or "{}"}))
    return calls


# ---- calls with a mark at their beginning only


def _mistral(text: str) -> tuple[list[WrittenCall], str]:
    around, *blocks = text.split("[TOOL_CALLS]")
    calls = []
    for block in blocks:
        name, mark, arguments = block.partition("[ARGS]")
        if mark:
            calls.append(_call_of({"name": name.split("[CALL_ID]")[0].strip(), "arguments": read_json(arguments)}))
        else:
            calls += _json_calls(block.strip())
    return calls, around


_PYTHON_TAG = "<|python_tag|>"


def _llama(text: str) -> tuple[list[WrittenCall], str]:
    """A turn that is a JSON object with a name and parameters, and nothing else."""
    head, mark, tail = text.partition(_PYTHON_TAG)
    body = (tail if mark else text).strip()
    if not mark and not re.match(r'\{\s*"(name|type)"\s*:', body):
        return [], text
    value = read_json(body)
    if not mark and not (isinstance(value, dict) and ("parameters" in value or "arguments" in value)):
        return [], text
    return _calls_of(value), head if mark else ""


_HARMONY_CALL = re.compile(
    r"(?:^|<\|start\|>assistant)\s*"
    r"(?:to=functions\.(?P<name>[^\s<]+)\s*<\|channel\|>\w+|<\|channel\|>\w+\s+to=functions\.(?P<name2>[^\s<]+))"
    r"\s*(?:<\|constrain\|>\s*)?(?:\b\w+\s*)?<\|message\|>(?P<arguments>.*?)(?=<\|call\|>|<\|end\|>|<\|start\|>|$)",
    re.DOTALL,
)
_HARMONY_THOUGHT = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|$)", re.DOTALL
)
_HARMONY_HEAD = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>\w+<\|message\|>")


def _harmony(text: str) -> tuple[list[WrittenCall], str]:
    calls = [
        _call_of({"name": m["name"] or m["name2"], "arguments": m["arguments"].strip() or "{}"})
        for m in _HARMONY_CALL.finditer(text)
    ]
    rest = _HARMONY_CALL.sub("", text).replace("<|call|>", "").replace("<|end|>", "")
    if "to=functions." in rest:
        raise CallError("A call is not written as it should be.")
    return calls, _HARMONY_HEAD.sub("", rest)


_ATEM_TURN = re.compile(r"(?:<\|eom\|><\|start\|>assistant)? to=(?P<to>[^\s<]+)<\|message\|>")


def _atem_visible(text: str) -> str:
    """Without the messages to itself and the heads of the others."""
    pieces = _ATEM_TURN.split(text)
    return pieces[0] + "".join(body for to, body in zip(pieces[1::2], pieces[2::2], strict=True) if to != "self")


def _atem(text: str) -> tuple[list[WrittenCall], str]:
    text = text.replace("<atem:function_calls>", "").replace("</atem:function_calls>", "")
    opening, closing = "<atem:invoke ", "</atem:invoke>"
    return _between(opening, closing, lambda inside: _ATEM(f"{opening}{inside}{closing}"))(text)


SYNTAXES = (
    Syntax("hermes", _between("<tool_call>", "</tool_call>", _json_calls)),
    Syntax("qwen_xml", _between("<tool_call>", "</tool_call>", _QWEN_XML)),
    Syntax("glm", _between("<tool_call>", "</tool_call>", _GLM)),
    Syntax("mistral", _mistral),
    Syntax("python", _between("<|tool_call_start|>", "<|tool_call_end|>", _python_calls)),
    Syntax(
        "gemma",
        _between("<|tool_call>", "<tool_call|>", _gemma_call),
        lambda text: blocks(text, "<|channel>thought\n", "<channel|>")[1],
    ),
    Syntax("harmony", _harmony, lambda text: _HARMONY_THOUGHT.sub("", text)),
    Syntax("deepseek", _between("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _deepseek_calls)),
    Syntax("actions", _between("<|START_ACTION|>", "<|END_ACTION|>", _json_calls)),
    Syntax("phi", _between("<|tool_call|>", "<|/tool_call|>", _json_calls)),
    Syntax("atem", _atem, _atem_visible),
    Syntax("llama", _llama),
)


def schema_syntax(schema: Any, parse: Callable[[str], Any]) -> Syntax:
    """parse: a tokenizer's `parse_response`, which reads a turn as a message by the `response_schema`."""

    def find(text: str) -> tuple[list[WrittenCall], str]:
        try:
            message = parse(text)
            calls = _calls_of(message.get("tool_calls") or [])
            rest = str(message.get("content") or "").strip()
        except CallError:
            raise
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:  # what parse_response raises for a turn that does not fit
            raise CallError(f"The turn cannot be read ({str(error)[:200]}).") from None
        if not calls and not text.strip().endswith(rest or "\0"):  # a schema passes over a call that is not closed
            raise CallError("The turn cannot be read.")
        return calls, rest

    digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()[:8]
    return Syntax(f"schema-{digest}", find)
