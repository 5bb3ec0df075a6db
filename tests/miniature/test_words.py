"""The shipped miniature says and understands the right words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from scripts.miniature.recognizer import Heard, SpeechRecognizer, recall
from scripts.miniature.scoring import (
    Case,
    answer,
    hear_all,
    load_model,
    recognizable,
    right,
    spoken_right,
    word_errors,
)
from tests.paths import MINI

Cases = Callable[..., list[Case]]


def answers(model: KimiAudio, cases: Sequence[Case], ablation: str = "none") -> list:
    return [answer(model, case, ablation) for case in cases]


@pytest.mark.parametrize(("voices", "most"), [("held_out", 0.05), ("held_out_voices", 0.10)])
def test_transcription(trained: KimiAudio, cases: Cases, voices: str, most: float):
    heard = cases("transcription", voices)
    assert len(heard) >= 30
    assert word_errors(answers(trained, heard)) <= most


def test_spoken_questions_are_answered_in_both_tracks(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer
):
    given = answers(trained, cases("question"))
    assert right(given) >= 0.9
    assert spoken_right(hear_all(trained, recognizer, given)) >= 0.85


def test_dialogues_use_their_history(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer
):
    asked = cases("dialogue")
    given = answers(trained, asked)
    assert right(given) >= 0.85
    assert spoken_right(hear_all(trained, recognizer, given)) >= 0.7
    forgetful = [Case(c.kind, c.chats[-1:], c.text, c.spoken) for c in asked]
    assert right(answers(trained, forgetful)) <= 0.5


def test_read_aloud_is_understood(trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer):
    heard = []
    for case in cases("read"):
        wave, _ = trained.generate(case.chats, output_type="both", seed=0)
        heard.append(Heard(case.text, recognizer.hear(recognizable(wave))))
    assert recall(heard) >= 0.9


def test_what_is_heard_is_repeated(trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer):
    given = answers(trained, cases("repeat"))
    assert right(given) >= 0.85
    assert spoken_right(hear_all(trained, recognizer, given)) >= 0.75


def test_streamed_speech_says_the_same(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer
):
    case = cases("question")[0]
    events = list(trained.stream(case.chats, output_type="both", preset="low_latency", seed=0))
    pieces = [event.wav for event in events if isinstance(event, AudioChunk)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert isinstance(events[-1], Completion)
    assert text == events[-1].text == case.text
    assert recognizer.hear(recognizable(torch.cat(pieces)), "answer") == case.text


@pytest.mark.parametrize("ablation", ["features", "codes", "delay"])
def test_what_the_pipeline_needs(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer, ablation: str
):
    """Without it, answers are lost: Whisper's features and speech codes when voices that it does
    not know are heard, the delay of the audio track when it speaks."""
    if ablation == "delay":
        asked, changed = cases("question"), load_model(MINI, audio_delay=0)
        said = hear_all(changed, recognizer, answers(changed, asked))
        assert spoken_right(said) <= 0.3
    else:
        asked = cases("transcription", "held_out_voices") + cases("question", "held_out_voices")
        whole = right(answers(trained, asked))
        assert right(answers(trained, asked, ablation)) <= whole - 0.05


def test_full_heads_give_the_same_tokens(trained: KimiAudio, cases: Cases):
    full = load_model(MINI, "full")
    chosen = [case for kind in ("transcription", "question", "read") for case in cases(kind)[:8]]
    assert answers(full, chosen) == answers(trained, chosen)
