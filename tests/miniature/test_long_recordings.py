"""Recordings of many sentences, and sounds that make a transcript repeat itself, by words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.scheduler import Scheduler
from scripts.miniature.scoring import Case, load_model, measure_long
from tests.paths import MINI

Cases = Callable[..., list[Case]]


def test_a_long_recording_is_understood_as_its_sentences_are(
    trained: KimiAudio, spoken_world: Path, long: bool
):
    found = measure_long(trained, spoken_world, seconds=600 if long else 75)
    assert found["word_errors"] <= min(found["alone"] + 0.02, 0.05), found


def test_what_is_said_again_is_transcribed_again(trained: KimiAudio, cases: Cases, tmp_path: Path):
    """The guard against repetition cuts nothing of a sentence that is said six times."""
    case = cases("transcription")[0]
    once = np.append(load_audio(case.chats[-1]["content"]), np.zeros(SAMPLE_RATE // 2, np.float32))
    path = tmp_path / "again.wav"
    write_wav(path, np.tile(once, 6), SAMPLE_RATE)
    transcript = trained.transcribe(str(path))
    assert not any(segment.repetition for segment in transcript.segments)
    assert jiwer.wer(" ".join([case.text] * 6), transcript.text) <= 0.1


def test_a_text_without_an_end_is_cut_where_it_repeats_itself(cases: Cases, long: bool):
    """Kept from ending, the model says the same words for ever after some sentences."""
    model = load_model(MINI)
    endless = replace(model.decoder.control, text_end=-1)
    model.decoder = Decoder(model.language_model, endless, 1000)
    model.scheduler = Scheduler(model.decoder, model.detokenizer, model.encoder.encode)
    cut = 0
    for case in cases("read")[: 3 if long else 1]:
        whole, kept = (
            list(model.stream(case.chats, output_type="text", max_new_tokens=450, **guard))[-1]
            for guard in ({}, {"stop_repetition": True})
        )
        assert whole.text.startswith(kept.text)
        if kept.metrics["stop_reason"] != "repetition":
            continue
        cut += 1
        ids, length = whole.text_ids[: kept.metrics["decode_steps"]], len(kept.text_ids)
        assert kept.text_ids == ids[:length] and len(ids) >= length + 64
        units = [u for u in range(1, 129) if ids[length:] == ids[length - u : -u]]
        assert units, "what was cut off is nothing but the last words again"
    assert cut
