"""A random model for logs of conversations, with a chat template for tools."""

from __future__ import annotations

from pathlib import Path

import torch
from support.small_models import SHAPE, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# ChatML with tools, calls and results as Hermes and Qwen write them, and thoughts that stay.
HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def hermes_model(folder: Path, texts: list[str], positions: int = 2048) -> Path:
    """A folder with a random model of two layers, which ends a turn now and then, and the template HERMES. positions: its context."""
    tokenizer = train_tokenizer(texts)
    tokenizer.chat_template = HERMES
    # A random model hardly ever draws one certain token: many end its turns.
    ends = [f"<|end_{i}|>" for i in range(64)]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
