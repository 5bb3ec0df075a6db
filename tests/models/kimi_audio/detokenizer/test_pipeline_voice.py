"""Speech in a reference voice, as an answer has it, against the recorded run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.engine.speech import speak
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, Voice
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.flow import StreamConfig
from kimia_infer.models.kimi_audio.vocoder import Vocoder


def test_recorded_voice(golden: Path, dit: DiT, vocoder: Vocoder) -> None:
    data = json.loads((golden / "detok" / "prefill.json").read_text())
    recorded = load_file(golden / "detok" / "unit.safetensors")
    config = StreamConfig(
        voice_chunk_frames=data["prefill_chunk_size"], voice_chunks=data["max_prompt_chunk"]
    )
    voice = Voice(recorded["prefill.timbre_mel"], recorded["prefill.timbre_tokens"])

    def spoken(voice: Voice | None) -> list[torch.Tensor]:
        noise = lambda chunk, frames: recorded[f"prefill.noise.{chunk}"].float()  # noqa: E731
        return list(
            speak(Detokenizer(dit, vocoder, config), data["codes"], noise, "quality", voice)
        )

    waves = spoken(voice)
    assert len(waves) == len(data["chunks"])
    for index, wave in enumerate(waves):
        expected = recorded[f"prefill.wav.{index}"].view(-1)
        torch.testing.assert_close(wave, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(spoken(None)[0], waves[0], atol=1e-3)


def test_an_unsuitable_voice_fails_the_first_chunk(dit: DiT, vocoder: Vocoder) -> None:
    detokenizer = Detokenizer(dit, vocoder)
    mel = torch.zeros(4, dit.config.mel_bins + 1)
    voice = Voice(mel, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference voice"):
        next(speak(detokenizer, [0] * 62, lambda *_: torch.empty(0), "quality", voice))
