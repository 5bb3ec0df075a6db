"""Training of the detokenizer: it sees what streaming sees, learns, goes on, and is served."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.config import DiTConfig
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, MelStream
from kimia_infer.models.kimi_audio.dit import DiT, dit_component
from kimia_infer.models.kimi_audio.flow import (
    CACHE_TIMESTEP,
    FlowNetwork,
    Rows,
    StreamConfig,
    ode_timesteps,
)
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from kimia_infer.training.config import read_config
from kimia_infer.training.plan import MicroBatch
from kimia_infer.training.run_directory import FINAL, PLOT, all_checkpoints, newest_intact
from kimia_infer.training.tasks.config import DetokenizerTrainingConfig
from kimia_infer.training.tasks.detokenizer import (
    DetokenizerNetwork,
    RecordingReader,
    mel_statistics,
    new_dit,
    train_detokenizer,
)
from kimia_infer.training.tasks.flow_matching import Chunk, FlowMatcher, chunk_layout, draw_chunks
from kimia_infer.training.tasks.recordings import Recordings, find_recordings
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.graphs import graphs_for
from tests.paths import MINI
from tests.training.runs import interrupt, losses, write_sound, write_sounds

CPU = torch.device("cpu")
STREAM = StreamConfig(chunk_codes=5, look_ahead_codes=2, cache_frames=20, ode_points=4)
CHUNKS = [Chunk(0, 3, 5), Chunk(3, 8, 10), Chunk(8, 13, 15), Chunk(13, 18, 18)]
PUSHED = (5, 5, 5, 3)  # what makes these chunks: the look-ahead comes again with the next one


def tiny_config(**changes) -> DiTConfig:
    sizes = {"depth": 2, "hidden_size": 24, "heads": 2, "mlp_ratio": 2.0, "mel_bins": 5, "codes": 9}
    rest = {"rope_base": 10000.0, "rope_interpolation": 1.0, "mel_mean": -4.0, "mel_std": 3.0}
    return DiTConfig(**{**sizes, **rest, **changes})


def random_dit() -> DiT:
    torch.manual_seed(0)
    return DiT(tiny_config())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder, 6, 0.5, 0.2)
    return folder


def settings(sounds: Path, output: Path, *assignments: str) -> DetokenizerTrainingConfig:
    known = [
        f"data={sounds}", f"model={MINI}", f"output={output}", "device=cpu", "size.width=32",
        "size.depth=2", "size.heads=2", "batch_size=2", "crop_codes=10", "learning_rate=3e-3",
        *assignments,
    ]  # fmt: skip
    return read_config(DetokenizerTrainingConfig, None, known)


@torch.no_grad()
def test_the_attention_of_training_is_that_of_streaming(monkeypatch):
    dit = random_dit()
    codes = torch.randint(0, 9, (CHUNKS[-1].stop,))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    evaluate = Rows.velocity

    def recorded(rows, x, conditioning):
        velocity = evaluate(rows, x, conditioning)
        seen.append((x.clone(), velocity.clone()))
        return velocity

    monkeypatch.setattr(Rows, "velocity", recorded)
    generator = torch.Generator().manual_seed(1)
    network = FlowNetwork(dit, STREAM, graphs_for(CPU), (1,))
    stream = MelStream(network, lambda _, n: torch.randn(n, 5, generator=generator))
    for number, part in enumerate(codes.split(PUSHED), 1):
        final = number == len(PUSHED)
        chunk = stream.chunk(part.tolist(), final)
        stream.advance(part.tolist(), final, *network.solve([chunk]))
    steps = ode_timesteps(STREAM.ode_points)
    per_chunk = len(steps) + 1  # the last one makes the past, which a final chunk does not
    layout = chunk_layout(CHUNKS, STREAM.cache_frames // 4)
    finished = seen[len(steps) :: per_chunk]
    assert len(seen) == len(CHUNKS) * per_chunk - 1
    for step, timestep in enumerate(steps):
        noisy = seen[step::per_chunk]
        frames, expected = (
            torch.cat([pair[side] for pair in finished + noisy])[None] for side in (0, 1)
        )
        times = torch.where(layout.owner < 0, CACHE_TIMESTEP, timestep)[None]
        # A second crop, longer than the padded first, must not change it.
        batch = [torch.cat([x, x.flip(1)]) for x in (frames, codes[layout.codes][None], times)]
        lengths = torch.tensor([len(codes)] * 2)
        found = FlowMatcher(dit, STREAM).velocities(*batch, layout, lengths)
        torch.testing.assert_close(found[:1], expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_padding_changes_nothing():
    matcher, codes = FlowMatcher(random_dit()), torch.randint(0, 9, (1, 12))
    short, whole = chunk_layout([Chunk(0, 8, 8)], 99), chunk_layout([Chunk(0, 12, 12)], 99)
    frames = torch.randn(1, 48, 5)
    times = torch.full((1, 12), 300)
    alone = matcher.velocities(frames[:, :32], codes[:, :8], times[:, :8], short, torch.tensor([8]))
    padded = matcher.velocities(frames, codes, times, whole, torch.tensor([8]))
    torch.testing.assert_close(padded[:, :32], alone, rtol=0, atol=2e-6)
    assert padded.isfinite().all()


def test_chunks_cover_every_crop():
    generator = torch.Generator().manual_seed(0)
    sizes, aheads = set(), set()
    for length in range(1, 60):
        chunks = draw_chunks(length, 7, 37, 12, generator)
        assert [c.start for c in chunks] + [length] == [0] + [c.stop for c in chunks]
        assert all(7 <= c.stop - c.start <= 37 for c in chunks[:-1])
        assert all(c.stop <= c.seen <= min(c.stop + 12, length) for c in chunks)
        sizes |= {c.stop - c.start for c in chunks[:-1]}
        aheads |= {c.seen - c.stop for c in chunks}
        layout = chunk_layout(chunks, 225)
        assert (layout.owner < 0).sum() == chunks[-1].start
        assert layout.visible.diagonal().all()
    assert {min(sizes), max(sizes)} <= set(range(7, 38))
    assert len(sizes) > 10
    assert {0, 12} <= aheads


def test_the_loss_is_that_of_the_straight_flow():
    """A network whose velocity is zero leaves the mean square of (mel - noise)."""
    matcher = FlowMatcher(new_dit(tiny_config()))
    mel = torch.randn(3, 40, 5)
    layout = chunk_layout([Chunk(0, 10, 10)], 225)
    arguments = (torch.zeros(3, 10).long(), torch.tensor([10, 6, 10]), layout, torch.zeros(3) > 0)
    found = matcher.loss(mel, *arguments, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, 1, generator=generator)
    noise = torch.randn(3, 10, 4, 5, generator=generator).flatten(1, 2)
    expected = (mel - noise).square().mean(2)
    means = torch.stack([expected[0].mean(), expected[1, :24].mean(), expected[2].mean()])
    torch.testing.assert_close(found, means)


@torch.no_grad()
def test_what_the_network_is_told(monkeypatch):
    """Finished frames are clean, at the time of the cache; noisy ones are on the straight line."""
    matcher, told = FlowMatcher(random_dit()), {}
    velocities = matcher.velocities

    def spied(frames, codes, times, *rest):
        told.update(frames=frames, codes=codes, times=times)
        return velocities(frames, codes, times, *rest)

    monkeypatch.setattr(matcher, "velocities", spied)
    layout = chunk_layout(CHUNKS, 225)
    mel, codes = torch.randn(2, 72, 5), torch.randint(0, 9, (2, 18))
    lengths, dropped = torch.tensor([18, 18]), torch.tensor([False, True])
    matcher.loss(mel, codes, lengths, layout, dropped, torch.Generator().manual_seed(2))
    count = int((layout.owner < 0).sum())
    assert count == CHUNKS[-1].start
    torch.testing.assert_close(told["frames"][:, : 4 * count], mel[:, : 4 * count])
    assert (told["times"][:, :count] == CACHE_TIMESTEP).all()
    assert (told["codes"][1] == 9).all()
    assert torch.equal(told["codes"][0], codes[0, layout.codes])
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(2, len(CHUNKS), generator=generator)
    noise = torch.randn(2, len(layout.codes), 4, 5, generator=generator)
    for chunk in range(len(CHUNKS)):
        mine = layout.owner == chunk
        place = CHUNKS[chunk]
        assert layout.codes[mine].tolist() == list(range(place.start, place.seen))
        assert torch.equal(
            told["times"][:, mine], (drawn[:, chunk, None] * 1000).long().expand(-1, mine.sum())
        )
        time = drawn[:, chunk, None, None, None]
        truth = mel.unflatten(1, (-1, 4))[:, place.start : place.seen]
        line = (1 - time) * noise[:, mine] + time * truth
        torch.testing.assert_close(told["frames"].unflatten(1, (-1, 4))[:, mine], line)


def test_gradients_reach_everything(sounds: Path, tmp_path: Path):
    run = settings(sounds, tmp_path, "condition_dropout=0.5", "min_chunk=0.1", "max_chunk=0.2")
    reader = RecordingReader(MINI)
    torch.manual_seed(3)
    dit = DiT(tiny_config(mel_bins=reader.mel.mel_bins, codes=reader.codes))
    network = DetokenizerNetwork(dit, {}, run).train()
    samples = Recordings(find_recordings(sounds, tmp_path), reader.read, 1.0)
    torch.manual_seed(4)
    sum(network(samples[MicroBatch(tuple(range(6)), (1 / 6,) * 6)]).values()).sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("average."):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert dit.semantic_token_embedding.weight.grad[-1].abs().max() > 0  # dropped codes


def test_a_run_learns_and_is_served(sounds: Path, tmp_path: Path):
    result = train_detokenizer(settings(sounds, tmp_path, "max_steps=40", "eval_every=20"))
    found = losses(result)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert len(losses(result, "eval_loss")) == 2
    assert (tmp_path / PLOT).stat().st_size > 1_000
    folder = tmp_path / FINAL / "audio_detokenizer"
    dit = dit_component(folder).load(CPU, torch.float32)
    detokenizer = Detokenizer(dit, vocoder_component(MINI / "vocoder").load(CPU, torch.float32))
    codes = torch.randint(0, dit.config.codes, (35,))
    wave = detokenizer.synthesize(codes, lambda _, frames: torch.zeros(frames, 80))
    assert wave.shape == (1, 35 * detokenizer.samples_per_code)
    assert wave.isfinite().all()
    reader = RecordingReader(MINI)
    mels = [
        reader.read(s)["mel"] for s in find_recordings(sounds, sounds)[1:]
    ]  # the first is for evaluation
    values = torch.cat(mels).flatten().double()
    assert dit.config.mel_mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert dit.config.mel_std == pytest.approx(values.std(correction=0).item(), abs=1e-6)
    # Another run begins with it, and keeps its sizes and statistics.
    other = settings(
        sounds, tmp_path / "more", f"initial={folder}", "max_steps=1", "learning_rate=0",
        "size.width=64",
    )  # fmt: skip
    train_detokenizer(other)
    further = tmp_path / "more" / FINAL / "audio_detokenizer"
    texts = [yaml.safe_load((f / "config.yaml").read_text()) for f in (folder, further)]
    assert texts[0] == texts[1]
    before, after = (load_file(f / "model.safetensors") for f in (folder, further))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_resumed_run_equals_an_uninterrupted_one(sounds: Path, tmp_path: Path):
    options = ["max_steps=5", "save_every=2", "accumulation=2", "batch_size=1"]
    whole = train_detokenizer(settings(sounds, tmp_path / "whole", *options))
    parts = settings(sounds, tmp_path / "parts", *options)
    interrupt(lambda: train_detokenizer(parts), step=3)
    assert [path.name for path in all_checkpoints(tmp_path / "parts")] == ["step-00000002"]
    resumed = train_detokenizer(parts, resume=True)
    for name in ("loss", "eval_loss"):
        assert losses(resumed, name) == losses(whole, name)
    expected, found = (
        load_file(tmp_path / run / FINAL / "audio_detokenizer" / "model.safetensors")
        for run in ("whole", "parts")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigurationError, match=r"^crop_codes: 9, but"):
        other = settings(sounds, tmp_path / "parts", *options, "crop_codes=9")
        train_detokenizer(other, resume=True)
    with pytest.raises(ConfigurationError, match="--resume"):
        train_detokenizer(parts)


@pytest.mark.parametrize("name", ["state.safetensors", "kept.safetensors"])
def test_a_run_resumes_before_a_damaged_checkpoint(
    sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
):
    run = settings(sounds, tmp_path, "max_steps=3", "save_every=1", "keep_checkpoints=2")
    whole = train_detokenizer(run)
    older, newer = all_checkpoints(tmp_path)
    path = newer / "state" / name
    os.truncate(path, path.stat().st_size - 100)
    resumed = train_detokenizer(run, resume=True)
    (warning,) = [r.getMessage() for r in caplog.records if str(path) in r.getMessage()]
    assert warning.endswith(f"continuing from the older {older}")
    assert losses(resumed) == losses(whole)
    assert newest_intact(tmp_path) == (newer, [])


def test_statistics_do_not_depend_on_how_sounds_are_cut():
    values = {4: 1.0, 12: 5.0}
    mels = Recordings(
        list(values),
        lambda n: {"mel": torch.full((n, 2), values[n]), "seconds": 1.0},
        0.0,
    )
    assert mel_statistics(mels) == pytest.approx((4.0, 3.0**0.5))


def test_bad_data_stops_before_training(sounds: Path, tmp_path: Path):
    def lines(*values: object) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    good = [{"audio": str(sounds / f"{i}.wav")} for i in range(3)]
    short = write_sound(tmp_path / "short.wav", 0.05, 0)
    for bad, message in (
        ({"audio": "nowhere.wav"}, "nowhere.wav"),
        ({"text": "yes"}, "audio: missing"),
        ({"audio": good[0]["audio"], "codes": []}, "codes: expected a list"),
        ({"audio": good[0]["audio"], "codes": [9999] * 6}, "codes: 9999 is not below"),
        (
            {"audio": good[0]["audio"], "codes": [1] * 60},
            "codes: 60, but the recording is as long as",
        ),
        ({"audio": str(short)}, "at least 1920 are needed"),
        (["x.wav"], "expected an object"),
    ):
        with pytest.raises(DataError) as caught:
            train_detokenizer(settings(lines(good[0], bad, *good[1:]), tmp_path / "run"))
        assert "data.jsonl:2: " in str(caught.value)
        assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
    data = lines(good[0], {"audio": "nowhere.wav"}, *good[1:])
    skipping = settings(data, tmp_path / "run", "bad_lines=skip", "max_steps=1")
    assert train_detokenizer(skipping).complete
    listed = tmp_path / "list.txt"
    listed.write_text(f"{sounds / '0.wav'}\n\nnowhere.wav\n")
    with pytest.raises(DataError, match=r"list.txt:3: .*nowhere.wav"):
        train_detokenizer(settings(listed, tmp_path / "x"))
    with pytest.raises(DataError, match="one recording is not enough"):
        train_detokenizer(settings(lines(good[0]), tmp_path / "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no audio files"):
        train_detokenizer(settings(tmp_path / "empty", tmp_path / "x"))
    with pytest.raises(ConfigurationError, match=r"^max_chunk: 0.3 is less than min_chunk"):
        settings(sounds, tmp_path, "max_chunk=0.3")
    with pytest.raises(
        ConfigurationError, match=r"crop_code: unknown field; did you mean crop_codes"
    ):
        settings(sounds, tmp_path, "crop_code=3")
