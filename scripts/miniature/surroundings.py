"""What happens to speech between a mouth and a model: rooms, noise, telephones, codecs, levels.

Everything is drawn from a seed.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import av
import numpy as np
import soxr

from kimia_infer.audio.files import SAMPLE_RATE, pcm16

TELEPHONE_RATE = 8_000
TELEPHONE_BAND = 300.0, 3_400.0
"""Hz, of an analogue telephone line (ITU-T G.712)."""

MU = 255.0
"""Of the companding law (ITU-T G.711)."""

CODECS = {
    "mp3": ("mp3", "libmp3lame", (16_000, 24_000, 32_000)),
    "opus": ("ogg", "libopus", (8_000, 12_000, 20_000)),
}
"""Container and codec as FFmpeg calls them, and low rates in bits per second."""

SOUND_SPEED = 343.0  # meters per second
EARLY = 8
"""Single reflections before the dense tail."""


@dataclass(frozen=True)
class Room:
    """``decay``: seconds until 60 dB less; ``distance`` from mouth to microphone in meters."""

    decay: float
    distance: float


@dataclass(frozen=True)
class Surroundings:
    """How a recording was made; the default changes nothing.

    Args:
        speed: of playback, which shifts the pitch too.
        before: seconds of silence before the speech, less than 0 where its start is missing.
        after: seconds of silence after it.
        room: where it was spoken.
        ratio: decibels of speech over noise; None for silence.
        color: exponent of the noise's spectrum: 0 white, 1 pink, 2 brown.
        band: Hz that a microphone lets through, up to.
        telephone: whether it came over a telephone line.
        codec: of CODECS, with its bits per second.
        level: peak of the recording, full scale 1.
    """

    speed: float = 1.0
    before: float = 0.0
    after: float = 0.0
    room: Room | None = None
    ratio: float | None = None
    color: float = 1.0
    band: float | None = None
    telephone: bool = False
    codec: tuple[str, int] | None = None
    level: float | None = None

    def heard(self, wave: np.ndarray, seed: int) -> np.ndarray:
        """Speech float [samples] at 16 kHz as it arrives; ``seed`` is of room and noise."""
        chance = np.random.default_rng(seed)
        if self.speed != 1.0:
            wave = soxr.resample(wave, SAMPLE_RATE * self.speed, SAMPLE_RATE)
        before, after = (round(seconds * SAMPLE_RATE) for seconds in (self.before, self.after))
        wave = np.pad(wave[max(0, -before) :], (max(0, before), after))
        if self.room is not None:
            wave = _convolved(wave, impulse_response(self.room, chance))[: len(wave)]
        if self.ratio is not None:
            noise = colored_noise(len(wave), self.color, chance)
            wave = wave + noise * _loudness(wave) * 10 ** (-self.ratio / 20)
        if self.telephone:
            wave = _by_telephone(wave)
        elif self.band is not None:
            wave = _band(wave, 0.0, self.band)
        if self.level is not None:
            wave = wave * (self.level / (np.abs(wave).max() or 1.0))
        if self.codec is not None:
            wave = _coded(wave, *self.codec)
        return np.clip(wave, -1.0, 1.0).astype(np.float32)


def draw_surroundings(chance: random.Random) -> Surroundings:
    """Surroundings as people have them; a quarter of them are quiet."""
    level = 10 ** chance.uniform(-1.5, 0.0)
    before, after = chance.uniform(0.0, 0.5), chance.uniform(0.1, 0.6)
    if chance.random() < 0.25:
        return Surroundings(before=before, after=after, level=level)
    room = Room(chance.uniform(0.15, 0.8), chance.uniform(0.2, 3.0))
    channel = chance.random()
    codec = chance.choice(list(CODECS)) if 0.2 <= channel < 0.4 else None
    return Surroundings(
        speed=chance.uniform(0.88, 1.12) if chance.random() < 0.6 else 1.0,
        before=-chance.uniform(0.0, 0.04) if chance.random() < 0.1 else before,
        after=after,
        room=room if chance.random() < 0.6 else None,
        ratio=chance.uniform(5.0, 30.0) if chance.random() < 0.75 else None,
        color=chance.uniform(0.0, 2.0),
        telephone=channel < 0.2,
        codec=(codec, chance.choice(CODECS[codec][2])) if codec else None,
        band=chance.uniform(3_000.0, 7_000.0) if channel > 0.85 else None,
        level=level,
    )


def impulse_response(room: Room, chance: np.random.Generator) -> np.ndarray:
    """From mouth to microphone, float [samples]: the direct sound, reflections and a tail."""
    length = max(2, round(room.decay * SAMPLE_RATE))
    seconds = np.arange(length) / SAMPLE_RATE
    fall = 10 ** (-3 * seconds / room.decay)
    tail = chance.normal(size=length) * fall
    tail[: round(0.02 * SAMPLE_RATE)] *= 0.1  # the dense part begins later
    # At the critical distance, here of a room of 60 cubic meters, both are equally loud.
    critical = 0.057 * np.sqrt(60.0 / room.decay)
    response = tail * (room.distance / critical) / np.sqrt(np.sum(tail**2))
    for delay in chance.uniform(1.0, 8.0, EARLY) / SOUND_SPEED:
        place = min(length - 1, round(delay * SAMPLE_RATE))
        response[place] += (
            chance.uniform(-1, 1) * room.distance / (room.distance + delay * SOUND_SPEED)
        )
    response[0] += 1.0
    return response


def colored_noise(samples: int, color: float, chance: np.random.Generator) -> np.ndarray:
    """Noise [samples] with the power spectrum 1 / f ** color and a mean square of 1."""
    spectrum = np.fft.rfft(chance.normal(size=samples))
    frequencies = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 50.0)
    noise = np.fft.irfft(spectrum * frequencies ** (-color / 2), samples)
    return noise / np.sqrt(np.mean(noise**2))


def _loudness(wave: np.ndarray) -> float:
    """Root mean square of the frames of 20 ms that are louder than the mean."""
    frames = wave[: len(wave) // 320 * 320].reshape(-1, 320)
    powers = np.mean(frames**2, axis=1)
    return float(np.sqrt(np.mean(powers[powers >= powers.mean()])))


def _by_telephone(wave: np.ndarray) -> np.ndarray:
    narrow = soxr.resample(wave, SAMPLE_RATE, TELEPHONE_RATE)
    narrow = np.clip(_band(narrow, *TELEPHONE_BAND, TELEPHONE_RATE), -1.0, 1.0)
    packed = np.sign(narrow) * np.log1p(MU * np.abs(narrow)) / np.log1p(MU)
    packed = np.round(packed * 127) / 127
    narrow = np.sign(packed) * np.expm1(np.abs(packed) * np.log1p(MU)) / MU
    return soxr.resample(narrow, TELEPHONE_RATE, SAMPLE_RATE)


def _coded(wave: np.ndarray, codec: str, bits: int) -> np.ndarray:
    """``wave`` after a codec at ``bits`` per second, of the same length; mp3 delays it a little."""
    form, name, _ = CODECS[codec]
    file = io.BytesIO()
    with av.open(file, "w", form) as container:
        stream = container.add_stream(name, SAMPLE_RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(pcm16(np.clip(wave, -1, 1))[None], "s16", "mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    file.seek(0)
    with av.open(file, "r") as coded:
        resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE)
        frames = [f for one in coded.decode(audio=0) for f in resampler.resample(one)]
    found = np.concatenate([f.to_ndarray()[0] for f in [*frames, *resampler.resample(None)]])
    return np.pad(found[: len(wave)], (0, max(0, len(wave) - len(found))))


def _band(wave: np.ndarray, low: float, high: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    """``wave`` between two frequencies in Hz, with soft edges."""
    frequencies = np.fft.rfftfreq(len(wave), 1 / rate)
    gain = 1 / (1 + (frequencies / high) ** 16)
    if low:
        gain *= 1 - 1 / (1 + (frequencies / low) ** 8)
    return np.fft.irfft(np.fft.rfft(wave) * gain, len(wave))


def _convolved(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    size = len(wave) + len(response) - 1
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
