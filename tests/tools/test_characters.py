"""What counts as the same text, and half characters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_fast.tools.arithmetic import evaluate
from swirl_fast.tools.characters import same_text, whole_characters, whole_values, without_accents


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Zürich", "zurich"),
        ("Zu\u0308rich", "zurich"),
        ("Beyoncé", "beyonce"),
        ("Straße", "strasse"),
        ("Łódź, Smørrebrød", "lodz, smorrebrod"),
        ("ﬁnal Ｗｉｄｅ", "final wide"),
        ("İstanbul", "istanbul"),
        ("ガ 한국 हिन्दी", "ガ 한국 हिन्दी"),  # marks that are part of a letter stay
        ("Plain ASCII_1", "plain ascii_1"),
    ],
)
def test_accents_and_case_are_no_difference(text: str, folded: str) -> None:
    assert without_accents(text) == folded


@given(st.text())
def test_composed_and_decomposed_texts_are_the_same(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert same_text(unicodedata.normalize(form, text)) == same_text(text)
        assert without_accents(unicodedata.normalize(form, text)) == without_accents(text)
    whole_characters(text).encode("utf-8")


def test_white_space_is_collapsed() -> None:
    assert same_text(" a\u00a0 b\n\tc ") == "a b c"


def test_half_characters_become_the_replacement_character() -> None:
    assert whole_characters("Hi \ud83d there 🎉") == "Hi \ufffd there 🎉"
    assert whole_values({"a\udc00": ["\ud800", {"b": 1}], "c": None}) == {"a\ufffd": ["\ufffd", {"b": 1}], "c": None}


def test_the_calculator_reads_compatibility_forms() -> None:
    assert evaluate("（3+4）*2") == evaluate("（３＋４）＊２") == 14
