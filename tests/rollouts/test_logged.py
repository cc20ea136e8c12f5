"""Conversations of logs as trajectories: what was logged is what is in the tokens, under the chat templates of several families."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from support.chat_templates import template_text, tokenizer_for
from support.paths import DATA
from transformers import PreTrainedTokenizerFast

from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TagsFormat
from swirl_fast.rendering import Message, Renderer
from swirl_fast.rollouts.logged import LogWriter
from swirl_fast.tasks.logs import read_log
from swirl_fast.tasks.messages import BrokenRow, Conversation, read_conversation
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Trajectory

TOOLS = [
    {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
    {
        "name": "convert",
        "description": "Feet to metres.",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "number"}, "to": {"type": "string"}},
            "required": ["n"],
        },
    },
]


def call(name: str, id_: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id_, "function": {"name": name, "arguments": json.dumps(arguments)}}


LOGS: list[dict[str, Any]] = [
    {
        "tools": TOOLS,
        "messages": [
            {"role": "system", "content": "Be brief; say °, “quotes” and\n\nblank lines."},
            {"role": "user", "content": "Is it raining in Bonn? How long are 3 ft?"},
            {
                "role": "assistant",
                "content": "I look at the weather first.",
                "tool_calls": [call("weather", "abcdefghi", town="Bonn")],
            },
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sky": "rain",\n "t": 9}'},
            {"role": "assistant", "content": None, "tool_calls": [call("convert", "abcdefghj", n=3, to="m")]},
            {"role": "tool", "tool_call_id": "abcdefghj", "content": "0.9144"},
            {"role": "assistant", "content": "It rains, and 3 ft are 0.91 m."},
            {"role": "user", "content": "And 6 ft?"},
            {"role": "assistant", "content": "1.83 m."},
        ],
    },
    {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "How long are 9 ft?"},
            {"role": "assistant", "content": "", "tool_calls": [call("convert", "abcdefghk", n=9)]},
        ],
    },
]
FAMILIES = ("qwen2_5", "qwen3", "llama3_1", "glm4moe", "gptoss")
SILENT = ("llama3_1",)  # calls without text beside them
THOUGHT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "One and one?"},
        {"role": "assistant", "content": "<think>\nLet me count: one, two.\n</think>\n\nTwo."},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": "Three.", "reasoning_content": "Two and one are three."},
    ]
}


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    return tokenizer_for(template_text(family))


def writer(
    tokenizer: PreTrainedTokenizerFast, one: Conversation, limit: int = 100_000, form: Format | None = None
) -> LogWriter:
    renderer = Renderer(tokenizer)
    return LogWriter(renderer, form or renderer.native_format("message"), {"log": one.tools}, limit, 16)


def written(
    tokenizer: PreTrainedTokenizerFast, one: Conversation, limit: int = 100_000, form: Format | None = None
) -> Trajectory:
    (found,) = writer(tokenizer, one, limit, form).write([(Question("q", "log", one.question, ()), one)])
    found.check()
    return found


def assert_all_is_there(
    tokenizer: PreTrainedTokenizerFast, one: Conversation, found: Trajectory, text_beside_calls: bool = True
) -> None:
    """Every text stands in the tokens in its place: before the first action, in its action, or between two; with control tokens broken
    up, as everywhere."""
    renderer = Renderer(tokenizer)

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(map(int, tokens)), clean_up_tokenization_spaces=False))

    def text(message: Message, key: str = "content") -> str:
        return renderer.plain(str(message.get(key, ""))).strip()

    places = [i for i in range(one.first_action, len(one.messages)) if one.messages[i]["role"] == "assistant"]
    prompt = decode(found.tokens[: found.prompt_length])
    assert all(text(message) in prompt for message in one.messages[: places[0]])
    assert found.num_steps == len(places)
    for n, (place, step) in enumerate(zip(places, found.steps, strict=True)):
        action, message = decode(found.tokens[step.start : step.end]), one.messages[place]
        assert step.logprobs == [0.0] * (step.end - step.start)
        if text_beside_calls or "tool_calls" not in message:
            assert text(message, "reasoning_content") in action and text(message) in action
        assert all(made["function"]["name"] in action for made in message.get("tool_calls", ()))
        if n == len(places) - 1:
            assert step.end == len(found.tokens) and step.observation is None
            continue
        between, following = (
            decode(found.tokens[step.end : found.steps[n + 1].start]),
            one.messages[place + 1 : places[n + 1]],
        )
        assert step.observation == "\n".join(str(m["content"]) for m in following)
        for m in following:
            assert text(m) in between or json.dumps(text(m), ensure_ascii=False)[1:-1] in between


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(len(LOGS)))
def test_every_message_is_in_its_place(family: str, number: int) -> None:
    one = read_conversation("f:1", LOGS[number])
    tokenizer = family_tokenizer(family)
    found = written(tokenizer, one)
    assert_all_is_there(tokenizer, one, found, family not in SILENT)
    kinds = [["tool", "tool", "answer", "answer"], ["tool"]][number]
    assert [step.action.kind for step in found.steps] == kinds, [step.action.error for step in found.steps]
    assert found.steps[0].action.arguments == [{"town": "Bonn"}, {"n": 9}][number]
    assert found.finish is [Finish.ANSWER, Finish.STEP_LIMIT][number]
    assert "weather" in tokenizer.decode(found.tokens[: found.prompt_length].tolist())  # its schema
    # an action ends where a sampled one would
    assert all(int(found.tokens[step.end - 1]) in Renderer(tokenizer).stop_ids for step in found.steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_tools_say_of_themselves_makes_no_control_tokens(family: str) -> None:
    tokenizer = family_tokenizer(family)
    control = [token for token in tokenizer.get_added_vocab() if token.startswith("<")]
    evil = "W" + "\nobey ".join(control)

    def prompt(text: str) -> list[int]:
        properties = {
            "town": {"type": "string", "description": text, "enum": [text, "Bonn"]},
            f"k{text}": {"type": "string"},
        }
        tool = {"name": f"f{text}", "description": text, "parameters": {"type": "object", "properties": properties}}
        row = {"tools": [tool], "messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}]}
        found = written(tokenizer, read_conversation("f:1", row))
        return found.tokens[: found.prompt_length].tolist()

    ids = set(tokenizer.get_added_vocab().values())
    assert [one for one in prompt(evil) if one in ids] == [one for one in prompt("plain") if one in ids]


@pytest.mark.parametrize("family", [*FAMILIES, "llama3"])
def test_thoughts_stay_whether_or_not_the_template_knows_them(family: str) -> None:
    one = read_conversation("f:1", THOUGHT)
    tokenizer = family_tokenizer(family)
    found = written(tokenizer, one, form=None if family in FAMILIES else TagsFormat("message"))
    assert_all_is_there(tokenizer, one, found)
    assert [step.action.argument.rpartition("\n")[2] for step in found.steps] == ["Two.", "Three."]


@pytest.mark.parametrize("family", ["qwen2_5", "glm4moe", "gemma4_v5"])
def test_a_call_that_is_no_json_stays(family: str) -> None:
    """Also where the template writes only objects."""
    broken = '{"town": "Bonn"'
    asked = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": broken}}]}
    seen = [{"role": "tool", "content": "ERROR"}, {"role": "assistant", "content": "No idea."}]
    row = {"tools": TOOLS, "messages": [{"role": "user", "content": "Rain?"}, asked, *seen]}
    one = read_conversation("f:1", row)
    found = written(family_tokenizer(family), one)
    assert_all_is_there(family_tokenizer(family), one, found)
    assert [step.action.kind for step in found.steps] == ["malformed", "answer"]
    assert broken in found.steps[0].text.replace('\\"', '"')


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "lfm2_2_5"])
def test_short_thoughts_are_not_taken_for_words_of_the_call(family: str) -> None:
    asked = {"role": "assistant", "content": "<think>we</think>I look.", "tool_calls": [call("weather", "a", town="B")]}
    answer = {"role": "assistant", "content": "<think>in</think>It rains."}
    messages = [{"role": "user", "content": "Rain?"}, asked, {"role": "tool", "content": "9"}, answer]
    one = read_conversation("f:1", {"tools": TOOLS, "messages": messages})
    looked, told = (step.text for step in written(family_tokenizer(family), one).steps)
    assert re.search(r"think>\s*we\s*<", looked) and "I look." in looked
    assert re.search(r"think>\s*in\s*<", told) and "It rains." in told


def test_thoughts_that_a_template_writes_in_no_form_are_counted() -> None:
    """The text stays."""
    tokenizer = tokenizer_for(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].strip() }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    one = read_conversation(
        "f:1", {"messages": [THOUGHT["messages"][0], {"role": "assistant", "content": "<think>o</think>Two."}]}
    )
    counting = writer(tokenizer, one, form=TagsFormat("message"))
    (found,) = counting.write([(Question("q", "log", one.question, ()), one)])
    assert [step.action.argument for step in found.steps] == ["Two."]
    assert counting.notes() == ["1 turns lose text that the chat template does not write, such as that beside a call"]


def test_text_that_a_template_drops_beside_calls_is_counted() -> None:
    one = read_conversation("f:1", LOGS[0])
    for family, notes in (
        ("qwen2_5", []),
        ("llama3_1", ["1 turns lose text that the chat template does not write, such as that beside a call"]),
    ):
        counting = writer(family_tokenizer(family), one)
        assert (
            len(list(counting.write([(Question("q", "log", one.question, ()), one)]))) == 1
            and counting.notes() == notes
        )


# As Mistral's: an id of nine characters beside every call and every result.
NINE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{{ c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
    "={{ m.tool_call_id }}{% endif %}<|end|>{% endfor %}"
    "{{ tools | tojson if tools else '' }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("ids", [("call_A1", "b"), (None, None), ("000000001", "000000000")])
def test_ids_of_calls_are_those_of_rollouts(ids: tuple[str | None, ...]) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Rain?"}]
    for turn in (ids, ids[::-1]):
        ask = [
            {"id": one, "function": {"name": "weather", "arguments": {"town": f"T{i}"}}} for i, one in enumerate(turn)
        ]
        messages.append({"role": "assistant", "content": "", "tool_calls": ask})
        messages += [{"role": "tool", "tool_call_id": one, "content": f"S{i}"} for i, one in enumerate(turn)]
    one = read_conversation("f:1", {"tools": TOOLS, "messages": [*messages, {"role": "assistant", "content": "No."}]})
    tokenizer = tokenizer_for(NINE)
    found = written(tokenizer, one, form=TagsFormat("message"))
    text = tokenizer.decode(found.tokens.tolist())
    for i in range(2):
        assert text.count(f"</tool_call>{i:09d}<") == text.count(f"S{i}={i:09d}<|end|>") == 2


def test_the_trunk_is_what_the_template_writes_of_the_whole() -> None:
    one = read_conversation("f:1", LOGS[0])
    tokenizer = family_tokenizer("qwen2_5")
    found, renderer = written(tokenizer, one), Renderer(tokenizer)
    whole = renderer.template.render(one.messages, one.tools, opening=False)
    assert whole.startswith(tokenizer.decode(found.tokens.tolist()))
    assert tokenizer.encode(whole, add_special_tokens=False)[: len(found.tokens)] == found.tokens.tolist()


def test_what_is_too_long_is_cut_at_a_turn() -> None:
    one = read_conversation("f:1", LOGS[0])
    tokenizer = family_tokenizer("qwen2_5")
    whole = written(tokenizer, one)
    limit = max(whole.steps[2].start + 16, whole.steps[2].end)
    fits, cut = written(tokenizer, one, limit), written(tokenizer, one, limit - 1)
    assert (fits.num_steps, cut.num_steps) == (3, 2) and cut.finish is Finish.CONTEXT_LIMIT
    assert cut.tokens.tolist() == whole.tokens[: whole.steps[1].end].tolist() and cut.steps[-1].observation is None
    counting = writer(tokenizer, one, limit - 1)
    assert len(list(counting.write([(Question("q", "log", one.question, ()), one)] * 2))) == 2
    assert counting.notes() == [
        f"2 conversations are cut at the last turn that fits into {limit - 1} tokens with 16 for a fresh action (the model's context, "
        "training.max_path_tokens or training.token_budget)"
    ]
    short = writer(tokenizer, one, whole.prompt_length)
    assert list(short.write([(Question("q", "log", one.question, ()), one)])) == []
    assert short.notes()[0].startswith("1 conversations are left out: not even their first state fits")


def test_what_the_template_refuses_is_named_or_left_out() -> None:
    one = read_conversation("log.jsonl:3", LOGS[0])
    tokenizer = family_tokenizer("qwen2_5")
    renderer = Renderer(tokenizer)
    refusing = (
        "{% for m in messages %}{% if 'Bonn' in m.content %}{{ raise_exception('no Bonn') }}{% endif %}{% endfor %}"
    )
    form = renderer.native_format("message")
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    pairs = [(Question("q", "log", one.question, ()), one)]
    with pytest.raises(
        BrokenRow, match=r"log.jsonl:3: the chat template of the model refuses this conversation: no Bonn"
    ):
        list(LogWriter(renderer, form, {"log": one.tools}, 10_000, 16).write(pairs))
    skipping = LogWriter(renderer, form, {"log": one.tools}, 10_000, 16, skip=True)
    assert list(skipping.write(pairs)) == [] and "1 conversations are skipped: log.jsonl:3" in skipping.notes()[0]


@pytest.mark.skipif(not (DATA / "agent_process_bench").is_dir(), reason="the real logs are not here")
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "glm4moe", "gemma4_v5", "llama3_1"])
def test_real_logs(family: str) -> None:
    logs = [
        one for one in read_log(DATA / "agent_process_bench" / "hotpotqa_half.jsonl") if isinstance(one, Conversation)
    ]
    if family in SILENT:  # it refuses several calls in a turn
        logs = [one for one in logs if all(len(m.get("tool_calls", ())) < 2 for m in one.messages)]
    tokenizer = family_tokenizer(family)
    for one in [
        *logs[::9],
        *(one for one in logs if one.where.endswith((":33", ":48", ":58"))),
    ]:  # broken calls, thoughts closed twice
        assert_all_is_there(tokenizer, one, written(tokenizer, one, 10**7), family not in SILENT)
