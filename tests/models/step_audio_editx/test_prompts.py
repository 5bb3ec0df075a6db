"""Prompts, packing and the tokenizer against recordings of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.convert_slow_tokenizer import import_protobuf

from kimia_infer.models.step_audio_editx import edits, packing, prompts
from kimia_infer.models.step_audio_editx.text_tokenizer import TextTokenizer
from kimia_infer.utils.errors import CheckpointError, RequestError
from tests.models.step_audio_editx.recorded import RECORDED, values

PROMPTS, PACKING = values("prompts"), values("packing")


@pytest.fixture(scope="module")
def builder() -> prompts.PromptBuilder:
    return prompts.PromptBuilder(TextTokenizer(RECORDED))


def edit_of(case: dict[str, Any]) -> edits.Edit:
    kind, option, new = (case[key] or "" for key in ("edit_type", "edit_info", "new_text"))
    return edits.Edit(kind, option, case["audio_text"] or "", new)


def refused(case: dict[str, Any]) -> bool:
    """What the published code accepts and answers with a wrong prompt."""
    if case["kind"] == "clone":
        return not case["target_text"]
    kind, option = case["edit_type"], case.get("edit_info")
    known = kind in edits.OPTIONS and (not edits.OPTIONS[kind] or option)
    texts = kind in edits.NO_TEXT or case.get("audio_text")
    return not (known and texts) or (kind, option) == ("speed", "remove")


def test_ids_are_the_recorded_ones(builder: prompts.PromptBuilder) -> None:
    audio = packing.interleave(PROMPTS["vq02"], PROMPTS["vq06"])
    cases = [case for case in PROMPTS["cases"] if not refused(case)]
    assert len(cases) == 56
    for case in cases:
        if case["kind"] == "clone":
            texts = case["prompt_text"], audio, case["target_text"]
            found = builder.clone(case["speaker"], *texts)
        else:
            found = builder.edit(edit_of(case), audio)
        assert found == case["ids"], case.get("instruction", case.get("target_text"))


def test_options_are_the_recorded_ones() -> None:
    recorded = {kind: tuple(o) for kind, o in PROMPTS["edit_types"].items() if kind != "clone"}
    assert recorded == edits.OPTIONS


EDITS = [
    (("mood", "happy", "a"), "kind: expected one of emotion, style"),
    (("emotion", "hapy", "a"), "found 'hapy'; did you mean 'happy'"),
    (("speed", "remove", "a"), "option: expected one of faster"),
    (("emotion", "", "a"), "option: expected one of happy"),
    (("denoise", "happy"), "option: denoise has none"),
    (("style", "child", " "), "text: style needs the words"),
    (("paralinguistic", "", "a"), "new_text: expected the text with tags"),
    (("style", "child", "a", "b"), "new_text: only paralinguistic"),
    (("style", "child", "a <audio_7> b"), "text: <audio_7> is a token"),
    (("paralinguistic", "", "a", "<|EOT|>"), "new_text: <|EOT|> is a token"),
]


@pytest.mark.parametrize(("fields", "message"), EDITS, ids=lambda value: str(value)[:30])
def test_bad_edits_are_refused(
    builder: prompts.PromptBuilder, fields: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RequestError) as error:
        builder.edit(edits.Edit(*fields), [0] * 5)
    assert message in str(error.value)


def test_a_model_of_sentencepiece_gives_the_same_ids(tmp_path: Path) -> None:
    """The published checkpoint has one, and no ``tokenizer.json``."""
    schema = import_protobuf()
    recorded = json.loads((RECORDED / "tokenizer.json").read_text())
    added = {token["content"]: token["special"] for token in recorded["added_tokens"]}
    model = schema.ModelProto()
    model.trainer_spec.model_type = schema.TrainerSpec.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = 0
    kinds = schema.ModelProto.SentencePiece
    names = {False: kinds.USER_DEFINED, True: kinds.CONTROL, None: kinds.NORMAL}
    pieces = [*recorded["model"]["vocab"], *((f"<audio_{n}>", 0.0) for n in range(5120))]
    for index, (piece, score) in enumerate(pieces):
        kind = names[added.get(piece)] if index else kinds.UNKNOWN
        kind = kinds.BYTE if piece.startswith("<0x") else kind
        model.pieces.add(piece=piece, score=score, type=kind)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    read = TextTokenizer(tmp_path)
    texts = [text for case in PROMPTS["cases"] for text in case.get("encode_calls", ())]
    tokenizer = TextTokenizer(RECORDED)
    assert len(texts) > 30 and read.size == tokenizer.size
    assert [read.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a tokenizer .*unigram"):
        TextTokenizer(tmp_path)


def test_clone_needs_both_texts(builder: prompts.PromptBuilder) -> None:
    for text, target, field in (("", "a", "text"), ("a", "\n", "target")):
        with pytest.raises(RequestError, match=f"^{field}: expected some text"):
            builder.clone("clone_0", text, [0] * 5, target)


def test_speakers_have_the_recorded_names() -> None:
    def rising(samples: int) -> np.ndarray:
        return np.linspace(-0.5, 0.5, samples, dtype=np.float32)

    stereo = np.stack([rising(1500), rising(1500)[::-1]])
    waves = {"long": rising(5000), "short": rising(700), "stereo": stereo}
    for case in PROMPTS["speaker_ids"]:
        assert prompts.speaker_name(case["prompt_text"], waves[case["wav"]]) == case["id"]


@pytest.mark.parametrize("case", PACKING["interleave"], ids=lambda c: f"{c['n02']}-{c['n06']}")
def test_groups_are_interleaved(case: dict[str, Any]) -> None:
    vq02, vq06 = (case.get(name, list(range(case[n]))) for name, n in NAMED)
    found = packing.interleave(vq02, vq06)
    assert len(found) == case["lm_ids_len"]
    if "lm_ids" in case:
        assert [65536 + token for token in found] == case["lm_ids"]


NAMED = (("vq02", "n02"), ("vq06", "n06"))


def test_rows_are_the_recorded_ones() -> None:
    compared = 0
    for case in PACKING["reshape"]:
        tokens = packing.whole_groups(case["mixed"])
        if all(0 <= token < packing.AUDIO_TOKENS for token in tokens) and tokens:
            rows = packing.flow_rows(tokens).tolist()
            assert rows == case["rows"][: len(rows)], case["case"]
            assert int(packing.flow_rows(tokens).max()) < packing.TABLE_ROWS
            compared += 1
    assert compared == 8


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "no audio was produced"), ([5120, 0, 0, 0, 0], "5120"), ([-1, 0, 0, 0, 0], "-1")],
)
def test_what_is_no_audio_is_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        packing.flow_rows(tokens)


def test_the_mel_is_aligned_as_recorded() -> None:
    for case in PACKING["prompt_mel_alignment"]:
        mel = torch.arange(case["mel_frames"])[:, None]
        found = packing.aligned_mel(mel, case["rows"])[:, 0]
        assert found.tolist() == case["source_index"]


def changed(directory: Path, **fields: Any) -> Path:
    content = json.loads((RECORDED / "tokenizer.json").read_text()) | fields
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: file missing"):
        TextTokenizer(tmp_path)
    words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    with pytest.raises(CheckpointError, match="expected a Unigram model, found WordLevel"):
        TextTokenizer(changed(tmp_path, model=words, added_tokens=[]))
    begun = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": SEQUENCE}],
        "pair": [{"Sequence": SEQUENCE}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    with pytest.raises(CheckpointError, match="adds tokens of its own"):
        TextTokenizer(changed(tmp_path, post_processor=begun))


SEQUENCE = {"id": "A", "type_id": 0}
