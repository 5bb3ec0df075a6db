"""The untrained miniature: repeatable, complete, in the published layout, able to answer."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.checkpoint import LAYOUT
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component, whisper_component
from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.language_model import language_model_component
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from kimia_infer.training.tasks.config import DiTSize, EncoderSize, GeneratorSize
from kimia_infer.weights.component import Component, expected_tensors
from scripts.miniature.untrained import CORPUS, SEED, Sizes, train_merges, write_miniature
from scripts.miniature.whisper import WhisperSize
from tests.paths import ROOT

QUESTION = ROOT / "scripts" / "question.wav"


def checksums(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def parts(directory: Path) -> dict[str, Component]:
    return {
        "": language_model_component(directory),
        "whisper-large-v3": whisper_component(directory / "whisper-large-v3"),
        "glm-4-voice-tokenizer": speech_tokenizer_component(directory / "glm-4-voice-tokenizer"),
        "audio_detokenizer": dit_component(directory / "audio_detokenizer"),
        "vocoder": vocoder_component(directory / "vocoder"),
    }


@pytest.fixture(scope="module")
def model(untrained: Path) -> KimiAudio:
    return KimiAudio(str(untrained), device="cpu", dtype="float32")


# SHA-256 of the seed's language model, the same on every machine.
FIRST_DIGITS = "e792291c4d41c26b"


def test_a_seed_always_gives_the_same_files(untrained: Path, tmp_path: Path):
    write_miniature(tmp_path)
    assert checksums(tmp_path) == checksums(untrained)
    assert checksums(tmp_path)["model.safetensors"].startswith(FIRST_DIGITS)


def test_another_seed_changes_the_weights_and_nothing_else(untrained: Path, tmp_path: Path):
    write_miniature(tmp_path, SEED + 1)
    other, first = checksums(tmp_path), checksums(untrained)
    assert other.keys() == first.keys()
    changed = {name for name in other if other[name] != first[name]}
    assert changed == {name for name in other if name.endswith(".safetensors")}


def test_it_is_complete(untrained: Path):
    assert LAYOUT.missing_files(untrained) == []


def test_every_stored_tensor_is_used_and_sound(untrained: Path):
    for folder, part in parts(untrained).items():
        with safe_open(untrained / folder / "model.safetensors", "pt") as stored:
            names = set(stored.keys())
            assert len(names) == len(expected_tensors(part.slots)) == len(part.store.tensors)
            assert all(torch.isfinite(stored.get_tensor(name)).all() for name in names)


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("", ("model.", "lm_head.", "mimo_output.")),
        ("whisper-large-v3", "model.encoder."),
        ("audio_detokenizer", "speech_model."),
    ],
)
def test_tensors_carry_the_published_prefixes(
    untrained: Path, folder: str, prefix: str | tuple[str, ...]
):
    with safe_open(untrained / folder / "model.safetensors", "pt") as stored:
        assert all(name.startswith(prefix) for name in stored.keys())  # noqa: SIM118


def test_the_names_are_those_of_a_recorded_checkpoint(untrained: Path, golden: Path):
    """What only layer numbers and sizes distinguish from the recorded one."""

    def shape_free(name: str) -> str:
        return ".".join("N" if part.isdigit() else part for part in name.split("."))

    recorded = parts(golden / "e2e" / "checkpoint")
    for folder, part in parts(untrained).items():
        ours, theirs = expected_tensors(part.slots), expected_tensors(recorded[folder].slots)
        assert {shape_free(name) for name in ours} == {shape_free(name) for name in theirs}


def keys(values: object, path: str = "") -> set[str]:
    if not isinstance(values, dict):
        return {path}
    return {key for name, value in values.items() for key in keys(value, f"{path}/{name}")}


# Published fields that only the published code and its training read.
UNREAD = {
    "config.json": {"/auto_map", "/initializer_range", "/transformers_version"},
    "audio_detokenizer/config.yaml": {
        "/model/dit/chunk_params",
        "/model/dit/condition_input_dim",
        "/model/dit/ffn_conv_kernel_size",
        "/model/dit/prompt_cfg_dropout",
        "/model/dit/semantic_cfg_dropout",
        "/model/dit/use_chunk_setting",
    },
}


@pytest.mark.parametrize("name", UNREAD)
def test_configurations_have_the_published_fields(untrained: Path, golden: Path, name: str):
    ours, theirs = (
        keys(yaml.safe_load((directory / name).read_text()))
        for directory in (untrained, golden / "e2e" / "checkpoint")
    )
    lacking = {key for key in theirs - ours if not key.startswith(tuple(UNREAD[name]))}
    assert lacking == set()
    assert ours - theirs <= {"/model_type"}


def ranks(directory: Path) -> list[bytes]:
    lines = (directory / "tiktoken.model").read_text().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines]


def test_bytes_are_ranked_as_published(untrained: Path, golden: Path):
    assert ranks(untrained)[:256] == ranks(golden / "e2e" / "checkpoint")[:256]
    assert len(set(ranks(untrained))) == len(ranks(untrained)) == Sizes().base_tokens


def test_special_tokens_are_the_published_ones(untrained: Path, golden: Path):
    published = json.loads((golden / "prompt" / "prompt_new.json").read_text())
    names = published["all_special_tokens"]
    tokenizer = json.loads((untrained / "tokenizer_config.json").read_text())
    base = Sizes().base_tokens
    added = {int(i): entry["content"] for i, entry in tokenizer["added_tokens_decoder"].items()}
    assert added == dict(enumerate(names, start=base))
    config = json.loads((untrained / "config.json").read_text())
    shift = base - published["special_tokens"]["[BOS]"]
    ids = {name: number + shift for name, number in published["special_tokens"].items()}
    assert config["kimia_media_begin"] == ids["<|im_media_begin|>"]
    assert config["kimia_media_end"] == ids["<|im_media_end|>"]
    assert config["pad_token_id"] == published["pad"] + shift
    assert config["kimia_token_offset"] == base + len(names)


def test_text_survives_and_known_words_are_short(untrained: Path):
    tokenizer = TextTokenizer(untrained)
    for text in (CORPUS, "Grüße, 你好! 12 <|im_msg_end|>\n", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(CORPUS)) < len(CORPUS) / 2.5
    assert len(tokenizer.encode(" morning")) == 1


def test_merges_take_the_most_frequent_pair_first():
    assert train_merges("abab abab abab xy", 3) == [b"ab", b"abab", b" abab"]


def test_rates_give_the_published_hop(untrained: Path):
    config = VocoderConfig.from_directory(untrained / "vocoder")
    assert (config.hop_size, config.sample_rate) == (480, 24_000)


def test_other_sizes_load_too(tmp_path: Path):
    sizes = Sizes(
        merges=40,
        hidden=64,
        trunk_layers=3,
        fork_layer=1,
        mimo_layers=1,
        whisper=WhisperSize(width=32),
        speech=EncoderSize(width=64, layers=1, codes=96),
        dit=DiTSize(depth=1),
        vocoder=GeneratorSize(
            channels=128,
            rates=(5, 2, 2, 2, 2, 3, 2),
            kernels=(9, 4, 4, 4, 4, 5, 4),
            block_kernels=(3, 5),
        ),
    )
    write_miniature(tmp_path, sizes=sizes)
    for part in parts(tmp_path).values():
        part.load(torch.device("cpu"), torch.float32)
    assert TextTokenizer(tmp_path).base_tokens == sizes.base_tokens == 296


@pytest.mark.parametrize("head_rows", ["full", "track"])
def test_it_answers_speech_with_text_and_a_finite_wave(untrained: Path, head_rows: str):
    model = KimiAudio(str(untrained), device="cpu", dtype="float32", head_rows=head_rows)
    chat = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
    wav, text = model.generate(chat, output_type="both", max_new_tokens=60)
    assert text
    assert wav.dtype == torch.float32 and wav.shape[0] == 1
    assert wav.shape[1] > 0 and wav.shape[1] % 1920 == 0
    assert torch.isfinite(wav).all() and float(wav.std()) > 0.01 and float(wav.abs().max()) < 1.1


def test_it_answers_text_with_text(model: KimiAudio):
    chat = [{"role": "user", "message_type": "text", "content": "Hello, what time is it?"}]
    wav, text = model.generate(chat, output_type="text", max_new_tokens=30)
    assert wav is None and text


def test_speech_differs_from_silence_in_many_codes(model: KimiAudio):
    time = torch.arange(32_000) / 16_000
    sweep = 0.5 * torch.sin(2 * math.pi * (200 + 1000 * time) * time)
    codes = model.speech_codes.encode(sweep)
    assert len(set(codes.tolist())) > len(
        set(model.speech_codes.encode(torch.zeros(32_000)).tolist())
    )
    assert len(set(codes.tolist())) >= 8
