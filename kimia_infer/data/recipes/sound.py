"""Data sets of questions about sounds, in the layouts in which they are published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kimia_infer.data.conversations import DataError
from kimia_infer.data.manifests import ACCURACY, MATCH
from kimia_infer.data.recipes.layout import (
    Row,
    document,
    fields,
    find,
    inside,
    lettered,
    lines,
    options_question,
    row,
    table,
)

VOCALSOUND = {
    "/m/01j3sz": "Laughter",
    "/m/07plz5l": "Sigh",
    "/m/01b_21": "Cough",
    "/m/0dl9sf8": "Throat clearing",
    "/m/01hsr_": "Sneeze",
    "/m/07ppn3j": "Sniff",
}
NONSPEECH7K = ("Breath", "Cough", "Cry", "Laugh", "Scream", "Sneeze", "Yawn")
MELD = ("neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust")
MELD_MAX_SECONDS = 30
"""Longer utterances, by their times, are left out (published evaluation)."""
TUT2017 = (
    "beach", "bus", "cafe or restaurant", "car", "city center", "forest path", "grocery store",
    "home", "library", "metro station", "office", "park", "residential area", "train", "tram",
)  # fmt: skip
COCHLSCENE = (
    "bus", "cafe", "car", "crowdedindoor", "elevator", "kitchen", "park", "residentialarea",
    "restaurant", "restroom", "street", "subway", "subwaystation",
)  # fmt: skip
COCHLSCENE_SUBSETS = {"Test": "test", "Val": "dev"}

VOCAL_QUESTION = "Identify the human vocal sound in the audio."
SCENE_QUESTION = "Identify the acoustic scene in the audio."
EMOTION_QUESTION = "Identify the predominant emotion in this speech."


def mmau(folder: Path) -> Iterator[Row]:
    """``mmau-test-mini.json`` and ``test-mini-audios/ID.wav``."""
    path = find(folder, "mmau-test-mini.json", "data/mmau-test-mini.json")
    sounds = find(path.parent, "test-mini-audios")
    for entry in document(path):
        name, question, choices, answer, task = fields(
            entry, ["id", "question", "choices", "answer", "task"], str(path)
        )
        asked = f"{question}\n{' '.join(lettered(choices))}"
        yield _choice("MMAU", task, name, sounds / f"{name}.wav", asked, choices, answer)


def clotho_aqa(folder: Path) -> Iterator[Row]:
    """``clotho_aqa_{test,val}.csv``, or these with ``_clean``, and ``audio_files/``.

    The reference is the answer that most annotators of a question gave; a question without such
    an answer is left out.
    """
    sounds = find(folder, "audio_files")
    for split, subset in (("test", "test"), ("val", "dev")):
        path = find(folder, f"clotho_aqa_{split}_clean.csv", f"clotho_aqa_{split}.csv")
        answers: dict[tuple[str, str], list[str]] = {}
        for values in table(path, ("file_name", "QuestionText", "answer")):
            asked = values["file_name"], values["QuestionText"].strip()
            answers.setdefault(asked, []).append(values["answer"].strip().lower())
        for number, ((name, question), given) in enumerate(answers.items()):
            (answer, votes), *others = Counter(given).most_common(2)
            if not others or others[0][1] < votes:
                found = row(
                    "ClothoAQA", subset, f"{number}-{name}", sounds / name, question, answer, MATCH
                )
                if answer in ("yes", "no"):  # choices, since "no" may be in any answer
                    found |= {"metric": ACCURACY, "choices": ["yes", "no"]}
                yield found


def vocalsound(folder: Path) -> Iterator[Row]:
    """``datafiles/te.json`` and ``audio_16k/*.wav`` (or ``audio_44k``)."""
    root = find(folder, "data") if (folder / "data" / "datafiles").is_dir() else folder
    path, sounds = find(root, "datafiles/te.json"), find(root, "audio_16k", "audio_44k")
    choices = tuple(VOCALSOUND.values())
    question = options_question(VOCAL_QUESTION, choices)
    (entries,) = fields(document(path), ["data"], str(path))
    for entry in entries:
        wav, label = fields(entry, ["wav", "labels"], str(path))
        audio = sounds / Path(wav).name
        answer = VOCALSOUND.get(label, label)
        yield _choice("VocalSound", "", audio.stem, audio, question, choices, answer)


def nonspeech7k(folder: Path) -> Iterator[Row]:
    """``metadata of test set.csv`` and ``test/*.wav``."""
    path, sounds = find(folder, "metadata of test set.csv"), find(folder, "test")
    question = options_question(VOCAL_QUESTION, NONSPEECH7K)
    for values in table(path, ("Filename", "Classname")):
        label = values["Classname"].strip()
        # The file writes "crying" and "screaming" for what the question calls Cry and Scream.
        answer = next((c for c in NONSPEECH7K if label.lower().startswith(c.lower())), label)
        name = values["Filename"]
        yield _choice("Nonspeech7k", "", name, sounds / name, question, NONSPEECH7K, answer)


def meld(folder: Path) -> Iterator[Row]:
    """``test_sent_emo.csv`` and the videos ``output_repeated_splits_test/diaD_uttU.mp4``."""
    root = inside(folder, "MELD.Raw")
    path = find(root, "test_sent_emo.csv")
    videos = find(root, "output_repeated_splits_test", "test/output_repeated_splits_test")
    question = options_question(EMOTION_QUESTION, MELD)
    columns = ("Dialogue_ID", "Utterance_ID", "Emotion", "StartTime", "EndTime")
    for values in table(path, columns):
        dialogue, utterance, emotion, start, end = (values[column] for column in columns)
        if _seconds(end, path) - _seconds(start, path) > MELD_MAX_SECONDS:
            continue
        name = f"dia{dialogue}_utt{utterance}"
        yield _choice("MELD", "", name, videos / f"{name}.mp4", question, MELD, emotion)


def tut2017(folder: Path) -> Iterator[Row]:
    """``TUT-acoustic-scenes-2017-evaluation/``: ``meta.txt`` and ``audio/*.wav``."""
    root = inside(folder, "TUT-acoustic-scenes-2017-evaluation")
    path = find(root, "meta.txt")
    question = options_question(SCENE_QUESTION, TUT2017)
    for line in lines(path):
        name, label, *_ = [*line.split(), ""]
        answer = label.replace("/", " or ").replace("_", " ")
        yield _choice("TUT2017", "", Path(name).stem, root / name, question, TUT2017, answer)


def cochlscene(folder: Path) -> Iterator[Row]:
    """``CochlScene/{Test,Val}/SCENE/*.wav``."""
    root = inside(folder, "CochlScene")
    question = options_question(SCENE_QUESTION, COCHLSCENE)
    for published, subset in COCHLSCENE_SUBSETS.items():
        for audio in sorted(find(root, published).glob("*/*.wav")):
            name, answer = f"{audio.parent.name}/{audio.stem}", audio.parent.name.lower()
            yield _choice("CochlScene", subset, name, audio, question, COCHLSCENE, answer)


def _choice(
    dataset: str,
    subset: str,
    name: str,
    audio: Path,
    question: str,
    choices: Sequence[str],
    answer: str,
) -> Row:
    """A question with choices."""
    found = row(dataset, subset, name, audio, question, answer, ACCURACY)
    return found | {"choices": list(choices)}


def _seconds(time: str, path: Path) -> float:
    """Seconds of a time such as ``00:14:38,127``."""
    try:
        hours, minutes, seconds = time.replace(",", ".").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError as error:
        raise DataError(f"{path}: expected hours:minutes:seconds, found {time!r}") from error
