"""Every recipe reads the published layout of its data set, here in a tiny copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kimia_infer.data.conversations import DataError
from kimia_infer.data.recipes import RECIPES, write_manifest
from kimia_infer.evaluation.items import Defaults, Item, read_manifest

OPTIONS_END = (
    "\n.Answer with the option's letter from the given choices directly and only give the best "
    "option."
)


def put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def librispeech(root: Path) -> None:
    for part, name in (("test-clean", "61-70968"), ("test-other", "367-130732")):
        speaker, chapter = name.split("-")
        folder = root / "LibriSpeech" / part / speaker / chapter
        put(folder / f"{name}.trans.txt", f"{name}-0000 HE BEGAN\n{name}-0001 A CONFUSED\n")
    put(root / "LibriSpeech" / "dev-clean" / "1" / "2" / "1-2.trans.txt", "1-2-0000 NOT THIS\n")


def aishell1(root: Path) -> None:
    put(root / "wav" / "test" / "S0764" / "BAC009S0764W0121.wav")
    put(root / "wav" / "train" / "S0002" / "BAC009S0002W0122.wav")
    put(
        root / "transcript" / "aishell_transcript_v0.8.txt",
        "BAC009S0002W0122 而 对 楼市\nBAC009S0764W0121 甚至 出现 交易\n",
    )


def aishell2(root: Path) -> None:
    folder = root / "AISHELL-DEV-TEST-SET" / "iOS" / "test"
    put(folder / "wav.scp", "IT0011W0001\twav/T0011/IT0011W0001.wav\n")
    put(folder / "trans.txt", "IT0011W0001\t换一首歌\n")


def wenetspeech(root: Path) -> None:
    def segment(name: str, subset: str) -> dict:
        times = {"begin_time": 1.25, "end_time": 3.5}
        return {"sid": name, "text": "你好", "subsets": [subset], **times}

    audios = [
        {"aid": "Y1", "path": "audio/test_net/Y1.opus", "segments": [segment("Y1_S1", "TEST_NET")]},
        {"aid": "M1", "path": "audio/M1.opus", "segments": [segment("M1_S1", "TEST_MEETING")]},
        {"aid": "L1", "path": "audio/train/L1.opus", "segments": [segment("L1_S1", "L")]},
    ]
    put(root / "WenetSpeech.json", json.dumps({"audios": audios}))


def fleurs(root: Path) -> None:
    row = "1661\t{0}.wav\tRaw, text.\t{1}\tr a w |\t96000\tFEMALE\n"
    rows = row.format("10004", "raw text") + row.format("10005", "raw text")
    put(root / "data" / "en_us" / "test.tsv", rows)
    put(root / "data" / "cmn_hans_cn" / "test.tsv", row.format("10006", "你 好"))


def mmau(root: Path) -> None:
    entry = {
        "id": "3fe64f3d",
        "audio_id": "./test-mini-audios/3fe64f3d.wav",
        "question": "Who speaks?",
        "choices": ["Man", "Woman", "Child", "Robot"],
        "answer": "Man",
        "task": "sound",
    }
    put(root / "mmau-test-mini.json", json.dumps([entry]))
    put(root / "test-mini-audios" / "3fe64f3d.wav")


def clotho_aqa(root: Path) -> None:
    header = "file_name,QuestionText,answer,confidence\n"
    rows = "".join(
        f'"a, b.wav",{question},{answer},yes\n'
        for question, answers in {
            "Is it raining?": ("yes", "Yes", "no"),
            "What is flowing?": ("water", "stone", "water"),
            "How many?": ("one", "two", "three"),
        }.items()
        for answer in answers
    )
    put(root / "clotho_aqa_test.csv", header + rows)
    put(root / "clotho_aqa_val_clean.csv", "file_name,QuestionText,answer\nc.wav,What?,BIRD\n")
    (root / "audio_files").mkdir()


def vocalsound(root: Path) -> None:
    data = [
        {"wav": "/somewhere/else/audio_16k/m0600_0_throatclearing.wav", "labels": "/m/0dl9sf8"},
        {"wav": "/somewhere/else/audio_16k/f0003_0_laughter.wav", "labels": "/m/01j3sz"},
    ]
    put(root / "datafiles" / "te.json", json.dumps({"data": data}))
    (root / "audio_16k").mkdir()


def nonspeech7k(root: Path) -> None:
    header = "Filename,File ID,Duration in ms,Class ID,Classname,source\n"
    rows = "1_2_0.wav,1,500,2,crying,x\n1_4_0.wav,1,500,4,screaming,x\n1_0_0.wav,1,500,0,breath,x\n"
    put(root / "metadata of test set.csv", header + rows)
    (root / "test").mkdir()


def meld(root: Path) -> None:
    columns = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode"
    times = ('"00:16:16,059","00:16:21,731"', '"00:16:21,940","00:17:23,442"')
    put(
        root / "MELD.Raw" / "test_sent_emo.csv",
        f"{columns},StartTime,EndTime\n"
        f'1,"Why, do I?",Mark,surprise,positive,0,0,3,19,{times[0]}\n'
        f"2,What,Rachel,anger,negative,0,1,3,19,{times[1]}\n",
    )
    (root / "MELD.Raw" / "output_repeated_splits_test").mkdir()


def tut2017(root: Path) -> None:
    put(root / "meta.txt", "audio/1.wav\tcafe/restaurant\naudio/2.wav\tresidential_area\n")


def cochlscene(root: Path) -> None:
    for part, scene in (("Test", "CrowdedIndoor"), ("Val", "Bus"), ("Train", "Car")):
        put(root / "CochlScene" / part / scene / f"{scene}_user01.wav")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "librispeech": librispeech,
    "aishell-1": aishell1,
    "aishell-2": aishell2,
    "wenetspeech": wenetspeech,
    "fleurs": fleurs,
    "mmau": mmau,
    "clotho-aqa": clotho_aqa,
    "vocalsound": vocalsound,
    "nonspeech7k": nonspeech7k,
    "meld": meld,
    "tut2017": tut2017,
    "cochlscene": cochlscene,
}


def items_of(name: str, tmp_path: Path) -> list[Item]:
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    LAYOUTS[name](data)
    manifest = read_manifest(write_manifest(name, data, output), Defaults(output))
    assert manifest.faults == []
    return manifest.items


def facts(item: Item) -> tuple[str, str, str, str]:
    return item.dataset, item.subset, item.metric, item.reference


def audio_paths(items: list[Item], tmp_path: Path) -> list[str]:
    root = tmp_path / "data"
    return [
        Path(path).relative_to(root).as_posix() for i in items for path in i.recordings.values()
    ]


def test_every_recipe_has_a_layout_here():
    assert RECIPES.keys() == LAYOUTS.keys()


def test_librispeech(tmp_path: Path):
    items = items_of("librispeech", tmp_path)
    assert len(items) == 4
    assert facts(items[0]) == ("LibriSpeech", "test-clean", "wer", "HE BEGAN")
    assert facts(items[3]) == ("LibriSpeech", "test-other", "wer", "A CONFUSED")
    assert audio_paths(items, tmp_path)[1] == ("LibriSpeech/test-clean/61/70968/61-70968-0001.flac")
    assert items[0].question == "Please transcribe the spoken content into written text."


def test_aishell1(tmp_path: Path):
    (item,) = items_of("aishell-1", tmp_path)
    assert facts(item) == ("AISHELL-1", "", "cer", "甚至出现交易")
    assert audio_paths([item], tmp_path) == ["wav/test/S0764/BAC009S0764W0121.wav"]
    assert item.question == "请把这段语音转录成文本。"


def test_aishell2(tmp_path: Path):
    (item,) = items_of("aishell-2", tmp_path)
    assert facts(item) == ("AISHELL-2", "ios", "cer", "换一首歌")
    assert audio_paths([item], tmp_path) == [
        "AISHELL-DEV-TEST-SET/iOS/test/wav/T0011/IT0011W0001.wav"
    ]


def test_wenetspeech_cuts_its_recordings(tmp_path: Path):
    items = items_of("wenetspeech", tmp_path)
    assert {item.subset for item in items} == {"test-net", "test-meeting"}
    assert facts(items[0]) == ("WenetSpeech", "test-net", "cer", "你好")
    assert items[0].span == (1.25, 3.5)
    assert audio_paths(items, tmp_path) == ["audio/test_net/Y1.opus", "audio/M1.opus"]


def test_fleurs_takes_the_languages_that_are_there(tmp_path: Path):
    chinese, *english = items_of("fleurs", tmp_path)
    assert facts(chinese) == ("Fleurs", "cmn_hans_cn", "cer", "你 好")
    assert (chinese.language, chinese.question) == ("zh", "请将这段语音转写成文字。")
    assert [facts(item) for item in english] == [("Fleurs", "en_us", "wer", "raw text")] * 2
    assert english[0].question == "Please transcribe this audio."
    assert audio_paths(english, tmp_path)[0] == "data/en_us/audio/test/10004.wav"


def test_mmau(tmp_path: Path):
    (item,) = items_of("mmau", tmp_path)
    assert facts(item) == ("MMAU", "sound", "accuracy", "Man")
    assert item.question == "Who speaks?\n(A) Man (B) Woman (C) Child (D) Robot"
    assert audio_paths([item], tmp_path) == ["test-mini-audios/3fe64f3d.wav"]


def test_clotho_aqa_takes_what_most_annotators_say(tmp_path: Path):
    rain, flow, what = items_of("clotho-aqa", tmp_path)
    assert facts(rain) == ("ClothoAQA", "test", "accuracy", "yes")
    assert rain.choices == ("yes", "no")
    assert facts(flow) == ("ClothoAQA", "test", "match", "water")
    assert facts(what) == ("ClothoAQA", "dev", "match", "bird")
    assert audio_paths([rain], tmp_path) == ["audio_files/a, b.wav"]


def test_vocalsound(tmp_path: Path):
    first, second = items_of("vocalsound", tmp_path)
    assert facts(first) == ("VocalSound", "", "accuracy", "Throat clearing")
    assert facts(second) == ("VocalSound", "", "accuracy", "Laughter")
    assert first.question == (
        "Identify the human vocal sound in the audio.\nOptions:\n(A) Laughter\n(B) Sigh\n"
        "(C) Cough\n(D) Throat clearing\n(E) Sneeze\n(F) Sniff" + OPTIONS_END
    )
    assert audio_paths([first], tmp_path) == ["audio_16k/m0600_0_throatclearing.wav"]


def test_nonspeech7k(tmp_path: Path):
    items = items_of("nonspeech7k", tmp_path)
    assert [item.reference for item in items] == ["Cry", "Scream", "Breath"]
    assert audio_paths(items[:1], tmp_path) == ["test/1_2_0.wav"]


def test_meld_leaves_out_what_is_longer_than_published(tmp_path: Path):
    (item,) = items_of("meld", tmp_path)
    assert facts(item) == ("MELD", "", "accuracy", "surprise")
    assert audio_paths([item], tmp_path) == ["MELD.Raw/output_repeated_splits_test/dia0_utt0.mp4"]
    assert "\n(E) surprise\n" in item.question


def test_tut2017_labels_are_options(tmp_path: Path):
    items = items_of("tut2017", tmp_path)
    assert [item.reference for item in items] == ["cafe or restaurant", "residential area"]
    assert audio_paths(items, tmp_path) == ["audio/1.wav", "audio/2.wav"]


def test_cochlscene(tmp_path: Path):
    test, dev = items_of("cochlscene", tmp_path)
    assert facts(test) == ("CochlScene", "test", "accuracy", "crowdedindoor")
    assert facts(dev) == ("CochlScene", "dev", "accuracy", "bus")


@pytest.mark.parametrize("name", RECIPES)
def test_another_directory_is_refused(name: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=str(tmp_path / "data")):
        write_manifest(name, tmp_path / "data", tmp_path / "output")
    assert not list(tmp_path.glob("output/*"))


def test_damaged_files_are_named(tmp_path: Path):
    put(tmp_path / "test-mini-audios" / "x.wav")
    put(tmp_path / "mmau-test-mini.json", '[{"id": 1}]')
    with pytest.raises(DataError, match="expected an object with id, question"):
        write_manifest("mmau", tmp_path, tmp_path / "output")
    put(tmp_path / "mmau-test-mini.json", "[{")
    with pytest.raises(DataError, match=r"mmau-test-mini\.json: cannot be read"):
        write_manifest("mmau", tmp_path, tmp_path / "output")


def test_missing_columns_are_named(tmp_path: Path):
    nonspeech7k(tmp_path)
    put(tmp_path / "metadata of test set.csv", "Filename,Label\na.wav,cry\n")
    with pytest.raises(DataError, match="no column Classname"):
        write_manifest("nonspeech7k", tmp_path, tmp_path / "output")


def test_unknown_recipe(tmp_path: Path):
    with pytest.raises(DataError, match="expected one of librispeech"):
        write_manifest("timit", tmp_path, tmp_path)
