"""The number parser for gold answers and student outputs: it reads a number correctly or refuses it.

`read_number` parses a whole text, `write_number` gives the form in which answers are stored, and `number_answers` finds
the answer in a student's sentence. docs/data.md lists what is accepted. Values are exact fractions. Sizes are bounded
before anything is computed, and every pattern runs in time linear in the text.

The source is shipped with the lm-evaluation-harness task, so it imports only `number_markup`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pst_dist.data.tasks.number_markup import NotANumber, without_markup

MAX_DIGITS = 1000
"""Maximum number of digits when written out, so that 1e999999 is refused instead of computed."""
MAX_TEXT = 4000
"""Maximum length in characters of the text of one number."""

_CURRENCY_SIGNS = "$€£¥₹₩₽¤"
_CURRENCY_CODES = "USD|US\\$|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|Rs\\.?"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# After an amount of money m, mm, bn and k are scales, so only these words may follow one.
_MONEY_WORDS = frozenset(
    "dollar dollars euro euros pound pounds yen rupee rupees franc francs usd eur gbp jpy cny inr chf cad aud "
    "in of total all each apiece per person day week month year hour minute item unit piece ticket".split()
)
# A short word could be a variable, a scale or an ordinal suffix; these are unambiguous units.
_SHORT_UNITS = frozenset("km cm mm nm kg mg ml cl dl ft in yd mi lb oz hr kb gb tb kw of".split())
_GLUED_UNITS = frozenset("km cm mm nm kg mg ml cl dl ft lbs lb oz mph kmh kph hrs hr mins min secs sec".split())
_RATE_UNITS = _SHORT_UNITS | frozenset("m s h g l hr hour min minute sec second day week month year person".split())
# Words after a number that change its value, leave it open or make it something else: 5 dozen, 5 or more, 5 pm.
NOT_UNITS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
    "billion trillion hundreds thousands dozen dozens score scores gross grand lakh lakhs lac lacs crore crores mln "
    "mio mrd bln trn mil bil tri thou tsd half halves third thirds quarter quarters fourth fourths fifth fifths "
    "sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth "
    "thousandths millionth millionths double twice triple quadruple plus minus times over by squared cubed root "
    "roots sqrt pi tau log ln exp mod modulo factorial power powers choose divided multiplied added subtracted "
    "infinity point and or to nor not none either neither between from through until than less more fewer greater "
    "least most maximum minimum about approximately approx around almost nearly roughly circa maybe perhaps if when "
    "where unless but except up down ago before after below above under negative positive short behind loss debt "
    "deficit owed overdue bc bce ad ce am pm noon midnight past till base mult sin cos tan percent percentage pct "
    "unknown undefined wrong false january february march april may june july august september october november "
    "december jan feb mar apr jun jul aug sep sept oct nov dec binary hex hexadecimal octal decimal oclock ish odd "
    "something remainder mille mila cien ciento cento cent docena docenas douzaine douzaines".split()
)
_FOREIGN_SCALE = re.compile(r"(?:milliard|million|millon|milione|milioni|billion|trillion|tausend|hundert|dutzend)")

_SUPERSCRIPTS = {ord(char): plain for char, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True)}
_SIGN = re.compile(r"[-+]")
_MONEY = re.compile(rf"(?:(?:{_CURRENCY_CODES})(?![A-Za-z])|[{_CURRENCY_SIGNS}])")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?!\d)(?:[.,]\d+)?", re.ASCII)
_RUN = re.compile(r"[\d.,']+", re.ASCII)
_EXPONENT = re.compile(r"[eE]([-+]?)(\d+)(?![\d.,])", re.ASCII)
_TEN_TO = re.compile(r" ?[x\u00d7*·⋅] ?10 ?(?:\^ ?([-+]?\d+)|([⁻⁺]?[⁰¹²³⁴-⁹]+))(?![\d.,^])", re.ASCII)
_OVER = re.compile(r" ?/ ?([\d.,']+)", re.ASCII)
_MIXED = re.compile(r" (\d+) ?/ ?(\d+)", re.ASCII)


def read_number(text: str, *, percent_is_hundredths: bool = False) -> Fraction:
    """The value of a text that is one number and nothing else; raises NotANumber.

    A unit or currency is allowed and ignored. So is the percent sign, unless `percent_is_hundredths`: then 50 % is 1/2.
    """
    if len(text) > MAX_TEXT:
        raise NotANumber(f"is longer than {MAX_TEXT:,} characters")
    plain = without_markup(text)
    if not plain:
        raise NotANumber("is empty")
    value, place, money = _amount(plain)
    scale = _tail(plain[place:], money, percent_is_hundredths)
    return _bounded(value * scale)


def write_number(value: Fraction) -> str:
    """The canonical text of a value: 43, -0.5 or, for an infinite decimal, 1/3. `read_number` parses it back.

    Raises NotANumber for more than MAX_DIGITS digits.
    """
    _bounded(value)
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1 or max(twos, fives) > MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * (10**places // value.denominator)).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def number_of_json(value: int | float) -> Fraction:
    """The value of a number from a JSON or Parquet file; raises NotANumber when it is not finite or too long.

    A float that is not a whole number is rounded to 15 significant digits, which every decimal keeps when stored as a
    float: 0.1 is one tenth and 0.30000000000000004 is 0.3.
    """
    if value != value or value in (float("inf"), float("-inf")):
        raise NotANumber("is not a finite number")
    return _bounded(Fraction(int(value)) if value == int(value) else Fraction(f"{value:.15g}"))


def _bounded(value: Fraction) -> Fraction:
    # bit_length is cheap; str() of a million digits is not.
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_DIGITS * 3.33:
        raise NotANumber(f"has more than {MAX_DIGITS:,} digits")
    return value


def _amount(text: str) -> tuple[Fraction, int, bool]:
    """The value at the start of a text, the position where it ends, and whether a currency precedes it."""
    place, negative, signs, money = 0, False, 0, False
    while place < len(text):
        if sign := _SIGN.match(text, place):
            signs, negative, place = signs + 1, sign.group() == "-", sign.end()
        elif not money and (currency := _MONEY.match(text, place)):
            money, place = True, currency.end()
        elif text[place] == " ":
            place += 1
        else:
            break
    if signs > 1:
        raise NotANumber("has two signs")
    spaced = _SPACED.match(text, place)
    if spaced:
        # 1 234/567 is either a fraction or a mixed number, and +1 555 123 456 is a telephone number.
        if text[spaced.end() : spaced.end() + 2].strip()[:1] in tuple("/.,'") or "+" in text[:place]:
            raise NotANumber("has spaces that may be more than thousands separators")
        whole, _, fraction = spaced.group().replace(" ", "").replace(",", ".").partition(".")
        return _signed(_decimal(whole, fraction), negative), spaced.end(), money
    run = _RUN.match(text, place)
    if run is None:
        raise NotANumber("does not start with a number" if any(map(str.isdigit, text)) else "contains no number")
    value, place = _plain(run.group()), run.end()
    if over := _OVER.match(text, place):
        value, place = _divided(value, _plain(over.group(1))), over.end()
    elif mixed := _MIXED.match(text, place):
        if not run.group().isdigit() or int(mixed.group(1)) >= int(mixed.group(2)):
            raise NotANumber("is not a mixed number such as 1 1/2")
        part = _divided(_plain(mixed.group(1)), _plain(mixed.group(2)))
        value, place = value + part, mixed.end()
    elif exponent := _EXPONENT.match(text, place):
        value, place = _shifted(value, exponent.group(1) + exponent.group(2)), exponent.end()
    elif power := _TEN_TO.match(text, place):
        digits = power.group(1) or power.group(2).translate(_SUPERSCRIPTS)
        value, place = _shifted(value, digits), power.end()
    return _signed(value, negative), place, money


def _signed(value: Fraction, negative: bool) -> Fraction:
    return -value if negative else value


def _divided(value: Fraction, by: Fraction) -> Fraction:
    if by == 0:
        raise NotANumber("divides by zero")
    return value / by


def _shifted(value: Fraction, exponent: str) -> Fraction:
    if len(exponent) > 5 or abs(int(exponent)) > MAX_DIGITS:
        raise NotANumber(f"has an exponent beyond {MAX_DIGITS:,}")
    power = int(exponent)
    return value * 10**power if power >= 0 else value / 10**-power


def _decimal(whole: str, fraction: str) -> Fraction:
    if len(whole) + len(fraction) > MAX_DIGITS:
        raise NotANumber(f"has more than {MAX_DIGITS:,} digits")
    return Fraction(int(whole + fraction or "0"), 10 ** len(fraction))


def _plain(run: str) -> Fraction:
    """The value of digits with points, commas and apostrophes if they can only mean one number."""
    kinds = [mark for mark in ".,'" if mark in run]
    counts = {mark: run.count(mark) for mark in kinds}
    if not any(map(str.isdigit, run)):
        raise NotANumber("contains no number")
    if not kinds:
        return _decimal(run, "")
    last = max(kinds, key=run.rfind)
    if len(kinds) == 1 and counts[last] == 1:
        whole, _, fraction = run.partition(last)
        if last == ".":
            return _decimal(whole, fraction)
        # 1,234 has a thousands separator; in 12,5 and 0,123 the comma must be a decimal comma. Nobody writes 012,5.
        if last == "," and fraction and (whole == "0" or (whole and whole[0] != "0" and not _is_grouped(run, ","))):
            return _decimal(whole, fraction)
    elif counts[last] == 1 and last != "'" and len(kinds) == 2:
        # The last mark, if it occurs once, separates the decimals; the other one must separate thousands.
        whole, _, fraction = run.partition(last)
        other = next(mark for mark in kinds if mark != last)
        if fraction and _is_grouped(whole, other):
            return _decimal(whole.replace(other, ""), fraction)
    if len(kinds) == 1 and _is_grouped(run, last):
        return _decimal(run.replace(last, ""), "")
    raise NotANumber("has commas, points or apostrophes that do not make one number")


def _is_grouped(run: str, mark: str) -> bool:
    """Whether `mark` separates thousands: one to three digits, the first not zero, then groups of three."""
    first, *groups = run.split(mark)
    return bool(
        groups
        and 1 <= len(first) <= 3
        and first.isdigit()
        and first[0] != "0"
        and all(len(group) == 3 and group.isdigit() for group in groups)
    )


def _tail(tail: str, money: bool, percent_is_hundredths: bool) -> Fraction:
    """The factor given by the text after a number; raises NotANumber when that text may be more than a unit."""
    rest = tail.strip()
    if rest.lower() in ("%", "percent", "per cent", "pct"):
        if money:
            raise NotANumber("is both money and a percentage")
        return Fraction(1, 100) if percent_is_hundredths else Fraction(1)
    first, _, others = rest.partition(" ")
    scale = Fraction(1)
    if tail.startswith(" ") and first.lower() in SCALES:
        scale, rest = Fraction(SCALES[first.lower()]), others
    if not rest:
        return scale
    if not money and _MONEY.fullmatch(rest):
        return scale
    if rest in ("°", "°C", "°F", "¢") and scale == 1 and not money:
        return scale
    words = rest.split(" ")
    glued = not tail.startswith(" ")
    if glued and (money or re.split(r"[/^²³]", words[0])[0] not in _GLUED_UNITS or not is_unit(words[0], money)):
        raise NotANumber(f"has {_cut(rest)!r} after the number, which is not a known unit")
    if len(words) > 5 or not all(is_unit(word, money) for word in words[glued:]):
        raise NotANumber(f"has {_cut(rest)!r} after the number, which may change its value")
    return scale


def is_unit(word: str, money: bool = False) -> bool:
    """Whether a word after a number is a unit that leaves its value as it is; `money`: after an amount of money."""
    low = word.lower()
    if money:
        return low in _MONEY_WORDS
    if low in NOT_UNITS or _FOREIGN_SCALE.match(low):
        return False
    name, _, power = low.replace("²", "^2").replace("³", "^3").partition("^")
    if power:
        return power in ("2", "3") and name in _RATE_UNITS
    if "/" in low:
        parts = low.split("/")
        return len(parts) == 2 and all(part in _RATE_UNITS for part in parts)
    return low in _SHORT_UNITS or (len(low) > 2 and low.isascii() and low.replace("-", "").isalpha())


def _cut(text: str) -> str:
    return text if len(text) <= 20 else text[:19] + "…"
