"""Data sets of transcribed speech, in the layouts in which they are published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kimia_infer.data.conversations import DataError
from kimia_infer.data.manifests import QUESTION, error_rate, parse_language
from kimia_infer.data.recipes.layout import Row, document, fields, find, inside, lines, row

# Questions of the published evaluation, by data set.
CHINESE = "请把这段语音转录成文本。"
FLEURS = {"en": "Please transcribe this audio.", "zh": "请将这段语音转写成文字。"}

LIBRISPEECH_SUBSETS = ("test-clean", "test-other")
WENETSPEECH_SUBSETS = {"TEST_MEETING": "test-meeting", "TEST_NET": "test-net"}


def librispeech(folder: Path) -> Iterator[Row]:
    """``test-{clean,other}/SPEAKER/CHAPTER/``: FLAC files and their ``*.trans.txt``."""
    root = inside(folder, "LibriSpeech")
    subsets = [subset for subset in LIBRISPEECH_SUBSETS if (root / subset).is_dir()]
    if not subsets:
        find(root, *LIBRISPEECH_SUBSETS)
    for subset in subsets:
        for transcript in sorted((root / subset).glob("*/*/*.trans.txt")):
            for line in lines(transcript):
                name, _, text = line.partition(" ")
                audio = transcript.with_name(f"{name}.flac")
                yield _row("LibriSpeech", subset, name, audio, text, QUESTION, "en")


def aishell1(folder: Path) -> Iterator[Row]:
    """``data_aishell/``: ``wav/test/SPEAKER/*.wav``, ``transcript/aishell_transcript_v0.8.txt``."""
    root = inside(folder, "data_aishell")
    texts = {}
    for line in lines(find(root, "transcript/aishell_transcript_v0.8.txt")):
        name, _, text = line.partition(" ")
        texts[name] = text.replace(" ", "")
    for audio in sorted(find(root, "wav/test").glob("*/*.wav")):
        text = texts.get(audio.stem, "")
        yield _row("AISHELL-1", "", audio.stem, audio, text, CHINESE, "zh")


def aishell2(folder: Path) -> Iterator[Row]:
    """``iOS/test/``: ``wav.scp`` and ``trans.txt``, a name, a tab and a path or text each."""
    root = find(folder, "AISHELL-DEV-TEST-SET/iOS/test", "iOS/test", "wav.scp")
    root = root.parent if root.name == "wav.scp" else root
    paths = dict(_tabbed(find(root, "wav.scp")))
    for name, text in _tabbed(find(root, "trans.txt")):
        if name not in paths:
            raise DataError(f"{root / 'wav.scp'}: no line for {name}")
        yield _row("AISHELL-2", "ios", name, root / paths[name], text, CHINESE, "zh")


def wenetspeech(folder: Path) -> Iterator[Row]:
    """``WenetSpeech.json`` with segments of the recordings in ``audio/``."""
    path = find(folder, "WenetSpeech.json")
    (recordings,) = fields(document(path), ["audios"], str(path))
    for recording in recordings:
        audio, segments = fields(recording, ["path", "segments"], str(path))
        for segment in segments:
            name, start, end, text, subsets = fields(
                segment, ["sid", "begin_time", "end_time", "text", "subsets"], str(path)
            )
            for subset in sorted(WENETSPEECH_SUBSETS.keys() & set(subsets)):
                public = WENETSPEECH_SUBSETS[subset]
                found = _row("WenetSpeech", public, name, folder / audio, text, CHINESE, "zh")
                yield found | {"start": start, "end": end}


def fleurs(folder: Path) -> Iterator[Row]:
    """``LANGUAGE/test.tsv`` and ``LANGUAGE/audio/test/*.wav`` for every language that is there."""
    root = inside(folder, "data")
    tables = sorted(root.glob("*/test.tsv"))
    if not tables:
        find(root, "en_us/test.tsv")
    for path in tables:
        code = path.parent.name
        language = parse_language(code)
        for line in lines(path):
            columns = line.split("\t")
            if len(columns) < 4:
                raise DataError(f"{path}: expected at least 4 columns, found {line!r}")
            audio = path.parent / "audio" / "test" / columns[1]
            question = FLEURS.get(language, FLEURS["en"])
            # A sentence, the first column, has several readers.
            yield _row("Fleurs", code, audio.stem, audio, columns[3], question, language)


def _tabbed(path: Path) -> Iterator[tuple[str, str]]:
    for line in lines(path):
        name, tab, rest = line.partition("\t")
        if not tab:
            raise DataError(f"{path}: expected a name, a tab and more, found {line!r}")
        yield name, rest


def _row(
    dataset: str, subset: str, name: str, audio: Path, text: str, question: str, language: str
) -> Row:
    return row(dataset, subset, name, audio, question, text, error_rate(language), language)
