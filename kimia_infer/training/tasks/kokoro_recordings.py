"""Recordings and their texts: durations, pitch and energy that an adapter learns from people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.audio.files import silence_of
from kimia_infer.data.conversations import DataError
from kimia_infer.data.manifests import AudioRow, parse_language, read_rows
from kimia_infer.models.kokoro.aligner import Aligner, load_aligner
from kimia_infer.models.kokoro.config import SAMPLE_RATE, KokoroConfig
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.measures import (
    LOWEST,
    energy_of,
    mel_power,
    pitch_of,
    sounding_frames,
    without_silence,
)
from kimia_infer.models.kokoro.network import KokoroNetwork
from kimia_infer.models.kokoro.phonemes.reading import read_text
from kimia_infer.models.kokoro.prosody import repeat_phonemes
from kimia_infer.models.kokoro.voices import Voices, language_of
from kimia_infer.training.dataset import usable
from kimia_infer.training.feature_cache import FileCache
from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig
from kimia_infer.training.tasks.kokoro_data import Example, Line, encoded_phonemes, prosody_style
from kimia_infer.training.tasks.recordings import Recording
from kimia_infer.utils.errors import RequestError, explain
from kimia_infer.utils.files import no_file, replacing

MAX_SECONDS = 30.0

LEAST_FIT = 0.08
"""Of a text that may be what is said; docs/training.md has those of right and wrong ones."""

FRAME_SECONDS = 0.025
VERSION = "1"
"""Of what is measured and how; another number and stored features are not used any more."""

CERTAIN = 20.0
"""Logit of a share that is 1 in float32."""


@dataclass(frozen=True, eq=False)
class SpokenLine(Line):
    """A recording: ``durations`` int64 [phonemes + 2] in frames of 25 ms, and at two values a frame
    ``pitch`` in Hz (0: not voiced) and ``energy`` at the level of the recording."""

    durations: Tensor
    pitch: Tensor
    energy: Tensor


class RecordingTeacher:
    """What recordings teach the voice that learns from them."""

    def __init__(self, network: KokoroNetwork, voices: Voices):
        self.network, self.voices = network, voices

    @torch.no_grad()
    def __call__(self, line: Line) -> Example:
        assert isinstance(line, SpokenLine)
        network, predictor = self.network, self.network.predictor
        device = network.device
        style = prosody_style(self.voices, line.voice, len(line.phonemes)).to(device)
        encoded, rows = encoded_phonemes(network, line.phonemes)
        durations = line.durations.to(device)
        d = predictor.text_encoder(encoded, style, rows)
        frames = repeat_phonemes(d, durations[None], int(durations.sum()))
        usual_pitch, usual_energy = predictor.curves(frames, style, Rows())
        counts = torch.arange(1, network.config.max_dur + 1)
        logits = torch.where(counts <= line.durations[:, None], CERTAIN, -CERTAIN)
        sounds = [False, *map(str.isalpha, line.phonemes), False]
        heard = torch.tensor(sounds).repeat_interleave(2 * line.durations)
        pitch = filled(line.pitch, usual_pitch[0].cpu())
        energy = levelled(line.energy, usual_energy[0].cpu(), line.pitch > 0, heard)
        return Example(encoded[0].cpu(), style[0].cpu(), logits, line.durations, pitch, energy)


def filled(pitch: Tensor, usual: Tensor) -> Tensor:
    """``pitch`` [values] in Hz, and where it is 0 the ``usual`` one of the voice, moved to fit.

    Between voiced and voiceless Kokoro's pitch takes values that no tracker finds, by which its
    decoder knows how voiced a sound is. They are kept, and moved by as much as the pitch around
    them was.
    """
    voiced = pitch > 0
    both = (voiced & (usual > LOWEST)).nonzero()[:, 0].numpy()
    if not len(both):
        return torch.where(voiced, pitch, usual)
    ratio = np.log(pitch[both].numpy() / usual[both].numpy())
    moved = np.exp(np.interp(np.arange(len(pitch)), both, ratio))
    return torch.where(voiced, pitch, usual * torch.from_numpy(moved).float())


def levelled(energy: Tensor, usual: Tensor, voiced: Tensor, heard: Tensor) -> Tensor:
    """``energy`` [values] at the level of the ``usual`` one of the voice.

    The level of a recording says how near the microphone was: means are made equal where it is
    ``voiced``. Where no sound is ``heard`` by the text, in pauses, the noise of a room is louder
    than Kokoro's silence, which is kept.
    """
    if voiced.any():
        energy = energy + (usual[voiced].mean() - energy[voiced].mean())
    return torch.where(heard, energy, torch.minimum(energy, usual))


@dataclass(frozen=True)
class Measures:
    """Measures recordings, and keeps in ``cache`` what it found."""

    aligner: Aligner
    config: KokoroConfig
    cache: FileCache

    def __call__(self, recording: Recording, phonemes: str, voice: str) -> SpokenLine:
        """Raises DataError or AudioError for a recording that cannot be used."""
        path = self.cache.path(recording.path, f" {recording.part} {phonemes}")
        if path.is_file():
            found = load_file(path)
        else:
            found = self._measured(recording, phonemes)
            with replacing(path) as partial:
                save_file(found, partial)
        self._require_short_sounds(found["durations"], phonemes)  # of this model, stored or not
        return SpokenLine(recording.where, phonemes, voice, **found)

    def _measured(self, recording: Recording, phonemes: str) -> dict[str, Tensor]:
        wave = recording.load(SAMPLE_RATE, MAX_SECONDS)
        if reason := silence_of(wave, SAMPLE_RATE):
            raise DataError(f"audio: {recording.path} {reason}")
        sounding = sounding_frames(wave)
        self._require_short_pauses(sounding)
        wave = without_silence(wave, sounding)
        power = mel_power(wave)
        durations = self._durations(power, phonemes)
        return {"durations": durations, "pitch": pitch_of(wave), "energy": energy_of(power)}

    def _durations(self, power: Tensor, phonemes: str) -> Tensor:
        seconds = FRAME_SECONDS * len(power) / 2
        if len(power) // 2 < len(phonemes) + 2:
            raise DataError(
                f"text: {len(phonemes)} phonemes cannot be spoken in {seconds:.2f} s; expected "
                "what is said in the recording"
            )
        found = self.aligner.align(power, phonemes)
        if found.fit < LEAST_FIT:
            raise DataError(
                f"text: does not fit the recording (a fit of {found.fit:.2f}, expected "
                f"{LEAST_FIT} or more); check the text and its language"
            )
        return found.durations

    def _require_short_sounds(self, durations: Tensor, phonemes: str) -> None:
        if (longest := int(durations.max())) > self.config.max_dur:
            symbol = f" {phonemes} "[int(durations.argmax())]
            raise DataError(
                f"audio: {FRAME_SECONDS * longest:.2f} s for {symbol!r}, at most "
                f"{FRAME_SECONDS * self.config.max_dur:g} s can be learned; leave the recording out"
            )

    def _require_short_pauses(self, sounding: np.ndarray) -> None:
        pauses = np.diff(sounding)
        if len(pauses) and (longest := int(pauses.max())) > self.config.max_dur:
            begin = FRAME_SECONDS * int(sounding[pauses.argmax()])
            raise DataError(
                f"audio: a pause of {FRAME_SECONDS * longest:.2f} s at {begin:.2f} s, but Kokoro's "
                f"longest is {FRAME_SECONDS * self.config.max_dur:g} s; cut the recording there"
            )


def recording_of(row: dict, where: str, audio_root: Path, language: str) -> tuple[Recording, str]:
    """The recording and the text of a row. Raises DataError or ValidationError."""
    facts = AudioRow.model_validate(row)
    if not facts.reference:
        raise DataError("text: missing; what is said in the recording is needed")
    if facts.language is not None and facts.language != parse_language(language):
        raise DataError(
            f"language: {facts.language}, but the texts are read as {language}; leave the row out, "
            "or name another voice or language"
        )
    path = audio_root / facts.audio
    if not path.is_file():
        raise DataError(f"audio: {no_file(path)} (relative paths begin at audio_root)")
    return Recording(where, path, facts.reference, part=facts.part), facts.reference


def read_whole(text: str, language: str, config: KokoroConfig, known: str) -> str:
    """The phonemes of a text that is spoken at once. Raises RequestError or DataError."""
    sentences = read_text(text, language, config.vocab, config.max_phonemes)
    phonemes = " ".join(sentence.phonemes for sentence in sentences)
    if len(phonemes) > config.max_phonemes:
        raise DataError(
            f"text: {len(phonemes)} phonemes, at most {config.max_phonemes} are learned at once; "
            "cut the recording at a pause"
        )
    if unknown := sorted(set(phonemes) - set(known)):
        raise DataError(
            f"text: the phonemes {' '.join(unknown)} cannot be found in recordings; only those of "
            "English can"
        )
    return phonemes


def read_recordings(
    settings: KokoroTrainingConfig, data: str, config: KokoroConfig
) -> list[SpokenLine]:
    """The recordings that the list ``data`` names, measured; what was measured before is read.

    Raises:
        DataError: naming rows without recording or text, and recordings that are silent, too long,
            in another language, or whose text does not fit.
    """
    (voice,) = settings.voices
    language = settings.language or language_of(voice)
    rows = list(read_rows(Path(data)))
    if not rows:
        raise DataError(f"{data}: no rows")
    aligner = load_aligner()
    root = Path(settings.feature_cache or Path(settings.output) / "features")
    measure = Measures(aligner, config, FileCache(root, aligner, VERSION))
    found: dict[int, SpokenLine] = {}

    def check(number: int) -> None:
        line, row = rows[number]
        where = f"{data}:{line}"
        try:
            if isinstance(row, DataError):
                raise row
            recording, text = recording_of(row, where, Path(settings.audio_root), language)
            phonemes = read_whole(text, language, config, aligner.symbols)
            found[number] = measure(recording, phonemes, voice)
        except ValidationError as error:
            raise DataError(f"{where}: {'; '.join(explain(error))}") from error
        except (DataError, RequestError) as error:
            raise DataError(f"{where}: {error}") from error

    skip = settings.bad_lines == "skip"
    good = usable(range(len(rows)), check, data, "recording", skip)
    return [found[number] for number in good]
