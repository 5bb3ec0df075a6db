"""All figures of a miniature, measured on the final checkpoint, and spectrograms of its speech."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.training.tasks.recordings import Recording, find_recordings
from kimia_infer.utils.files import write_text
from scripts.miniature.codec_scores import Codec, score_codec
from scripts.miniature.espeak import Utterance
from scripts.miniature.recognizer import Heard, SpeechRecognizer, chance_recall, recall
from scripts.miniature.scoring import (
    AS_STORED,
    Case,
    Serving,
    answer,
    load_model,
    measure,
    read_cases,
)
from scripts.miniature.spoken_world import (
    ANSWER_RATE,
    ANSWER_VOICE,
    LONGEST_REPEATED,
    READ,
    sound_name,
)

FIGURES, PICTURE = "figures.json", "spectrograms.png"
SHOWN = ("question", "dialogue", "repeat")
"""Kinds of conversations with one example in the picture."""

SENTENCES, TIMED = 3, 20


def write_figures(
    checkpoint: Path, world: Path, output: Path, limit: int, serving: Serving = AS_STORED
) -> dict:
    """Measure ``checkpoint`` and write ``figures.json`` and ``spectrograms.png`` to ``output``.

    Args:
        world: folder of a spoken world, of which only the held-out sets are used.
        limit: most cases of each kind, and sentences read aloud; the codec is measured on
            SENTENCES times as many.
    """
    model = load_model(checkpoint, serving=serving)
    codec, recognizer = Codec(checkpoint), SpeechRecognizer()
    sounds = find_recordings(world / "voice_held_out.jsonl", world, needs_text=True)
    short = [sound for sound in sounds if len((sound.text or "").split()) <= LONGEST_REPEATED]
    figures = {
        "codec": recalls_of(score_codec(codec, sounds[: SENTENCES * limit], recognizer)),
        "read_aloud": _read_aloud(model, codec, recognizer, short[:limit]),
        "chance": chance_recall(sound.text for sound in sounds),
        "real_time_factor": _real_time_factor(model, world),
        "threads": torch.get_num_threads(),
        "bytes": sum(path.stat().st_size for path in _served(checkpoint)),
        "quantization": model.quantization,
        "kv_cache": model.decoder.kv_cache,
        **measure(checkpoint, world, limit, serving),
    }
    output.mkdir(parents=True, exist_ok=True)
    draw(model, world, output / PICTURE)
    write_text(output / FIGURES, json.dumps(figures, indent=1) + "\n")
    return figures


def _served(checkpoint: Path) -> Iterator[Path]:
    """Files of a checkpoint, without its description."""
    beside = {"README.md", FIGURES, PICTURE}
    return (path for path in checkpoint.rglob("*") if path.is_file() and path.name not in beside)


def recalls_of(heard: dict[str, list[Heard]]) -> dict[str, dict[str, float]]:
    """Recognized content words, and the ratio to those of the original."""
    recalls = {name: recall(found) for name, found in heard.items()}
    count = len(heard["original"])
    return {
        name: {"sentences": count, "recall": found, "ratio": found / recalls["original"]}
        for name, found in recalls.items()
    }


def _read_aloud(
    model: KimiAudio, codec: Codec, recognizer: SpeechRecognizer, sounds: Sequence[Recording]
) -> dict[str, dict[str, float]]:
    """Recognition of the texts of ``sounds`` read by the model, and of the originals."""
    heard: dict[str, list[Heard]] = {"original": [], "one-shot": [], "streamed": []}
    for sound in tqdm(sounds, desc="Reading aloud", unit=" sentences", disable=None):
        request = {"role": "user", "message_type": "text", "content": READ + (sound.text or "")}
        codes = answer(model, Case("read", [request], sound.text, True)).codes
        versions = {"original": load_audio(sound.path)}
        if codes:
            versions |= codec.spoken(torch.tensor(codes))
        for name, found in heard.items():
            silent = name not in versions
            found.append(
                Heard(sound.text, "") if silent else recognizer.heard(sound.text, versions[name])
            )
    return recalls_of(heard)


def _real_time_factor(model: KimiAudio, world: Path) -> float | None:
    """Seconds per second of spoken answers; None if there is no speech."""
    cases = read_cases(world / "held_out.jsonl", world, ("question", "repeat"), TIMED)
    model.generate(cases[0].chats, output_type="both", seed=0)  # warm-up
    taken = spoken = 0.0
    for case in cases:
        begun = time.perf_counter()
        wave, _ = model.generate(case.chats, output_type="both", seed=0)
        taken += time.perf_counter() - begun
        spoken += 0.0 if wave is None else wave.shape[-1] / ANSWER_RATE
    return taken / spoken if spoken else None


def draw(model: KimiAudio, world: Path, path: Path) -> None:
    """Spectrograms of questions, and of answers by the synthesizer and by the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file = ConversationFile(world / "held_out.jsonl")
    lines = [file.raw(index) for index in range(len(file))]
    cases = [read_cases(file.path, world, (kind,), 1)[0] for kind in SHOWN]
    figure, axes = pyplot.subplots(len(cases), 3, figsize=(13, 8), layout="constrained")
    for row, case in zip(axes, cases, strict=True):
        said = next(line["said"][-1] for line in lines if line["kind"] == case.kind)
        asked = case.chats[-1]["content"]
        original = world / sound_name(Utterance(case.text, ANSWER_VOICE))
        wave, text = model.generate(case.chats, output_type="both", seed=0)
        silence = torch.zeros(1, ANSWER_RATE)
        waves = {
            f"{case.kind}: {said}": load_audio(asked, sample_rate=ANSWER_RATE),
            f"espeak-ng: {case.text}": load_audio(original, sample_rate=ANSWER_RATE),
            f"miniature: {text}": (silence if wave is None else wave)[0].numpy(),
        }
        for axis, (title, samples) in zip(row, waves.items(), strict=True):
            noisy = samples + np.random.default_rng(0).normal(0.0, 1e-6, len(samples))
            axis.specgram(noisy, NFFT=512, noverlap=384, Fs=ANSWER_RATE, vmin=-140, vmax=-40)
            axis.set(title=title, ylim=(0, 8000), xlabel="seconds", ylabel="Hz")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
