"""Step-Audio-EditX measured: stages of a clone, what was slow as published, streaming, variants."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from kimia_infer.api.editx import EditX
from kimia_infer.audio.files import wav_bytes
from kimia_infer.audio.native import load_native
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.step_audio_editx.checkpoint import Networks
from kimia_infer.models.step_audio_editx.flow import MelStream
from kimia_infer.models.step_audio_editx.frontend import RATE, limit_level, tokenizer_wave
from kimia_infer.models.step_audio_editx.packing import (
    FRAMES_PER_GROUP,
    GROUP,
    TOKENS_PER_SECOND,
    flow_rows,
)
from kimia_infer.models.step_audio_editx.prompts import PromptBuilder
from kimia_infer.models.step_audio_editx.reference import Reference, ReferenceReader
from kimia_infer.models.step_audio_editx.sampling import AudioRange, generate
from kimia_infer.models.step_audio_editx.speech import Speech, in_chunks
from kimia_infer.models.step_audio_editx.variants import VARIANTS, check_variant
from kimia_infer.models.step_audio_editx.vq02 import features
from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark.bench import Bench
from scripts.benchmark.editx_networks import SIZES, random_networks
from scripts.benchmark.editx_published import encode_by_chunks, step_with_all_pairs
from scripts.benchmark.measuring import parameter_bytes, synchronize
from scripts.benchmark.report import Table

SECONDS = 10
"""Of the reference, and, unless fewer decode steps are asked for, of the answer."""
TEXT = "What the voice of the recording says, in about as many words as ten seconds hold."

STAGES = ("front end", "VQ02", "VQ06", "speaker", "prompt", "decode", "flow", "vocoder", "total")
PROJECTED = {
    "front end": 0.1,
    "VQ02 + VQ06": 20.0,
    "decode": 2.0,
    "flow + vocoder": 2.0,
    "total": 24.0,
}
"""Of a study that is often quoted: a total by stopwatch, and stages that it assumes."""
PROJECTED_COLUMN = "projected by others, s"
PROJECTED_NOTE = (
    "Projected by others: a study of the published code on an L40S. Of these figures only the "
    "total was measured; the stages are assumed, and stand here for comparison of shares alone."
)

POSITIONS = (200, 1000, 2000)
SAME_CODES = 1e-3
"""Of the encoder's output, which is normalized: what one pass and the loop may differ by."""


class StageClock:
    """Seconds of each stage, by the clock and of processor time of this process."""

    def __init__(self, device: torch.device):
        self._device = device
        self.wall: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        name = {"front_end": "front end", "vq02": "VQ02", "vq06": "VQ06"}.get(stage, stage)
        synchronize(self._device)
        wall, processor = time.perf_counter(), time.process_time()
        yield
        synchronize(self._device)
        self.wall[name] = time.perf_counter() - wall
        self.processor[name] = time.process_time() - processor


def load_networks(bench: Bench, variant: str = "none") -> Networks:
    """Of the checkpoint, or random ones."""
    if bench.setup.weights is not None:
        return EditX(bench.directory, bench.device, bench.dtype, variant).networks
    return random_networks(SIZES[bench.setup.size or "mid"], bench.device, bench.dtype, variant)


def reference_sound(bench: Bench) -> bytes:
    """The question, over and over."""
    wave, rate = load_native(bench.question)
    wanted = SECONDS * rate
    return wav_bytes(np.tile(wave, -(-wanted // len(wave)))[:wanted], rate)


class Cloner:
    """Clones a voice stage by stage; the networks end no answer early, if they are random."""

    def __init__(self, bench: Bench, networks: Networks):
        self.networks, self._sound = networks, reference_sound(bench)
        self._steps = min(bench.steps, round(SECONDS * TOKENS_PER_SECOND)) // GROUP * GROUP
        self.forget()

    def forget(self) -> None:
        """Read the next reference anew."""
        self._reader = ReferenceReader(self.networks)

    def reference(self, clock: StageClock) -> Reference:
        return self._reader.read(self._sound, lambda text: None, timed=clock.timed)

    def tokens(self, reference: Reference, clock: StageClock) -> list[int]:
        tokenizer = self.networks.tokenizer
        with clock.timed("prompt"):
            prompt = PromptBuilder(tokenizer).clone("x", TEXT, reference.tokens, TEXT)
        self.prompt_tokens = len(prompt)
        audio = AudioRange(tokenizer.first_audio, tokenizer.turn_end)
        uniforms = SeededRandomness(0).uniforms("audio", self._steps)
        model, end = self.networks.language_model, tokenizer.turn_end
        with clock.timed("decode"):
            found = list(generate(model, prompt, uniforms, end, audio))
        return [token - tokenizer.first_audio for token in found]

    def clone(self, device: torch.device) -> tuple[StageClock, list[int]]:
        """One clone, its sound in one piece."""
        clock = StageClock(device)
        with clock.timed("total"):
            reference = self.reference(clock)
            tokens = self.tokens(reference, clock)
            randomness = SeededRandomness(0)
            speech = Speech(self.networks, reference, randomness, lambda: None, clock.timed)
            speech.push(tokens, last=True)
        return clock, tokens


def middle(clocks: list[StageClock], values: Callable[[StageClock], dict]) -> dict[str, float]:
    found = [values(clock) for clock in clocks]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def stages(bench: Bench) -> list[Table]:
    """Every stage of a clone: the first one of a process, later ones, and with a kept reference."""
    start = time.perf_counter()
    networks = load_networks(bench)
    loaded = time.perf_counter() - start
    cloner = Cloner(bench, networks)
    cold, tokens = cloner.clone(bench.device)
    warm, kept = [], []
    for _ in range(bench.runs):
        cloner.forget()
        warm.append(cloner.clone(bench.device)[0])
        kept.append(cloner.clone(bench.device)[0])
    columns = {
        "cold, s": cold.wall,
        "warm, s": middle(warm, lambda clock: clock.wall),
        "warm, CPU s": middle(warm, lambda clock: clock.processor),
        "reference kept, s": middle(kept, lambda clock: clock.wall),
        "reference kept, CPU s": middle(kept, lambda clock: clock.processor),
    }
    rows: list[dict[str, str | float | None]] = [{"stage": "load", "cold, s": loaded}]
    for stage in STAGES:
        rows.append({"stage": stage, **{name: c.get(stage) for name, c in columns.items()}})
    by_stage = {row["stage"]: row for row in rows}
    for stage, projected in PROJECTED.items():
        by_stage.setdefault(stage, {"stage": stage})[PROJECTED_COLUMN] = projected
    rows = list(by_stage.values())
    made = "" if bench.setup.weights else " (load: random weights are made; no speaker network)"
    note = (
        f"{SECONDS} s of reference, {cloner.prompt_tokens} tokens of prompt, {len(tokens)} of "
        f"answer, {len(tokens) / TOKENS_PER_SECOND:.1f} s of sound."
    )
    return [Table(f"Stages of a clone{made}", rows, [note, PROJECTED_NOTE])]


@torch.inference_mode()
def seconds(action: Callable[[], Tensor], device: torch.device) -> tuple[float, float, Tensor]:
    """By the clock, of processor time, and the result."""
    clock = StageClock(device)
    with clock.timed("it"):
        found = action()
    return clock.wall["it"], clock.processor["it"], found


def race(
    ways: dict[str, Callable[[], Tensor]], runs: int, device: torch.device
) -> dict[str, tuple[float, float, Tensor]]:
    """Median seconds of each way over interleaved runs, after a warm-up, and its result."""
    results: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, action in ways.items():
            results[name].append(seconds(action, device))
    return {
        name: (
            statistics.median(wall for wall, _, _ in found[1:]),
            statistics.median(processor for _, processor, _ in found[1:]),
            found[-1][2],
        )
        for name, found in results.items()
    }


def vq02_loop(bench: Bench) -> list[Table]:
    """VQ02's encoder in one pass beside the published loop over chunks."""
    vq02 = load_networks(bench).vq02
    wave, rate = load_native(reference_sound(bench))
    heard = tokenizer_wave(limit_level(torch.from_numpy(wave)), rate).to(bench.device)
    rows = vq02.normalization(features(heard))
    ways: dict[str, Callable[[], Tensor]] = {
        "one pass": lambda: vq02.encoder([rows])[0],
        "loop over chunks, as published": lambda: encode_by_chunks(vq02.encoder, rows),
    }
    found = race(ways, bench.runs, bench.device)
    table_rows = [
        {"VQ02": name, "s": wall, "CPU s": processor}
        for name, (wall, processor, _) in found.items()
    ]
    (_, ours, one), (_, published, loop) = found.values()
    equal = int((vq02.nearest(one) == vq02.nearest(loop)).sum())
    difference = float((one - loop).abs().max())
    problems = [] if difference < SAME_CODES else [f"they differ by {difference:.2e}"]
    note = (
        f"{len(rows)} rows, {equal} codes equal, largest difference {difference:.1e}; the loop "
        f"takes {published / ours:.1f} times the CPU seconds."
    )
    return [Table(f"VQ02 of {len(heard) / RATE:.1f} s", table_rows, [note], problems)]


def decode_bias(bench: Bench) -> list[Table]:
    """A decode step beside one with the bias of all pairs of positions in every layer."""
    model, rows = load_networks(bench).language_model, []
    cache = model.new_cache(max(POSITIONS) + 1)
    token = torch.tensor([5], device=bench.device)
    for position in POSITIONS:
        ways: dict[str, Callable[[], Tensor]] = {
            "": partial(model.step, token, position, cache),
            "all pairs, ": partial(step_with_all_pairs, model, token, position, cache),
        }
        row: dict[str, float] = {"position": position}
        found = race(ways, bench.runs, bench.device)
        for name, (wall, processor, _) in found.items():
            row |= {f"{name}s": wall, f"{name}CPU s": processor}
        rows.append(row | {"times": row["all pairs, CPU s"] / row["CPU s"]})
    return [Table("A decode step, with the bias of one row and, as published, of all pairs", rows)]


@torch.inference_mode()
def streaming(bench: Bench) -> list[Table]:
    """Sound in chunks beside sound in one piece: what comes first, and what differs."""
    networks = load_networks(bench)
    cloner, clock = Cloner(bench, networks), StageClock(bench.device)
    reference = cloner.reference(clock)
    tokens = cloner.tokens(reference, clock)
    chunks = [chunk for chunk, _ in in_chunks(iter(tokens))]
    rows, mels = [], {}
    for name, parts in {"one piece": [tokens], "chunks": chunks}.items():
        draws = SeededRandomness(0).noise_stream(0, networks.flow.config.mel_bins)
        voice = reference.rows, reference.mel, reference.speaker

        def noise(frames: int, draws: Callable[[int], Tensor] = draws) -> Tensor:
            return draws(frames).to(bench.device)

        stream, made, taken = MelStream(networks.flow, *voice, noise), [], []
        for part in parts:
            pushed = flow_rows(part).to(bench.device)
            push = partial(stream.push, pushed, part is parts[-1])
            wall, processor, mel = seconds(push, bench.device)
            made.append(mel)
            taken.append((wall, processor))
        mels[name] = torch.cat(made)
        rows.append(
            {
                "flow": name,
                "first chunk, tokens": len(parts[0]),
                "first chunk, s": taken[0][0],
                "all, s": sum(wall for wall, _ in taken),
                "all, CPU s": sum(processor for _, processor in taken),
            }
        )
    return [Table("Flow in one piece and in chunks", rows, seam_notes(mels, chunks))]


def seam_notes(mels: dict[str, Tensor], chunks: list[list[int]]) -> list[str]:
    """How far frames beside seams are apart, in both, against other neighbours."""
    ends, frames = [], -FRAMES_PER_GROUP  # less the look-ahead
    for chunk in chunks[:-1]:
        frames += len(chunk) // GROUP * FRAMES_PER_GROUP
        ends.append(frames)
    if not ends:
        return ["The answer is one chunk."]
    notes = []
    for name, mel in mels.items():
        steps = (mel[1:] - mel[:-1]).abs().mean(1)
        at = steps[torch.tensor(ends, device=steps.device) - 1].mean()
        notes.append(
            f"{name}: neighbouring frames are {at:.3f} apart where chunks meet and "
            f"{steps.mean():.3f} on average (mean of |log mel|)."
        )
    apart = (mels["chunks"] - mels["one piece"]).abs().mean()
    return [*notes, f"Frames of the two differ by {apart:.3f} on average."]


def compare_variants(bench: Bench) -> list[Table]:
    """Whole clones with the language model in each form, one after the other."""
    rows: list[dict[str, str | float]] = []
    notes = ["Whole clones with a reference that is kept; decode has the prompt in it."]
    for variant in VARIANTS:
        try:
            check_variant(variant, bench.device)
        except ConfigurationError as error:
            notes.append(f"Without {variant}: {error}")
            continue
        networks = load_networks(bench, variant)
        cloner = Cloner(bench, networks)
        cloner.clone(bench.device)
        clocks = [cloner.clone(bench.device)[0] for _ in range(bench.runs)]
        wall = middle(clocks, lambda clock: clock.wall)
        processor = middle(clocks, lambda clock: clock.processor)
        rows.append(
            {
                "quantization": variant,
                "language model, GB": stored_bytes(networks.language_model) / 1e9,
                "decode, s": wall["decode"],
                "decode, CPU s": processor["decode"],
                "total, s": wall["total"],
                "total, CPU s": processor["total"],
            }
        )
        del networks, cloner
        gc.collect()
    return [Table(f"Variants of the language model, {bench.runs} runs, medians", rows, notes)]


def stored_bytes(model: nn.Module) -> int:
    return parameter_bytes(model) + sum(buffer.nbytes for buffer in model.buffers())
