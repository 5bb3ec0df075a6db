"""What all parts of the codec share: the command, workers, precision, averages, the cache."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.training.config import describe, read_config
from kimia_infer.training.plan import MicroBatch
from kimia_infer.training.run_directory import FINAL, all_checkpoints
from kimia_infer.training.tasks.codec import AveragedNetwork
from kimia_infer.training.tasks.config import (
    CodecTrainingConfig,
    DetokenizerTrainingConfig,
    TokenizerTrainingConfig,
    VocoderTrainingConfig,
)
from kimia_infer.training.tasks.detokenizer import (
    DetokenizerNetwork,
    RecordingReader,
    train_detokenizer,
)
from kimia_infer.training.tasks.recordings import Recordings, find_recordings
from kimia_infer.training.trainer import TrainingResult
from tests.command_line import run_here
from tests.paths import MINI
from tests.training.runs import losses, write_sound


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for index in range(4):
        write_sound(folder / f"{index}.wav", 0.5 + 0.2 * index, index)
    return folder


def assignments(sounds: Path, output: Path, *more: str) -> list[str]:
    return [
        f"data={sounds}", f"model={MINI}", f"output={output}", "device=cpu", "size.width=16",
        "size.depth=1", "size.heads=2", "batch_size=2", "crop_codes=10", "max_steps=4",
        "learning_rate=1e-2", *more,
    ]  # fmt: skip


def run(sounds: Path, output: Path, *more: str) -> TrainingResult:
    return train_detokenizer(
        read_config(DetokenizerTrainingConfig, None, assignments(sounds, output, *more))
    )


def test_the_command_runs(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.yaml"
    path.write_text("save_every: 2\n")
    known = [str(path), *assignments(sounds, tmp_path / "run")]
    assert run_here("train-codec", "detokenizer", *known) == 0
    assert f"{tmp_path / 'run' / FINAL}: 4 steps, loss " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert len(all_checkpoints(tmp_path / "run")) == 2


def test_the_command_names_everything_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = [f"data={tmp_path / 'x'}", f"output={tmp_path / 'run'}", f"model={MINI}", "epoch=3"]
    assert run_here("train-codec", "detokenizer", *wrong) == 2
    first, *faults = capsys.readouterr().err.splitlines()
    assert first.endswith("2 settings are wrong:")
    assert faults == [
        "  epoch: unknown field; did you mean epochs?",
        f"  data: {tmp_path / 'x'} does not exist",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings", [DetokenizerTrainingConfig, VocoderTrainingConfig, TokenizerTrainingConfig]
)
def test_every_setting_is_described(settings: type[CodecTrainingConfig]):
    text = "\n".join(describe(settings))
    assert "output [required]" in text
    assert "size." in text
    assert "None" not in text


def test_workers_and_the_cache_change_nothing(sounds: Path, tmp_path: Path):
    expected = losses(run(sounds, tmp_path / "plain"))
    assert losses(run(sounds, tmp_path / "workers", "workers=1", "cache_hours=0")) == expected
    checked = losses(run(sounds, tmp_path / "less", "gradient_checkpointing=true"))
    assert checked == pytest.approx(expected, rel=1e-5)
    assert losses(run(sounds, tmp_path / "seed", "seed=1")) != expected


def test_half_precision_is_near(sounds: Path, tmp_path: Path):
    expected = losses(run(sounds, tmp_path / "plain"))
    found = losses(run(sounds, tmp_path / "half", "precision=bf16"))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.03)


def test_the_evaluation_is_that_of_what_is_written(sounds: Path, tmp_path: Path):
    result = run(sounds, tmp_path, f"eval_data={sounds}", "batch_size=1", "eval_every=2")
    part = dit_component(tmp_path / FINAL / "audio_detokenizer")
    settings = read_config(DetokenizerTrainingConfig, None, assignments(sounds, tmp_path))
    network = DetokenizerNetwork(part.load(torch.device("cpu"), torch.float32), {}, settings).eval()
    reader = RecordingReader(MINI)
    samples = Recordings(find_recordings(sounds, tmp_path), reader.read, 0.0)
    with torch.no_grad():
        found = [sum(network(samples[MicroBatch((i,), (1.0,))]).values()).item() for i in range(4)]
    first, last = losses(result, "eval_loss")
    assert last == pytest.approx(sum(found) / 4, rel=1e-5)
    assert first != pytest.approx(last, rel=1e-5)


def test_an_average_settles_and_stands_in():
    class Layer(AveragedNetwork[nn.Linear]):
        forward = blocks = write = None

    network = Layer(nn.Linear(1, 1), 0.9)
    expected, decays = (
        network.trained.weight.item(),
        (min(0.9, (1 + n) / (10 + n)) for n in count(1)),
    )
    for value, decay in zip([5.0] * 50 + [1.0, 3.0] * 100, decays, strict=False):
        nn.init.constant_(network.trained.weight, value)
        network.after_step()
        expected = decay * expected + (1 - decay) * value
    mean = network.means()["weight"].item()
    assert mean == pytest.approx(expected, rel=1e-5)
    assert mean == pytest.approx(2.0, abs=0.15)
    assert network.eval().module.weight.item() == mean
    assert network.train().module.weight.item() == 3.0


def test_what_fits_stays_in_memory(sounds: Path, tmp_path: Path):
    reads: list[str] = []

    def read(sound):
        reads.append(sound.path.name)
        return {"seconds": 1800.0}

    found = find_recordings(sounds, tmp_path)
    samples = Recordings(found, read, 3600.0)
    for _ in range(2):
        samples[MicroBatch(tuple(range(4)), (0.25,) * 4)]
    assert [path.path.name for path in found] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert reads == ["0.wav", "1.wav", "2.wav", "3.wav", "2.wav", "3.wav"]


def test_a_sound_that_vanishes_stops_the_run(sounds: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    gone = write_sound(tmp_path / "gone.wav", 0.5, 9)
    paths = [*(str(s) for s in sorted(sounds.glob("*.wav"))), str(gone)]
    data.write_text("".join(json.dumps({"audio": p}) + "\n" for p in paths))
    reader = RecordingReader(MINI)
    samples = Recordings(find_recordings(data, tmp_path), reader.read, 0.0)
    gone.unlink()
    with pytest.raises(DataError, match=f"^{data}:5: "):
        samples[MicroBatch((0, 4), (0.5, 0.5))]
