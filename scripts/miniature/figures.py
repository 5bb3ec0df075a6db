"""All figures of a miniature, measured on the final checkpoint, and spectrograms of its speech."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import load_audio
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.engine import speech
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.checkpoint import VOCODER_FOLDER
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.training.tasks.recordings import Recording, find_recordings
from kimia_infer.utils.files import write_text
from scripts.miniature import scoring
from scripts.miniature.open_ear import judged, measure_speech
from scripts.miniature.people_scores import measure_people
from scripts.miniature.recognizer import (
    Heard,
    SpeechRecognizer,
    chance_recall,
    recall,
    understands,
)
from scripts.miniature.scoring import (
    Answer,
    Case,
    answer,
    answer_all,
    load_model,
    measure,
    measure_long,
    read_cases,
    recognizable,
    speak,
)
from scripts.miniature.spoken_world import (
    ANSWER_RATE,
    READ,
    read_lines,
    sound_name,
)
from scripts.miniature.voices import ANSWER_VOICE, Utterance

FIGURES, PICTURE = "figures.json", "spectrograms.png"
SHOWN = ("question", "dialogue", "repeat")
"""Kinds of conversations with one example in the picture."""

SENTENCES, TIMED = 3, 20

SPOKEN_KINDS, HEARD = ("question", "dialogue", "repeat", "unknown"), 60
"""Kinds of conversations whose answers an open ear hears, and most of each."""


class HeldOut(NamedTuple):
    """Folders of a spoken world, its people, the answer voice, and prompts of a real person."""

    world: Path
    people: Path
    voice: Path
    prompts: Path


def write_figures(
    checkpoint: Path,
    held_out: HeldOut,
    output: Path,
    limit: int,
    quantization: str | None = None,
    kv_cache: str | None = None,
    ear: bool = False,
) -> dict:
    """Measure ``checkpoint`` and write ``figures.json`` and ``spectrograms.png`` to ``output``.

    Args:
        held_out: what is asked, of which only the held-out sets are used.
        limit: most cases of each kind, and sentences read aloud; the codec is measured on
            SENTENCES times as many.
        ear: whether Whisper tiny.en listens too, see :mod:`scripts.miniature.open_ear`.
        quantization: of the weights, and ``kv_cache`` of the cache, as in ``load_components``.
    """
    world = held_out.world
    load = partial(load_model, checkpoint, quantization=quantization, kv_cache=kv_cache)
    model, mel = load(), MelConfig.from_directory(checkpoint / VOCODER_FOLDER)
    voice = held_out.voice
    recordings = find_recordings(voice / "held_out.jsonl", voice, needs_text=True)
    recordings = [r for r in recordings if understands(r.text or "")]
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    served = [path for path in files if path.name not in ("README.md", FIGURES, PICTURE)]
    figures = {
        "codec": recalls(recordings[: SENTENCES * limit], partial(codec_versions, model, mel)),
        "read_aloud": recalls(recordings[:limit], partial(_read_aloud, model)),
        "chance": chance_recall(recording.text for recording in recordings),
        "real_time_factor": _real_time_factor(model, world),
        "threads": torch.get_num_threads(),
        "bytes": sum(path.stat().st_size for path in served),
        "quantization": model.quantization,
        "kv_cache": model.decoder.kv_cache,
        **measure(load, world, limit),
        "people": measure_people(model, held_out.people, held_out.prompts),
        "people_long_recording": measure_long(model, held_out.people, scoring.LONG_SECONDS),
    }
    if ear:
        figures["open_ear"] = measure_speech(model, _spoken_answers(model, held_out), voice)
    output.mkdir(parents=True, exist_ok=True)
    draw(model, world, output / PICTURE)
    write_text(output / FIGURES, json.dumps(figures, indent=1) + "\n")
    return figures


def _spoken_answers(model: KimiAudio, held_out: HeldOut) -> list[Answer]:
    """Long answers to espeak-ng's voices and to people, at most HEARD of each."""
    given = []
    for folder in held_out[:2]:
        cases = read_cases(folder / "held_out.jsonl", SPOKEN_KINDS, HEARD)
        given += answer_all(model, [case for case in cases if judged(case.text)])
    return given


Versions = Callable[[Recording], dict[str, np.ndarray]]
"""The "original" of a recording and what is made of it: float [samples] by name, at 16 kHz."""


def recalls(recordings: Sequence[Recording], versions: Versions) -> dict[str, dict[str, float]]:
    """Recognized content words of every version, and the ratio to those of the original."""
    recognizer, heard = SpeechRecognizer(), {}
    for recording in tqdm(recordings, desc="Recognizing", unit=" sentences", disable=None):
        for name, wave in versions(recording).items():
            found = Heard(recording.text or "", recognizer.hear(wave))
            heard.setdefault(name, []).append(found)
    shares = {name: recall(found) for name, found in heard.items()}
    return {
        name: {"sentences": len(recordings), "recall": share, "ratio": share / shares["original"]}
        for name, share in shares.items()
    }


@torch.inference_mode()
def codec_versions(model: KimiAudio, mel: MelConfig, recording: Recording) -> dict[str, np.ndarray]:
    """A recording after each component of the codec: "vocoded" is from its spectrogram."""
    original = recording.load()
    wave = torch.from_numpy(recording.load(mel.sample_rate))
    vocoded = recognizable(_detokenizer(model).vocoder(log_mel(wave, mel)))
    codes = model.speech_codes.encode(original)
    return {"original": original, "vocoded": vocoded, **_spoken(model, codes)}


def _read_aloud(model: KimiAudio, recording: Recording) -> dict[str, np.ndarray]:
    """A recording, and its text read by the model."""
    text = recording.text or ""
    request = {"role": "user", "message_type": "text", "content": READ + text}
    codes = answer(model, Case("read", [request], text, True)).codes
    return {"original": recording.load(), **_spoken(model, torch.tensor(codes))}


@torch.inference_mode()
def _spoken(model: KimiAudio, codes: Tensor) -> dict[str, np.ndarray]:
    """Speech from codes int64 [n] in published chunks and, as of the low-latency preset, small."""
    if not len(codes):
        return dict.fromkeys(("one-shot", "streamed"), np.zeros(0))
    detokenizer, randomness = _detokenizer(model), SeededRandomness(0)
    bins = detokenizer.dit.config.mel_bins
    pieces = speech.speak(
        detokenizer,
        codes.tolist(),
        lambda chunk, frames: randomness.noise(chunk, frames, bins),
        "low_latency",
    )
    whole = model.detokenize_audio(codes, seed=0)
    return {"one-shot": recognizable(whole), "streamed": recognizable(torch.cat(list(pieces)))}


def _detokenizer(model: KimiAudio) -> Detokenizer:
    assert model.detokenizer is not None
    return model.detokenizer


def _real_time_factor(model: KimiAudio, world: Path) -> float | None:
    """Seconds per second of spoken answers; None if there is no speech."""
    cases = read_cases(world / "held_out.jsonl", ("question", "repeat"), TIMED)
    speak(model, cases[0])  # warm-up
    taken = spoken = 0.0
    for case in cases:
        begun = time.perf_counter()
        wave, _ = speak(model, case)
        taken += time.perf_counter() - begun
        spoken += 0.0 if wave is None else wave.shape[-1] / ANSWER_RATE
    return taken / spoken if spoken else None


def draw(model: KimiAudio, world: Path, path: Path) -> None:
    """Spectrograms of questions, and of answers by the synthesizer and by the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held_out = world / "held_out.jsonl"
    lines = read_lines(held_out)
    cases = [_with_reference(world, kind) for kind in SHOWN]
    figure, axes = pyplot.subplots(len(cases), 3, figsize=(13, 8), layout="constrained")
    for row, case in zip(axes, cases, strict=True):
        asked = case.chats[-1]["content"]
        said = next(x["said"][-1] for x in lines if x["conversation"][-2]["content"] == asked)
        original = world / sound_name(Utterance(case.text, ANSWER_VOICE))
        wave, text = speak(model, case)
        silence = torch.zeros(1, ANSWER_RATE)
        waves = {
            f"{case.kind}: {said}": load_audio(asked, sample_rate=ANSWER_RATE),
            f"Kokoro: {case.text}": load_audio(original, sample_rate=ANSWER_RATE),
            f"miniature: {text}": (silence if wave is None else wave)[0].numpy(),
        }
        for axis, (title, samples) in zip(row, waves.items(), strict=True):
            noisy = samples + np.random.default_rng(0).normal(0.0, 1e-6, len(samples))
            axis.specgram(noisy, NFFT=512, noverlap=384, Fs=ANSWER_RATE, vmin=-140, vmax=-40)
            axis.set(title=title, ylim=(0, 8000), xlabel="seconds", ylabel="Hz")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _with_reference(world: Path, kind: str) -> Case:
    """The first held-out conversation whose answer Kokoro says too."""
    cases = read_cases(world / "held_out.jsonl", (kind,), 10_000)
    return next(c for c in cases if (world / sound_name(Utterance(c.text, ANSWER_VOICE))).exists())
