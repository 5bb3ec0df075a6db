"""Phones whose times are known teach the speech tokenizer frame by frame."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kimia_infer.data.conversations import DataError
from kimia_infer.training.config import read_config
from kimia_infer.training.tasks.config import TokenizerTrainingConfig
from kimia_infer.training.tasks.recognizer import Units
from kimia_infer.training.tasks.recordings import Recording, find_recordings
from kimia_infer.training.tasks.speech_tokenizer import frame_phones, train_tokenizer
from kimia_infer.utils.errors import ConfigurationError
from tests.training.runs import losses, write_sound

PHONES = [[["h", 0.0], ["E", 0.2]], [["j", 0.05], ["E", 0.3], ["s", 0.5]], [["E", 0.1]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spoken")
    lines = [
        {"audio": str(write_sound(folder / f"{i}.wav", 0.6, i)), "text": "x", "phones": phones}
        for i, phones in enumerate(PHONES)
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(data: Path, output: Path, *assignments: str) -> TokenizerTrainingConfig:
    known = [
        f"data={data}", f"output={output}", "device=cpu", "size.width=32", "size.heads=2",
        "size.layers=1", "size.codes=12", "upper_layers=1", "batch_size=2", "eval_ratio=0",
        "character_weight=0", "mel_weight=0", "phone_weight=2", *assignments,
    ]  # fmt: skip
    return read_config(TokenizerTrainingConfig, None, known)


def test_a_frame_has_the_phone_of_its_middle():
    sound = Recording("here", Path(), phones=(("tS", 0.04), ("@2", 0.11), ("tS", 0.145)))
    found = frame_phones(sound, 10)
    assert found == ["_", "_", "tS", "tS", "tS", "@2", "@2", "tS", "tS", "tS"]


def test_phones_have_ids_in_order():
    units = Units.of(["a"], ["tS", "@2", "_", "E"])
    assert units.phones == ("@2", "E", "_", "tS")
    assert units.phone_ids(["E", "tS"]).tolist() == [1, 3]


def test_a_run_learns_phones(data: Path, tmp_path: Path):
    result = train_tokenizer(settings(data, tmp_path, "max_steps=60", "learning_rate=5e-3"))
    found = losses(result, "phones_loss")
    # Before anything is learned, all five phones are equally likely.
    assert found[0] == pytest.approx(2 * math.log(5), rel=0.4)
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert losses(result, "characters_loss")[-1] == 0


@pytest.mark.parametrize(
    ("phones", "message"),
    [
        ("E", "phones: expected a list"),
        ([["E"]], r"phones\[0\]\[1\]: missing"),
        ([], "phones: expected a list"),
        ([["E", 0.2], ["s", 0.1]], "phones: expected seconds that do not fall"),
        ([[3, 0.2]], r"phones\[0\]\[0\]: expected a valid string, found 3"),
        ([["E", "soon"]], r"phones\[0\]\[1\]: expected a valid number, found 'soon'"),
    ],
)
def test_bad_phones_are_named(data: Path, tmp_path: Path, phones: object, message: str):
    line = json.loads(data.read_text().splitlines()[0]) | {"phones": phones}
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message):
        find_recordings(bad, Path())


def test_phones_that_cannot_be_used_are_named(data: Path, tmp_path: Path):
    with pytest.raises(DataError, match="phones: missing"):
        frame_phones(Recording("here", Path()), 3)
    with pytest.raises(ConfigurationError, match="nothing to recognize"):
        settings(data, tmp_path, "phone_weight=0")
