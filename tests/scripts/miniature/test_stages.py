"""The stages of the miniature: in order, skipped when done, and kept when interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.mel import MelConfig
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import SpeechTokenizerConfig
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kokoro.layout import VOICES_NAME
from kimia_infer.training.run_directory import TrainingError
from kimia_infer.training.tasks.config import (
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerTrainingConfig,
)
from kimia_infer.training.tasks.detokenizer import RecordingReader
from kimia_infer.training.tasks.speech_tokenizer import new_config, new_tokenizer
from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import write_text
from kimia_infer.weights.layout import RECORD_NAME
from scripts.miniature import (
    figures,
    natural,
    people,
    recipe,
    recognizer,
    scoring,
    spoken_world,
    voice,
)
from scripts.miniature.assembly import ROWS_OF_TOKENS
from scripts.miniature.conversations import Amounts
from scripts.miniature.natural import WordList
from scripts.miniature.people import PeopleSize
from scripts.miniature.recipe import held_out, make_encoder, take_over
from scripts.miniature.spoken_world import WorldSize
from scripts.miniature.stages import STAGES, make, ready, result
from scripts.miniature.untrained import Sizes, write_miniature
from scripts.miniature.voices import ACCENTS, ENGLISH, HELD_OUT_ENGLISH, Utterance
from scripts.miniature.whisper import WhisperSize
from tests.paths import MINI
from tests.training.runs import interrupt, write_sound

CPU = torch.device("cpu")


def test_stages_can_be_made_in_their_order(tmp_path: Path):
    for name, needs in STAGES.items():
        assert all(result(tmp_path, needed).exists() for needed in needs)
        assert name in ready(tmp_path)
        result(tmp_path, name).mkdir(parents=True)
        assert name not in ready(tmp_path)
    assert not ready(tmp_path)


def test_independent_stages_can_run_together(tmp_path: Path):
    free = ["kokoro", "world", "whisper", "held_out"]
    assert ready(tmp_path) == free
    (tmp_path / "world").mkdir()
    result(tmp_path, "kokoro").mkdir(parents=True)
    assert ready(tmp_path, running=free) == ["people", "voice"]
    result(tmp_path, "voice").mkdir(parents=True)
    assert ready(tmp_path, running=[*free, "people"]) == ["vocoder"]
    result(tmp_path, "people").mkdir(parents=True)
    assert ready(tmp_path, running=[*free, "vocoder"]) == ["tokenizer"]
    result(tmp_path, "tokenizer").mkdir(parents=True)
    assert ready(tmp_path, running=[*free, "vocoder"]) == ["encoder"]


def test_a_stage_is_made_once_and_after_what_it_needs(tmp_path: Path, monkeypatch):
    made = []

    def write(run: Path) -> None:
        made.append(run)
        result(run, "vocoder").mkdir(parents=True)

    monkeypatch.setattr(recipe, "make_vocoder", write)
    with pytest.raises(TrainingError, match="vocoder: needs voice to be done first"):
        make(tmp_path, "vocoder")
    result(tmp_path, "voice").mkdir(parents=True)
    make(tmp_path, "vocoder")
    make(tmp_path, "vocoder")
    assert made == [tmp_path]


def test_an_interrupted_world_is_not_taken_for_one(tmp_path: Path, monkeypatch):
    def fail(folder: Path, *_: object) -> None:
        (folder / "train.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "write_world", fail)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "world")
    assert "world" in ready(tmp_path)
    monkeypatch.setattr(recipe, "write_world", lambda *_: None)
    make(tmp_path, "world")
    assert (tmp_path / "world").is_dir()


def test_the_encoder_is_the_rounded_tokenizer(tmp_path: Path):
    size = EncoderSize(width=32, layers=1, heads=2, codes=20)
    config = new_config(TokenizerTrainingConfig(data="", output="", size=size))
    torch.manual_seed(0)
    tokenizer = new_tokenizer(SpeechTokenizerConfig.from_json(config, Path("config.json")))
    tensors = {name: p.detach() for name, p in tokenizer.named_parameters()}
    folder = tmp_path / "tokenizer" / "final" / SPEECH_TOKENIZER_FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"ema_count": torch.ones(20)}, folder / "model.safetensors")
    make_encoder(tmp_path)
    stored = tmp_path / "encoder" / SPEECH_TOKENIZER_FOLDER
    found = load_file(stored / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].half()) for name in tensors)
    served = speech_tokenizer_component(stored).load(CPU, torch.float32)
    assert torch.equal(served.codebook.weight, tensors["codebook.weight"].half().float())
    reader = RecordingReader(tmp_path / "encoder")
    assert reader.codes == 20
    assert reader.mel == MelConfig(24_000, 1024, 1024, 480, 80, 0.0, 8000.0)


SMALL = {
    "VOCODER": {"size": GeneratorSize(channels=32, dilations=(1,)), "batch_size": 2},
    "TOKENIZER": {"size": EncoderSize(width=32, layers=2, heads=2, codes=20), "batch_size": 2},
    "DETOKENIZER": {"size": DiTSize(width=32, depth=1, heads=1), "batch_size": 2},
    "LANGUAGE_MODEL": {"batch_size": 2},
}
STEPS = {"max_steps": 2, "save_every": 1, "eval_every": 2}


def hum(folder: Path, work: list[Utterance | WordList], kokoro: Path) -> None:
    """Where Kokoro speaks otherwise."""
    for item in work:
        for index, path in enumerate(natural.paths(folder, item)):
            path.parent.mkdir(parents=True, exist_ok=True)
            words = 1 if isinstance(item, WordList) else len(item.text.split())
            write_sound(path, 0.3 * words, index)
            path.with_suffix(".json").write_text('[["a", 0.0], ["b", 0.2]]')


VOICES = (*ENGLISH, *HELD_OUT_ENGLISH, *ACCENTS)


def packages(*voices: str) -> Callable[[Path], Path]:
    """Where Kokoro is made of packages otherwise: a folder with these voices."""

    def build(folder: Path) -> Path:
        write_text(folder / RECORD_NAME, "")
        save_file({name: torch.zeros(1) for name in voices}, folder / VOICES_NAME)
        return folder

    return build


def small_whisper(folder: Path, archives: Path) -> None:
    size = WhisperSize(width=16, layers=1, heads=2, feed_forward=16, mels=40)
    write_miniature(archives, sizes=Sizes(whisper=size))
    shutil.copytree(archives / WHISPER_FOLDER, folder, dirs_exist_ok=True)


@pytest.fixture
def small(monkeypatch) -> None:
    """Stages of a few sounds and steps, without packages and Kokoro."""
    for name in ("WORLD", "HELD_OUT"):
        monkeypatch.setattr(recipe, name, WorldSize(14, 14, 14, 14))
    monkeypatch.setattr(spoken_world, "POOL", {"train": 12, "validation": 4, "held_out": 8})
    monkeypatch.setattr(voice, "POOL", {"train": 12, "validation": 4, "held_out": 8})
    monkeypatch.setattr(recipe, "PEOPLE", PeopleSize(6, 2, 0, readers=1))
    monkeypatch.setattr(recipe, "HELD_OUT_PEOPLE", PeopleSize(0, 0, 4, readers=0))
    monkeypatch.setattr(recipe, "AMOUNTS", Amounts(1, spelled=2, typed=4, short=2, long=1))
    for module in (people, voice):
        monkeypatch.setattr(module, "write_speech", hum)
    monkeypatch.setattr(figures, "measure_speech", lambda *_: {"count": 0})
    monkeypatch.setattr(recipe, "build_from_packages", packages(*VOICES))
    monkeypatch.setattr(recipe, "write_tiny", small_whisper)
    monkeypatch.setattr(recipe, "fetch_prompts", lambda folder: None)
    monkeypatch.setattr(figures, "recalls", lambda *_: {})  # nobody says a word
    monkeypatch.setattr(figures, "measure_people", lambda *_: {})
    monkeypatch.setattr(figures, "measure_long", lambda *_: {})  # few people, no sentence
    monkeypatch.setattr(recipe, "MEASURED", 1)
    for name, values in SMALL.items():
        monkeypatch.setattr(recipe, name, getattr(recipe, name) | values | STEPS)
    monkeypatch.setattr(recognizer, "LISTENS", 1)
    monkeypatch.setattr(scoring, "LONG_SECONDS", 3)
    monkeypatch.setattr(scoring, "MOST_STEPS", 10)
    monkeypatch.setattr(figures, "TIMED", 1)
    monkeypatch.setattr(figures, "HEARD", 0)


def test_kokoro_is_made_with_all_voices_or_not_at_all(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(recipe, "build_from_packages", packages(*VOICES[1:]))
    with pytest.raises(WeightsError, match=f"1 voices are missing, such as {VOICES[0]}; npm"):
        make(tmp_path, "kokoro")
    assert "kokoro" in ready(tmp_path)
    monkeypatch.setattr(recipe, "build_from_packages", packages(*VOICES))
    make(tmp_path, "kokoro")
    assert {"people", "voice"} <= set(ready(tmp_path))


def test_what_is_measured_on_is_made_apart_from_what_is_trained_on(
    tmp_path: Path, small: None, monkeypatch
):
    cached = packages(*VOICES)(tmp_path / "cache")
    monkeypatch.setattr(recipe, "build_from_packages", lambda: cached)
    asked = held_out(tmp_path / "run")
    assert (asked.people / "held_out.jsonl").read_text().count("\n") == 4
    assert asked.world.is_dir() and (tmp_path / "run" / "prompts").is_dir()
    assert (asked.voice / "held_out.jsonl").is_file()
    made = ("kokoro", "people", "voice")
    assert not any(result(tmp_path / "run", name).exists() for name in made)


def test_a_miniature_is_made_from_nothing(tmp_path: Path, small: None):
    """All stages, of a world of a few sounds; one training is interrupted and resumed."""
    make(tmp_path, "kokoro")
    make(tmp_path, "voice")
    interrupt(lambda: make(tmp_path, "vocoder"), step=1)
    while waiting := ready(tmp_path):
        make(tmp_path, waiting[0])
    assert all(result(tmp_path, name).exists() for name in STAGES)
    measured = json.loads((tmp_path / "figures" / "figures.json").read_text())
    assert measured["sets"].keys() == set(scoring.HELD_OUT_SETS)
    assert measured["ablations"].keys() == {"none", *scoring.ABLATIONS}
    assert measured["same_tokens_with_full_heads"]
    model = KimiAudio(str(tmp_path / "mini"))
    question = {"role": "user", "message_type": "text", "content": "one"}
    model.generate([question], output_type="both", max_new_tokens=9)


def test_a_run_begins_with_a_miniature(tmp_path: Path, small: None):
    """Its language model is where training begins: layers, and the rows of words by these."""
    take_over(tmp_path, MINI)
    take_over(tmp_path, MINI)
    shutil.copytree(MINI / SPEECH_TOKENIZER_FOLDER, tmp_path / "encoder" / SPEECH_TOKENIZER_FOLDER)
    for name in ("whisper", "base"):
        make(tmp_path, name)
    assert {"kokoro", "world"} <= set(ready(tmp_path))
    before = load_file(MINI / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    other = {n for n in base if base[n].shape != before[n].shape}
    other |= {n for n in base.keys() - other if not torch.equal(base[n], before[n])}
    assert other == {"model.vq_adaptor.layers.0.weight", *ROWS_OF_TOKENS}
    old, new = (TextTokenizer(folder) for folder in (MINI, tmp_path / "base"))
    for text in (" twelve", " kitchen"):
        (was,), (is_now,) = old.encode(text), new.encode(text)
        for name in ROWS_OF_TOKENS:
            assert torch.equal(base[name][is_now], before[name][was])


def test_a_run_that_began_otherwise_takes_over_nothing(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"no miniature, .*model\.safetensors"):
        take_over(tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()
    (tmp_path / "base").mkdir()
    with pytest.raises(TrainingError, match="its language model began without one"):
        take_over(tmp_path, MINI)
    assert not (tmp_path / "start").exists()
