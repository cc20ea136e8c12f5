"""The chat templates that models have, as TRL ships them: which are accepted, and that what is rolled out is what they write."""

from __future__ import annotations

import pytest
from support.chat_templates import END_TOKENS, native_templates, template_text, tokenizer_for
from support.paths import ROOT

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Call
from swirl_fast.rendering import Renderer
from swirl_fast.rendering.template import calling, result_of
from swirl_fast.tools.tool import CALCULATOR, ToolSpec, text_tool

NAMES = native_templates()
# With neither calls nor tools in the template, or without one of the two.
TAGS_ONLY = {
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3",
    "phi3_5", "qwen2_5_vl", "smolvlm",
}  # fmt: skip
LOOKUP = text_tool("lookup", "lookup", "words", "looks words up")

CONVERT = ToolSpec(
    "convert",
    "converts",
    {
        "type": "object",
        "properties": {
            "value": {"type": "number"},
            "whole": {"type": "integer"},
            "to": {"type": "string"},
            "exact": {"type": "boolean"},
            "parts": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["value", "to"],
    },
    "convert",
    "convert",
    "convert",
)


def renderer_of(name: str) -> Renderer:
    tokenizer = tokenizer_for(template_text(name))
    ends = next((tokens for family, tokens in END_TOKENS.items() if name.startswith(family)), ())
    return Renderer(tokenizer, name, [tokenizer.convert_tokens_to_ids(token) for token in ends])


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_with_tags_is_what_the_template_writes(name: str) -> None:
    renderer = renderer_of(name)
    messages = [{"role": "user", "content": "what is 2 + 3?"}]
    tokens = renderer.prompt(messages)
    for i in range(3):
        turn = {"role": "assistant", "content": f"<math_exp>{i} + 3</math_exp>"}
        observed = [{"role": "user", "content": f"{i} + 3 -> RESULT-{i}"}]
        written = renderer.written(turn)
        assert renderer.text(written).endswith(f"<math_exp>{i} + 3</math_exp>")
        tokens += [*written, *renderer.following(turn, observed, written[-1])]
        messages += [turn, *observed]
    text, whole = (renderer.tokenizer.decode(ids) for ids in (tokens, renderer.prompt(messages)))
    # thoughts stay, also empty ones, which many templates drop from earlier turns
    assert _bare(text) == _bare(whole)


def _bare(text: str) -> str:
    for piece in ("<think>", "</think>", "<|return|>", "<|end|>", "\n", " "):
        text = text.replace(piece, "")
    return text


@pytest.mark.parametrize("name", sorted(set(NAMES) - TAGS_ONLY))
def test_calls_are_written_read_and_answered_natively(name: str) -> None:
    renderer = renderer_of(name)
    form = renderer.native_format("tag")
    assert renderer.stop_id in renderer.stop_ids
    prompt = renderer.tokenizer.decode(renderer.prompt([{"role": "user", "content": "Q"}], [LOOKUP]))
    assert "looks words up" in prompt
    turn = calling([("lookup", {"words": 'the "first" king\'s <b>name</b>, 1,000 €\nand more'})])
    written = renderer.written(turn)
    assert written[-1] in renderer.stop_ids
    action = form.parse(renderer.text(written), [LOOKUP])
    assert action.kind == "tool" and action.calls[0].tool == "lookup", action.error
    assert action.arguments == {"words": 'the "first" king\'s <b>name</b>, 1,000 €\nand more'}
    state = renderer.tokenizer.decode(renderer.following(turn, [result_of(0, "lookup", "RESULT -> 5")], written[-1]))
    assert state.count("RESULT -> 5") == 1 and "question" not in state and "EDGE" not in state
    closed = renderer.following(turn, [result_of(0, "lookup", "RESULT -> 5")], -1)
    assert renderer.tokenizer.decode(closed).endswith(state) and closed[0] in renderer.stop_ids


@pytest.mark.parametrize("name", sorted(set(NAMES) - TAGS_ONLY))
def test_several_calls_and_typed_arguments(name: str) -> None:
    renderer = renderer_of(name)
    form = renderer.native_format("message")

    arguments = {"value": 2.5, "whole": 3, "to": "7", "exact": True, "parts": [1, 2]}
    calls = [("convert", arguments), ("convert", {**arguments, "to": "m"})]
    if not form.parallel:
        one = form.parse(renderer.text(renderer.written(calling(calls[:1]))), [CONVERT])
        assert one.arguments == arguments, one.error
        return
    turn = calling(calls)
    action = form.parse(renderer.text(renderer.written(turn)), [CONVERT])
    assert [call.arguments for call in action.calls] == [arguments, {**arguments, "to": "m"}], action.error
    results = [result_of(i, "convert", f"RESULT-{i}") for i in range(2)]
    after = renderer.tokenizer.decode(renderer.following(turn, results, renderer.written(turn)[-1]))
    assert all(after.count(f"RESULT-{i}") == 1 for i in range(2))


@pytest.mark.parametrize("name", sorted(TAGS_ONLY))
def test_others_say_why_they_cannot_be_native(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"actions.format=native: the chat template of {name} does not .*use actions.format=tags"
    ):
        renderer_of(name).native_format("tag")


@pytest.mark.parametrize("name", [name for name in NAMES if "think" in template_text(name)])
def test_thoughts_can_be_turned_off_or_it_is_said_that_they_cannot(name: str) -> None:
    tokenizer = tokenizer_for(template_text(name))
    opening = tokenizer.decode(renderer_of(name).prompt([{"role": "user", "content": "Q"}]))
    try:
        off = Renderer(tokenizer, name, thinking="off")
    except ValueError as error:
        assert "model.thinking=off" in str(error) and "enable_thinking" in str(error)
        return
    closed = tokenizer.decode(off.prompt([{"role": "user", "content": "Q"}]))
    assert not closed.rstrip().endswith("<think>")
    assert closed != opening or not opening.rstrip().endswith("<think>")


READY = sorted(path.stem for path in (ROOT / "configs" / "chat_templates").glob("*.jinja"))


def ready(name: str) -> Renderer:
    text = (ROOT / "configs" / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return Renderer(tokenizer_for(text, *["[INST]"] * (name == "mistral")), name)


@pytest.mark.parametrize("name", READY)
def test_the_shipped_templates_are_accepted_and_append_tool_results(name: str) -> None:
    renderer = ready(name)
    if name == "chatml":
        with pytest.raises(ValueError, match="does not write calls"):
            renderer.native_format("tag")
        return
    form = renderer.native_format("message")
    assert form.identity == "native-hermes-message"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    tokens = renderer.prompt(messages, [LOOKUP])
    thinking = {
        **calling([("lookup", {"words": "a"}), ("lookup", {"words": "b"})]),
        "reasoning_content": "I look it up.",
    }
    for turn, following in (
        (thinking, [result_of(i, "lookup", f"found {i}") for i in range(2)]),
        ({"role": "assistant", "content": "It is a."}, [{"role": "user", "content": "and?"}]),
    ):
        written = renderer.written(turn)
        tokens += [*written, *renderer.following(turn, following, written[-1])]
        messages += [turn, *following]
    assert tokens == renderer.prompt(messages, [LOOKUP]), "thoughts stay"
    assert "I look it up." in renderer.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", sorted(set(READY) - {"chatml"}))
def test_a_refused_template_names_the_one_for_the_model(name: str) -> None:
    tokenizer = ready(name).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}"
    with pytest.raises(ValueError, match=f"[ (]{name} is one for this model"):
        Renderer(tokenizer, name)


OWN = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[[{{ c.function.name }} {{ c.function.arguments | tojson }}]]{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = r"\[\[(?P<name>\w+) (?P<arguments>\{.*?\})\]\]"
SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string", "x-regex": r"^(.*?)(?=\[\[|$)"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": CALL,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "arguments": {"type": "object", "x-parser": "json", "additionalProperties": {}},
                },
            },
        },
    },
}


def test_calls_of_an_unknown_syntax_are_read_by_the_response_schema_of_the_tokenizer() -> None:
    tokenizer = tokenizer_for(OWN)
    with pytest.raises(ConfigError, match=r"writes calls in a way that is not known here: '\[\["):
        Renderer(tokenizer).native_format("message")
    tokenizer.response_schema = SCHEMA
    form = Renderer(tokenizer).native_format("message")
    assert form.identity.startswith("native-schema-") and form.parallel
    parsed = form.parse('I add.[[calculator {"expression": "1 + 2"}]]', (CALCULATOR,))
    assert parsed.calls == (Call("calculator", "1 + 2", {"expression": "1 + 2"}),)
    two = form.parse('[[calculator {"expression": "1"}]][[calculator {"expression": "2"}]]', (CALCULATOR,))
    assert [call.argument for call in two.calls] == ["1", "2"]
    answer = form.parse("<think>\nHm.\n</think>\n\nIt is 3.", (CALCULATOR,))
    assert (answer.kind, answer.argument) == ("answer", "It is 3.")
    for broken in ('It is [[calculator {"expression"', '[[calculator {"expression": }]]', '[[other {"a": 1}]]', ""):
        assert form.parse(broken, (CALCULATOR,)).kind == "malformed", broken
