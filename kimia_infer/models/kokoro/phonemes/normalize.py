"""Text as it is read aloud: what is not spoken is left out, and figures become words.

espeak-ng reads plain numbers, ordinals, percentages and most units by itself. The rules here are
for what it gets wrong: money, dates, times of day, fractions, years, abbreviations, addresses.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_TAG = re.compile(r"</?[A-Za-z!?][^<>]{0,200}>|\x1b\[[0-9;]{0,20}[A-Za-z]")
"""Of SGML, and the colours of terminals."""
_FORMS = ("<wide>", "<narrow>", "<font>")
"""Decompositions of characters that are forms of others, as full width and bold letters are."""
_SAME = str.maketrans(
    {
        "‘": "'", "’": "'", "ʼ": "'", "`": "'", "«": "“", "»": "”", "„": "“", "‟": "“",
        "–": "—", "―": "—", "−": "-", "‐": "-", "‑": "-", "，": ",", "、": ",", "。": ".",
        "！": "!", "？": "?", "：": ":", "；": ";", "（": "(", "）": ")", "।": ".", "॥": ".",
        "「": "“", "」": "”", "『": "“", "』": "”", "《": "“", "》": "”",
        "؟": "?", "،": ",", "¿": "", "¡": "", "\u200c": "", "\u200d": "", "\ufeff": "",
        "[": " ", "]": " ", "{": " ", "}": " ", "|": " ", "\\": " ", "*": " ", "_": " ",
        "#": " ", "~": " ", "^": " ",
    }
)  # fmt: skip

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
MONEY = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
}
ABBREVIATIONS = {
    "Mr.": "Mister", "Mrs.": "Missus", "Ms.": "Miz", "Dr.": "Doctor", "Prof.": "Professor",
    "St.": "Saint", "Jr.": "Junior", "Sr.": "Senior", "vs.": "versus", "etc.": "et cetera",
    "e.g.": "for example", "i.e.": "that is", "approx.": "approximately",
    "Ave.": "Avenue", "Blvd.": "Boulevard", "Rd.": "Road", "Gen.": "General", "Col.": "Colonel",
    "Sgt.": "Sergeant", "Capt.": "Captain", "Lt.": "Lieutenant", "Gov.": "Governor",
    "Sen.": "Senator", "Rep.": "Representative", "Inc.": "Incorporated", "Ltd.": "Limited",
    "Corp.": "Corporation", "Dept.": "Department", "a.m.": "a m", "p.m.": "p m",
}  # fmt: skip
_LAST_WORDS = (
    "etc.",
    "a.m.",
    "p.m.",
    "Jr.",
    "Sr.",
    "Inc.",
    "Ltd.",
    "Corp.",
    "Ave.",
    "Blvd.",
    "Rd.",
)
FRACTIONS = {"1/2": "one half", "1/3": "one third", "2/3": "two thirds"}
FRACTIONS |= {"1/4": "one quarter", "3/4": "three quarters"}
DECADES = ("twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties")
DECADES = (*DECADES, "nineties")


def clean(text: str) -> str:
    """Text without what nobody speaks: tags, emoji and other symbols, control characters.

    Typographic variants of punctuation become those that Kokoro knows, other forms of letters and
    figures the plain ones.
    """
    text = unicodedata.normalize("NFC", _TAG.sub(" ", text)).translate(_SAME)
    text = text.replace("...", "…").replace("--", "—").replace(" - ", " — ")
    return "".join(map(_kept, "".join(map(_plain, text))))


def _plain(character: str) -> str:
    """A character without its form: ``Ａ`` and ``𝐀`` are A, ``ﬁ`` is fi, ``①`` and ``१`` are 1."""
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.decimal(character))
    form = unicodedata.decomposition(character).partition(" ")[0]
    if form == "<circle>":
        return f" {unicodedata.normalize('NFKC', character)} "
    if form in _FORMS or "\ufb00" <= character <= "\ufb06" or "\u2160" <= character <= "\u217f":
        return unicodedata.normalize("NFKC", character)
    return character


def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if character == "\n" or character in "$£€+=%&°@":
        return character
    if category in ("So", "Sk", "Sm", "Cn", "Cs", "Co") or category.startswith(("C", "Z")):
        return " "
    return "" if 0xFE00 <= ord(character) <= 0xFE0F else character


def normalize(text: str, language: str) -> str:
    """Cleaned text with addresses, and in English with figures, as words."""
    text = _URL.sub(_spelled_url, _EMAIL.sub(_spelled_url, text))
    if not language.startswith("en"):
        text = re.sub(r"([$£€¥])\s?(\d[\d.,]*\d|\d)", r"\2 \1", text)
        if language in _SIGNS:
            text = _UNSPACED.sub(r"\g<0> ", text).translate(_SIGNS[language])
        return text
    for pattern, replace in _ENGLISH:
        text = pattern.sub(replace, text)
    return text


# A mark beside a character of such a script; there is no space behind it as in other languages.
_UNSPACED = re.compile(
    r"(?<=[^\x00-\x7f])[.,:;!?…](?=[^\s)”\"'.,:;!?…])|[.,:;!?…](?=[^\x00-\x7f\s…”])"
)
_SIGNS = {
    "ja": str.maketrans({"$": "ドル", "£": "ポンド", "€": "ユーロ", "¥": "円", "%": "パーセント"}),
    "zh": str.maketrans({"$": "美元", "£": "英镑", "€": "欧元", "¥": "元"}),
}
"""Signs that misaki does not read, in the languages that write no spaces."""
_EMAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b")
_URL = re.compile(
    r"\b(?:https?://|www\.)[\w./?=&%#:~+-]{1,300}[\w/]|"
    r"\b[a-z0-9-]{2,63}\.(?:com|org|net|io|edu|gov|ai|dev)(?:/[\w./-]{0,200}\w)?\b"
)


def _spelled_url(found: re.Match[str]) -> str:
    text = re.sub(r"^https?://", "", found[0]).rstrip("/")
    for mark, word in ((".", "dot"), ("/", "slash"), ("@", "at"), ("-", "dash"), ("www", "w w w")):
        text = text.replace(mark, f" {word} ")
    return re.sub(r"[?=&%#:~+]+", " ", text)


def _written_out(found: re.Match[str]) -> str:
    """An abbreviation in words; the full stop stays where it may end a sentence as well."""
    word, rest = ABBREVIATIONS[found[0]], found.string[found.end() :]
    may_end = found[0] in _LAST_WORDS and re.match(r"\s*$|\s+[A-Z“\"]", rest)
    return f"{word}." if may_end else word


def _money(found: re.Match[str]) -> str:
    one, many, cent, cents = MONEY[found[1]]
    whole, part, scale = found[2].replace(",", ""), found[3], found[4]
    if scale:
        return f"{whole}{f'.{part}' if part else ''} {scale} {many}"
    amount = f"{whole} {one if whole == '1' else many}"
    if not part or not int(part):
        return amount
    small = int(part.ljust(2, "0")[:2])
    rest = f"{small} {cent if small == 1 else cents}"
    return rest if whole == "0" else f"{amount} and {rest}"


def _time(found: re.Match[str]) -> str:
    hour, minute, half = int(found[1]), found[2], found[3]
    read = {"00": "" if half else " o'clock"}.get(minute, f" {minute}")
    if minute != "00" and minute.startswith("0"):
        read = f" oh {minute[1]}"
    if hour > 12 and minute == "00" and not half:
        read = " hundred"
    return f"{hour}{read}{f' {half[0].lower()} m' if half else ''}"


def _date(year: str, month: str, day: str, whole: str) -> str:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return whole
    return f"{MONTHS[int(month) - 1]} {int(day)}, {_year(year)}"


def _year(digits: str) -> str:
    high, low = digits[:2], digits[2:]
    if digits[1:3] == "00" or int(digits) < 1100:
        return digits
    if low == "00":
        return f"{high} hundred"
    return f"{high} {f'oh {low[1]}' if low[0] == '0' else low}"


def _decade(found: re.Match[str]) -> str:
    century, digit = found[1], int(found[2])
    if digit < 2:
        return found[0]
    return f"{century or ''} {DECADES[digit - 2]}".strip()


_Replace = Callable[[re.Match[str]], str]
_ABBREVIATION = re.compile(
    r"(?<![\w.])(?:" + "|".join(re.escape(each) for each in ABBREVIATIONS) + r")(?!\w)"
)
_ENGLISH: list[tuple[re.Pattern[str], _Replace]] = [
    (_ABBREVIATION, _written_out),
    (re.compile(r"\bNo\.\s?(?=\d)"), lambda m: "number "),
    (
        re.compile(
            r"([$£€])\s?(\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?"
            r"(?:\s(thousand|million|billion|trillion)\b)?"
        ),
        _money,
    ),
    (re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b"), lambda m: _date(m[1], m[2], m[3], m[0])),
    (re.compile(r"\b(\d{1,2})/(\d{1,2})/(\d{4})\b"), lambda m: _date(m[3], m[1], m[2], m[0])),
    (re.compile(r"\b([01]?\d|2[0-3]):([0-5]\d)(?:\s?([ap])\.?\s?m\b\.?)?", re.I), _time),
    (re.compile(r"\b(\d{2})?(\d)0'?s\b"), _decade),
    (re.compile(r"(?<![\d/])[123]/[234](?![\d/])"), lambda m: FRACTIONS.get(m[0], m[0])),
    (re.compile(r"(?<![\d.,])(1[1-9]\d\d|20[1-9]\d)(?![\d]|[.,]\d)"), lambda m: _year(m[1])),
    (re.compile(r"(\d),(?=\d{3}\b)"), lambda m: m[1]),
    (re.compile(r"(?<![\w)])-(?=\d)"), lambda m: "minus "),
    (re.compile(r"(?<=\d)\s?[-—]\s?(?=\d)"), lambda m: " to "),
    (re.compile(r"\s&\s"), lambda m: " and "),
]
