"""A tokenizer for any chat template: byte-level, with the template's control tokens as added ones."""

from __future__ import annotations

import re
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(trl.__file__).parent / "chat_templates"
_CONTROL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|</?[a-z]+_of_[a-z]+>|<\|[a-z_\"]+>|<[a-z_]+\|>|<end_of_utterance>|<\|\"\|>|</s>|<(?:/?think|/?tool_call|/?tool_response)>"
)
# Of families whose end tokens stand in generation_config.json and not in the template.
END_TOKENS = {
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
}


def native_templates() -> list[str]:
    """Those that models have, without TRL's variants for training."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))


def template_text(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template: str, *more: str) -> PreTrainedTokenizerFast:
    """more: further control tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["the answer is 12 + 3 = 15 QUERY -> RESULT user assistant tool"] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    control = dict.fromkeys(["<bos>", "<eos>", *more, *_CONTROL.findall(template)])
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer
