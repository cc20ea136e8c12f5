"""Chat template -> token ids, append-only: the tokens that were sampled are never rendered or tokenised again.

A trajectory's tokens grow by `action tokens as sampled` + `observation tokens`, where the latter are the end of the assistant's
turn (when it was not sampled), the user turn with the observation, and the opening of the next assistant turn. Both ends of that
are read off the template once, by rendering conversations that differ in one message. A template for which that is not
possible, because it changes or drops earlier turns when later ones arrive, is refused by name: training would see other tokens
than the rollout did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from swirl_fast.config import ModelConfig
from swirl_fast.formats.tags import ANSWER_TAG
from swirl_fast.tasks.task import Example
from swirl_fast.tools.characters import whole_characters
from swirl_fast.tools.tool import BUILT_IN, ToolSpec

Message = dict[str, str]
_BREAKS = (
    " ",
    " ",
    "·",
    "\ufffd",
)  # put into what would become a control token, one after the other until none is left
READY = "chatml is one for models with the tokens <|im_start|> and <|im_end|>, such as Qwen3"


def instructions(tools: Sequence[ToolSpec], max_steps: int, own: str = "") -> str:
    """The system message: what the tags mean and how the conversation goes (points of the paper's appendix, in our words).

    own: in place of it; `{tools}` in it becomes the lines about tools and tags.
    """
    lines = []
    for tool in tools:
        if tool.name in BUILT_IN:
            lines.append(f"To use the {tool.name}, write {tool.usage}: {tool.description}")
        else:
            arguments = f" Arguments: {tool.arguments}." if tool.arguments else ""
            lines.append(f"To use {tool.name}, write {tool.usage}: {tool.description}{arguments}")
    if tools:
        lines.append(
            f"You may make up to {max_steps - 1} calls, one a turn. The result comes back as QUERY -> RESULT. "
            "Never repeat a call that was already made."
        )
    lines.append(f"When you have enough information, write <{ANSWER_TAG}>…</{ANSWER_TAG}>.")
    if tools:
        lines.append("A turn has either one call or the answer, never both.")
    if own:
        return own.replace("{tools}", "\n".join(lines))
    return "\n".join(["Answer the question in a few words.", *lines])


def conversation(
    question: str, tools: Sequence[ToolSpec], max_steps: int, examples: Sequence[Example], own_instructions: str = ""
) -> list[Message]:
    """System message, the worked examples as earlier turns, and the question."""
    messages = [{"role": "system", "content": instructions(tools, max_steps, own_instructions)}]
    for example in examples:
        messages.append({"role": "user", "content": example.question})
        for i, action in enumerate(example.actions):
            messages.append({"role": "assistant", "content": action})
            if i < len(example.observations):
                messages.append({"role": "user", "content": example.observations[i]})
    messages.append({"role": "user", "content": question})
    return messages


def open_renderer(config: ModelConfig, dated: bool = True) -> Renderer:
    """Of the model of a config, with all tokens that end its turns. dated: False writes a fixed day where the template writes today's.

    Raises ConfigError for a model that cannot be loaded, ValueError as Renderer does.
    """
    from swirl_fast.models.load import dateless, end_ids, load_tokenizer

    tokenizer = load_tokenizer(config)
    return Renderer(tokenizer if dated else dateless(tokenizer), config.path, end_ids(config, tokenizer))


class Renderer:
    """stop_id: the token with which the chat template ends an assistant's turn. stop_ids: all tokens that end one, that one first;
    generation stops at each, and a turn that ends with any of them is complete."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str = "the model", end_ids: Sequence[int] = ()
    ) -> None:
        """end_ids: further tokens that the model may end a turn with. Raises ValueError, naming `name`, for a chat template that is not
        append-only."""
        self._read_tokenizer(tokenizer, name)
        self._system_role = self._has_system_role()
        before, self._after = self._probe()
        tokens = self._encode(before)
        self.stop_id = tokens[0] if tokens else -1
        if self.stop_id not in tokenizer.get_added_vocab().values():
            raise ValueError(
                f"the chat template of {name} does not end an assistant's turn with a special token (it continues with {before!r}), "
                f"so generation would not know where to stop; set model.chat_template to one that does ({READY})"
            )
        self.stop_ids = tuple(dict.fromkeys([self.stop_id, *end_ids]))
        self._end_of_turn = str(tokenizer.convert_ids_to_tokens(self.stop_id))
        self._before = before.removeprefix(self._end_of_turn)

    def _read_tokenizer(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self._name = name
        special = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        # but blanks and single characters, which end nothing, and what unknown characters become
        control = {i for token, i in tokenizer.get_added_vocab().items() if len(token) > 1 and token.strip(" \t\r\n▁")}
        self._control = control - {tokenizer.unk_token_id}

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of s_1: the rendered conversation with the opening of the assistant's turn."""
        return self._encode(self._render([{**m, "content": self.plain(m["content"])} for m in messages]))

    def observation(self, text: str, stopped: bool) -> list[int]:
        """Token ids that follow an action: `s_{i+1} = s_i + a_i + observation(o_i)`.

        stopped: the action's last token is one of stop_ids (False: it hit the length limit, and the turn is closed here).
        """
        tokens = self._encode(self._before + self.plain(text) + self._after)
        return tokens if stopped else [self.stop_id, *tokens]

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
        """Token ids of the text of an action, without its stop token: of one that was written, not sampled."""
        return self._encode(self.plain(text))

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

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _render(self, messages: Sequence[Message]) -> str:
        if not self._system_role and messages and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    def _has_system_role(self) -> bool:
        messages = [{"role": "system", "content": "S-probe"}, {"role": "user", "content": "U-probe"}]
        try:
            return "S-probe" in self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # Gemma-2 raises: it has no system role
            return False

    def _probe(self) -> tuple[str, str]:
        """The texts between an action and an observation, and between an observation and the next action."""
        messages = [{"role": "system", "content": "instructions"}, {"role": "user", "content": "question"}]
        rendered = self._render(messages)
        found = set()
        for i, action in enumerate(
            (
                "<math_exp>1 + 1</math_exp>",
                "<think>\nreasoning\n</think>\n\n<math_exp>2</math_exp>",
                "<answer>2</answer>",
            )
        ):
            observation = f"OBSERVATION-{i}"
            messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
            longer = self._render(messages)
            start = rendered + action
            if not longer.startswith(start) or longer[len(start) :].count(observation) != 1:
                at = next(
                    (k for k, (a, b) in enumerate(zip(longer, start, strict=False)) if a != b),
                    min(len(longer), len(start)),
                )
                raise ValueError(
                    f"the chat template of {self._name} rewrites earlier turns: after one more turn, {start[max(0, at - 20) : at + 40]!r} "
                    f"has become {longer[max(0, at - 20) : at + 40]!r}. Set model.chat_template to a template that only appends; {READY}"
                )
            before, after = longer[len(start) :].split(observation)
            found.add((before, after))
            rendered = longer
        if len(found) != 1:
            raise ValueError(
                f"the chat template of {self._name} renders the same turn differently at different places: {sorted(found)}. "
                f"Set model.chat_template to a template that only appends; {READY}"
            )
        return found.pop()
