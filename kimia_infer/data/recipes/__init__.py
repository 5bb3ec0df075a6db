"""Recipes: a manifest from a data set in the layout in which it is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.data.conversations import DataError
from kimia_infer.data.recipes import sound, speech
from kimia_infer.data.recipes.layout import Row
from kimia_infer.utils.files import write_json_lines


@dataclass(frozen=True)
class Recipe:
    """``rows`` reads the directory of a data set; ``layout`` names its files, for help texts."""

    rows: Callable[[Path], Iterator[Row]]
    layout: str


RECIPES = {
    "librispeech": Recipe(
        speech.librispeech, "{test-clean,test-other}/SPEAKER/CHAPTER/*.flac, *.trans.txt"
    ),
    "aishell-1": Recipe(
        speech.aishell1, "wav/test/SPEAKER/*.wav, transcript/aishell_transcript_v0.8.txt"
    ),
    "aishell-2": Recipe(speech.aishell2, "iOS/test/{wav.scp,trans.txt,wav/}"),
    "wenetspeech": Recipe(speech.wenetspeech, "WenetSpeech.json, audio/"),
    "fleurs": Recipe(speech.fleurs, "LANGUAGE/test.tsv, LANGUAGE/audio/test/*.wav"),
    "mmau": Recipe(sound.mmau, "mmau-test-mini.json, test-mini-audios/*.wav"),
    "clotho-aqa": Recipe(sound.clotho_aqa, "clotho_aqa_{test,val}[_clean].csv, audio_files/"),
    "vocalsound": Recipe(sound.vocalsound, "datafiles/te.json, {audio_16k,audio_44k}/*.wav"),
    "nonspeech7k": Recipe(sound.nonspeech7k, "metadata of test set.csv, test/*.wav"),
    "meld": Recipe(sound.meld, "test_sent_emo.csv, output_repeated_splits_test/*.mp4"),
    "tut2017": Recipe(sound.tut2017, "meta.txt, audio/*.wav"),
    "cochlscene": Recipe(sound.cochlscene, "{Test,Val}/SCENE/*.wav"),
}


def write_manifest(name: str, data: Path, folder: Path) -> Path:
    """Write the manifest of the data set in ``data`` into ``folder``, by recipe ``name``; its path.

    Raises:
        DataError: there is no such recipe, or ``data`` does not have its layout.
    """
    if name not in RECIPES:
        raise DataError(f"recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    if not data.is_dir():
        raise DataError(f"{data}: not a directory")
    rows = list(RECIPES[name].rows(data))
    if not rows:
        raise DataError(f"{data}: no items; recipe {name} reads {RECIPES[name].layout}")
    path = folder / f"{name}.jsonl"
    write_json_lines(path, rows)
    return path
