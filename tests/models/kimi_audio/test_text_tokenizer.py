"""Text tokens against recorded ones, the special tokens, and damaged tokenizer files."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kimia_infer.models.kimi_audio import text_tokenizer as tokenizer_module
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens, TextTokenizer, special_names
from kimia_infer.utils.errors import CheckpointError
from tests.paths import GOLDEN

RECORDED = json.loads((GOLDEN / "e2e" / "cases.json").read_text())
PROMPTS = json.loads((GOLDEN / "prompt" / "prompt_new.json").read_text())
CHECKPOINT = GOLDEN / "e2e" / "checkpoint"
PUBLISHED_NAMES = {
    "msg_end": "<|im_msg_end|>",
    "user_msg_start": "<|im_kimia_user_msg_start|>",
    "assistant_msg_start": "<|im_kimia_assistant_msg_start|>",
    "media_begin": "<|im_media_begin|>",
    "media_end": "<|im_media_end|>",
    "text_blank": "<|im_kimia_text_blank|>",
    "text_eos": "<|im_kimia_text_eos|>",
    "speech_ct": "<|im_kimia_speech_ct_id|>",
    "speech_ctd": "<|im_kimia_speech_ctd_id|>",
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(CHECKPOINT)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The two files the tokenizer reads, free to be changed."""
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "case", RECORDED["tokenizer"]["encode"], ids=lambda c: repr(c["text"][:20])
)
def test_recorded_encodings(case: dict, tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize(
    "case", RECORDED["tokenizer"]["decode"], ids=lambda c: repr(c["text"][:20])
)
def test_recorded_decodings(case: dict, tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_recorded_answers_decode(tokenizer: TextTokenizer) -> None:
    for case in RECORDED["cases"]:
        assert tokenizer.decode(case["text_ids"]) == case["text"]


def test_special_names_are_the_published_ones() -> None:
    assert special_names() == PROMPTS["all_special_tokens"]


def test_special_ids_of_the_published_vocabulary() -> None:
    published = PROMPTS["special_tokens"]
    expected = {field: published[name] for field, name in PUBLISHED_NAMES.items()}
    expected["pad"] = PROMPTS["pad"]
    assert asdict(SpecialTokens.after(published["[BOS]"])) == expected


def test_special_ids_of_the_recorded_checkpoint(tokenizer: TextTokenizer) -> None:
    tokens = RECORDED["tokens"]
    assert tokenizer.base_tokens == tokens["n_base"]
    assert tokenizer.vocab_size == tokens["n_base"] + tokens["n_special"]
    for field, name in PUBLISHED_NAMES.items():
        token = getattr(tokenizer.special, field)
        recorded = [name.strip("<|>").removeprefix("im_"), field]
        assert token == next(tokens[key] for key in recorded if key in tokens)
        assert tokenizer.decode([token]) == name
    assert tokenizer.special.pad == tokens["pad"]


@given(st.text())
@example("<|im_kimia_user_msg_start|> [BOS]")
@example("\u0000 \r\n\r\n  \t \u00a0\u3000x\u200b 👩\u200d👩\u200d👧 1234567890")
def test_decoding_inverts_encoding(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.base_tokens for token in ids)


_tokenizers: list[TextTokenizer] = []


def _shared() -> TextTokenizer:
    if not _tokenizers:
        _tokenizers.append(TextTokenizer(CHECKPOINT))
    return _tokenizers[0]


def test_lone_surrogates_become_the_replacement_character(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def _cut_naively(text: str, window_chars: int, run_chars: int) -> list[str]:
    """The published cutting, character by character."""
    pieces = []
    for start in range(0, len(text), window_chars):
        piece, run = "", 0
        for character in text[start : start + window_chars]:
            same = bool(piece) and piece[-1].isspace() == character.isspace()
            run = run + 1 if same else 1
            if run > run_chars:
                pieces.append(piece)
                piece, run = "", 1
            piece += character
        pieces.append(piece)
    return pieces


@given(st.text("ab \n\u3000", max_size=60), st.integers(1, 30), st.integers(1, 6))
def test_long_texts_are_cut_as_published(text: str, window: int, run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "WINDOW_CHARS", window)
        patch.setattr(tokenizer_module, "RUN_CHARS", run)
        assert list(tokenizer_module.pieces(text)) == _cut_naively(text, window, run)


def test_long_texts_survive(tokenizer: TextTokenizer) -> None:
    for text in ("x" * 1_000_001, " " * 60_000 + "a", ("a" * 24_999 + " ") * 20):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("offset", [0, 1, 10**9])
def test_ids_beyond_the_text_vocabulary(offset: int, tokenizer: TextTokenizer) -> None:
    token = tokenizer.vocab_size + offset
    with pytest.raises(ValueError, match=f"{token} is not a text token"):
        tokenizer.decode([0, token])
    with pytest.raises(ValueError, match="-1 is not a text token"):
        tokenizer.decode([-1])


@pytest.mark.parametrize("content", [None, {}, {"tokenizer_class": "TikTokenTokenizer"}])
def test_without_added_tokens_the_published_ones_hold(content: dict, directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.unlink() if content is None else path.write_text(json.dumps(content))
    assert TextTokenizer(directory).special == _shared().special


def _edit(directory: Path, change) -> None:
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    change(values["added_tokens_decoder"])
    path.write_text(json.dumps(values))


def test_special_tokens_in_another_order(directory: Path) -> None:
    token = TextTokenizer(directory).special.media_begin

    def swap(added: dict) -> None:
        added[str(token)], added[str(token + 1)] = added[str(token + 1)], added[str(token)]

    _edit(directory, swap)
    match = rf"tokenizer_config.json: special token {token} .*expected '<\|im_media_begin\|>'"
    with pytest.raises(CheckpointError, match=match):
        TextTokenizer(directory)


def test_special_token_missing_or_too_many(directory: Path) -> None:
    last = TextTokenizer(directory).special.pad
    _edit(directory, lambda added: added.update({str(last + 1): {"content": "<|more|>"}}))
    with pytest.raises(CheckpointError, match=rf"{last + 1} is '<\|more\|>', expected None"):
        TextTokenizer(directory)
    _edit(directory, lambda added: [added.pop(str(last + 1)), added.pop(str(last))])
    with pytest.raises(CheckpointError, match=f"special token {last} is None"):
        TextTokenizer(directory)


@pytest.mark.parametrize("added", [[], {"x": {"content": "a"}}, {"1": "a"}, {"1": {}}])
def test_malformed_added_tokens(added: object, directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        TextTokenizer(directory)


def _lines(directory: Path) -> list[bytes]:
    return (directory / "tiktoken.model").read_bytes().splitlines()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: [*lines, b"!!! 99"], "not a tiktoken rank file"),
        (lambda lines: [*lines, b"QUJD"], "not a tiktoken rank file"),
        (lambda lines: [*lines, b"QUJDREVG x"], "not a tiktoken rank file"),
        (lambda lines: lines[:-2] + lines[-1:], "ranks are not 0 to"),
        (lambda lines: [*lines, lines[-1]], "ranks are not 0 to"),
        (lambda lines: lines[:100], "no token for byte"),
        (lambda lines: [], "no token for byte"),
    ],
)
def test_damaged_rank_file(change, reason: str, directory: Path) -> None:
    lines = change(_lines(directory))
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines))
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model: .*{reason}"):
        TextTokenizer(directory)


def test_missing_rank_file(directory: Path) -> None:
    (directory / "tiktoken.model").unlink()
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: file missing"):
        TextTokenizer(directory)


def test_another_number_of_ranks_needs_other_special_ids(directory: Path) -> None:
    lines = _lines(directory)
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines[:-1]))
    with pytest.raises(CheckpointError, match="follow the"):
        TextTokenizer(directory)
