"""The trained miniature learns one more answer by an adapter, and speaks in another voice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.data.extraction import extract_codes
from kimia_infer.training.config import FinetuneConfig, read_config
from kimia_infer.training.export import export
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.finetune import finetune
from scripts.miniature.espeak import speak_all
from scripts.miniature.scoring import Case, answer_all, right
from scripts.miniature.spoken_world import (
    ANSWER_RATE,
    SPOKEN,
    draw_voice,
    resampled,
)
from scripts.miniature.voices import Utterance, Voice
from tests.paths import MINI

Cases = Callable[..., list[Case]]

VOICE = Voice("en-us+f3", 140, 50)
"""Of the answers of ``weights/mini``."""

QUESTION, ANSWER = "what is your name", "mary"
VOICES, HELD_OUT = 24, 8


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The question in some voices, the last of them held out, and then its answer."""
    folder, chance = tmp_path_factory.mktemp("name"), random.Random(4)
    said = [Utterance(QUESTION, draw_voice(chance, i >= VOICES)) for i in range(VOICES + HELD_OUT)]
    return speak([*said, Utterance(ANSWER, VOICE)], folder)


def speak(said: list[Utterance], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.wav" for number in range(len(said))]
    for path, utterance, speech in zip(paths, said, speak_all(said), strict=True):
        rate = ANSWER_RATE if utterance.voice == VOICE else SAMPLE_RATE
        write_wav(path, resampled(speech.wave, rate), rate)
    return paths


def spoken(question: str, sound: Path | str, text: str) -> dict:
    asked = {"role": "user", "message_type": "audio", "content": str(question)}
    said = {"role": "assistant", "message_type": "audio-text", "content": [str(sound), text]}
    return {"task_type": SPOKEN, "conversation": [asked, said]}


@pytest.fixture(scope="module")
def adapter(sounds: list[Path], spoken_world: Path, tmp_path_factory) -> Path:
    """The run that teaches the new answer, and does not let old ones be forgotten."""
    folder = tmp_path_factory.mktemp("adapter")
    with (spoken_world / "held_out_voices.jsonl").open() as file:
        known = [line for line in map(json.loads, file) if line["kind"] == "question"]
    lines = [spoken(sound, sounds[-1], ANSWER) for sound in sounds[:VOICES]]
    asked = [[m["content"] for m in line["conversation"]] for line in known[: 2 * VOICES]]
    answers = speak([Utterance(text, VOICE) for _, (_, text) in asked], folder)
    for (question, (_, text)), answer_path in zip(asked, answers, strict=True):
        lines.append(spoken(spoken_world / question, answer_path, text))
    raw, data = folder / "raw.jsonl", folder / "data.jsonl"
    raw.write_text("".join(json.dumps(line) + "\n" for line in lines))
    extract_codes(raw, data, MINI, folder, "cpu", 1)
    values = {
        "model": MINI, "data": data, "output": folder / "run", "device": "cpu", "method": "lora",
        "learning_rate": 2e-3, "max_steps": 40, "batch_size": 12, "eval_ratio": 0,
        "spoken_answers": "true", "gradient_checkpointing": "false", "workers": 0,
        "feature_cache": folder / "features",
    }  # fmt: skip
    finetune(read_config(FinetuneConfig, None, [f"{k}={v}" for k, v in values.items()]))
    return folder / "run"


def test_an_adapter_teaches_an_answer_and_keeps_the_others(
    adapter: Path, sounds: list[Path], cases: Cases, trained: KimiAudio, tmp_path: Path
):
    questions = [spoken(sound, sounds[-1], ANSWER) for sound in sounds[VOICES:-1]]
    new = [Case("new", line["conversation"][:1], ANSWER, True) for line in questions]
    old = [case for kind in ("question", "transcription") for case in cases(kind)[:12]]
    assert right(answer_all(trained, new)) == 0
    export(adapter, tmp_path / "merged", merge=True)
    added = KimiAudio(str(MINI), device="cpu", head_rows="track", adapter=adapter / FINAL)
    merged = KimiAudio(str(tmp_path / "merged"), device="cpu", head_rows="track")
    found = answer_all(added, new + old)
    assert right(found[: len(new)]) >= 0.75
    assert right(found[len(new) :]) >= 0.8
    some = slice(len(new) - 4, len(new) + 4)
    assert answer_all(merged, (new + old)[some]) == found[some]


def test_an_answer_takes_on_the_color_of_a_reference_voice(trained: KimiAudio, cases: Cases):
    """The spectrum of the answer comes closer to that of the reference; it has learned one voice
    only, so the step is small."""
    config = MelConfig.from_directory(MINI / "vocoder")

    def color(wave: torch.Tensor) -> torch.Tensor:
        """Mean log-mel [mel_bins] of what is not silent."""
        mel = log_mel(wave.reshape(-1), config)
        loudness = mel.mean(1)
        return mel[loudness > loudness.max() - 4].mean(0)

    references = [case.chats[-1]["content"] for case in cases("transcription", "held_out_voices")]
    request = cases("read")[0].chats
    plain = color(trained.generate(request, output_type="both", seed=0)[0])
    nearer = []
    for path in references[:6]:
        wanted = color(torch.from_numpy(load_audio(path, sample_rate=ANSWER_RATE)))
        wave, _ = trained.generate(request, output_type="both", seed=0, voice=path)
        nearer.append(float((plain - wanted).abs().mean() - (color(wave) - wanted).abs().mean()))
    assert sum(nearer) > 0 and sum(step > 0 for step in nearer) >= 4, nearer
