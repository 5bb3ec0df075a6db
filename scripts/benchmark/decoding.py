"""Seconds per decode step: the library's loop in every mode beside the plain one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kimia_infer.api.kimia import POLL_INTERVAL
from kimia_infer.engine.decode import ControlTokens, DecodeInput, Decoder, Generation
from kimia_infer.layers.attention import KV_CACHES
from kimia_infer.layers.onednn import use_onednn
from kimia_infer.layers.quantization import QuantizedLinear
from kimia_infer.layers.sampler import Sampling, SeededRandomness, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from scripts.benchmark.measuring import (
    BOTH,
    MODES,
    copy_bandwidth,
    memory,
    step_bytes,
    synchronize,
)
from scripts.benchmark.plain_language_model import PlainGeneration
from scripts.benchmark.report import Cell, Table

PROMPT_LENGTH = 128
LONG_RUN_STEPS = 1500
WINDOW = 100
"""Steps at both ends of a long run."""
SEED = 0
GREEDY = Sampling(audio=TrackSampling(0.0, 5, 1.0, 64), text=TrackSampling(0.0, 5, 1.0, 16))
CPU_TURN = 4
"""On the CPU the loops take turns of this many steps, so that other work on the machine slows all
of them alike. An accelerator is not shared: there a turn is a whole run."""

Loop = Generation | PlainGeneration


def poll_interval(device: torch.device) -> int:
    """Steps between two polls of the device, as KimiAudio has it."""
    return 1 if device.type == "cpu" else POLL_INTERVAL


def first_timed_step(device: torch.device) -> int:
    """Before it there are the prompt, what is done once, and the switch at the end of the text."""
    return 8 if device.type == "cpu" else 4 * POLL_INTERVAL


@dataclass
class Contender:
    """One way of decoding and the seconds per step that it took."""

    name: str
    mode: str
    head_rows: str
    model: LanguageModel
    make: Callable[[], Loop]
    cache_dtype: torch.dtype | None = None
    seconds: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.loop = self.make()
        self.run: Any = self.loop.run()

    def take_turn(self, steps: int | None = None) -> bool:
        """Go on for ``steps``, or to the end with None; False once there is no more."""
        device = self.model.device
        synchronize(device)
        before = first = self.loop.launched
        start = time.perf_counter()
        for _ in self.run:
            now, after = time.perf_counter(), self.loop.launched
            if before >= first_timed_step(device):
                self.seconds.append((now - start) / (after - before))
            if steps is not None and after - first >= steps:
                return True
            before, start = after, time.perf_counter()
        return False

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def random_prompt(model: LanguageModel) -> tuple[DecodeInput, ControlTokens]:
    """Ids of both tracks, and control tokens that are never sampled: no run ends early."""
    config, length = model.config, PROMPT_LENGTH
    generator = torch.Generator().manual_seed(SEED)
    audio = torch.randint(config.base_tokens, config.vocab_size, (1, length), generator=generator)
    text = torch.randint(1, config.base_tokens, (1, length), generator=generator)
    prompt = DecodeInput(audio.to(model.device), text.to(model.device))
    return prompt, ControlTokens(SpecialTokens.after(config.base_tokens).text_blank, -1, (-1,))


def with_cut_heads(model: LanguageModel) -> LanguageModel:
    """``model`` as KimiAudio runs it with ``head_rows="track"``.

    It shares its parameters with the plain loop, which does not use its linear layers.
    """
    cut = model.with_cut_heads()
    use_onednn(cut)
    return cut


def library_decoder(model: LanguageModel, steps: int, kv_cache: str = "none") -> Decoder:
    control = random_prompt(model)[1]
    return Decoder(model, control, PROMPT_LENGTH + steps, kv_cache=kv_cache)


def library_loop(decoder: Decoder, mode: str, steps: int) -> Generation:
    """A greedy generation that stays in ``mode``."""
    prompt, _ = random_prompt(decoder.model)
    tracks, interval = MODES[mode], poll_interval(decoder.model.device)
    output = "both" if tracks.audio else "text"
    generation = Generation(
        decoder, prompt, output, steps, GREEDY, SeededRandomness(SEED), interval
    )
    generation.tracks = tracks
    return generation


def dequantized(model: LanguageModel) -> LanguageModel:
    """``model`` with its matrices in the working dtype, which the plain loop reads."""
    if model.quantization == "none":
        return model
    with torch.device("meta"):
        plain = LanguageModel(model.config)
    for name, layer in model.named_modules():
        values = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, QuantizedLinear):
            weight = layer.dequantized(model.dtype)
            values = {"weight": nn.Parameter(weight, requires_grad=False), "bias": layer.bias}
        for leaf, value in values.items():
            setattr(plain.get_submodule(name), leaf, value)
    return plain.eval()


def plain_contender(model: LanguageModel, steps: int) -> Contender:
    """The plain loop. It computes with the values of quantized matrices."""
    whole = dequantized(model)
    make = lambda: PlainGeneration(whole, *random_prompt(model), "both", steps)  # noqa: E731
    return Contender("plain loop", BOTH, "full", whole, make)


def contenders(
    name: str, model: LanguageModel, head_rows: str, steps: int, kv_cache: str = "none"
) -> list[Contender]:
    """The library's loop in every mode."""
    decoder = library_decoder(model, steps, kv_cache)

    def one(mode: str) -> Contender:
        make = lambda: library_loop(decoder, mode, steps)  # noqa: E731
        return Contender(name, mode, head_rows, model, make, KV_CACHES[kv_cache])

    return [one(mode) for mode in MODES]


def race(entered: Sequence[Contender], runs: int) -> None:
    """Run all contenders ``runs`` times, interleaved."""
    turn = CPU_TURN if entered[0].model.device.type == "cpu" else None
    for _ in range(runs):
        active = list(entered)
        for contender in active:
            contender.begin()
        while active:
            active = [contender for contender in active if contender.take_turn(turn)]


def step_rows(
    entered: Sequence[Contender], steps: int, bandwidth: float, against: Callable[..., Contender]
) -> list[dict[str, Cell]]:
    """A row each, with its speed relative to that of the contender that ``against`` gives."""
    rows: list[dict[str, Any]] = []
    for contender in entered:
        model, seconds = contender.model, contender.median
        filled = PROMPT_LENGTH + (first_timed_step(model.device) + steps) / 2
        size = step_bytes(model, contender.mode, filled, contender.cache_dtype)
        rows.append(
            {
                "loop": contender.name,
                "mode": contender.mode,
                "heads": contender.head_rows,
                "steps/s": 1 / seconds,
                "ratio": against(contender).median / seconds,
                "ms/step": 1e3 * seconds,
                "MB/step": size / 1e6,
                "GB/s": size / seconds / 1e9,
                "% of copy": 100 * size / seconds / bandwidth,
            }
        )
    return rows


BANDWIDTH_NOTE = (
    "MB/step: weights and filled cache that a step has to read, each once. Copy bandwidth: "
    "{:.1f} GB/s, bytes read plus bytes written, best of several large copies."
)


def compare_decoding(model: LanguageModel, steps: int, runs: int) -> Table:
    """The plain loop beside every mode with cut and with full heads."""
    device = model.device
    bandwidth = copy_bandwidth(device)
    use_onednn(model)
    plain, full = plain_contender(model, steps), contenders("library", model, "full", steps)
    entered = [plain, *contenders("library", with_cut_heads(model), "track", steps), *full]
    race(entered, runs)
    bandwidth = max(bandwidth, copy_bandwidth(device))
    delay, compared = model.config.audio_delay, full[list(MODES).index(BOTH)]
    equal = equal_steps(plain.loop, compared.loop, delay)
    return Table(
        f"Decode steps: prompt of {PROMPT_LENGTH} positions, {steps} steps, {runs} runs, medians; "
        f"attention: {library_decoder(model, steps).backend.name}",
        step_rows(entered, steps, bandwidth, lambda _: plain),
        [
            BANDWIDTH_NOTE.format(bandwidth / 1e9),
            f"Both tracks with full heads chose the plain loop's tokens in the first {equal} of "
            f"{steps} steps.",
        ],
    )


def equal_steps(first: Loop, second: Loop, delay: int) -> int:
    """Leading steps in which both chose the same tokens."""
    text = _common(first.text_ids, second.text_ids)
    audio = delay + _common(first.audio_ids, second.audio_ids)
    return min(text, audio)


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def long_run(model: LanguageModel) -> Table:
    """Time per step and memory near both ends of a long generation with both tracks."""
    decoder = library_decoder(with_cut_heads(model), LONG_RUN_STEPS)
    loop = library_loop(decoder, BOTH, LONG_RUN_STEPS)
    skip = first_timed_step(model.device)
    early, late = [], []
    at_first: dict[str, float] = {}
    before, start = 0, time.perf_counter()
    for _ in loop.run():
        now, after = time.perf_counter(), loop.launched
        seconds = (now - start) / (after - before)
        if skip <= before < skip + WINDOW:
            early.append(seconds)
            at_first = memory(model.device)
        elif before >= LONG_RUN_STEPS - WINDOW:
            late.append(seconds)
        before, start = after, time.perf_counter()
    steps = {"first": early, "last": late}
    rows = [
        {"steps": f"{name} {WINDOW}", "ms/step": 1e3 * statistics.median(seconds), **used}
        for (name, seconds), used in zip(
            steps.items(), (at_first, memory(model.device)), strict=True
        )
    ]
    return Table(f"A long run of {loop.launched} steps, both tracks", rows)
