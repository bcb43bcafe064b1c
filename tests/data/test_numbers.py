"""The number reader: each accepted style has its right value, everything else is refused, in linear time."""
# ruff: noqa: RUF001  the characters that look alike are what is tested

from __future__ import annotations

import contextlib
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from pst_dist.data.tasks import get_task
from pst_dist.data.tasks.number_answers import find_number, numbers_in
from pst_dist.data.tasks.numbers import MAX_DIGITS, NotANumber, number_of_json, read_number, write_number

READ = {
    # signs
    **{"−3": "-3", "–5": "-5", "-5": "-5", "- 5": "-5", "+5": "5", "(-5)": "-5", "－5": "-5"},
    # decimals and thousands
    **{".5": "1/2", "5.": "5", "-.5": "-1/2", "007.50": "15/2", "0": "0", "-0.0": "0"},
    **{"1,234": "1234", "1,234,567": "1234567", "1,234.5": "2469/2", "1 234": "1234", "1\u202f234\u00a0567": "1234567"},
    **{"1'234": "1234", "1’234’567.5": "2469135/2", "1.234.567": "1234567", "1.234": "617/500"},
    **{"12,5": "25/2", "0,123": "123/1000", "1234,567": "1234567/1000", "1.500,00": "1500", "1 234,5": "2469/2"},
    # currency, percent, scale
    **{"$5": "5", "5 $": "5", "-$5": "-5", "$-5": "-5", "€5": "5", "5 €": "5", "1.500,00 €": "1500", "US$5": "5"},
    **{"USD 5": "5", "5 USD": "5", "Rs. 5": "5", "$5 per day": "5", "50%": "50", "50 %": "50", "50 percent": "50"},
    **{"$3 million": "3000000", "5 hundred": "500", "1/2 million": "500000", "2.5 billion people": "2500000000"},
    # units
    **{"5 apples": "5", "5 apples.": "5", "12 km": "12", "12km": "12", "5 km/h": "5", "5 m/s": "5", "3 cm²": "3"},
    **{"25 °C": "25", "90°": "90", "5 square feet": "5", "12 pens in all": "12"},
    # fractions, exponents
    **{"7/7": "1", "1/2": "1/2", "1 / 2": "1/2", "-3/4": "-3/4", "1 1/2": "3/2", "-1 1/2": "-3/2", "½": "1/2"},
    **{"1½": "3/2", "3e3": "3000", "1.5E-3": "3/2000", "1.5 x 10^3": "1500", "1.5×10³": "1500", "2*10^-2": "1/50"},
    # LaTeX and markdown
    **{
        r"\frac{1}{2}": "1/2",
        r"\dfrac{3}{4}": "3/4",
        r"-\frac{1}{2}": "-1/2",
        r"\frac12": "1/2",
        r"1\frac{1}{2}": "3/2",
    },
    **{r"\boxed{7}": "7", r"$\boxed{7}$": "7", r"**$\boxed{\frac{1}{2}}$**": "1/2", "$5$": "5", r"\$5": "5"},
    **{
        r"50\%": "50",
        r"1\,234": "1234",
        "1{,}234": "1234",
        r"\$1,\!234": "1234",
        r"5\text{ apples}": "5",
        "**5**": "5",
    },
    **{r"1.5 \times 10^{3}": "1500", r"90^\circ": "90", r"\(5\)": "5", r"5~\mathrm{km}": "5", r"\left(-5\right)": "-5"},
    **{"１２": "12", "'5'": "5"},
}
REFUSED = [
    *("", "x", "five", "many", "-", "$", "NaN", "inf", "٣", "5 万", "5²", "0x10", "1_000"),
    *("4x", "4 x", "5k", "5m", "5 m", "$5 bn", "$5 mm", "5 Millionen", "5 dozen", "5th", "5 th", "$5 a day"),
    *(
        r"\sqrt{2}",
        r"2\sqrt{3}",
        r"2\pi",
        r"\frac{x}{2}",
        r"\frac{1}{2}\pi",
        r"5\leftarrow",
        "2^3",
        "10^3",
        "5!",
        "x = 5",
    ),
    *(
        "1,2,3",
        "3, 4",
        "1,000,00",
        "001,234",
        "00,5",
        ",5",
        "5,",
        "1'23",
        "1.2.3",
        "1.2,3.4",
        "1..2",
        "5..",
        "12,34,567",
    ),
    *(
        "3 or 4",
        "5 and 6",
        "3-4",
        "3–4",
        "3 to 4",
        "about 5",
        "~5",
        "5 or more",
        "5 more apples",
        "101 binary",
        "12 of 15",
        "5 less",
    ),
    *("2:30", "5 pm", "1/2/1999", "2021-04-30", "5 May", "555-1234", "+1 555 123 456", "(5)", "--5", "$-$5"),
    *("1/0", "1 5/2", "1/-2", "1 234/567", "1.5 1/2", "$1$ or $2$", "3 + 4", "3 million million", "1 2", "5 apples 6"),
]
SAID = {
    **{"7": "7", " 7.": "7", "So 12 pens.": "12", "The answer is 7.": "7", "Answer: -5": "-5", "yes, 5": "5"},
    **{"7, because 3 and 4 make 7; not 8": "7", "7 because 3": "7", "-3.0\nQ: 5": "-3", "It costs $3.50 each": "7/2"},
    **{"x = 5": "5", "3 + 4 = 7": "7", r"The answer is $\frac{1}{2}$.": "1/2", r"so \boxed{3}, yes \boxed{3}": "3"},
    **{"So −3": "-3", "It is .5 kg": "1/2", "1 1/2 cups": "3/2", "$3 million": "3000000"},
}
UNPARSED = [
    *(
        "",
        "nothing",
        "4x",
        "3 or 4",
        "12 of 15",
        "minus 5",
        "about 7.5 euros",
        "no more than 5",
        "5 apples and 3 pears",
    ),
    *(
        "2:30",
        "x5",
        "x-5",
        "Answer - 5",
        "5 = 3 + 2",
        "1, 234",
        "3 . 5",
        "7, 8",
        "It is 5!",
        r"\sqrt{2}",
        r"2\pi",
        r"\boxed{3} \boxed{4}",
        r"\boxed{3",
        "In 5 May",
    ),
]


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_what_the_table_accepts_has_its_value(text, value):
    assert read_number(text) == Fraction(value)
    assert find_number(text) == Fraction(value), "a student may write what a gold answer may"
    assert read_number(write_number(Fraction(value))) == Fraction(value)


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_one_number_for_certain_is_refused(text):
    with pytest.raises(NotANumber):
        read_number(text)
    with pytest.raises(ValueError, match="is not a number: it"):
        get_task(None, "number").gold(text)


@pytest.mark.parametrize(("text", "value"), SAID.items())
def test_the_number_of_a_sentence_is_found(text, value):
    assert find_number(text) == Fraction(value)


@pytest.mark.parametrize("text", UNPARSED)
def test_an_output_that_is_not_certain_is_unparsed(text):
    assert find_number(text) is None
    assert get_task(None, "number").cleanse(text) is None


def test_all_numbers_of_a_text_are_listed():
    text = "3 and -4 make 1 1/2 of $3 million (7), 50 % - 5 x5 .5."
    assert [str(value) for value in numbers_in(text)] == ["3", "-4", "3/2", "3000000", "7", "50", "-5", "1/2"]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("43", "43"),
        ("-1/2", "-0.5"),
        ("1/3", "1/3"),
        ("0", "0"),
        ("1/1000", "0.001"),
        ("-7/4", "-1.75"),
        ("12.50", "12.5"),
    ],
)
def test_each_value_has_one_written_form(value, written):
    assert write_number(Fraction(value)) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (5, "5"),
        (5.0, "5"),
        (0.1, "0.1"),
        (0.1 + 0.2, "0.3"),
        (1e20, "1" + "0" * 20),
        (12345678901234567, "12345678901234567"),
    ],
)
def test_numbers_of_json_keep_the_digits_that_a_float_holds(value, written):
    assert write_number(number_of_json(value)) == written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**2000])
def test_numbers_of_json_that_are_none_are_refused(value):
    with pytest.raises(NotANumber):
        number_of_json(value)


STYLES = {
    "plain": lambda whole, cents: f"{whole}.{cents:02d}",
    "minus sign": lambda whole, cents: f"\u2212{whole}.{cents:02d}",
    "English": lambda whole, cents: f"{whole:,}.{cents:02d}",
    "continental": lambda whole, cents: f"{whole:,}".replace(",", ".") + f",{cents:02d}",
    "spaced": lambda whole, cents: f"{whole:,}".replace(",", "\u202f") + f",{cents:02d}",
    "Swiss": lambda whole, cents: f"{whole:,}".replace(",", "'") + f".{cents:02d}",
    "dollars": lambda whole, cents: f"-${whole:,}.{cents:02d}",
    "euros": lambda whole, cents: f"{whole},{cents:02d} €",
    "exponent": lambda whole, cents: f"{whole}{cents:02d}e-2",
    "power of ten": lambda whole, cents: rf"{whole}{cents:02d} \times 10^{{-2}}",
    "fraction": lambda whole, cents: f"{whole * 100 + cents}/100",
    "LaTeX": lambda whole, cents: rf"$\boxed{{\frac{{{whole * 100 + cents}}}{{100}}}}$",
    "mixed": lambda whole, cents: f"{whole} {cents}/100",
    "unit": lambda whole, cents: f"{whole}.{cents:02d} kilometres per hour",
    "percent": lambda whole, cents: f"{whole}.{cents:02d} %",
}


@seed(15)
@settings(max_examples=60, deadline=None, database=None)
@given(whole=st.integers(0, 10**15), cents=st.integers(0, 99))
def test_a_value_written_in_any_accepted_style_is_read_back_exactly(whole, cents):
    value = Fraction(whole * 100 + cents, 100)
    for name, style in STYLES.items():
        text = style(whole, cents)
        wanted = -value if text[0] in "-\u2212" else value
        assert read_number(text) == wanted, (name, text)
        assert get_task(None, "number").cleanse(f"So it is {text}.") == write_number(wanted), (name, text)


@seed(15)
@settings(max_examples=200, deadline=None, database=None)
@given(st.text("0123456789.,'-+$€% \\{}^/xe()kmor½", max_size=12))
def test_whatever_is_accepted_reads_back_from_its_written_form(text):
    try:
        value = read_number(text)
    except NotANumber:
        return
    assert read_number(write_number(value)) == value
    assert find_number(text) == value


LONG = 20_000
PIECES = [
    *(
        "1",
        "1,",
        "1.",
        "1 ",
        "1'",
        " ",
        "-",
        "$",
        "(",
        "\\",
        "{",
        "}",
        "1/",
        "1e",
        "10^",
        "x",
        "½",
        "\n",
        "a ",
        "**",
        "=",
        "or 1 ",
    ),
    *(
        r"\frac{",
        r"\frac{1}{",
        r"\boxed{",
        r"\boxed{1}",
        r"\text{",
        "1,234 ",
        "1 234",
        "million ",
        ". 1",
        "(A) ",
        "A ",
        "because ",
    ),
]


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_are_read_in_linear_time(piece):
    number, choice, dates = (get_task(None, kind) for kind in ("number", "choice", "date"))
    started = time.process_time()
    for text in (piece * (LONG // len(piece)), "1" + piece * (LONG // len(piece)), piece * (LONG // len(piece)) + "1x"):
        for task in (number, choice, dates, get_task("svamp"), get_task("aqua"), get_task("coin_flip")):
            task.cleanse(text)
            task.candidates(text)
    for text in (piece * (4000 // len(piece)), "1" + piece * (3999 // len(piece))):
        with contextlib.suppress(NotANumber):
            read_number(text)
    assert time.process_time() - started < 3, "a quadratic pattern takes minutes"


@pytest.mark.parametrize(
    "text", ["1e999999", "1e-999999", "9" * 10_000_000, "1e" + "9" * 3000, "0." + "1" * 2000, "1" + "0" * MAX_DIGITS]
)
def test_sizes_are_bounded_before_anything_is_computed(text):
    started = time.process_time()
    with pytest.raises(NotANumber):
        read_number(text)
    assert time.process_time() - started < 1


def test_random_bytes_never_raise_anything_else():
    chars = "0123456789.,'-+−–$€%\\{}^/xeE()[]abkmM½²³ \u00a0\u2044٣１*=~"
    rng = random.Random(15)
    for _ in range(3000):
        text = "".join(rng.choices(chars, k=rng.randint(0, 30)))
        find_number(text)
        numbers_in(text)
