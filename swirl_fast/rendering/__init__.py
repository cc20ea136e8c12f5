"""Messages -> text -> token ids: the system message (instructions.py), the chat template (template.py), the tokens (renderer.py)."""

from __future__ import annotations

from swirl_fast.config import ActionsConfig, ModelConfig
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TagsFormat
from swirl_fast.rendering.instructions import conversation, instructions, message_of, observed
from swirl_fast.rendering.renderer import Renderer
from swirl_fast.rendering.template import Message

__all__ = [
    "Message",
    "Renderer",
    "conversation",
    "instructions",
    "message_of",
    "observed",
    "open_format",
    "open_renderer",
]


def open_renderer(config: ModelConfig, dated: bool = True) -> Renderer:
    """Of the model of a config, with all tokens that end its turns. dated: False writes a fixed day where the template writes today's.

    Raises ConfigError for a model that cannot be loaded, ValueError as Renderer does.
    """
    from swirl_fast.models.load import dateless, end_ids, load_tokenizer

    tokenizer = load_tokenizer(config)
    used = tokenizer if dated else dateless(tokenizer)
    return Renderer(used, config.path, end_ids(config, tokenizer), config.thinking)


def open_format(actions: ActionsConfig, model: ModelConfig) -> Format:
    """How actions are written: actions.format=native is read off the chat template of the model, whose tokenizer it loads.

    Raises ConfigError as `open_renderer` does, ValueError for a chat template that cannot write calls, or in a way that nobody can read.
    """
    if actions.format == "tags":
        return TagsFormat(actions.answer)
    return open_renderer(model, dated=False).native_format(actions.answer)
