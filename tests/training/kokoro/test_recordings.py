"""Adapters of Kokoro's prosody, trained on recordings and their texts."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.audio.files import load_audio, write_wav
from kimia_infer.data.conversations import DataError
from kimia_infer.evaluation.prosody import prosody_agreement
from kimia_infer.models.kokoro.adapters.store import apply_adapter
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.config import SAMPLE_RATE, KokoroConfig
from kimia_infer.models.kokoro.prosody import expected_durations
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.config import read_config
from kimia_infer.training.tasks import kokoro_recordings
from kimia_infer.training.tasks.kokoro import train_kokoro
from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig
from kimia_infer.training.tasks.kokoro_recordings import RecordingTeacher, filled, read_recordings
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.utils.errors import ConfigurationError
from tests.command_line import run_here
from tests.models.kokoro.spoken import SPOKEN
from tests.models.kokoro.tiny import STYLE, narrow_kokoro
from tests.training.runs import interrupt, losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, a list of recordings, and what was measured of them."""
    folder = tmp_path_factory.mktemp("kokoro")
    (folder / "model").mkdir()
    write_list(folder / "list.csv", [(str(s.path), s.text) for s in SPOKEN])
    with narrow_kokoro(folder / "model", longest=50):
        yield folder


def write_list(path: Path, rows: Sequence[tuple[str, ...]], *more: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audio", "text", *more), *rows])
    return path


def assignments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model={folder / 'model'}", f"data={folder / 'list.csv'}", f"output={output}",
        f"feature_cache={folder / 'features'}", "voices=[af_heart]", "device=cpu", "batch_size=2",
        "learning_rate=1e-2", "adapter.rank=2", "max_steps=4", *more,
    ]  # fmt: skip


def settings(known: list[str]) -> KokoroTrainingConfig:
    return read_config(KokoroTrainingConfig, None, known)


def run(known: list[str], resume: bool = False) -> TrainingResult:
    return train_kokoro(settings(known), resume)


def test_prosody_of_recordings_is_learned(folder: Path, tmp_path: Path):
    known = assignments(
        folder, tmp_path, "max_steps=8", "eval_ratio=0", "batch_size=3", "learning_rate=2e-2"
    )
    found = losses(run(known))
    assert sum(found[-2:]) < 0.85 * sum(found[:2])
    network = load_network(folder / "model", CPU)
    lines = read_recordings(settings(known), str(folder / "list.csv"), network.config)
    examples = list(map(RecordingTeacher(network, Voices(folder / "model", 2 * STYLE)), lines))
    before = prosody_agreement(network.predictor, examples)
    apply_adapter(network.predictor, tmp_path / "final")
    after = prosody_agreement(network.predictor, examples)
    assert abs(after.length - 1) < abs(before.length - 1)
    assert after.energy < before.energy


def test_what_is_learned_is_what_was_measured(folder: Path, tmp_path: Path):
    """Durations by their logits, pitch where there is one, energy moved to the voice's level."""
    network = load_network(folder / "model", CPU)
    known = settings(assignments(folder, tmp_path))
    teacher = RecordingTeacher(network, Voices(folder / "model", 2 * STYLE))
    for line, spoken in zip(
        read_recordings(known, str(folder / "list.csv"), network.config), SPOKEN, strict=True
    ):
        assert line.phonemes == spoken.phonemes
        example = teacher(line)
        assert torch.equal(expected_durations(example.logits), line.durations.float())
        voiced = line.pitch > 0
        assert torch.equal(example.pitch[voiced], line.pitch[voiced])
        shift = (example.energy - line.energy)[voiced]
        assert (shift - shift.median()).abs().median() < 1e-5
        assert len(example.pitch) == len(example.energy) == 2 * line.durations.sum()
    short = network.config.model_copy(update={"max_dur": 3})  # of another model, measured before
    with pytest.raises(DataError, match=r"at most 0\.075 s can be learned"):
        read_recordings(known, str(folder / "list.csv"), short)


def test_pitch_is_filled_with_that_of_the_voice():
    pitch = torch.tensor([0.0, 110.0, 0.0, 0.0, 120.0, 0.0])
    usual = torch.tensor([210.0, 220.0, 8.0, 200.0, 220.0, 8.0])
    found = filled(pitch, usual)
    assert found[[1, 4]].tolist() == [110.0, 120.0]
    assert found[0].item() == pytest.approx(105.0)
    assert found[3].item() == pytest.approx(200 * (110 / 220) ** (1 / 3) * (120 / 220) ** (2 / 3))
    assert found[[2, 5]].max() < 5
    assert torch.equal(filled(torch.zeros(6), usual), usual)


def test_an_interrupted_run_continues_and_measures_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more = ["save_every=2", "max_steps=4"]
    whole, parts = (assignments(folder, tmp_path / name, *more) for name in ("whole", "parts"))
    expected = run(whole)
    interrupt(lambda: run(parts), step=3)

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(kokoro_recordings, "mel_power", refuse)
    found = run(parts, resume=True)
    assert losses(found) == losses(expected)
    assert losses(found, "eval_loss") == losses(expected, "eval_loss")
    weights = [tmp_path / n / "final" / "adapter_model.safetensors" for n in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_command_makes_an_adapter_that_speaks_by_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    known = assignments(folder, tmp_path / "run", "max_steps=2", f"model={model}")
    assert run_here("finetune-kokoro", *known) == 0
    assert "run/final: 2 steps, loss" in capsys.readouterr().out
    assert "| teacher | recordings |" in (tmp_path / "run" / "final" / "README.md").read_text()
    assert run_here("export", tmp_path / "run", model / "adapters" / "mine") == 0
    plain, adapted = (load_network(model, CPU, adapter=name) for name in (None, "mine"))
    changed = [
        not torch.equal(a, b)
        for a, b in zip(
            plain.predictor.shared.parameters(), adapted.predictor.shared.parameters(), strict=True
        )
    ]
    assert any(changed)


def silent(_: np.ndarray) -> np.ndarray:
    return np.zeros(24_000, np.float32)


def paused(wave: np.ndarray) -> np.ndarray:
    middle = len(wave) // 2
    return np.concatenate([wave[:middle], np.zeros(48_000, np.float32), wave[middle:]])


@pytest.mark.parametrize(
    ("change", "text", "message"),
    [
        (silent, None, "audio: .*0.wav is silent"),
        (lambda wave: np.tile(wave, 20), None, "longer than the permitted 30 s"),
        (lambda wave: wave[:12_000], None, r"phonemes cannot be spoken in 0.50 s"),
        (paused, None, r"a pause of 1.98 s at 1.\d\d s, but Kokoro's longest is 1.25 s; cut"),
        (
            None,
            "Whoever asked for seven green umbrellas?",
            r"text: does not fit the recording \(a fit of 0.0",
        ),
        (None, "Где находится библиотека?", r"text: does not fit the recording \(a fit of 0.0"),
        (None, "...", "text: nothing in it can be spoken"),
        (None, " ", "text: missing; what is said in the recording is needed"),
        (None, "so " * 200, "phonemes, at most 254 are learned at once; cut"),
    ],
)
def test_recordings_that_cannot_be_used_are_named(
    folder: Path,
    tmp_path: Path,
    change: Callable[[np.ndarray], np.ndarray] | None,
    text: str | None,
    message: str,
):
    wave = load_audio(SPOKEN[0].path, sample_rate=SAMPLE_RATE)
    write_wav(tmp_path / "0.wav", wave if change is None else change(wave), SAMPLE_RATE)
    rows = [(str(tmp_path / "0.wav"), SPOKEN[0].text if text is None else text)]
    path = write_list(tmp_path / "list.csv", rows)
    known = settings([*assignments(folder, tmp_path / "run"), f"data={path}"])
    with pytest.raises(DataError, match=rf"list.csv:2: .*{message}"):
        read_recordings(known, str(path), KokoroConfig.from_directory(folder / "model"))


def test_rows_say_what_they_mean(folder: Path, tmp_path: Path):
    """Parts of recordings, other languages, missing files; bad ones can be left out."""
    spoken = SPOKEN[0]
    seconds = len(load_audio(spoken.path, sample_rate=SAMPLE_RATE)) / SAMPLE_RATE
    twice = np.tile(load_audio(spoken.path, sample_rate=SAMPLE_RATE), 2)
    write_wav(tmp_path / "twice.wav", twice, SAMPLE_RATE)
    good = {"audio": "twice.wav", "text": spoken.text, "offset": seconds, "duration": seconds}
    rows = [
        good,
        {"audio": "twice.wav", "text": spoken.text, "language": "fr"},
        {"audio": "none.wav", "text": spoken.text},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [*assignments(folder, tmp_path / "run"), f"data={path}", f"audio_root={tmp_path}"]
    config = KokoroConfig.from_directory(folder / "model")
    with pytest.raises(DataError) as raised:
        read_recordings(settings(known), str(path), config)
    assert "list.jsonl:2: language: fr, but the texts are read as en-us" in str(raised.value)
    assert "list.jsonl:3: audio: " in str(raised.value)
    (line,) = read_recordings(settings([*known, "bad_lines=skip"]), str(path), config)
    errors = (line.durations.cumsum(0) - spoken.durations.cumsum(0)).abs()
    assert errors.median() == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("voices=[af_heart, am_adam]", "voices: recordings teach one voice"),
        ("teacher_voice=am_adam", "voices: recordings teach one voice"),
        ("objective=outputs", "objective: "),
        ("eval_data=lines.txt", "eval_data: expected recordings, or strings of phonemes"),
    ],
)
def test_settings_that_do_not_go_with_recordings(
    folder: Path, tmp_path: Path, setting: str, message: str
):
    with pytest.raises(ConfigurationError, match=message):
        settings(assignments(folder, tmp_path / "run", setting))


def test_made_up_strings_are_not_validated_by_recordings(tmp_path: Path):
    known = ["model=model", f"output={tmp_path}", "eval_data=recordings.csv"]
    with pytest.raises(ConfigurationError, match="eval_data: expected recordings, or strings"):
        settings(known)
