"""A row of an agent's log -> a conversation in one form, that of OpenAI's chat messages; or what is wrong with the row.

What is read:

    {"messages": [{"role", "content", "tool_calls"?, "tool_call_id"?, …}, …], "tools": […]?, "id"?}    OpenAI
    the same with content blocks: text, thinking, tool_use, tool_result; tools with input_schema       Anthropic
    {"conversations": [{"from", "value"}, …], "system"?, "tools"?}                                     ShareGPT, Hermes
    either with calls and results in the text, <tool_call>{…}</tool_call>, <tool_response>…</tool_response>
    a bare list of messages

What comes out: at most one system message, at the head. Arguments of calls are objects; every call has an id, and every result names its
call and its tool. Thoughts, also `<think>…</think>` at the head of a text, are `reasoning_content`. Messages of the assistant that follow
each other are one turn: loggers split a turn into its text and its calls, and a policy's turn ends where the environment answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from swirl_fast.formats.format import blocks
from swirl_fast.tools.arguments import check_json, schema_problem, strict_json
from swirl_fast.tools.characters import whole_values
from swirl_fast.tools.tool import ToolSpec

Message = dict[str, Any]
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_TEXTS = ("text", "input_text", "output_text")  # types of content blocks
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ANYTHING = {"type": "object", "properties": {}, "additionalProperties": True}  # of a tool whose schema the log lacks
_ENDLESS = 1 << 31  # characters of a call: what was logged was accepted, and tools of logs never run


class BrokenRow(ValueError):
    """Names the file, the line, the field, its value and the remedy."""


@dataclass(frozen=True)
class Conversation:
    """where: `file:line`. id: as the log names it, None where it does not. tools: those that the log names, empty where it names none;
    then any call is accepted. messages: see above; the last may be of any role."""

    where: str
    id: str | None
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]

    @property
    def first_action(self) -> int:
        """The number of the first message that is an action: the first of the assistant behind one of the user. A greeting before that
        belongs to the prompt."""
        user = next(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return next(i for i, message in enumerate(self.messages) if i > user and message["role"] == "assistant")

    @property
    def question(self) -> str:
        """The first message of the user."""
        return next(str(message["content"]) for message in self.messages if message["role"] == "user")

    def opening_key(self) -> bytes:
        """8 bytes: equal for conversations with the same messages up to the first action. The system message is left out: many hold the
        date."""
        return _digest([one for one in self.messages[: self.first_action] if one["role"] != "system"], [])[:8]

    def content_key(self) -> bytes:
        """16 bytes: equal for the same conversation, whatever its id and its calls' ids."""
        return _digest(self.messages, [spec.identity for spec in self.tools])[:16]


def _digest(messages: Sequence[Message], tools: Sequence[str]) -> bytes:
    bare = [
        {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        | {"calls": [call["function"] for call in message.get("tool_calls", ())]}
        for message in messages
    ]
    text = json.dumps([bare, tools], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def read_conversation(where: str, row: Any) -> Conversation:
    """row: as JSON gives it. Raises BrokenRow."""
    try:
        return _Reader(where).read(whole_values(row))
    except RecursionError:
        raise BrokenRow(f"{where}: is nested too deeply") from None


def _fail(where: str, field: str, remedy: str, *value: Any) -> NoReturn:
    """value: what stands there, where it says something."""
    shown = "".join(f" = {repr(one)[:80]}{'…' if len(repr(one)) > 80 else ''}" for one in value)
    raise BrokenRow(f"{where}: {field}{shown}: {remedy}")


class _Waiting(NamedTuple):
    """A call without a result. turn: the number of its turn. made: whether the id is ours."""

    turn: int
    id: str
    name: str
    made: bool


class _Reader:
    """Of one row."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: list[Message] = []
        self._waiting: list[_Waiting] = []
        self._calls = self._turns = 0
        self._calls_in_text = True
        self._tools: dict[str, ToolSpec] = {}

    def read(self, row: Any) -> Conversation:
        key, items, table = self._messages(row)
        self._tools = {spec.name: spec for spec in self._read_tools(table.get("tools") or table.get("functions"))}
        if table.get("system") not in (None, ""):
            self._add({"role": "system", "content": self._text(table["system"], "system")}, "system")
        self._calls_in_text = not any(map(_has_calls, items))
        for i, item in enumerate(items):
            for message in self._read_message(item, f"{key}[{i}]"):
                self._add(message, f"{key}[{i}]")
        self._check_whole(key)
        self._sort_results()
        return Conversation(self._where, self._id(table), tuple(self._found), tuple(self._tools.values()))

    def _fail(self, field: str, remedy: str, *value: Any) -> NoReturn:
        _fail(self._where, field, remedy, *value)

    def _messages(self, row: Any) -> tuple[str, list[Any], Mapping[str, Any]]:
        if isinstance(row, list):
            return "", row, {}
        if not isinstance(row, Mapping):
            raise BrokenRow(
                f"{self._where}: must be a JSON object with `messages`, or a list of messages, not {type(row).__name__}"
            )
        key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
        if key is None:
            names = ", ".join(map(str, row)) or "nothing"
            raise BrokenRow(
                f"{self._where}: has no messages, only {names[:200]}; a row is {{'messages': [{{'role': …, 'content': …}}, …]}}"
            )
        if not isinstance(row[key], list):
            self._fail(key, "must be a list of messages", row[key])
        return key, row[key], row

    def _id(self, table: Mapping[str, Any]) -> str | None:
        value = table.get("id")
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            self._fail("id", "must be a text or a whole number; leave it out to have one made", value)
        return str(value).strip()

    # ---- tools

    def _read_tools(self, value: Any) -> list[ToolSpec]:
        if isinstance(value, str) and value.strip():
            value = self._json(value, "tools")
        if value in (None, "", [], {}):
            return []
        if not isinstance(value, list):
            self._fail("tools", "must be a list of tool schemas", value)
        self._check_json(value, "tools")
        found: dict[str, ToolSpec] = {}
        for i, entry in enumerate(value):
            place = f"tools[{i}]"
            inner = entry.get("function") if isinstance(entry, Mapping) and "function" in entry else entry
            if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
                self._fail(
                    place,
                    "must have a `name`, as {'type': 'function', 'function': {'name': …, 'parameters': …}}",
                    entry,
                )
            keys = ("parameters", "input_schema", "inputSchema")
            schema = next((inner[key] for key in keys if inner.get(key) is not None), _ANYTHING)
            description = inner.get("description") or ""
            if not isinstance(schema, Mapping) or not isinstance(description, str):
                self._fail(place, "its parameters must be a JSON schema, and its description a text", entry)
            if (kind := schema.get("type", "object")) != "object":
                self._fail(
                    place, f"its parameters are no JSON schema of an object: type {kind!r} is not object", inner["name"]
                )
            if problem := schema_problem(schema):
                self._fail(place, f"its parameters are no JSON schema: {problem}", inner["name"])
            if inner["name"] in found:
                self._fail(place, "a tool of this name comes twice; leave one out", inner["name"])
            found[inner["name"]] = log_tool(inner["name"], description, schema)
        return list(found.values())

    # ---- messages

    def _read_message(self, item: Any, place: str) -> Iterator[Message]:
        """One, or several where results of tools stand in a message of the user."""
        if not isinstance(item, Mapping):
            self._fail(place, "must be a message: an object with `role` and `content`", item)
        named = "role" if item.get("role") is not None else "from"
        role = _ROLES.get(str(item.get(named)).lower())
        if role is None:
            if item.get(named) is None:
                self._fail(place, "has no role; write system, user, assistant or tool", dict(item))
            self._fail(f"{place}.{named}", "is no role; write system, user, assistant or tool", item[named])
        field = next((key for key in ("content", "value") if key in item), "content")
        content, place_of = item.get(field), f"{place}.{field}"
        if str(item[named]).lower() == "function_call":
            yield {"role": role, "content": "", "tool_calls": self._written_calls(content, place_of)}
        elif role == "assistant":
            yield self._with_calls_in_text(self._assistant(item, content, place, place_of), place_of)
        elif role == "user" and isinstance(content, list):
            yield from self._user_blocks(content, place, place_of)
        elif role == "tool" or (role == "user" and any(call.turn == self._turns for call in self._waiting)):
            yield from self._results(item, role, self._text(content, place_of), place)
        else:
            yield {"role": role, "content": self._text(content, place_of)}

    def _assistant(self, item: Mapping[str, Any], content: Any, place: str, place_of: str) -> Message:
        texts, calls = [], []
        thoughts = [item[key] for key in _THOUGHTS if item.get(key)][:1]
        for i, block in enumerate(content if isinstance(content, list) else [content]):
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind == "tool_use":
                calls.append(
                    self._call(block.get("id"), block.get("name"), block.get("input"), f"{place_of}[{i}]", "input")
                )
            elif kind == "thinking":
                thoughts.append(block.get("thinking") or "")
            elif kind != "redacted_thinking":  # which nobody can read
                texts.append(self._text([block] if isinstance(content, list) else block, place_of, i))
        if content is None and isinstance(item.get("refusal"), str):
            texts = [item["refusal"]]
        if not all(isinstance(thought, str) for thought in thoughts):
            self._fail(place, "its thoughts (reasoning_content) must be a text", thoughts)
        entries = item.get("tool_calls") or []
        if not isinstance(entries, list):
            self._fail(f"{place}.tool_calls", "must be a list of calls", entries)
        calls += [self._called(entry, f"{place}.tool_calls[{i}]") for i, entry in enumerate(entries)]
        if item.get("function_call"):  # OpenAI's form before tool_calls
            calls.append(self._called(item["function_call"], f"{place}.function_call"))
        text, inside = _without_thoughts("\n".join(texts))
        thoughts += [inside] if inside else []
        message: Message = {"role": "assistant", "content": text}
        if any(thoughts):
            message["reasoning_content"] = "\n".join(thought for thought in thoughts if thought)
        if calls:
            message["tool_calls"] = calls
        return message

    def _user_blocks(self, blocks: list[Any], place: str, place_of: str) -> Iterator[Message]:
        texts: list[str] = []
        for i, block in enumerate(blocks):
            if isinstance(block, Mapping) and block.get("type") == "tool_result":
                if texts:
                    yield {"role": "user", "content": "\n".join(texts)}
                    texts = []
                result = self._text(block.get("content"), f"{place_of}[{i}].content")
                yield self._result(block.get("tool_use_id"), None, result, f"{place_of}[{i}]")
            else:
                texts.append(self._text([block], place_of, i))
        if texts or not blocks:
            yield {"role": "user", "content": "\n".join(texts)}

    def _text(self, content: Any, place: str, first: int = 0) -> str:
        """Of a text, or of blocks of text. first: the number of the first block, for messages."""
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            if isinstance(content, Mapping) and content.get("type") in _TEXTS:
                return self._text([content], place)
            self._fail(place, "must be a text, or a list of blocks {'type': 'text', 'text': …}", content)
        texts = []
        for i, block in enumerate(content, first):
            if isinstance(block, str):
                texts.append(block)
                continue
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind not in _TEXTS:
                self._fail(
                    f"{place}[{i}]",
                    "only text can be read, no images, audio or files; leave the block or the conversation out",
                    kind or block,
                )
            if not isinstance(block.get("text"), str):
                self._fail(f"{place}[{i}].text", "must be a text", block.get("text"))
            texts.append(block["text"])
        return "\n".join(texts)

    # ---- calls

    def _called(self, entry: Any, place: str) -> Message:
        inner = entry.get("function", entry) if isinstance(entry, Mapping) else entry
        if not isinstance(inner, Mapping) or "name" not in inner:
            self._fail(place, "must be a call: {'id': …, 'function': {'name': …, 'arguments': …}}", entry)
        return self._call(entry.get("id"), inner["name"], inner.get("arguments"), place, "arguments")

    def _written_calls(self, value: Any, place: str) -> list[Message]:
        found = self._json(value, place) if isinstance(value, str) else value
        return [self._called(entry, place) for entry in (found if isinstance(found, list) else [found])]

    def _call(self, id_: Any, name: Any, arguments: Any, place: str, field: str) -> Message:
        if not isinstance(name, str) or not name:
            self._fail(f"{place}.name", "must be the name of a tool", name)
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        if isinstance(arguments, str):
            arguments = _arguments_in(arguments)
        elif not isinstance(arguments, dict):
            self._fail(f"{place}.{field}", "must be a JSON object, or the text of one", arguments)
        else:
            self._check_json(arguments, f"{place}.{field}")
        if id_ is not None and not isinstance(id_, str | int):
            self._fail(f"{place}.id", "must be a text", id_)
        self._calls += 1
        own = id_ in (None, "")
        return {
            "id": f"call_{self._calls}" if own else str(id_),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
            **({"made": True} if own else {}),
        }

    def _with_calls_in_text(self, message: Message, place: str) -> Message:
        """Where calls have no other place: ShareGPT has none, and an endpoint without a parser of calls fills none. Hermes and Qwen write
        `<tool_call>{…}</tool_call>`. Beside messages that have their calls in a place of their own it is a call that the model got wrong,
        and stays what it wrote."""
        written, around = blocks(message["content"], "<tool_call>", "</tool_call>") if self._calls_in_text else ([], "")
        if not written:
            return message
        calls = [self._called(self._json(text.strip(), place), place) for text in written]
        return {**message, "content": around.strip(), "tool_calls": calls}

    def _results(self, item: Mapping[str, Any], role: str, text: str, place: str) -> Iterator[Message]:
        """Of a message of a tool, or of the user: their templates write results as `<tool_response>…</tool_response>`, several perhaps."""
        results, around = blocks(text, "<tool_response>", "</tool_response>")
        id_ = item.get("tool_call_id")
        if role == "tool" and (around.strip() or not results or id_):
            yield self._result(id_, item.get("name"), text, place)
            return
        for result in results:
            yield self._result(id_, item.get("name"), result.strip(), place)
        if role == "user" and (around.strip() or not results):
            yield {"role": "user", "content": around.strip() if results else text}

    def _result(self, id_: Any, name: Any, text: str, place: str) -> Message:
        """Belongs to the call that it names, by its id, or else by its tool; or to the first without a result where it names none. Calls of
        a later turn come before those of an earlier one, which were never answered."""
        waiting = sorted(self._waiting, key=lambda call: -call.turn)
        if id_ not in (None, ""):
            fitting = [call for call in waiting if call.id == str(id_)] or [call for call in waiting if call.made]
        else:
            fitting = [call for call in waiting if call.name == name] or waiting
        if not fitting:
            what = (
                f"names the call {id_!r}, and no call of this id waits for a result"
                if id_ not in (None, "")
                else "is a result, and no call waits for one"
            )
            self._fail(place, f"{what}; add the assistant's call before it, or leave the result out", text)
        self._waiting.remove(fitting[0])
        return {
            "role": "tool",
            "content": text,
            "tool_call_id": fitting[0].id,
            "name": name if isinstance(name, str) and name else fitting[0].name,
        }

    def _json(self, text: str, place: str) -> Any:
        try:
            return strict_json(text)
        except ValueError as error:
            self._fail(place, f"is not valid JSON ({error}); write it as JSON", text)

    def _check_json(self, value: Any, place: str) -> None:
        try:
            check_json(value)
        except ValueError as error:
            self._fail(place, f"cannot be written as JSON ({error}); change it, or leave the row out", value)

    # ---- the whole

    def _add(self, message: Message, place: str) -> None:
        role, last = message["role"], self._found[-1] if self._found else None
        if role == "system" and last is not None:
            second = any(one["role"] == "system" for one in self._found)
            remedy = "is a second system message; put both into one" if second else "a system message must be the first"
            self._fail(place, remedy, message["content"])
        joined = last if last is not None and role == last["role"] == "assistant" else None
        self._turns += role == "assistant" and joined is None
        for call in message.get("tool_calls", ()):
            self._waiting.append(_Waiting(self._turns, call["id"], call["function"]["name"], call.pop("made", False)))
        if joined is not None:
            self._join(joined, message, place)
        else:
            self._found.append(message)

    def _join(self, last: Message, message: Message, place: str) -> None:
        if last.get("tool_calls") and (message["content"] or message.get("reasoning_content")):
            self._fail(
                place,
                "speaks before the calls of the message before have a result; add the results, or leave the conversation out",
                message["content"],
            )
        for key, between in (("content", "\n\n"), ("reasoning_content", "\n\n")):
            parts = [one[key] for one in (last, message) if one.get(key)]
            if parts or key == "content":
                last[key] = between.join(parts)
        if calls := [*last.get("tool_calls", ()), *message.get("tool_calls", ())]:
            last["tool_calls"] = calls

    def _check_whole(self, key: str) -> None:
        roles = [message["role"] for message in self._found]
        key = key or "the list"
        if not roles:
            self._fail(key, "holds no message")
        if "assistant" not in roles:
            self._fail(key, "no message is the assistant's, so there is no action to learn from; leave the row out")
        if "user" not in roles:
            self._fail(
                key, "no message is the user's, so there is nothing that the assistant answers; leave the row out"
            )
        if "assistant" not in roles[roles.index("user") :]:
            self._fail(key, "the assistant says nothing after the first message of the user; leave the row out")

    def _sort_results(self) -> None:
        """Those of one turn into the order of its calls: most chat templates write neither id nor name beside a result."""
        places: dict[str, int] = {}
        keys, start = [], 0
        for at, message in enumerate(self._found):
            if message["role"] != "tool":
                start = at
                if calls := message.get("tool_calls"):
                    places = {call["id"]: place for place, call in reversed(list(enumerate(calls, 1)))}
            keys.append((start, places.get(message["tool_call_id"], len(places) + 1) if at > start else 0))
        self._found = [message for _, message in sorted(zip(keys, self._found, strict=True), key=lambda pair: pair[0])]


def _has_calls(item: Any) -> bool:
    """Whether a message of a log has calls outside its text."""
    if not isinstance(item, Mapping):
        return False
    content = item.get("content")
    blocks = content if isinstance(content, list) else []
    return bool(
        item.get("tool_calls")
        or item.get("function_call")
        or "function_call" in (item.get("role"), item.get("from"))
        or any(isinstance(block, Mapping) and block.get("type") == "tool_use" for block in blocks)
    )


def _without_thoughts(text: str) -> tuple[str, str]:
    """(the rest, the thoughts at the head). A template that opens the thoughts itself leaves logs without `<think>`; a model may close
    its thoughts more than once."""
    head, closing, rest = text.partition("</think>")
    opened = re.match(r"\s*<think>", head)
    if not closing or ("<think>" in head and not opened):
        return text, ""
    thoughts = [head[opened.end() :] if opened else head]
    if "<think>" not in rest:
        *more, rest = rest.split("</think>")
        thoughts += more
    return rest.lstrip("\n"), "\n".join(part for thought in thoughts if (part := thought.strip("\n")).strip())


def log_tool(name: str, description: str, parameters: Mapping[str, Any]) -> ToolSpec:
    """A tool of a log: it is parsed and shown, and never runs."""
    told = json.dumps([name, description, parameters], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return ToolSpec(name, description, parameters, name, "conversations", f"{name}@{digest}", _ENDLESS)


def open_tool(name: str) -> ToolSpec:
    """Of a log that has no schemas: any arguments."""
    return log_tool(name, "", _ANYTHING)


def _arguments_in(text: str) -> Any:
    """A JSON object; a text that is none stays as the agent wrote it: its call was malformed, and so is the recorded action."""
    try:
        found = strict_json(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text
