"""Texts to sentences of phonemes, and where each word is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kimia_infer.models.kokoro.phonemes.alignment import aligned
from kimia_infer.models.kokoro.phonemes.normalize import clean, normalize
from kimia_infer.models.kokoro.phonemes.sources import Phonemizer, Source, source_of
from kimia_infer.utils.errors import NoSpeech, RequestError

MAX_CHARACTERS = 100_000
FIRST_PHONEMES = 60
"""The first piece of a text ends at the first comma or the like behind so many of them."""
SHORT_PHONEMES = 20
"""A shorter sentence is spoken together with the next one: alone it sounds worse."""
BATCH = 16
"""Sentences that are read at a time, after the first one alone."""

_OVERRIDE = re.compile(r"\[([^\[\]]{1,100})\]\(/([^/()\n]{1,200})/\)")
_PLACE = "\ue000"  # of an override; cleaned text has no such character
_SENTENCE = re.compile(r"[^\n]+?(?:[.!?…]+[)”\"']*(?=\s|$)|(?=\n)|$)")
_ATOM = re.compile(
    rf"{_PLACE}|[;!?—…\"()“”]|\.(?!\w)|[,:](?!\d)|(?:[^;!?—…\"()“”.,:{_PLACE}]|\.(?=\w)|[,:](?=\d))+"
)
_CUTS = ("!.?…", ":;", ",—", " ")
_CLOSING = ')”"'
_MARKS = "ˈˌːʰʲ"  # letters in Unicode, without a sound of their own


@dataclass(frozen=True)
class Word:
    """A word and where its phonemes begin and end in those of the sentence."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Sentence:
    """What is spoken at once: phonemes, at most as many as the model takes."""

    phonemes: str
    words: list[Word]


def read_text(
    text: str | Iterable[str],
    language: str,
    vocab: Mapping[str, int],
    longest: int,
    lexicon: Mapping[str, str] | None = None,
    phonemizer: Phonemizer = "espeak",
) -> Iterator[Sentence]:
    """The sentences of a text, read as they are asked for; ``phonemizer`` reads English.

    A text that is still being written comes as an iterable of pieces, each of whole sentences.
    ``[word](/phonemes/)`` in the text and ``lexicon`` (words in small letters) say how a word is
    spoken. ``longest`` is in phonemes.

    Raises:
        NoSpeech: nothing in it can be spoken.
        RequestError: naming ``text`` or ``language``: too long, an override has symbols that are
            not in ``vocab``, or nothing here reads the language.
    """
    source = source_of(language, phonemizer)
    words = {k.lower(): v for k, v in (lexicon or {}).items()}
    pieces = [text] if isinstance(text, str) else text
    sentences = (s for piece in pieces for s in _read_piece(piece, language, source, vocab, words))
    found = False
    for sentence in _spread(sentences, longest):
        found = True
        yield sentence
    if not found:
        shown = f", found {text[:40]!r}" if isinstance(text, str) else ""
        raise NoSpeech(f"text: nothing in it can be spoken{shown}")


def _read_piece(
    text: str, language: str, source: Source, vocab: Mapping[str, int], lexicon: Mapping[str, str]
) -> Iterator[Sentence]:
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"text: at most {MAX_CHARACTERS} characters, found {len(text)}")
    plain = _OVERRIDE.split(text)  # text, word, phonemes, text, ...
    given = [
        (word, _checked(phonemes, vocab))
        for word, phonemes in zip(plain[1::3], plain[2::3], strict=True)
    ]
    whole = _PLACE.join(normalize(clean(part), language) for part in plain[::3])
    return _Reader(source, vocab, lexicon, given).sentences(_SENTENCE.findall(whole))


def read_phonemes(phonemes: str, vocab: Mapping[str, int], longest: int) -> Iterator[Sentence]:
    """The sentences of a string of phonemes; words are what has spaces around it.

    Raises:
        RequestError: naming ``phonemes``: too long, none, or a symbol that is not in ``vocab``.
    """
    if len(phonemes) > MAX_CHARACTERS:
        raise RequestError(f"phonemes: at most {MAX_CHARACTERS}, found {len(phonemes)}")
    text = " ".join(_checked(phonemes, vocab, "phonemes").split())
    if not _has_sound(text):
        raise RequestError(f"phonemes: expected some to speak, found {phonemes[:40]!r}")
    parts = (" ".join(part.split()) for part in _SENTENCE.findall(text))
    sentences = (
        Sentence(part, [Word(m[0], m.start(), m.end()) for m in re.finditer(r"[^\s]+", part)])
        for part in parts
        if part
    )
    yield from _spread(sentences, longest)


def _checked(phonemes: str, vocab: Mapping[str, int], field: str = "text") -> str:
    phonemes = phonemes.replace("g", "ɡ")  # the letter of keyboards for that of IPA
    unknown = sorted({symbol for symbol in phonemes if symbol not in vocab and symbol != "\n"})
    if unknown:
        raise RequestError(
            f"{field}: {' '.join(map(repr, unknown[:5]))} in {phonemes[:40]!r} is no phoneme of "
            "Kokoro; see docs/kokoro.md for those it has"
        )
    return phonemes


@dataclass
class _Reader:
    """Reads the sentences of one text."""

    source: Source
    vocab: Mapping[str, int]
    lexicon: Mapping[str, str]
    given: list[tuple[str, str]]

    def sentences(self, texts: Sequence[str]) -> Iterator[Sentence]:
        """Those of ``texts`` in which something is spoken: the first at once, then several."""
        places = iter(self.given)
        start, size = 0, 1
        while start < len(texts):
            atoms = [list(self._atoms(text, places)) for text in texts[start : start + size]]
            lines = [atom for each in atoms for atom in each if isinstance(atom, str)]
            worded = [line for line in lines if _has_words(line)]
            spoken = iter(self.source(worded) if worded else [])
            for each in atoms:
                sentence = self._joined(each, spoken)
                if _has_sound(sentence.phonemes):
                    yield sentence
            start, size = start + size, BATCH

    def _atoms(
        self, text: str, places: Iterator[tuple[str, str]]
    ) -> Iterator[str | tuple[str, str]]:
        """Words and punctuation as text, words whose phonemes are known as a pair."""
        for match in _ATOM.finditer(text):
            if match[0] == _PLACE:
                yield next(places)
            elif not self.lexicon:
                yield match[0]
            else:
                yield from self._looked_up(match[0])

    def _looked_up(self, words: str) -> Iterator[str | tuple[str, str]]:
        for part in re.findall(r"[\w']+|[^\w']+", words):
            phonemes = self.lexicon.get(part.lower())
            yield part if phonemes is None else (part, _checked(phonemes, self.vocab, "lexicon"))

    def _joined(self, atoms: Sequence[str | tuple[str, str]], spoken: Iterator[str]) -> Sentence:
        text, words = "", []
        for atom in atoms:
            if isinstance(atom, tuple):
                word, phonemes = atom
                words.append(Word(word, len(text), len(text) + len(phonemes)))
                text += phonemes
            elif _has_words(atom):
                if atom[0].isspace() and text and not text.endswith(" "):
                    text += " "
                line = "".join(c for c in next(spoken) if c in self.vocab)
                for word, phonemes in aligned(atom.split(), line.split()):
                    words.append(Word(word, len(text), len(text) + len(phonemes)))
                    text += f"{phonemes} "
                text = text if atom[-1].isspace() else text.rstrip(" ")
            elif atom.isspace():
                text = text if text.endswith(" ") or not text else f"{text} "
            elif atom in self.vocab:
                text = (text if atom in '(“"—' else text.rstrip(" ")) + atom
        return Sentence(text.strip(), words)


def _has_sound(phonemes: str) -> bool:
    return any(symbol.isalpha() and symbol not in _MARKS for symbol in phonemes)


def _has_words(atom: str) -> bool:
    return any(map(str.isalnum, atom)) or any(mark in atom for mark in "%&+=@$£€°")


def _spread(sentences: Iterator[Sentence], longest: int) -> Iterator[Sentence]:
    """The same, none too long, the first one short, and very short ones with their next."""
    waiting: Sentence | None = None
    first = True
    for sentence in sentences:
        if waiting is not None:
            sentence, waiting = _together(waiting, sentence), None
        if len(sentence.phonemes) < SHORT_PHONEMES and not first:
            waiting = sentence
            continue
        for piece in _cut(sentence, longest, first):
            yield piece
            first = False
    if waiting is not None:
        yield from _cut(waiting, longest, first=False)


def _together(first: Sentence, second: Sentence) -> Sentence:
    shift = len(first.phonemes) + 1
    words = [Word(w.text, w.start + shift, w.end + shift) for w in second.words]
    return Sentence(f"{first.phonemes} {second.phonemes}", first.words + words)


def _cut(sentence: Sentence, longest: int, first: bool) -> Iterator[Sentence]:
    """A sentence in pieces, cut behind the strongest punctuation that fits."""
    text, start = sentence.phonemes, 0
    while start < len(text):
        end = len(text)
        if first and start == 0:
            early = re.search(r"[,;:—] ", text[FIRST_PHONEMES:])
            if early and end - FIRST_PHONEMES - early.end() >= SHORT_PHONEMES:
                end = FIRST_PHONEMES + early.end()
        if end - start > longest:
            end = start + _last_cut(text[start : start + longest])
        piece = text[start:end]
        skipped = len(piece) - len(piece.lstrip())
        words = [
            Word(w.text, max(w.start, start) - start - skipped, min(w.end, end) - start - skipped)
            for w in sentence.words
            if start <= w.start < end
        ]
        if _has_sound(piece):
            yield Sentence(piece.strip(), words)
        start = end


def _last_cut(text: str) -> int:
    """Where the last piece of ``text`` that should stay together begins."""
    for marks in _CUTS:
        places = [place for place, symbol in enumerate(text) if symbol in marks]
        if places and places[-1] > 0:
            end = places[-1] + 1
            while end < len(text) and text[end] in _CLOSING:
                end += 1
            return end
    return len(text)
