"""The seven tasks of pre-training, on a document whose sequences are written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kimia_infer.data.conversations import ConversationFile, DataError
from kimia_infer.training.config import FinetuneConfig, MixConfig
from kimia_infer.training.dataset import check_lines
from kimia_infer.training.documents import PATTERNS, DocumentBuilder, DocumentFile
from kimia_infer.training.samples import Sample
from tests.training import recorded
from tests.training.recorded import CONFIG, SAMPLES, SPECIAL

B, END, BEGIN = SPECIAL.text_blank, SPECIAL.media_end, SPECIAL.media_begin
EOS, FIRST, DELAY = SPECIAL.text_eos, CONFIG.token_offset, CONFIG.audio_delay
SOUND = next(
    m["content"] for m in SAMPLES[0]["raw"]["conversation"] if m["message_type"] == "audio"
)
CODES = {"a": [FIRST + 1, FIRST + 2], "b": [FIRST + 3, FIRST + 4, FIRST + 5]}
"""Of two segments, whose texts are "a" and "b"; the tokens of the texts are their bytes."""
A, C = (ord(text) for text in CODES)
NOTHING = dict.fromkeys(PATTERNS, 0)


def builder(max_length: int = 100) -> DocumentBuilder:
    base = vars(recorded.builder())
    return DocumentBuilder(**{**base, "max_length": max_length, "read_features": features})


def features(path: Path) -> torch.Tensor:
    """Stands for stored ones; the document's codes are made up, and need no sound."""
    return torch.zeros(2, CONFIG.adaptor_input_dim)


def document(tmp_path: Path, *texts: str, **changes: Any) -> ConversationFile:
    messages = [
        {
            "role": "user",
            "message_type": "audio-text",
            "content": [SOUND, text],
            "audio_tokens": CODES[text],
        }
        | changes
        for text in texts
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"task_type": "document", "conversation": messages}) + "\n")
    return ConversationFile(path)


def pieces(file: ConversationFile, task: str, max_length: int = 100) -> DocumentFile:
    return DocumentFile(file, MixConfig(**(NOTHING | {task: 1})), builder(max_length), skip=False)


def sample(file: ConversationFile, task: str) -> Sample:
    found = pieces(file, task)
    assert len(found) == 1
    return builder().build(found[0])


def codes(text: str, heard: bool = False, learned: bool = True) -> list[tuple]:
    """Codes alone: audio id, text id, whether it has features, what is learned of each track."""
    middle = [(code, B, heard, learned, False) for code in CODES[text]]
    return [(BEGIN, B, False, False, False), *middle, (END, B, False, learned, False)]


def heard(text: str) -> list[tuple]:
    return codes(text, heard=True, learned=False)


def written(text: str, learned: bool = True) -> list[tuple]:
    return [(B, ord(text), False, False, learned), (B, EOS, False, False, learned)]


BOTH = [
    (B, C, False, False, True),
    (B, EOS, False, False, True),
    *[(B, B, False, False, False)] * (DELAY - 2),
    *[(code, B, False, True, False) for code in CODES["b"]],
    (END, B, False, True, False),
]
EXPECTED = {
    "audio": codes("a") + codes("b"),
    "text": written("a") + written("b"),
    "transcription": heard("a") + written("a") + heard("b") + written("b"),
    "speech": written("a", False) + codes("a") + written("b", False) + codes("b"),
    "audio_to_audio": heard("a") + codes("b"),
    "audio_to_text": heard("a") + written("b"),
    "audio_to_both": heard("a") + BOTH,
}


@pytest.mark.parametrize("task", PATTERNS)
def test_sequences(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([2, 3])
    made = DocumentBuilder(
        **{
            **vars(builder()),
            "read_features": lambda path: torch.zeros(next(lengths), CONFIG.adaptor_input_dim),
        }
    )
    found = made.build(pieces(document(tmp_path, "a", "b"), task)[0])
    audio, text, continuous, learned_audio, learned_text = map(
        list, zip(*EXPECTED[task], strict=True)
    )
    assert found.audio_ids.tolist() == audio
    assert found.text_ids.tolist() == text
    assert found.is_continuous.tolist() == continuous
    # What is learned at a position is the id of the next one.
    assert found.audio_labels[:-1].tolist() == audio[1:]
    assert found.text_labels[:-1].tolist() == text[1:]
    assert found.audio_loss_mask.tolist() == [*learned_audio[1:], False]
    assert found.text_loss_mask.tolist() == [*learned_text[1:], False]
    assert (0 if found.features is None else len(found.features)) == sum(continuous)


def test_a_text_may_be_longer_than_its_speech(tmp_path: Path) -> None:
    messages = [("a", 2), ("b" * 12, 1)]
    conversation = [
        {
            "role": "user",
            "message_type": "audio-text",
            "content": [SOUND, text],
            "audio_tokens": [FIRST] * count,
        }
        for text, count in messages
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"task_type": "document", "conversation": conversation}) + "\n")
    found = sample(ConversationFile(path), "audio_to_both")
    assert found.audio_ids[4:].tolist() == [*[B] * DELAY, FIRST, END, *[B] * (13 - DELAY - 2)]
    assert found.text_ids[4:].tolist() == [C] * 12 + [EOS]
    assert found.text_loss_mask.sum() == 13 and found.audio_loss_mask.sum() == 2


def test_documents_come_as_often_as_tasks_weigh(tmp_path: Path) -> None:
    file = DocumentFile(document(tmp_path, "a", "b"), MixConfig(), builder(), skip=False)
    tasks = [file[index].task_type for index in range(len(file))]
    counts = {task: tasks.count(task) for task in PATTERNS}
    assert counts == {task: 1 for task in PATTERNS} | {"text": 7, "audio_to_both": 2}
    assert set(MixConfig().weights()) == set(PATTERNS)


def test_long_documents_are_cut_between_segments(tmp_path: Path) -> None:
    file = document(tmp_path, "a", "b", "a", "b", "a")
    # Segments have 4 and 5 positions as codes; in turn, 4 as heard ones and 2 or 5 as learned ones.
    found = pieces(file, "audio", max_length=10)
    assert [len(found[index].messages) for index in range(len(found))] == [2, 2, 1]
    found = pieces(file, "audio_to_text", max_length=8)
    assert [[m.message_type for m in found[i].messages] for i in range(len(found))] == [
        ["audio", "text"],
        ["audio", "text"],
    ]
    samples = check_lines(found, builder(max_length=8), skip=False)
    assert samples.lengths == [6, 6]
    with pytest.raises(
        DataError, match=r"jsonl:1 \(audio\): .* 5 positions, more than max_length 4"
    ):
        check_lines(pieces(file, "audio", 4), builder(4), skip=False)


def test_tasks_of_two_segments_need_two(tmp_path: Path) -> None:
    file = document(tmp_path, "a")
    assert [len(pieces(file, task)) for task in ("transcription", "audio_to_text")] == [1, 0]


def test_what_is_no_document_is_refused(tmp_path: Path) -> None:
    file = document(tmp_path, "a", message_type="text", content="a")
    with pytest.raises(DataError, match=r"conversation\[0\]: .*pretrain=false|audio_tokens"):
        pieces(file, "text")
    conversation = [{"role": "user", "message_type": "audio-text", "content": [SOUND, "a"]}]
    path = tmp_path / "no_codes.jsonl"
    path.write_text(json.dumps({"task_type": "document", "conversation": conversation}) + "\n")
    with pytest.raises(DataError, match=r"jsonl:1: .*audio_tokens: missing; extract the codes"):
        pieces(ConversationFile(path), "text")
    file = document(tmp_path, "a", audio_tokens=[FIRST - 1])
    with pytest.raises(DataError, match=r"jsonl:1: conversation\[0\]\.audio_tokens: .* is not"):
        pieces(file, "audio")


def test_lines_that_are_no_documents_can_be_skipped(tmp_path: Path) -> None:
    good = document(tmp_path, "a", "b").path.read_text()
    path = tmp_path / "some.jsonl"
    path.write_text('{"task_type": "document"}\n' + good)
    with pytest.raises(DataError, match=r"1 of 2 lines cannot be used:\n.*some\.jsonl:1"):
        pieces(ConversationFile(path), "audio")
    mix = MixConfig(**(NOTHING | {"audio": 1}))
    found = DocumentFile(ConversationFile(path), mix, builder(), skip=True)
    assert len(found) == 1 and found.where(0) == f"{path}:2 (audio)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": MixConfig(text=3)}, "mix: weighs the tasks of pretrain=true only"),
        ({"pretrain": True, "spoken_answers": True}, "spoken_answers: documents have none"),
    ],
)
def test_settings_that_would_do_nothing(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(data="d", output="o", model="m", **settings)


def test_some_task_has_to_be_learned() -> None:
    with pytest.raises(ValueError, match="mix: every task is learned 0 times"):
        FinetuneConfig(data="d", output="o", model="m", pretrain=True, mix=MixConfig(**NOTHING))
