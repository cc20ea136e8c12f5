"""What a chat template writes, as text: the prompt, an assistant's turn, and what stands between two of its turns.

A trajectory grows by `the turn as it was sampled` + `what follows it`. The latter is read off the template with markers in place of the
turn's contents: it begins with the token that ends the turn and ends with the opening of the next one. Thoughts of earlier turns, which
many templates drop, stay: nothing that was sampled is rendered again. A template that changes earlier turns in any other way, or writes
another text at another place, is refused by name: training would see other tokens than the rollout did.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from swirl_fast.tools.tool import ToolSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In OpenAI's form: role and content; of an assistant reasoning_content and tool_calls, [{"id", "type": "function", "function": {"name",
# "arguments": {…}}}]; of a tool name and tool_call_id.
Message = dict[str, Any]
# Shipped templates, by a token that the models have which they are for; the first that fits.
READY = {
    "<|im_start|>": "hermes",
    "<|start_header_id|>": "llama3",
    "<start_of_turn>": "gemma",
    "[INST]": "mistral",
    "</s>": "mistral",
}
THINKING = ("enable_thinking", "thinking")  # what templates call the variable
_MARKS = ("MARK-0-EDGE", "MARK-1-EDGE", "MARK-2-EDGE")
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?$")
_EMPTY = re.compile(r"^<think>\s*</think>\s*")
_BASE: list[Message] = [{"role": "system", "content": "instructions"}, {"role": "user", "content": "question"}]


def _as_it_is(message: Message) -> Message:
    return message


def _in_parts(message: Message) -> Message:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _called(message: Message, no_text: bool, as_json: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if as_json:
        calls = [
            {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
            for call in calls
        ]
    content = message["content"] or (None if no_text else "")
    return {**message, "content": content, "tool_calls": calls}


def _as_json(arguments: Any) -> str:
    """A text is what an agent wrote in place of arguments."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


_CALL_FORMS = [
    functools.partial(_called, no_text=no_text, as_json=as_json)
    for as_json in (False, True)
    for no_text in (False, True)
]


_Form = Callable[[Message], Message]


class Template:
    """end_texts: further tokens that the model may end a turn with. Raises ValueError, naming `name`, for a template that is not
    append-only, or without a variable for thinking="off".

    end: text of the token with which it ends an assistant's turn. opens: whether that token opens the next turn, as in GLM's, which has
    no end of its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, end_texts: Iterable[str] = (), thinking: str = "keep"
    ) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._variables = self._thinking(thinking)
        added = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._call_form: _Form = _as_it_is
        self._content_form: _Form = _as_it_is
        self._find_content_form()
        self._has_system_role = self._system_role()
        alone = self._after(self.render([*_BASE, _turn(0)], opening=False), _MARKS[0])
        between = self._after(self.render([*_BASE, _turn(0), _user(0)]), _MARKS[0])
        self.opens = not alone.strip()
        ending = between if self.opens else alone
        match = self._added.match(ending.lstrip())
        if match is None:
            raise ValueError(
                f"the chat template of {name} does not end an assistant's turn with a special token (it continues with {between!r}), "
                f"so generation would not know where to stop; set model.chat_template to one that does ({self._ready()})"
            )
        self.end = match[0]
        self.end_texts = list(dict.fromkeys([self.end, *end_texts]))
        self._check(between)
        self.calls = self._find_call_form()

    # ---- what it writes

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), opening: bool = True) -> str:
        """opening: with the opening of an assistant's turn at the end. Raises jinja2's TemplateError for what the template refuses."""
        if not self._has_system_role and messages and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        return self._write(messages, tools, opening)

    def _write(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), opening: bool = True) -> str:
        text = self._tokenizer.apply_chat_template(
            [self._content_form(self._call_form(message)) for message in messages],
            tools=[spec.schema for spec in tools] or None,
            tokenize=False,
            add_generation_prompt=opening,
            **self._variables,
        )
        assert isinstance(text, str), "tokenize=False gives text"
        return text

    def turn(self, message: Message) -> str:
        """An assistant's turn after its opening, without the token that ends it.

        Raises ValueError where the template leaves out a call or the text of the message."""
        before = self.render(_BASE)
        whole = self.render([*_BASE, message], opening=False)
        thought = message.get("reasoning_content")
        if not whole.startswith(before) and not thought:
            # The opening begins a thought: an empty one is written as a thought is.
            thinking = {**message, "reasoning_content": _MARKS[1]}
            whole = self.render([*_BASE, thinking], opening=False).replace(_MARKS[1], "", 1)
        if whole.startswith(before):
            text = whole[len(before) :]
        else:  # the template never writes again what its opening begins
            head = self.render(_BASE, opening=False)
            opened = _OPENED.sub("", before[len(head) :])
            rest = whole[len(head) :]
            if not whole.startswith(head) or not rest.startswith(opened):
                raise ValueError(
                    f"the chat template of {self._name} opens a turn with {before[-40:]!r} and writes {whole[-200:]!r}; "
                    f"set model.chat_template to one that writes turns as it opens them ({self._ready()})"
                )
            text = f"{(thought or '').strip()}\n</think>\n\n{_EMPTY.sub('', rest[len(opened) :])}"
        ends = [at for end in self.end_texts if (at := text.find(end)) >= 0]
        text = text[: min(ends)] if ends else text
        names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        lost = [word for word in (*names, str(message.get("content") or "").strip()) if word not in text]
        if lost:
            raise ValueError(f"the chat template of {self._name} leaves {lost[0][:80]!r} out of an assistant's turn")
        return text

    def following(self, turn: Message, messages: Sequence[Message]) -> str:
        """What follows an assistant's turn: the token that ends it, the messages, and the opening of the next turn.

        turn: of its contents only the names of the calls matter, which some templates write again beside the results.
        """
        calls = turn.get("tool_calls") or []
        marked = _calling([call["function"]["name"] for call in calls]) if calls else _turn(0)
        mark = _mark_of(len(calls) - 1) if calls else _MARKS[0]
        # The first mark is that of the turn: what comes behind it may say anything.
        _, found, tail = self.render([*_BASE, marked, *messages]).partition(mark)
        if not found:
            raise ValueError(
                f"the chat template of {self._name} leaves an assistant's turn out before {messages[:1]!r:.200}"
            )
        if calls:
            return tail[self._call_end(marked, tail, mark) :]
        return tail if self._added.match(tail) else tail.lstrip()

    def call_end(self, name: str) -> str:
        """Text of the token that ends a turn with a call of the tool `name`."""
        after = self.following(_calling([name]), [result_of(0, name, "RESULT")])
        match = self._added.match(after)
        if match is None:
            raise ValueError(f"the chat template of {self._name} does not end a call with a special token: {after!r}")
        return match[0]

    # ---- how it does so

    def _call_end(self, marked: Message, tail: str, mark: str) -> int:
        """Where in the text after the last argument of a call the turn ends."""
        ends = [at for end in self.end_texts if (at := tail.find(end)) >= 0]
        if ends:
            return min(ends)
        alone = self._after(self.render([*_BASE, marked], opening=False), mark)
        common = next(
            (i for i, (a, b) in enumerate(zip(alone, tail, strict=False)) if a != b), min(len(alone), len(tail))
        )
        if self.opens:
            match = self._added.search(tail, common)
            return match.start() if match else common
        found = [match.start() for match in self._added.finditer(tail[:common])]
        return found[-1] if found else common

    def _find_content_form(self) -> None:
        """As texts, or as lists of parts, which templates of models for images ask for."""
        reason = "it leaves the text of a message out"
        for form in (_as_it_is, _in_parts):
            self._content_form = form
            try:
                if _MARKS[0] in self._write([{"role": "user", "content": _MARKS[0]}]):
                    return
            except (TemplateError, TypeError) as error:
                reason = str(error)
        raise ValueError(
            f"the chat template of {self._name} does not write a user's text: {reason}; set model.chat_template to one that "
            f"does ({self._ready()})"
        )

    def _find_call_form(self) -> bool:
        """Whether it writes calls and their results at all: with arguments as a table or as JSON, with an empty text or none."""
        probe = [*_BASE, _calling(["probe-tool"]), result_of(0, "probe-tool", _MARKS[1])]
        for form in _CALL_FORMS:
            self._call_form = form
            try:
                text = self.render(probe)
            except (TemplateError, TypeError, ValueError, KeyError):  # TypeError: it joins texts and finds a table
                continue
            if all(text.count(word) == 1 for word in (_mark_of(0), _MARKS[1])) and "probe-tool" in text:
                return True
        self._call_form = _as_it_is
        return False

    def _after(self, text: str, mark: str) -> str:
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise ValueError(
                f"the chat template of {self._name} does not write an assistant's turn once; set model.chat_template to one that does "
                f"({self._ready()})"
            )
        return after

    def _thinking(self, thinking: str) -> dict[str, Any]:
        if thinking == "keep":
            return {}
        template = self._tokenizer.chat_template
        known = [word for word in THINKING if re.search(rf"\b{word}\b", template if isinstance(template, str) else "")]
        if not known:
            raise ValueError(
                f"model.thinking=off: the chat template of {self._name} has no variable {' or '.join(THINKING)} to turn thoughts off with; "
                "use model.thinking=keep"
            )
        return dict.fromkeys(known, False)

    def _system_role(self) -> bool:
        messages = [{"role": "system", "content": "S-probe"}, {"role": "user", "content": "U-probe"}]
        try:
            return "S-probe" in self._write(messages)
        except TemplateError:  # Gemma-2 raises: it has no system role
            return False

    def _ready(self) -> str:
        """Which template of ours is for this model."""
        tokens = self._tokenizer.get_vocab()
        name = next((name for token, name in READY.items() if token in tokens), None)
        if name is None:
            return "the shipped ones (swirl-fast configs) are for models with " + ", ".join(READY)
        return f"{name} is one for this model"

    def _check(self, between: str) -> None:
        """Raises ValueError unless turns are only appended: what was written before stays, thoughts and what opens them aside."""
        messages, prompt = list(_BASE), self.render(_BASE)
        for i in range(3):
            messages += [_turn(i), _user(i)]
            whole = self.render(messages)
            pieces = re.split("|".join(_MARKS[: i + 1]), whole)
            if len(pieces) != i + 2 or not _extends(pieces[0], prompt):
                start = prompt + _MARKS[0]
                at = next((k for k, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), 0)
                raise ValueError(
                    f"the chat template of {self._name} rewrites earlier turns: after one more turn, {start[max(0, at - 20) : at + 40]!r} "
                    f"has become {whole[max(0, at - 20) : at + 40]!r}. Set model.chat_template to a template that only appends; "
                    f"{self._ready()}"
                )
            found = [piece.replace(_user(k)["content"], "…") for k, piece in enumerate(pieces[1:])]
            expected = between.replace(_user(0)["content"], "…")
            if found[-1] != expected or not all(_extends(piece, expected) for piece in found):
                raise ValueError(
                    f"the chat template of {self._name} renders the same turn differently at different places: "
                    f"{sorted({*found, expected})}. "
                    f"Set model.chat_template to a template that only appends; {self._ready()}"
                )


def _extends(one: str, other: str) -> bool:
    """Whether one is the other with something after it, thoughts that are opened or empty aside."""
    one, other = _OPENED.sub("", one), _OPENED.sub("", other)
    return one.startswith(other) or other.startswith(one)


def _turn(i: int) -> Message:
    return {"role": "assistant", "content": _MARKS[i]}


def _user(i: int) -> Message:
    return {"role": "user", "content": f"OBSERVATION-{i}"}


def _mark_of(i: int) -> str:
    return f"CALL-{i}-EDGE"


def calling(calls: Sequence[tuple[str, dict[str, Any]]]) -> Message:
    """A turn with calls and no text."""
    made = [
        {"type": "function", "id": call_id(i), "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def call_id(i: int) -> str:
    """Nine digits, which is what Mistral's templates ask for."""
    return f"{i:09d}"


def _calling(names: Sequence[str]) -> Message:
    """A turn with calls, whose arguments are marks."""
    return calling([(name, {"mark": _mark_of(i)}) for i, name in enumerate(names)])


def result_of(i: int, name: str, content: str) -> Message:
    """The result of the call i of a turn."""
    return {"role": "tool", "name": name, "tool_call_id": call_id(i), "content": content}
