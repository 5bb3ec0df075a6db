"""A reference voice: read from a recording, and heard in what is spoken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.api.events import AudioChunk
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.voice import MAX_SECONDS, MIN_SECONDS
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioTooLong, load_audio
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.detokenizer import PRESETS, Voice
from kimia_infer.models.kimi_audio.prompt import AudioSource
from kimia_infer.utils.errors import RequestError
from tests.api.sounds import noise, wav_bytes
from tests.scripted import script

CHAT = [{"role": "user", "message_type": "text", "content": "tell me about the weather"}]
VOICE = wav_bytes(noise(3.37))
ARGUMENTS = {"output_type": "both", "max_new_tokens": 60, "seed": 3}


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _speaks(monkeypatch: pytest.MonkeyPatch, model: KimiAudio) -> None:
    codes = [model.kimia_token_offset + i % 50 for i in range(40)]  # of two chunks, in any preset
    script(monkeypatch, model, model.text_tokenizer.encode("some words"), codes)


def read(model: KimiAudio, source: AudioSource) -> Voice:
    return model.voice_reader.read(source, model.scheduler.call)


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 24_000])
def test_codes_and_mel_of_a_recording(model: KimiAudio, golden: Path, rate: int) -> None:
    """Own codes, four times each, beside as many frames of the mel at the vocoder's rate."""
    content = wav_bytes(noise(2.5, rate), rate)
    voice = read(model, content)
    wave, config = (
        load_audio(content),
        MelConfig.from_directory(golden / "e2e" / "checkpoint" / "vocoder"),
    )
    whole = len(wave) // 1280
    codes = model.speech_codes.encode(wave[: whole * 1280])
    assert voice.tokens.tolist() == codes.repeat_interleave(4).tolist()
    mel = log_mel(torch.from_numpy(load_audio(content, sample_rate=config.sample_rate)), config)
    assert torch.equal(voice.mel, mel[: 4 * whole])
    assert len(voice.mel) == len(voice.tokens) == 50 * 2.48


def test_every_frame_of_the_mel_has_sound(model: KimiAudio) -> None:
    """Whatever the length, no frame is padding, which would be loud in the logarithm."""
    for samples in range(SAMPLE_RATE, SAMPLE_RATE + 1300, 97):
        voice = read(model, wav_bytes(noise(2)[:samples]))
        assert len(voice.mel) == len(voice.tokens) == samples // 1280 * 4


def test_speech_continues_the_voice(model: KimiAudio) -> None:
    """The answer is what a stream speaks that was prefilled by hand."""
    completion = model.complete(CHAT, parse_parameters(**ARGUMENTS), voice=VOICE)
    noise_of = model._noise(SeededRandomness(ARGUMENTS["seed"]))
    with torch.inference_mode():
        stream = model.detokenizer.start(noise_of)
        stream.prefill(*read(model, VOICE))
        parts = torch.tensor(completion.codes).split(model.detokenizer.config.chunk_codes)
        waves = [stream.push(part, final=i == len(parts)) for i, part in enumerate(parts, 1)]
    assert len(parts) > 1
    assert torch.equal(completion.wav[0], torch.cat(waves))
    assert completion.metrics["voice_seconds"] > 0


def test_another_voice_sounds_different(model: KimiAudio) -> None:
    plain, text = model.generate(CHAT, **ARGUMENTS)
    voices = [VOICE, wav_bytes(noise(2, seed=5))]
    spoken = [model.generate(CHAT, **ARGUMENTS, voice=voice) for voice in voices]
    assert all(words == text for _, words in spoken)
    waves = [plain, *(wav for wav, _ in spoken)]
    assert all(wav.shape == plain.shape for wav in waves)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(waves[first], waves[second], atol=1e-3)
    assert torch.equal(model.generate(CHAT, **ARGUMENTS)[0], plain), "the voice is not kept"


@pytest.mark.parametrize("preset", PRESETS)
def test_streamed_pieces_are_the_answer(model: KimiAudio, preset: str) -> None:
    arguments = ARGUMENTS | {"preset": preset, "voice": VOICE}
    wav, _ = model.generate(CHAT, **arguments)
    waves = [
        event.wav for event in model.stream(CHAT, **arguments) if isinstance(event, AudioChunk)
    ]
    assert torch.equal(torch.cat(waves)[None], wav)


def test_the_last_voices_are_kept(
    model: KimiAudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(VOICE)
    voice = read(model, VOICE)
    encoded = []
    encode = model.speech_codes.encode
    monkeypatch.setattr(model.speech_codes, "encode", lambda w: (encoded.append(w), encode(w))[1])
    for same in (path, str(path), VOICE):
        assert read(model, same) is voice
    assert not encoded
    path.write_bytes(wav_bytes(noise(2, seed=9)))
    other = read(model, path)
    assert len(encoded) == 1
    assert other.tokens.tolist() != voice.tokens.tolist()
    assert read(model, VOICE) is voice
    assert len(encoded) == 1
    monkeypatch.setattr("kimia_infer.api.voice.KEPT", 2)
    read(model, wav_bytes(noise(2, seed=10)))  # takes the place of the other one
    assert read(model, VOICE) is voice
    assert read(model, path).tokens.tolist() == other.tokens.tolist()
    assert len(encoded) == 3


@pytest.mark.parametrize(
    ("voice", "error", "message"),
    [
        (wav_bytes(noise(MIN_SECONDS - 0.01)), AudioError, "voice: .* 1 to 30 s"),
        (wav_bytes(noise(MAX_SECONDS + 0.01)), AudioTooLong, "voice: .*permitted 30 s"),
        (wav_bytes(np.zeros(32_000)), AudioError, "voice: the recording is silent"),
        (b"no sound", AudioError, "voice: "),
        (b"", AudioError, "voice: .*empty"),
        ("missing.wav", AudioError, "voice: no such file: 'missing.wav'"),
        (3, RequestError, "voice: expected .* found int"),
    ],
)
def test_unsuitable_voices(
    model: KimiAudio, voice: object, error: type[RequestError], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(CHAT, **ARGUMENTS, voice=voice)


@pytest.mark.parametrize("seconds", [MIN_SECONDS, MAX_SECONDS])
def test_limits_are_permitted(model: KimiAudio, seconds: float) -> None:
    wav, _ = model.generate(CHAT, **ARGUMENTS, voice=wav_bytes(noise(seconds)))
    assert wav.isfinite().all()


def test_where_no_voice_can_be(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match=r"voice: .*output_type='both'"):
        model.generate(CHAT, voice=VOICE)
    parts = (model.text_tokenizer, model.speech_codes, model.whisper_features)
    components = Components(*parts, model.language_model, model.detokenizer)
    with pytest.raises(RequestError, match=r"voice: .*vocoder folder"):
        KimiAudio.from_components(components).generate(CHAT, **ARGUMENTS, voice=VOICE)
