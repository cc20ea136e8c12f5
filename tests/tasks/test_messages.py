"""Rows of agents' logs: every form comes out as the same conversation, and what cannot be read is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from support.paths import DATA

from swirl_fast.tasks.logs import read_log
from swirl_fast.tasks.messages import BrokenRow, Conversation, read_conversation
from swirl_fast.tools.arguments import checked_arguments

WEATHER = {
    "name": "weather",
    "description": "The weather of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it raining in Bonn?"}
RESULT, ANSWER = "rain, 9 °C", "Yes, it is."


def call(arguments: Any = '{"town": "Bonn"}', id_: str | None = "c1", name: str = "weather") -> dict[str, Any]:
    entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return entry if id_ is None else {"id": id_, **entry}


OPENAI = {
    "messages": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call()]},
        {"role": "tool", "tool_call_id": "c1", "content": RESULT},
        {"role": "assistant", "content": ANSWER},
    ],
    "tools": TOOLS,
}
ANTHROPIC = {
    "system": [{"type": "text", "text": "Be brief."}],
    "tools": [{"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": USER["content"]}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"town": "Bonn"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": RESULT}]}],
        },
        {"role": "assistant", "content": ANSWER},
    ],
}
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([WEATHER]),
    "conversations": [
        {"from": "human", "value": USER["content"]},
        {"from": "gpt", "value": "<think>\nHm.\n</think>\n\nI look."},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"town": "Bonn"}})},
        {"from": "observation", "value": RESULT},
        {"from": "gpt", "value": ANSWER},
    ],
}
HERMES = {
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": USER["content"]},
        {
            "from": "gpt",
            "value": '<think>Hm.</think>I look.\n<tool_call>\n{"arguments": {"town": "Bonn"}, "name": "weather"}\n</tool_call>\n',
        },
        {"from": "tool", "value": f"<tool_response>\n{RESULT}\n</tool_response>\n"},
        {"from": "gpt", "value": ANSWER},
    ],
}
OLD = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "reasoning": "Hm.", "function_call": call()["function"]},
        {"role": "function", "name": "weather", "content": RESULT},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ],
    "functions": [WEATHER],
}


def texts(one: Conversation) -> list[tuple[Any, ...]]:
    return [
        (
            m["role"],
            m["content"],
            m.get("reasoning_content"),
            [c["function"] for c in m.get("tool_calls", ())],
            m.get("name"),
        )
        for m in one.messages
    ]


WANTED = [
    ("system", "Be brief.", None, [], None),
    ("user", USER["content"], None, [], None),
    ("assistant", "I look.", "Hm.", [{"name": "weather", "arguments": {"town": "Bonn"}}], None),
    ("tool", RESULT, None, [], "weather"),
    ("assistant", ANSWER, None, [], None),
]


@pytest.mark.parametrize(
    "row", [OPENAI, ANTHROPIC, SHAREGPT, HERMES], ids=["openai", "anthropic", "sharegpt", "hermes"]
)
def test_every_form_is_the_same_conversation(row: dict[str, Any]) -> None:
    read = read_conversation("f:1", row)
    assert texts(read) == WANTED
    (call_,), result = read.messages[2]["tool_calls"], read.messages[3]
    assert call_["id"] == result["tool_call_id"] and call_["type"] == "function" and "made" not in call_
    assert read.content_key() == read_conversation("f:2", OPENAI).content_key()  # ids of calls are no difference
    (spec,) = read.tools
    assert (spec.name, spec.description, spec.parameters) == ("weather", WEATHER["description"], WEATHER["parameters"])
    assert read.first_action == 2 and read.question == USER["content"]


def test_the_old_form_of_calls_and_a_bare_list() -> None:
    read = read_conversation("f:1", OLD)
    assert texts(read)[2] == ("assistant", "", "Hm.", [{"name": "weather", "arguments": {"town": "Bonn"}}], None)
    assert [spec.name for spec in read.tools] == ["weather"]
    assert texts(read_conversation("f:1", OPENAI["messages"])) == WANTED


IN_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>'


@pytest.mark.parametrize(
    "result",
    [
        {"role": "user", "content": f"<tool_response>\n{RESULT}\n</tool_response>"},
        {"role": "tool", "content": f"<tool_response>{RESULT}</tool_response>\n"},
        {"role": "tool", "content": RESULT},
    ],
)
def test_calls_in_the_text_of_messages_with_roles(result: dict[str, Any]) -> None:
    """As an endpoint without a parser of calls logs them."""
    said = {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\nI look.\n{IN_TEXT}"}
    assert (
        texts(read_conversation("f:1", [SYSTEM, USER, said, result, {"role": "assistant", "content": ANSWER}]))
        == WANTED
    )


def test_several_calls_and_results_in_texts() -> None:
    said = {"role": "assistant", "content": IN_TEXT + IN_TEXT.replace("weather", "time")}
    seen = {"role": "user", "content": "<tool_response>a</tool_response>\n<tool_response>b</tool_response>\nAnd now?"}
    read = read_conversation("f:1", [USER, said, seen, {"role": "assistant", "content": ANSWER}])
    assert [(m["role"], m["content"], m.get("name")) for m in read.messages[1:]] == [
        ("assistant", "", None), ("tool", "a", "weather"), ("tool", "b", "time"), ("user", "And now?", None),
        ("assistant", ANSWER, None),
    ]  # fmt: skip


def test_texts_that_only_look_like_calls_and_results_stay() -> None:
    shown = {"role": "user", "content": "<tool_response>a</tool_response>"}
    both = {"role": "assistant", "content": f"as {IN_TEXT}", "tool_calls": [call(id_="c1")]}
    result = {"role": "tool", "tool_call_id": "c1", "content": f"<tool_response>{RESULT}</tool_response>"}
    open_ = {"role": "assistant", "content": "</tool_call> <tool_call>{"}
    read = read_conversation("f:1", [shown, both, result, open_])
    assert [m["content"] for m in read.messages] == [m["content"] for m in (shown, both, result, open_)]
    assert [len(m.get("tool_calls", ())) for m in read.messages] == [0, 1, 0, 0]


@pytest.mark.parametrize("wrong", ["<tool_call>plain words</tool_call>", IN_TEXT])
@pytest.mark.parametrize(
    "called",
    [
        {"role": "assistant", "content": None, "tool_calls": [call()]},
        {"role": "assistant", "content": None, "function_call": call()["function"]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "Bonn"}}],
        },
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Bonn"}}'},
    ],
)
def test_beside_calls_in_a_place_of_their_own_texts_are_what_the_model_wrote(
    called: dict[str, Any], wrong: str
) -> None:
    read = read_conversation("f:1", [USER, {"role": "assistant", "content": wrong}, USER, called])
    assert read.messages[1] == {"role": "assistant", "content": wrong}
    assert len(read.messages[3]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_response>" + " " * 300_000, "<tool_call>{</tool_call", "<think>", "</think>"]
)
def test_marks_that_are_not_closed_are_read_in_no_time(text: str) -> None:
    """Patterns that look for their end from every beginning would take minutes."""
    said = {"role": "assistant", "content": text * (300_000 // len(text) or 1)}
    user = {"role": "user", "content": said["content"]}
    read = read_conversation("f:1", [USER, CALLED, user, said, user])
    assert read.messages[2] == user and len(read.messages) == 5


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("<think>a</think>b", ("b", "a")),
        ("\n<think>\na\n</think>\n\n b", (" b", "a")),
        ("a\n</think>\n\nb", ("b", "a")),  # the template had opened the thoughts
        ("x <think>a</think> b", ("x <think>a</think> b", None)),
        ("<think>a", ("<think>a", None)),
        ("<think>a</think>b<think>c</think>", ("b<think>c</think>", "a")),
        ("<think>a <think> b</think>c", ("c", "a <think> b")),
        ("</think>a</think>", ("", "a")),  # closed more than once
        ("<think>a</think>\nb\n</think>\n\nc", ("c", "a\nb")),
    ],
)
def test_thoughts_at_the_head(content: str, wanted: tuple[str, str | None]) -> None:
    read = read_conversation("f:1", [USER, {"role": "assistant", "content": content}])
    assert (read.messages[1]["content"], read.messages[1].get("reasoning_content")) == wanted


def test_messages_of_the_assistant_that_follow_each_other_are_one_turn() -> None:
    said = [
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": None, "tool_calls": [call()]},
        {"role": "assistant", "content": "", "tool_calls": [call(id_="c2")]},
    ]
    results = [{"role": "tool", "tool_call_id": id_, "content": id_} for id_ in ("c2", "c1")]
    read = read_conversation("f:1", [USER, *said, *results, {"role": "assistant", "content": ANSWER}])
    assert [m["role"] for m in read.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert read.messages[1]["content"] == "I look." and [c["id"] for c in read.messages[1]["tool_calls"]] == [
        "c1",
        "c2",
    ]


def test_results_without_ids_belong_to_the_calls_in_order() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [call(id_=None), call(id_=None, name="time")]}
    read = read_conversation("f:1", [USER, calls, {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}])
    assert [(m["tool_call_id"], m["name"]) for m in read.messages[2:]] == [("call_1", "weather"), ("call_2", "time")]


def asked(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(entries)}


def seen(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **fields}


NEVER = [USER, asked(call(id_="c1")), {"role": "user", "content": "Well?"}]  # a call that has no result


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ([asked(call(id_="c2", name="time")), seen("9")], [("c2", "time")]),
        ([asked(call(id_=None, name="time")), seen("9")], [("call_2", "time")]),
        ([asked(call(id_="c1", name="time")), seen("9", tool_call_id="c1")], [("c1", "time")]),
        ([asked(call(id_=None, name="time")), seen("9", tool_call_id="x9")], [("call_2", "time")]),
        ([asked(call(id_="c2", name="time")), seen("9"), seen("rain")], [("c2", "time"), ("c1", "weather")]),
        ([asked(call(id_="c2", name="time")), seen("rain", tool_call_id="c1"), seen("9")], [("c1", "weather"), ("c2", "time")]),
        (
            [asked(call(id_="c2"), call(id_="c3", name="time")), seen("9", role="function", name="time"), seen("rain")],
            [("c3", "time"), ("c2", "weather")],
        ),
        ([asked(call(id_="c2")), seen("9", name="other.name")], [("c2", "other.name")]),
    ],
)  # fmt: skip
def test_results_belong_to_the_newest_turn_that_they_fit(more: list[Any], wanted: list[Any]) -> None:
    read = read_conversation("f:1", [*NEVER, *more])
    found = {m["content"]: (m["tool_call_id"], m["name"]) for m in read.messages if m["role"] == "tool"}
    assert [found[m["content"]] for m in more[1:]] == wanted


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("ids", [("a", "b", "c"), ("c", "b", "a")])
def test_results_of_one_turn_stand_in_the_order_of_its_calls(order: tuple[int, ...], ids: tuple[str, ...]) -> None:
    """Agents log them as they come in; most chat templates write neither id nor name beside a result."""
    turn = asked(*(call(id_=id_, name=f"tool_{i}") for i, id_ in enumerate(ids)))
    results = [seen(f"result {i}", tool_call_id=ids[i]) for i in order]
    read = read_conversation("f:1", [USER, turn, *results, SAID, USER, turn, *results, SAID])
    found = [(m["content"], m["name"], m["tool_call_id"]) for m in read.messages if m["role"] == "tool"]
    assert found == [(f"result {i}", f"tool_{i}", ids[i]) for i in (0, 1, 2, 0, 1, 2)]
    assert [m["role"] for m in read.messages[1:6]] == ["assistant", "tool", "tool", "tool", "assistant"]


def test_a_greeting_belongs_to_the_prompt_and_a_call_may_be_the_end() -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    read = read_conversation(
        "f:1", [SYSTEM, greeting, USER, {"role": "assistant", "content": "", "tool_calls": [call()]}]
    )
    assert read.first_action == 3 and len(read.messages) == 4


def test_what_is_the_same_opening() -> None:
    other = [{**SYSTEM, "content": "Today is Monday."}, USER, {"role": "assistant", "content": "No."}]
    one, two = read_conversation("f:1", OPENAI), read_conversation("f:2", other)
    assert one.opening_key() == two.opening_key() and one.content_key() != two.content_key()
    assert one.opening_key() != read_conversation("f:3", [{**USER, "content": "Is it?"}, *other[2:]]).opening_key()


def test_a_megabyte_of_text_and_half_characters() -> None:
    long = "word " * 200_000
    read = read_conversation("f:1", [{"role": "user", "content": long}, {"role": "assistant", "content": "a\ud83d"}])
    assert read.question == long and read.messages[1]["content"] == "a\ufffd"


def messages(*more: Any, tools: Any = None) -> dict[str, Any]:
    return {"messages": [USER, *more], **({} if tools is None else {"tools": tools})}


SAID = {"role": "assistant", "content": "Yes."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call()]}


def remote(reference: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"town": {"anyOf": [{"type": "null"}, {"$ref": reference}]}}}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


IMAGE = {"type": "image_url", "image_url": {"url": "data:…"}}


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ("text", "must be a JSON object with `messages`"),
        ({"text": "a"}, "has no messages, only text"),
        ({"messages": "a"}, "messages = 'a': must be a list"),
        ({"messages": []}, "messages: holds no message"),
        ({"messages": ["a"]}, "messages[0] = 'a': must be a message"),
        (messages({"role": "narrator", "content": "a"}), "messages[1].role = 'narrator': is no role"),
        (messages({"content": "a"}), "messages[1] = {'content': 'a'}: has no role"),
        (messages(), "no message is the assistant's"),
        ({"messages": [SYSTEM, SAID]}, "no message is the user's"),
        ({"messages": [SAID, USER]}, "the assistant says nothing after"),
        ({"messages": [SYSTEM, SYSTEM, USER, SAID]}, "messages[1] = 'Be brief.': is a second system message"),
        ({"system": "a", "messages": [SYSTEM, USER, SAID]}, "is a second system message"),
        (messages(SYSTEM, SAID), "a system message must be the first"),
        (messages({"role": "tool", "tool_call_id": "c1", "content": "a"}, CALLED), "names the call 'c1', and no call of this id waits"),
        (messages(CALLED, {"role": "tool", "tool_call_id": "c9", "content": "a"}), "names the call 'c9'"),
        (messages(SAID, {"role": "tool", "content": "a"}), "is a result, and no call waits for one"),
        (messages(CALLED, SAID), "speaks before the calls of the message before have a result"),
        (messages({"role": "assistant", "content": "<tool_call>{</tool_call>"}), "messages[1].content = '{': is not valid JSON"),
        (messages({**CALLED, "tool_calls": [call([1])]}), "tool_calls[0].arguments = [1]: must be a JSON object"),
        (messages({**CALLED, "tool_calls": [call({"day": date(2026, 1, 5)})]}), "date is no value of JSON"),
        (messages({**CALLED, "tool_calls": [call({"x": [b"a"]})]}), "bytes is no value of JSON"),
        (messages({**CALLED, "tool_calls": [call({"x": 1e999})]}), "a number is too large"),
        (messages({**CALLED, "tool_calls": [call({"x": nested(700)})]}), "nested too deeply"),
        (messages({"role": "assistant", "content": [{"type": "tool_use", "name": "b", "input": {"x": nested(99)}}]}), "input = {'x': [["),
        (messages(SAID, tools=[{**WEATHER, "examples": [date(2026, 1, 5)]}]), "date is no value of JSON"),
        (messages({**CALLED, "tool_calls": [call(name="")]}), "tool_calls[0].name = '': must be the name of a tool"),
        (messages({**CALLED, "tool_calls": {}} | {"tool_calls": "x"}), "messages[1].tool_calls = 'x': must be a list of calls"),
        (messages({**CALLED, "tool_calls": [{"type": "custom", "custom": {}}]}), "tool_calls[0] = "),
        (messages({"role": "assistant", "content": 3}), "messages[1].content = 3: must be a text"),
        (messages({"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}, SAID), "content[1] = 'image_url': only text"),
        (messages({"role": "assistant", "content": [{"type": "audio"}]}), "messages[1].content[0] = 'audio': only text"),
        (messages({"role": "assistant", "content": "", "reasoning_content": 3}), "its thoughts (reasoning_content) must be a text"),
        (messages(SAID, tools=3), "tools = 3: must be a list"),
        (messages(SAID, tools="{"), "tools = '{': is not valid JSON"),
        (messages(SAID, tools=[{"type": "function"}]), "tools[0] = {'type': 'function'}: must have a `name`"),
        (messages(SAID, tools=[WEATHER, WEATHER]), "tools[1] = 'weather': a tool of this name comes twice"),
        (messages(SAID, tools=[{"name": "a", "parameters": {"type": "object", "properties": 3}}]), "are no JSON schema"),
        (messages(SAID, tools=[{"name": "a", "parameters": {"type": "string"}}]), "type 'string' is not object"),
        (messages(SAID, tools=[{"name": "a", "parameters": remote("http://a.org/x")}]), "$ref = 'http://a.org/x' names nothing"),
        (messages(SAID, tools=[{"name": "a", "input_schema": remote("#/$defs/Town")}]), "$ref = '#/$defs/Town' names nothing in it"),
        ({**messages(SAID), "id": [1]}, "id = [1]: must be a text or a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(row: Any, shown: str) -> None:
    with pytest.raises(BrokenRow) as error:
        read_conversation("log.jsonl:7", row)
    assert str(error.value).startswith("log.jsonl:7: ") and shown in str(error.value)


# ---- files


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**OPENAI, "id": "a"}, messages(CALLED)]
    wanted = [texts(read_conversation("", row)) for row in rows]
    lines = written(tmp_path / "log.jsonl", *rows)
    for ending, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        content = pack(b"\xef\xbb\xbf\n" + lines.read_bytes())
        (tmp_path / f"log.jsonl{ending}").write_bytes(content)
        (tmp_path / f"packed{ending[1:]}.jsonl").write_bytes(content)  # named as if it were not packed
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "pretty.json").write_text(json.dumps({"data": rows}, indent=1), encoding="utf-8")
    written(tmp_path / "bare.jsonl", *(row["messages"] for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log.parquet")
    for file in sorted(tmp_path.iterdir()):
        found = list(read_log(file))
        assert [texts(one) for one in found if isinstance(one, Conversation)] == wanted, file
        assert str(file) in found[1].where  # type: ignore[union-attr]
    (tmp_path / "one.json").write_text(json.dumps(OPENAI, indent=1), encoding="utf-8")
    (one,) = read_log(tmp_path / "one.json")
    assert isinstance(one, Conversation) and texts(one) == wanted[0]


def test_broken_lines_do_not_stop_the_reading(tmp_path: Path) -> None:
    deep = "[" * 200_000
    lines = [
        json.dumps(OPENAI),
        "",
        '{"messages": [',
        "\udcff",
        deep,
        json.dumps({"a": float("nan")}),
        "[]",
        json.dumps(OPENAI),
    ]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = list(read_log(tmp_path / "log.jsonl"))
    broken = [str(one) for one in found if isinstance(one, BrokenRow)]
    assert len(found) == 7 and [isinstance(one, Conversation) for one in (found[0], found[-1])] == [True, True]
    for number, shown, text in zip(
        (3, 4, 5, 6, 7), ("not valid JSON", "not UTF-8", "nested", "NaN", "no message"), broken, strict=True
    ):
        assert text.startswith(f"{tmp_path / 'log.jsonl'}:{number}: ") and shown in text


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(json.dumps(OPENAI).encode())[:-9])
    (tmp_path / "log.jsonl.bz2").write_bytes(bz2.compress(json.dumps(OPENAI).encode())[:-9])
    (tmp_path / "log.jsonl.xz").write_bytes(b"no xz")
    (tmp_path / "log.parquet").write_bytes(b"PAR1")
    for name in ("log.jsonl.gz", "log.jsonl.bz2", "log.jsonl.xz", "log.parquet"):
        with pytest.raises(ValueError, match=f"{name}: not readable as"):
            list(read_log(tmp_path / name))


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/Town"}}, "$defs": {"Town": {"type": "string"}}},
        {"type": "object", "properties": {"x": True}, "required": ["x"]},
        {"$ref": "#/definitions/All", "definitions": {"All": {"type": "object"}}},
    ],
)
def test_schemas_with_references_and_those_that_are_true(parameters: dict[str, Any]) -> None:
    row = messages({**CALLED, "tool_calls": [call({}, name="a")]}, tools=[{"name": "a", "parameters": parameters}])
    (spec,) = read_conversation("log.jsonl:1", row).tools
    assert spec.parameters == parameters and spec.text_parameter is None


def test_a_tool_without_a_schema_takes_any_arguments() -> None:
    row = messages({**CALLED, "tool_calls": [call({"x": 1}, name="a")]}, tools=[{"name": "a", "description": "A."}])
    (spec,) = read_conversation("log.jsonl:1", row).tools
    assert checked_arguments(spec, {"x": 1}) == {"x": 1} and spec.description == "A."


@pytest.mark.skipif(not (DATA / "agent_process_bench").is_dir(), reason="the real logs are not here")
def test_real_logs() -> None:
    """Also those in which a call is cut off inside its arguments, or calls a tool that there is not."""
    found = list(read_log(DATA / "agent_process_bench" / "hotpotqa_half.jsonl"))
    assert [str(one) for one in found if isinstance(one, BrokenRow)] == []
    assert len(found) == 125 and len({one.opening_key() for one in found if isinstance(one, Conversation)}) == 25


@pytest.mark.parametrize(
    "text",
    [
        f'{{"x": {"[" * 700}{"]" * 700}}}',
        '{"x": 1e999}',
        "{",
        '{"a": NaN}',
        "[1]",
        "plain words",
        '"twice"',
        '{"a": 1, "a": 2}',
    ],
)
def test_what_an_agent_wrote_in_place_of_arguments_stays(text: str) -> None:
    """Its call was malformed, and is learned from as one. A tool that is not there was called, too."""
    row = messages({**CALLED, "tool_calls": [call(text, name="nothing")]})
    last = read_conversation("log.jsonl:1", row).messages[-1]
    assert last["tool_calls"][0]["function"] == {"name": "nothing", "arguments": text}


@pytest.mark.parametrize(
    "text", ["<think>a\n</think>\n\nb", "a</think>b", "a</think></think>\nb", "<think>a</think>\n</think>b"]
)
def test_thoughts_at_the_head_of_a_text(text: str) -> None:
    message = read_conversation("log.jsonl:1", messages({"role": "assistant", "content": text})).messages[-1]
    assert (message["reasoning_content"], message["content"]) == ("a", "b")
