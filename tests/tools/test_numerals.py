"""The number that a text states, and those that it mentions: everything beside the digits counts."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swirl_fast.tools.numerals import currency_in, number_in, numbers

STATED = {
    # signs
    "-5": "-5", "−5": "-5", "–5": "-5", "—5": "-5", "- 5": "-5", "x = - 5": "-5", "minus 5": "-5", "Minus 5": "-5", "negative 5": "-5",
    "it is negative 5": "-5", "-$4.50": "-9/2", "$-5": "-5", "－５": "-5", "+5": "5", "minus 5 degrees": "-5", "neg. 5": "-5",
    "the answer is -5": "-5",
    # thousands and decimals
    "1,200": "1200", "1,200.50": "2401/2", "10_000": "10000", "1'200": "1200", "1,00,000": "100000", "1.200,50": "2401/2", "1 200": "1200",
    "1\u00a0200": "1200", "1\u202f200 clips": "1200", "10 000 €": "10000", "-1 200": "-1200", "1.200": "6/5", ".5": "1/2", "5.": "5",
    # factors
    "5k": "5000", "5K": "5000", "$2.5M": "2500000", "5bn": "5000000000", "5B": "5000000000", "1.5 million": "1500000", "5 thousand": "5000",
    "$1.5 Million": "1500000", "3 hundred thousand": "300000", "5 dozen": "60", "2 lakh": "200000", "5 trillion": "5000000000000",
    # percent, fractions, powers of ten
    "50%": "1/2", "50 %": "1/2", "50 percent": "1/2", "5\\%": "1/20", "３％": "3/100", "3/4": "3/4", "-3 / 4": "-3/4", "1 1/2": "3/2",
    "½": "1/2", "1½": "3/2", "−½": "-1/2", "2 1/2 cups": "5/2", "The answer is 3/4.": "3/4", "5 and a half": "11/2", "3⁄4": "3/4",
    "1e5": "100000", "1.5e-3": "3/2000", "1.5×10^3": "1500", "1.5 x 10^-3": "3/2000", "10^3": "1000", "10³": "1000", "2·10⁻³": "1/500",
    # currencies, units and what is written around
    "$5": "5", "US$5": "5", "€5": "5", "5 €": "5", "USD 5": "5", "USD5": "5", "5 USD": "5", "5 dollars": "5", "\\$5": "5", "¥5": "5",
    "Rs.5": "5", "Rs. 5": "5",
    "10 clips": "10", "5kg": "5", "5 km/h": "5", "5 m²": "5", "5 m of H2O".replace(" m ", " kg "): "5", "$5/hour": "5", "5°C": "5",
    "x = 10": "10", "Answer: 5": "5", "(5)": "5", "**5**": "5", "\\boxed{5}": "5", "$5$": "5", "“5”": "5", "5 (five)": "5", "-> 5": "5",
    "5, because": "5", "5 - the total": "5", "5 more apples": "5", "5 times": "5", "１２": "12", "\ufeff5": "5", "about 10": "10",
}  # fmt: skip

NOT_STATED = (
    # other things
    "5x", "x5", "5 x", "3D", "3rd", "21st", "v2", "H2O", "#5", "12:30", "5:1", "5pm", "5 pm", "5 a.m.", "12 o'clock", "2020-01-05", "1/2/3",
    "3/4/2020", "1.2.3", "version 5", "0x10", "5i", "A-5", "5-year", "192.168.1.1", "①", "٣", "5٠", "5万", "5 万", "五",
    # several, ranges, calculations
    "3-5", "3–5", "3 to 5", "5~6", "10 or 12", "5 + 5", "48/2", "4/0", "2^3", "5²", "5**2", "5 × 3", "x - 5", "12 minus 5", "x minus 5",
    "5!", "√5", "sqrt(5)", "f(5)", "-(5)", "5π", "5 pi", "5 squared", "half of 5", "twice 5", "a third of 9", "5 divided by two",
    # bounds
    "<5", ">5", "≤ 5", ">= 5", "≠ 5", "!= 5", "±5", "5+", "at least 5", "less than 5", "over 5", "5 or more", "5 or so", "not 5",
    # two readings
    "1,5", "1,0", "0,500", "1_0", "1.200.300", "1 20", "3 400 meter races", "5m", "5 m", "5t", "5b", "5 k", "5 quarters", "1/2%", "5%%",
    "the answer — 5", "--5", "+-5", "minus -5", "5-", "5'10", "5'", '5"', "5*",
    # what would be dropped
    "0.3...", "0.3…", "0.(3)", "5\u0305", "5 grand", "5 quadrillion", "5 Millionen", "5 тысяч", "5 mil", "5 hundred-odd",
    "5 and three quarters", "5 zillion", "5 Tsd.", "5 Mill.", "5 bln", "5 gross", "5 만", "5 ألف", "5 milioni", "5 duizend", "5 ppm",
    "5 p.p.", "5 tysięcy", "5 milhões",
    "5 (thousand)", "5 in millions", "5 (in thousands)", "5 k€", "5 TEUR", "5 MUSD", "5 e3", "5 doubled", "5 out of ten",
    "5 at most", "5 max", "5 below zero", "5 degrees below zero", "less 5", "x 5", "can't be 5", "cannot be 5", "is not really 5",
    "1 thousand two hundred", "twenty 5", "point 5", "5‰", "5 per mille", "5 per thousand", "5 basis points", "5 million-dollar homes",
    "(5)k", "(5)!", "5\u200b0", "5ish", "no number", "ten", "nan", "", "9" * 5000, "1e99999", "1e999999999",
)  # fmt: skip


@pytest.mark.parametrize(("text", "value"), STATED.items())
def test_a_number_is_read_with_all_that_belongs_to_it(text: str, value: str) -> None:
    stated = number_in(text)
    assert stated is not None and stated.value == Fraction(value)


@pytest.mark.parametrize("text", NOT_STATED)
def test_what_may_be_another_number_is_none(text: str) -> None:
    assert number_in(text) is None


@pytest.mark.parametrize("text", ["-5", "1,200", "$5", "5 €", "50%", "1.5 million", "5k", "½", "1e5", "5.", "minus 5"])
def test_a_text_that_is_nothing_but_a_number(text: str) -> None:
    stated = number_in(text)
    assert stated is not None and stated.whole


@pytest.mark.parametrize("text", ["5 clips", "5kg", "x = 5", "the 5", "5 m²"])
def test_a_text_that_holds_more_than_a_number(text: str) -> None:
    stated = number_in(text)
    assert stated is not None and not stated.whole


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,200 and $3.50 and 50%", ["1200", "7/2", "1/2"]),
        ("$1,234,567.89. It was 10:30.", ["123456789/100", "10", "30"]),
        ("61 - 48 + 15 -> 28.0", ["61", "48", "15", "28"]),
        ("7-4, 7 -4, 7 - 4, (7)-4", ["7", "4", "7", "4", "7", "4", "7", "4"]),
        ("-4, 7 - -4, (-5) = -6 is -7", ["-4", "7", "-4", "-5", "-6", "-7"]),
        ("-$5 and $-5, −5", ["-5", "-5", "-5"]),
        ("COVID-19, H2O, the 3rd, 3x4, 5–10", ["19", "3", "3", "4", "5", "10"]),
        ("1e5 and 1.5e+20 and 2e-3", ["100000", "150000000000000000000", "1/500"]),
        ("12.5% of 3/4; 7%3 and 7 % 3 and 20% 5", ["1/8", "3", "4", "7", "3", "7", "3", "1/5", "5"]),
        ("1,0 12,34 1234,567", ["1", "0", "12", "34", "1234", "567"]),
        ("１２ pens, ５０％, ＄３．５０, 3 m²", ["12", "1/2", "7/2", "3"]),
        (".5 and 5.", ["1/2", "5"]),
        ("no number", []),
        ("9" * 5000, []),
        ("1e999999999999", []),
    ],
)
def test_numbers_mentioned(text: str, found: list[str]) -> None:
    assert [str(number) for number in numbers(text)] == found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("111," * 20_000 + "1", 20_001),
        ("1e" * 100_000, 1),
        ("-" * 200_000, 0),
        ("1." * 100_000, 1),
        (" " * 200_000 + "1", 1),
        ("５" * 200_000, 0),
    ],
)
def test_long_texts_are_read_in_one_pass(text: str, count: int) -> None:
    """A reader that is quadratic would take minutes for each."""
    assert len(numbers(text)) == count


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She earns $5k, he 1.5 million.", ["5000", "1500000"]),
        ("10_000 of 3 hundred thousand are 30 percent", ["10000", "300000", "3/10"]),
        ("5m and 5 B and 5 k", ["5", "5", "5"]),
        ("2 dozen eggs, 1\u00a0200 hens, 5\u00a0km, 0,500", ["24", "1200", "5", "0", "500"]),
    ],
)
def test_factors_of_mentioned_numbers(text: str, found: list[str]) -> None:
    assert [str(number) for number in numbers(text)] == found


@pytest.mark.parametrize(
    "text", ["5 " * 900, "$-" * 900 + "5", "1 200 " * 300, "*5" * 900, "½" * 1_900, "1_000" * 390, "(" * 1_900 + "5"]
)
def test_odd_answers_take_no_time(text: str) -> None:
    """A reader that is exponential would not come back."""
    number_in(text)


# ---- a writer of numbers in many notations, which the reader undoes

_wholes = st.integers(0, 10**12)


def _grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


def _decimal(value: int, places: int) -> tuple[str, Fraction]:
    digits = str(value).zfill(places + 1)
    return (f"{digits[:-places]}.{digits[-places:]}" if places else digits), Fraction(value, 10**places)


_bodies = st.one_of(
    st.builds(
        lambda v, sep: (_grouped(v, sep), Fraction(v)),
        _wholes,
        st.sampled_from([",", "_", "'", "\u00a0", "\u202f", ""]),
    ),
    st.builds(_decimal, _wholes, st.integers(0, 6)),
    st.builds(lambda v: (f"{v:,}.50", v + Fraction(1, 2)), _wholes),
    st.builds(lambda v: (f"{_grouped(v, '.')},50", v + Fraction(1, 2)), st.integers(1000, 10**9)),
    st.builds(lambda v, e: (f"{v}e{e}", v * Fraction(10) ** e), st.integers(1, 10**6), st.integers(-20, 20)),
    st.builds(
        lambda v, e, form: (form.format(v, e), v * Fraction(10) ** e),
        st.integers(1, 10**6),
        st.integers(-20, 20),
        st.sampled_from(["{}×10^{}", "{} x 10^{}", "{}*10**{}", "{} · 10^{{{}}}"]),
    ),
    st.builds(
        lambda w, t, b: (f"{w} {t}/{t + b}", w + Fraction(t, t + b)),
        st.integers(1, 99),
        st.integers(1, 99),
        st.integers(1, 99),
    ),
    st.builds(lambda t, b: (f"{t}/{t + b}", Fraction(t, t + b)), st.integers(1, 99), st.integers(1, 99)),
    st.builds(lambda w: (f"{w}½", w + Fraction(1, 2)), st.integers(1, 99)),
)
_plain_bodies = st.builds(_decimal, _wholes, st.integers(0, 6))
_scaled = st.one_of(
    _bodies.map(lambda body: (*body, Fraction(1))),
    st.builds(
        lambda body, end: (body[0] + end[0], body[1], Fraction(end[1])),
        _plain_bodies,
        st.sampled_from(
            [
                ("%", "1/100"),
                (" percent", "1/100"),
                ("k", "1000"),
                ("M", "1000000"),
                (" million", "1000000"),
                ("bn", "1000000000"),
            ]
            + [(" dozen", "12"), (" hundred thousand", "100000")]
        ),
    ),
)


@given(
    _scaled,
    st.sampled_from(["", "-", "−", "–", "—", "minus ", "negative ", "+", "- "]),
    st.sampled_from(["", "$", "€", "US$", "£ "]),
    st.sampled_from(["{}", " {} ", "{}.", "({})", "**{}**", "Answer: {}", "x = {}", "\u201c{}\u201d"]),
    st.booleans(),
)
def test_the_reader_undoes_the_writer(
    body: tuple[str, Fraction, Fraction], sign: str, currency: str, around: str, wide: bool
) -> None:
    text, value, scale = body
    if "*" in text:
        around = around.replace("**", "")
    if wide:
        text = text.translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"})
    stated = number_in(around.format(f"{sign}{currency}{text}"))
    wanted = value * scale * (-1 if sign not in ("", "+") else 1)
    assert stated is not None and stated.value == wanted


_dropped = st.sampled_from(
    "x D th m t i π ! ² ³ ^2 /2/3 :30 -3 -year … ... .5.5 ‰ 万 + * ' \" ٠ _0 ,5 (3) ~6 ** st pm e ish \u0305 \u200b0".split()
    + [
        " or more",
        " squared",
        " quarters",
        " k",
        " m",
        " to 7",
        " grand",
        " + 1",
        " factorial",
        " per mille",
        " and three quarters",
    ]
)


@given(st.integers(2, 999), _dropped)
def test_nothing_after_a_number_is_dropped(value: int, end: str) -> None:
    stated = number_in(f"{value}{end}")
    assert stated is None or stated.value != value


@given(st.text(max_size=30) | st.text("0123456789.,_'-−+*/^%$€½²×x ekKMbn()[]minuspercent\u00a0", max_size=30))
@example("\ue0001\u20440\ue001")
@example("\ue000" + "5")
def test_no_text_raises(text: str) -> None:
    stated = number_in(text)
    assert stated is None or isinstance(stated.value, Fraction)
    assert all(isinstance(value, Fraction) for value in numbers(text))


def test_the_currency_beside_a_number() -> None:
    for text in ("$5", "US$5", "5 USD", "＄5", "-$5", "USD 5", "**$5**", "$2.5M"):
        assert currency_in(text) == "USD", text
    others = {
        "5 €": "EUR",
        "£5": "GBP",
        "￡5": "GBP",
        "Rs. 5": "INR",
        "₹5": "INR",
        "5 CHF": "CHF",
        "A$5": "A$",
        "₿5": "₿",
    }
    assert {text: currency_in(text) for text in others} == others
    assert [currency_in(text) for text in ("5", "5%", "5k", "1.5 million", "")] == [""] * 5
