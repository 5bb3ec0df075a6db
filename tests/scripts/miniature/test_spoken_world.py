"""The spoken world: files as described, sounds that repeat, disjoint sets."""

from __future__ import annotations

import wave as riff
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.training.tasks.recordings import find_recordings
from kimia_infer.utils.errors import ConfigurationError
from scripts.miniature import espeak
from scripts.miniature.espeak import Synthesizer, speak_all
from scripts.miniature.spoken_world import (
    HELD_OUT_VARIANTS,
    LANGUAGES,
    SETS,
    VARIANTS,
    WorldSize,
    draw_tasks,
    silences,
    write_world,
)
from scripts.miniature.voices import Utterance, Voice
from scripts.miniature.world import core, whole

SIZE = WorldSize(train=40, validation=25, held_out=25, held_out_voices=25)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, SIZE, whole)
    return folder


def test_conversations_can_be_trained_on(world: Path):
    for name in SETS:
        file = ConversationFile(world / f"{name}.jsonl")
        assert len(file) == sum(round(p * getattr(SIZE, name)) for p in whole.KINDS.values())
        kinds = Counter(file.raw(index)["kind"] for index in range(len(file)))
        assert kinds.keys() == whole.KINDS.keys()
        for index, conversation in enumerate(file):
            spoken = file.raw(index)["kind"] != "transcription"
            assert conversation.output_type == ("both" if spoken else "text")
            *_, last = conversation.messages
            assert last.role == "assistant" and last.text
            for message in conversation.messages:
                if message.audio is not None and message.role == "user":
                    with riff.open(str(world / message.audio)) as sound:
                        assert sound.getframerate() == SAMPLE_RATE
                        assert 0.3 < sound.getnframes() / SAMPLE_RATE < 6


def test_sounds_have_texts_and_phones(world: Path):
    for name in [f"speech_{name}" for name in SETS]:
        for sound in find_recordings(world / f"{name}.jsonl", world, needs_text=True):
            seconds = len(load_audio(sound.path, sample_rate=SAMPLE_RATE)) / SAMPLE_RATE
            assert sound.phones[-1][1] <= seconds + 0.001
            assert len(sound.phones) >= 2 * len(sound.text.split())
    for sound in find_recordings(world / "speech_held_out.jsonl", world, needs_text=True):
        wave, rate = load_audio(sound.path, sample_rate=SAMPLE_RATE), SAMPLE_RATE
        begun = round(sound.phones[0][1] * rate)
        # Up to the first phone there is next to nothing, and of users' sounds often much of it.
        assert np.abs(wave[: max(0, begun - rate // 50)]).max(initial=0.0) < 0.02


def test_sets_share_neither_voices_nor_texts():
    drawn = {name: draw_tasks(core, name, 200, seed=1) for name in SETS}
    voices = {name: {task.voice for task in tasks} for name, tasks in drawn.items()}
    assert not voices["held_out_voices"] & (voices["train"] | voices["held_out"])
    variants = {voice.name.split("+")[1] for voice in voices["held_out_voices"]}
    assert variants <= set(HELD_OUT_VARIANTS) and not variants & set(VARIANTS)
    texts = {name: {task.turns for task in tasks} for name, tasks in drawn.items()}
    for name in ("validation", "held_out", "held_out_voices"):
        assert not texts[name] & texts["train"]
        kinds = Counter((task.kind, task.turns) for task in drawn[name])
        assert max(kinds.values()) == 1


def test_users_do_not_speak_at_once():
    spoken = [Utterance("red", voice) for voice in (Voice("en", 150, p) for p in range(30, 71))]
    before, after = zip(*map(silences, spoken), strict=True)
    assert min(before) < 0.05 and 0.25 < max(before) <= 0.3
    assert min(after) < 0.05 and 0.35 < max(after) <= 0.4


def test_sounds_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(espeak, "CHUNK", 2)
    said = [Utterance(text, Voice("en-us+f2", 150, 50)) for text in ("one", "two", "red", "six")]
    alone, together = list(speak_all(said, 1)), list(speak_all(said, 2))
    for first, second in zip(alone, together, strict=True):
        assert np.array_equal(first.wave, second.wave)
        assert first.phones == second.phones


def test_every_voice_exists_and_is_its_own():
    synthesizer = Synthesizer()
    names = [f"{language}+{v}" for language in LANGUAGES for v in VARIANTS + HELD_OUT_VARIANTS]
    heard = [synthesizer.speak(Utterance("a red cup", Voice(n, 150, 50))).wave for n in names]
    assert len({wave.tobytes() for wave in heard}) == len(names)
    for name in ("xx-none", "en-us+none"):
        with pytest.raises(ConfigurationError, match=f"no voice {name!r}".replace("+", r"\+")):
            synthesizer.speak(Utterance("one", Voice(name, 150, 50)))


def test_phones_begin_where_they_sound():
    """The hiss of "six" is where the first phone is said to be, the pause at the end silent."""
    wave, phones = Synthesizer().speak(Utterance("six", Voice("en-us+f3", 140, 50)))
    assert [name for name, _ in phones][:4] == ["s", "ɪ", "k", "s"]
    starts = [start for _, start in phones]
    assert starts == sorted(starts)

    def crossings(part: np.ndarray) -> float:
        return float(np.mean(np.diff(np.sign(part.astype(float))) != 0))

    hiss, vowel = wave[starts[0] : starts[1]], wave[starts[1] : starts[2]]
    assert crossings(hiss) > 2 * crossings(vowel)


def test_what_is_missing_is_named(monkeypatch):
    def fail(name: str):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(espeak.ctypes, "CDLL", fail)
    with pytest.raises(ConfigurationError, match="apt-get install espeak-ng"):
        Synthesizer()
