"""Pieces of a conversation are tokenised as they stand in it, by every kind of tokenizer; or the tokenizer is refused."""

from __future__ import annotations

import pytest
from support.small_models import CHAT_TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swirl_fast.rendering import Renderer

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{{ bos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = [chr(i) for i in range(33, 127)] + ["\n", "▁", "ü", "[UNK]"]


def spelled(
    pre: pre_tokenizers.PreTokenizer | None, normalizer: normalizers.Normalizer | None = None, **added: bool
) -> Tokenizer:
    """Letter by letter, with the words "is" and "▁is", so that a blank before a word can be seen."""
    merges = [("i", "s"), ("▁", "is"), ("▁", "<"), ("\n", "\n")]
    words = {letter: i for i, letter in enumerate([*LETTERS, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(words, merges, unk_token="[UNK]"))
    if pre is not None:
        made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(
        [AddedToken(token, special=True, **added) for token in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
    )
    return made


def byte_level(prefix: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    made.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")])
    return made


KINDS = {
    "byte level": byte_level(False),
    "byte level, blank before": byte_level(True),
    "Metaspace first": spelled(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace always": spelled(pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "Metaspace never": spelled(pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "Llama": spelled(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "added tokens with white space behind": spelled(
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False), rstrip=True
    ),
    "added tokens with white space before": spelled(
        pre_tokenizers.Metaspace(prepend_scheme="never", split=False), lstrip=True
    ),
    "added tokens that are normalised": spelled(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), normalized=True
    ),
}


def renderer_of(kind: str, template: str) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]" if "byte" not in kind else None,
    )
    tokenizer.chat_template = template
    return Renderer(tokenizer, kind)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA_2], ids=["ChatML", "Llama-2"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_tokens_of_the_whole(kind: str, template: str) -> None:
    """Of a written conversation. Where that cannot be, the tokenizer is refused by name."""
    try:
        renderer = renderer_of(kind, template)
    except ValueError as error:
        assert f"the tokenizer of {kind} makes other tokens of a conversation's pieces" in str(error)
        return
    messages = [{"role": "user", "content": "is it?"}]
    tokens = renderer.prompt(messages)
    for action, observation in [("is", "is -> 5"), ("<answer>it is 5</answer>", "  is it \n\n ü?"), ("it\n\nis", "no")]:
        turn = {"role": "assistant", "content": action}
        written = renderer.written(turn)
        following = [{"role": "user", "content": observation}]
        tokens += [*written, *renderer.following(turn, following, written[-1])]
        messages += [turn, *following]
    assert tokens == renderer.prompt(messages), renderer.tokenizer.convert_ids_to_tokens(tokens)


def test_most_kinds_are_not_refused() -> None:
    accepted = []
    for kind in KINDS:
        for template in (CHAT_TEMPLATE, LLAMA_2):
            try:
                accepted.append(renderer_of(kind, template))
            except ValueError:
                continue
    assert len(accepted) >= 15


def test_no_blank_is_made_before_an_observation() -> None:
    """Tokenised alone, what follows an action would begin with one."""
    renderer = renderer_of("Metaspace always", CHAT_TEMPLATE)
    stopped = renderer.observation("5", stopped=True)
    whole = renderer.tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    assert [renderer.stop_id, *stopped] == whole == renderer.observation("5", stopped=False)
