"""Seconds per decode step: the library's loop in every mode, and the plain loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, DecodeInput, Generation
from kimia_infer.engine.scheduler import POLL_INTERVAL
from kimia_infer.layers.attention import KV_CACHES
from kimia_infer.layers.operators import use_onednn
from kimia_infer.layers.quantization import QuantizedLinear
from kimia_infer.layers.sampler import Sampling, SeededRandomness, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel, use_packed
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
"""On a CPU the loops take turns of this many steps, so that other work on the machine slows all of
them alike. On an accelerator a turn is a whole run."""


def poll_interval(device: torch.device) -> int:
    """Decode steps between two polls of the device, as the engine makes them."""
    return 1 if device.type == "cpu" else POLL_INTERVAL


def first_timed_step(device: torch.device) -> int:
    """Skips the prompt, the warm-up and the switch at the end of the text."""
    return 8 if device.type == "cpu" else 4 * POLL_INTERVAL


@dataclass
class Together:
    """Generations that begin together and end together; a step advances all of them."""

    decoder: Decoder
    generations: list[Generation]

    @property
    def launched(self) -> int:
        return self.generations[0].launched

    def run(self) -> Iterator[None]:
        """Yields at each poll, as a generation that runs alone does."""
        try:
            for generation in self.generations:
                for _ in self.decoder.begin(generation):
                    pass
            going = len(self.generations)
            while going:
                going -= sum(progress.finished for _, progress in self.decoder.step())
                yield
        finally:
            self.decoder.reset()


Loop = Generation | PlainGeneration


@dataclass
class Contender:
    """One way of decoding, and the seconds of its steps."""

    name: str
    mode: str
    head_rows: str
    model: LanguageModel
    make: Callable[[], Loop | Together]
    cache_dtype: torch.dtype | None = None
    seconds: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.loop: Any = self.make()
        self.run: Any = self.loop.run()

    def take_turn(self, steps: int | None = None) -> bool:
        """Decode ``steps`` more, or all for None; False at the end of the run."""
        synchronize(self.model.device)
        skip = first_timed_step(self.model.device)
        before = first = self.loop.launched
        start = time.perf_counter()
        for _ in self.run:
            now, after = time.perf_counter(), self.loop.launched
            if before >= skip:
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
    """Ids of both tracks, and control tokens that are never sampled, so that no run ends early."""
    config, length = model.config, PROMPT_LENGTH
    generator = torch.Generator().manual_seed(SEED)
    audio = torch.randint(config.base_tokens, config.vocab_size, (1, length), generator=generator)
    text = torch.randint(1, config.base_tokens, (1, length), generator=generator)
    prompt = DecodeInput(audio.to(model.device), text.to(model.device))
    return prompt, ControlTokens(SpecialTokens.after(config.base_tokens).text_blank, -1, (-1,))


def with_cut_heads(model: LanguageModel) -> LanguageModel:
    """``model`` as KimiAudio runs it with ``head_rows="track"``; most parameters are shared."""
    cut = model.with_cut_heads()
    use_packed(cut)
    use_onednn(cut)
    return cut


def library_decoder(model: LanguageModel, steps: int, kv_cache: str = "none") -> Decoder:
    return Decoder(model, random_prompt(model)[1], PROMPT_LENGTH + steps, kv_cache=kv_cache)


def library_loop(decoder: Decoder, mode: str, steps: int) -> Generation:
    """A greedy generation that stays in ``mode``."""
    prompt, _ = random_prompt(decoder.model)
    output = "both" if MODES[mode].audio else "text"
    interval = poll_interval(decoder.model.device)
    draws = SeededRandomness(SEED)
    generation = Generation(decoder, prompt, output, steps, GREEDY, draws, interval)
    generation.tracks = MODES[mode]
    return generation


def dequantized(model: LanguageModel) -> LanguageModel:
    """``model`` with its matrices in the working dtype."""
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
    prompt = random_prompt(model)
    return Contender(
        "plain loop", BOTH, "full", whole, lambda: PlainGeneration(whole, *prompt, steps)
    )


def contenders(
    name: str, model: LanguageModel, head_rows: str, steps: int, kv_cache: str = "none"
) -> list[Contender]:
    """The library's loop in every mode."""
    found = []
    for mode in MODES:  # a decoder each, as they take turns
        make = partial(library_loop, library_decoder(model, steps, kv_cache), mode, steps)
        found.append(Contender(name, mode, head_rows, model, make, KV_CACHES[kv_cache]))
    return found


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
    """A row each; ``against`` gives the contender that its speed is compared to."""
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
    "{:.1f} GB/s, read plus written, best of several large copies."
)


def compare_decoding(model: LanguageModel, steps: int, runs: int) -> Table:
    """The plain loop, and every mode with cut and with full heads."""
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
            f"Both tracks with full heads chose the tokens of the plain loop in the first {equal} "
            f"of {steps} steps.",
        ],
    )


def compare_batches(model: LanguageModel, counts: Sequence[int], steps: int, runs: int) -> Table:
    """Steps of several generations with both tracks and cut heads together, beside one alone."""
    model = with_cut_heads(model)

    def decoder(slots: int) -> Decoder:
        return Decoder(model, random_prompt(model)[1], PROMPT_LENGTH + steps, slots=slots)

    if model.device.type == "cpu":  # one each, as they take turns
        decoders = {count: decoder(count) for count in counts}
    else:
        decoders = dict.fromkeys(counts, decoder(max(counts)))

    def together(count: int) -> Together:
        chosen = decoders[count]
        return Together(chosen, [library_loop(chosen, BOTH, steps) for _ in range(count)])

    entered = [
        Contender(str(count), BOTH, "track", model, partial(together, count)) for count in counts
    ]
    race(entered, runs)
    first = entered[0].median / counts[0]
    rows = [
        {
            "rows": count,
            "ms/step": 1e3 * contender.median,
            "steps/s of each": 1 / contender.median,
            "steps/s in all": count / contender.median,
            "ratio": count * first / contender.median,
        }
        for count, contender in zip(counts, entered, strict=True)
    ]
    title = f"Decode steps of requests together, both tracks: {steps} steps, {runs} runs, medians"
    note = f"Ratio: steps a second in all, against {counts[0]} row{'s' * (counts[0] > 1)}."
    return Table(title, rows, [note])


def equal_steps(first: Loop, second: Loop, delay: int) -> int:
    """Steps before the first in which they chose different tokens."""
    text = common_prefix(first.text_ids, second.text_ids)
    audio = delay + common_prefix(first.audio_ids, second.audio_ids)
    return min(text, audio)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Ids before the first that differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def long_run(model: LanguageModel) -> Table:
    """Time per step and memory in the course of a long generation with both tracks."""
    model = with_cut_heads(model)
    make = partial(library_loop, library_decoder(model, LONG_RUN_STEPS), BOTH, LONG_RUN_STEPS)
    run = Contender("library", BOTH, "track", model, make)
    run.begin()
    first = first_timed_step(model.device) + WINDOW
    rows = []
    for name, steps in (
        (f"first {WINDOW}", first), ("between", LONG_RUN_STEPS - first - WINDOW),
        (f"last {WINDOW}", None),
    ):  # fmt: skip
        run.seconds.clear()
        run.take_turn(steps)
        rows.append({"steps": name, "ms/step": 1e3 * run.median, **memory(model.device)})
    return Table(f"A long run of {LONG_RUN_STEPS} steps, both tracks", rows)
