"""Text of the chat template -> token ids, append-only: the tokens that were sampled are never rendered or tokenised again.

A trajectory's tokens grow by `action tokens as sampled` + `observation tokens`: what the template writes between two turns of the
assistant. Pieces are tokenised behind the text that they follow, for many tokenizers write the beginning of a text in another way; pieces
that do not join to the tokens of the whole conversation are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Format
from swirl_fast.formats.native import NativeFormat
from swirl_fast.formats.syntaxes import SYNTAXES, CallError, Syntax, schema_syntax
from swirl_fast.rendering.template import Message, Template, calling, result_of
from swirl_fast.tools.characters import whole_characters
from swirl_fast.tools.tool import ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put into what would become a control token, one after the other until none is left.
_BREAKS = (
    " ",
    " ",
    "·",
    "\ufffd",
)

_TOOL = ToolSpec(
    "probe_tool",
    "probes",
    {
        "type": "object",
        "properties": {"count": {"type": "integer"}, "words": {"type": "string"}},
        "required": ["count", "words"],
    },
    "probe_tool",
    "probe_tool",
    "probe_tool",
)
_ARGUMENTS = {"count": 3, "words": "two words"}


class Renderer:
    """stop_id: the token with which the chat template ends an assistant's turn. stop_ids: all tokens that end one, that one first;
    generation stops at each, and a turn that ends with any of them is complete."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "the model",
        end_ids: Sequence[int] = (),
        thinking: Literal["keep", "off"] = "keep",
    ) -> None:
        """end_ids: further tokens that the model may end a turn with. thinking: "off" has the chat template open turns without thoughts.
        Raises ValueError, naming `name`, for a chat template that is not append-only, and for a tokenizer that pieces cannot be tokenised
        with."""
        self._read_tokenizer(tokenizer, name)
        ends = [str(tokenizer.convert_ids_to_tokens(id_)) for id_ in end_ids]
        self.template = Template(tokenizer, name, ends, thinking)
        self.stop_id = self._id(self.template.end)
        ids = [self.stop_id, *end_ids]
        if self.template.calls:
            ids.append(self._id(self.template.call_end(_TOOL.name)))
        self.stop_ids = tuple(dict.fromkeys(ids))
        self._check_pieces()

    def _read_tokenizer(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self._name = name
        self._plain_tools: dict[str, ToolSpec] = {}  # by their schemas: many conversations have the same
        special = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        # but blanks and single characters, which end nothing, and what unknown characters become
        control = {i for token, i in tokenizer.get_added_vocab().items() if len(token) > 1 and token.strip(" \t\r\n▁")}
        self._control = control - {tokenizer.unk_token_id}

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """Token ids of s_1: the rendered conversation with the opening of the assistant's turn. tools: those that the chat template is to
        describe, where calls are written natively."""
        plain = [self._plain_tool(spec) for spec in tools]
        return self._encode(self.template.render([self._plain_message(m) for m in messages], plain))

    def following(self, turn: Message, messages: Sequence[Message], last: int) -> list[int]:
        """Token ids that follow an action: `s_{i+1} = s_i + a_i + following(…)`, up to the opening of the next turn.

        turn: the action as a message, of which the names of its calls matter. messages: what comes between. last: the action's last
        token; one of stop_ids has ended the turn, after any other the turn is closed here.
        """
        text = self.template.following(turn, [self._plain_message(m) for m in messages])
        tokens = self._encode(text)
        ended = last == tokens[0] if self.template.opens else last in self.stop_ids
        return tokens[1:] if ended else tokens

    def observation(self, text: str, stopped: bool) -> list[int]:
        """Token ids of an observation as a user's turn. stopped: the action's last token is one of stop_ids."""
        turn = {"role": "assistant", "content": ""}
        return self.following(turn, [{"role": "user", "content": text}], self.stop_id if stopped else -1)

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of an action, without the token that ended it."""
        if len(tokens) and tokens[-1] in self.stop_ids:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(
            np.asarray(tokens).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text of an action that was written, not sampled, as they stand in a turn; without the token that ends it."""
        return self._turn_tokens(self.plain(text), self.template.end)[:-1]

    def written(self, message: Message) -> list[int]:
        """Token ids of an assistant's message as a turn of its own, with the token that ends it."""
        message = self._plain_message(message)
        calls = message.get("tool_calls") or []
        end = self.template.call_end(calls[-1]["function"]["name"]) if calls else self.template.end
        return self._turn_tokens(self.template.turn(message), end)

    def _turn_tokens(self, text: str, end: str) -> list[int]:
        """end: text of the token that ends the turn, the last of the ids."""
        before = self._encode(self._opening)
        tokens = self._encode(self._opening + text + end)
        if tokens[: len(before)] != before:
            # The tokenizer would join the opening and the first characters: the opening stays as it is, as for a model that samples.
            tokens, before = self._encode(end + text + end), [self._id(end)]
        return tokens[len(before) :]

    def native_format(self, answer: Literal["tag", "message"]) -> Format:
        """How its chat template writes calls. Raises ConfigError where it does not, or in a way that no parser here can read."""
        refused = f"actions.format=native: the chat template of {self._name}"
        remedy = "use actions.format=tags, or set model.chat_template to a template for tools"
        if not self.template.calls:
            raise ConfigError(f"{refused} does not write calls and their results; {remedy}")
        if _TOOL.name not in self.template.render([{"role": "user", "content": "question"}], [_TOOL]):
            raise ConfigError(f"{refused} does not tell the model its tools; {remedy}")
        text = self.template.turn(calling([(_TOOL.name, _ARGUMENTS)]))
        schema = getattr(self.tokenizer, "response_schema", None)
        own = [schema_syntax(schema, self.tokenizer.parse_response)] if schema else []
        try:
            syntax = next((syntax for syntax in (*SYNTAXES, *own) if _reads(syntax, text, 1)), None)
        except ImportError as error:  # a response_schema may use jmespath, which transformers leaves out
            raise ConfigError(f"actions.format=native: the response_schema of {self._name}: {error}") from None
        if syntax is None:
            raise ConfigError(f"{refused} writes calls in a way that is not known here: {text[:200]!r}; {remedy}")
        try:
            both = self.template.turn(calling([(_TOOL.name, _ARGUMENTS)] * 2))
            results = [result_of(i, _TOOL.name, f"RESULT-{i}") for i in range(2)]
            after = self.template.following(calling([(_TOOL.name, {}), (_TOOL.name, {})]), results)
            parallel = _reads(syntax, both, 2) and all(f"RESULT-{i}" in after for i in range(2))
        except (TemplateError, ValueError):  # Llama 3.1 raises
            parallel = False
        return NativeFormat(syntax, answer, parallel)

    def plain(self, text: str) -> str:
        """`text` with the tokenizer's special tokens broken up, so that no question, passage or result can end a turn.

        A tokenizer that normalises (lower case, NFKC, …) makes them of other texts too, `<|IM_END|>`: so the ids decide. Raises ValueError
        for a text that gives control tokens however it is broken.
        """
        text = whole_characters(text)
        if self._special:
            text = self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        for by in _BREAKS:
            spans = self._control_spans(text)
            if not spans:
                return text
            for start, end in reversed(spans):
                blank = len(text[start:end]) - len(text[start:end].lstrip())
                at = start + blank + 1
                if at >= end or by == _BREAKS[-1]:  # nothing to break: the character goes
                    text = f"{text[: start + blank]}\ufffd{text[at:]}"
                else:
                    text = text[:at] + by + text[at:]
        if self._control_spans(text):
            raise ValueError(
                f"the tokenizer of {self._name} makes a control token of the text {text[:80]!r}; leave it out"
            )
        return text

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the tokenizer makes control tokens of a text; all of it, where a slow tokenizer does not say."""
        if not self.tokenizer.is_fast:
            return [(0, len(text))] if self._control.intersection(self._encode(text)) else []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [span for token, span in pairs if token in self._control]

    def _plain_message(self, message: Message) -> Message:
        return {
            key: value if key in ("role", "tool_call_id") else self._plain_value(value)
            for key, value in message.items()
        }

    def _plain_tool(self, spec: ToolSpec) -> ToolSpec:
        """What a tool says of itself comes from a log, or from anybody's server."""
        key = json.dumps(spec.schema)
        if key not in self._plain_tools:
            function = self._plain_value(spec.schema["function"])
            self._plain_tools[key] = replace(spec, **function)
        return self._plain_tools[key]

    def _plain_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, list):
            return [self._plain_value(one) for one in value]
        if isinstance(value, dict):
            return {self._plain_value(key): self._plain_value(one) for key, one in value.items()}
        return value

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _id(self, token: str) -> int:
        id_ = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(id_, int), "one token has one id"
        return id_

    def _check_pieces(self) -> None:
        """Raises ValueError where a conversation's pieces, tokenised one by one, are other tokens than those of the whole."""
        messages: list[Message] = [{"role": "user", "content": "Is 12 + 3 = 15?"}]
        prompt = self.template.render(messages)
        self._opening = prompt[max(prompt.rfind(token) for token in self._openers(prompt)) :]
        tokens, text = self._encode(prompt), prompt
        for i, content in enumerate(("It is 15.", "<answer>yes, 15</answer>")):
            turn: Message = {"role": "assistant", "content": content}
            observed: Message = {"role": "user", "content": f"Is  it?\n{i} -> \u00fc"}
            after = self.template.following(turn, [observed])
            written = self._turn_tokens(self.template.turn(turn), self.template.end)
            tokens += [*written[:-1], *self._encode(after)]
            text += self.template.turn(turn) + after
            messages += [turn, observed]
        whole = self.template.render(messages)
        if text == whole and tokens != self._encode(whole):
            at = next(i for i, (a, b) in enumerate(zip(tokens, [*self._encode(whole), -1], strict=False)) if a != b)
            shown = self.tokenizer.convert_ids_to_tokens(tokens[max(0, at - 2) : at + 3])
            raise ValueError(
                f"the tokenizer of {self._name} makes other tokens of a conversation's pieces than of the whole, near {shown}; use a model "
                "with a byte-level tokenizer, or one whose chat template puts special tokens around every turn"
            )

    def _openers(self, prompt: str) -> list[str]:
        return [token for token in self.tokenizer.get_added_vocab() if token in prompt and len(token) > 1] or [prompt]


def _reads(syntax: Syntax, text: str, count: int) -> bool:
    """Whether a syntax finds the probe's calls in a turn."""
    try:
        found, _ = syntax.find(syntax.visible(text))
    except CallError:
        return False
    names = {name: str(value) for name, value in _ARGUMENTS.items()}
    return len(found) == count and all(
        call.name == _TOOL.name and {name: str(value) for name, value in call.arguments.items()} == names
        for call in found
    )
