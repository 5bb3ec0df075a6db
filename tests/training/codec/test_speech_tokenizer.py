"""Training of the speech tokenizer: its codes come alive, it learns, goes on, is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import SpeechTokenizerConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, feature_extractor
from kimia_infer.training.config import read_config
from kimia_infer.training.run_directory import FINAL, TrainingError
from kimia_infer.training.tasks.config import TokenizerTrainingConfig
from kimia_infer.training.tasks.recognizer import Recognizer, Units, ctc, frames_needed
from kimia_infer.training.tasks.recordings import Examples, find_recordings
from kimia_infer.training.tasks.speech_tokenizer import (
    RunningCodeBook,
    TokenizerNetwork,
    new_config,
    new_tokenizer,
    read_spoken,
    train_tokenizer,
)
from kimia_infer.utils.errors import ConfigurationError
from tests.training.runs import SPOKEN_TEXTS, interrupt, losses, write_spoken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_spoken(tmp_path_factory.mktemp("spoken"), SPOKEN_TEXTS)


def settings(data: Path, output: Path, *assignments: str) -> TokenizerTrainingConfig:
    known = [
        f"data={data}", f"output={output}", "device=cpu", "size.width=32", "size.heads=2",
        "size.layers=1", "size.codes=12", "upper_layers=1", "batch_size=3", *assignments,
    ]  # fmt: skip
    return read_config(TokenizerTrainingConfig, None, known)


def examples(run: TokenizerTrainingConfig, data: Path, *indices: int) -> Examples:
    extractor = feature_extractor(Path(), 128)
    sounds = find_recordings(data, Path())
    items = tuple(read_spoken(sounds[index], run, extractor) for index in indices)
    return Examples(items, torch.full((len(items),), 1 / len(items)), ["a"] * len(items))


def network_of(run: TokenizerTrainingConfig) -> TokenizerNetwork:
    torch.manual_seed(0)
    values = new_config(run)
    config = SpeechTokenizerConfig.from_json(values, Path("size"))
    return TokenizerNetwork(new_tokenizer(config), values, run, Units.of(SPOKEN_TEXTS))


def book_of(codes: int, width: int, dead_below: float = 0.05) -> RunningCodeBook:
    torch.manual_seed(0)
    return RunningCodeBook(nn.Embedding(codes, width).requires_grad_(False), 0.9, dead_below)


def nearest(book: RunningCodeBook, vectors: torch.Tensor) -> torch.Tensor:
    return torch.cdist(vectors, book.table.weight).argmin(1)


def test_codes_follow_their_vectors():
    book = book_of(4, 3)
    centers = 10 * torch.eye(4, 3) + torch.arange(4)[:, None]
    book.table.weight.copy_(centers + 0.5)
    book.keep_table()
    for step in range(60):
        torch.manual_seed(step)
        vectors = centers.repeat(20, 1) + 0.1 * torch.randn(80, 3)
        book.collect(vectors, nearest(book, vectors))
        assert book.update() == 0
    torch.testing.assert_close(book.table.weight.data, centers, rtol=0, atol=0.1)
    torch.testing.assert_close(book.counts, torch.full((4,), 20.0), rtol=0.05, atol=0)


def test_dead_codes_come_alive():
    """All vectors are far from the table: it moves there, and nearly every code is chosen."""
    book = book_of(32, 4)
    revived, used = [], []
    for step in range(80):
        torch.manual_seed(step)
        vectors = 50 + torch.randn(200, 4)
        chosen = nearest(book, vectors)
        used.append(len(chosen.unique()))
        book.collect(vectors[:100], chosen[:100])  # several passes make a step
        book.collect(vectors[100:], chosen[100:])
        revived.append(book.update())
    assert revived[0] == 32
    assert used[0] == 1
    assert used[-1] >= 30
    # A code put out of reach comes back; without revival it would not.
    book.table.weight[5] = book.sums[5] = 1e4
    never = book_of(32, 4, dead_below=0.0)
    never.table.weight.copy_(book.table.weight)
    never.counts.copy_(book.counts)
    never.sums.copy_(book.sums)
    for step in range(80):
        torch.manual_seed(100 + step)
        vectors = 50 + torch.randn(200, 4)
        for each in (book, never):
            each.collect(vectors, nearest(each, vectors))
            each.update()
    vectors = 50 + torch.randn(2_000, 4)
    assert 5 in nearest(book, vectors)
    assert 5 not in nearest(never, vectors)


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_gradients_reach_everything(data: Path, tmp_path: Path, progress: float):
    run = settings(data, tmp_path, "word_weight=1")
    network = network_of(run).train()
    network.progress = progress
    losses = network(examples(run, data, 0, 1, 5))
    sum(losses.values()).sum().backward()
    for name, parameter in network.named_parameters():
        if name == "tokenizer.codebook.weight":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert (losses["commitment"].min() > 0) == (progress > 0)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_gives_what_its_sounds_give(data: Path, tmp_path: Path, training: bool):
    run = settings(data, tmp_path, "word_weight=1", "quantize_from=0")
    network = network_of(run).train(training)
    joined = network(examples(run, data, 0, 3, 5))
    for place, index in enumerate((0, 3, 5)):
        alone = network(examples(run, data, index))
        for name, expected, found in zip(alone, alone.values(), joined.values(), strict=True):
            torch.testing.assert_close(
                found[place], expected[0], rtol=1e-5, atol=1e-5, msg=f"{name} of {index}"
            )


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_only_codes_reach_the_recognizer(data: Path, tmp_path: Path, progress: float):
    """Once codes are used; gradients pass to the vectors as if they had been used."""
    network = network_of(settings(data, tmp_path)).train()
    network.progress = progress
    vectors = torch.randn(2, 5, 32, requires_grad=True)
    weight = torch.randn(2, 5, 32)
    found, _ = network.quantized(vectors, torch.tensor([5, 3]))
    table = network.tokenizer.codebook.weight
    codes = torch.cdist(vectors.detach(), table).argmin(-1)
    expected = table[codes] if progress else vectors
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (found * weight).sum().backward()
    torch.testing.assert_close(vectors.grad, weight)


def test_what_ctc_needs():
    units = Units.of(["Aab  ba", "ab c"])
    assert units.characters == (" ", "a", "b", "c")
    assert units.words == ("aab", "ab", "ba", "c")
    assert units.character_ids("AB").tolist() == [2, 3]
    assert units.word_ids("ba  aab").tolist() == [3, 1]
    target = units.character_ids("aab")
    for room, possible in ((frames_needed("aab"), True), (frames_needed("aab") - 1, False)):
        loss = ctc(torch.zeros(1, room, 5), torch.tensor([room]), [target])
        assert bool(loss.isfinite()) == possible


def test_the_recognizer_does_not_hear_padding():
    torch.manual_seed(0)
    recognizer = Recognizer(8, 2, 5, 0, 0)
    for parameter in recognizer.parameters():  # norms have a bias once they are trained
        torch.nn.init.normal_(parameter, std=0.3)
    vectors = torch.randn(1, 6, 8)
    counts = torch.tensor([4])
    expected = recognizer(vectors[:, :4], counts)
    torch.testing.assert_close(recognizer(vectors, counts)[:, :16], expected, rtol=0, atol=1e-6)


def test_a_run_learns_and_is_served(data: Path, tmp_path: Path):
    result = train_tokenizer(
        settings(data, tmp_path, "max_steps=60", "save_every=60", "learning_rate=5e-3")
    )
    found = losses(result, "characters_loss")
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    assert losses(result, "commitment_loss")[0] == 0 < losses(result, "commitment_loss")[-1]
    folder = tmp_path / FINAL / SPEECH_TOKENIZER_FOLDER
    codes = SpeechCodes(speech_tokenizer_component(folder).load(CPU, torch.float32), folder)
    wave = load_audio(data.parent / "5.wav")
    served = codes.encode(wave)
    assert len(served) == -(-len(wave) // 1280)
    sounds = [codes.encode(load_audio(data.parent / f"{index}.wav")) for index in range(6)]
    assert len(torch.cat(sounds).unique()) >= 6
    stored = load_file(folder / "model.safetensors")
    assert {"codebook.weight", "ema_count", "ema_weight", "conv1.weight"} <= stored.keys()
    assert not [name for name in stored if "recognizer" in name or "characters" in name]
    further = settings(data, tmp_path / "more", f"initial={folder}", "max_steps=1",
                       "learning_rate=0", "size.codes=99", "code_decay=0.99")  # fmt: skip
    train_tokenizer(further)
    again = tmp_path / "more" / FINAL / SPEECH_TOKENIZER_FOLDER
    assert json.loads((again / "config.json").read_text())["quantize_vocab_size"] == 12
    assert torch.equal(
        load_file(again / "model.safetensors")["conv1.weight"], stored["conv1.weight"]
    )


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path):
    options = ["max_steps=6", "save_every=2", "accumulation=2", "batch_size=2", "quantize_from=0.3"]
    whole = train_tokenizer(settings(data, tmp_path / "whole", *options))
    parts = settings(data, tmp_path / "parts", *options)
    interrupt(lambda: train_tokenizer(parts), step=3)
    resumed = train_tokenizer(parts, resume=True)
    for name in ("loss", "eval_loss", "commitment_loss"):
        assert losses(resumed, name) == losses(whole, name)
    expected, found = (
        load_file(tmp_path / run / FINAL / SPEECH_TOKENIZER_FOLDER / "model.safetensors")
        for run in ("whole", "parts")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace("a dog", "a cat"))
    with pytest.raises(TrainingError, match="trained with other units; use the same data"):
        train_tokenizer(settings(other, tmp_path / "parts", *options), resume=True)


def test_bad_data_and_settings_stop_before_training(data: Path, tmp_path: Path):
    sound = str(data.parent / "0.wav")
    path = tmp_path / "data.jsonl"
    for bad, message in (
        ({"audio": sound}, "text: missing"),
        ({"audio": sound, "text": " "}, "text: expected some text"),
        ({"audio": sound, "text": "a" * 80}, "text: 80 characters cannot be spoken in 0.64 s"),
        ({"audio": "nowhere.wav", "text": "yes"}, "nowhere.wav"),
    ):
        lines = [{"audio": sound, "text": "yes"}, bad]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError) as caught:
            train_tokenizer(settings(path, tmp_path / "run"))
        assert f"{path}:2: " in str(caught.value)
        assert message in str(caught.value)
    with pytest.raises(DataError, match="texts are needed"):
        train_tokenizer(settings(data.parent, tmp_path / "run"))
    with pytest.raises(DataError, match=r"longer than the permitted 0\.5 s"):
        train_tokenizer(settings(data, tmp_path / "run", "max_seconds=0.5"))
    with pytest.raises(ConfigurationError, match="character_weight: 0, and so are word_weight"):
        settings(data, tmp_path, "character_weight=0")
    assert not (tmp_path / "run").exists()
