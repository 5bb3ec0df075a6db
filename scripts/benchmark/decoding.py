"""Seconds per decode step: the library's loop in every mode beside the plain one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from kimia_infer.api.kimia import CHECK_INTERVAL
from kimia_infer.engine.decode import DecodeInput, Decoder, Generation
from kimia_infer.engine.state import ControlTokens
from kimia_infer.layers.onednn import use_onednn
from kimia_infer.layers.quantization import QuantizedLinear
from kimia_infer.layers.sampler import Sampling, TrackSampling
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.utils.randomness import SeededRandomness
from scripts.benchmark.bandwidth import BOTH, MODES, Mode, memory, step_bytes
from scripts.benchmark.plain_language_model import PlainGeneration
from scripts.benchmark.timing import synchronize

PROMPT_LENGTH = 128
LONG_RUN_STEPS = 1500
WINDOW = 100  # steps at both ends of a long run
SEED = 0
GREEDY = Sampling(audio=TrackSampling(0.0, 5, 1.0, 64), text=TrackSampling(0.0, 5, 1.0, 16))

# On the CPU the loops take turns of this many steps, so that what else the machine does
# slows all of them alike. An accelerator is not shared: there a turn is a whole run.
CPU_TURN = 4

Loop = Generation | PlainGeneration


def check_interval(device: torch.device) -> int:
    """Steps between two looks at the device, as KimiAudio has it."""
    return 1 if device.type == "cpu" else CHECK_INTERVAL


def first_timed_step(device: torch.device) -> int:
    """Before it there are the prompt, what is done once, and the switch at the end of the text."""
    return 8 if device.type == "cpu" else 4 * CHECK_INTERVAL


@dataclass
class Contender:
    """One way of decoding and the seconds per step that it showed."""

    name: str
    mode: Mode
    head_rows: str
    model: LanguageModel
    make: Callable[[], Loop]
    seconds: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.loop = self.make()
        self.run: Iterator = self.loop.run()

    def take_turn(self, steps: int | None) -> bool:
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


def random_prompt(model: LanguageModel) -> tuple[DecodeInput, ControlTokens]:
    """Ids of both tracks, and control tokens that are never sampled: no run ends early."""
    config, length = model.config, PROMPT_LENGTH
    generator = torch.Generator().manual_seed(SEED)
    audio = torch.randint(config.base_tokens, config.vocab_size, (1, length), generator=generator)
    text = torch.randint(1, config.base_tokens, (1, length), generator=generator)
    prompt = DecodeInput(audio.to(model.device), text.to(model.device))
    return prompt, ControlTokens(SpecialTokens.after(config.base_tokens).text_blank, -1, (-1,))


def library_models(model: LanguageModel) -> dict[str, LanguageModel]:
    """``model`` with cut and with full heads as KimiAudio runs it, by head rows.

    They share its parameters with the plain loop, which does not use its linear layers.
    """
    models = {"track": model.with_cut_heads(), "full": model}
    for each in models.values():
        use_onednn(each)
    return models


def library_decoder(model: LanguageModel, steps: int, kv_cache: str = "none") -> Decoder:
    control = random_prompt(model)[1]
    return Decoder(model, control, PROMPT_LENGTH + steps, kv_cache=kv_cache)


def library_loop(decoder: Decoder, mode: Mode, steps: int) -> Generation:
    prompt, _ = random_prompt(decoder.model)
    output = "both" if mode.tracks.audio else "text"
    interval = check_interval(decoder.model.device)
    generation = Generation(
        decoder, prompt, output, steps, GREEDY, SeededRandomness(SEED), interval
    )
    generation.tracks = mode.tracks
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


def make_contenders(model: LanguageModel, steps: int) -> list[Contender]:
    """The plain loop, then every mode with cut and with full heads.

    The plain loop knows no quantization: it computes with the values of quantized matrices.
    """
    whole = dequantized(model)

    def plain() -> PlainGeneration:
        return PlainGeneration(whole, *random_prompt(model), "both", steps)

    def ours(mode: Mode, head_rows: str) -> Contender:
        make = lambda: library_loop(decoders[head_rows], mode, steps)  # noqa: E731
        return Contender(mode.name, mode, head_rows, decoders[head_rows].model, make)

    decoders = {
        head_rows: library_decoder(each, steps) for head_rows, each in library_models(model).items()
    }
    return [
        Contender("plain loop", BOTH, "full", whole, plain),
        *(ours(mode, head_rows) for head_rows in decoders for mode in MODES),
    ]


def compare_decoding(model: LanguageModel, steps: int, runs: int) -> dict:
    """Run all contenders interleaved; medians of their seconds per step, and what they read."""
    turn = CPU_TURN if model.device.type == "cpu" else None
    contenders = make_contenders(model, steps)
    with tqdm(total=runs * steps * len(contenders), desc="Decoding", disable=None) as bar:
        for _ in range(runs):
            active = list(contenders)
            for contender in active:
                contender.begin()
            while active:
                for contender in list(active):
                    before = contender.loop.launched
                    if not contender.take_turn(turn):
                        active.remove(contender)
                    bar.update(contender.loop.launched - before)
    plain = contenders[0]
    full = next(c for c in contenders[1:] if (c.mode, c.head_rows) == (BOTH, "full"))
    filled = PROMPT_LENGTH + (first_timed_step(model.device) + steps) / 2
    return {
        "prompt_length": PROMPT_LENGTH,
        "steps": steps,
        "runs": runs,
        "check_interval": check_interval(model.device),
        "attention": library_decoder(model, steps).backend.name,
        "equal_steps": equal_steps(plain.loop, full.loop, model.config.audio_delay),
        "modes": [_row(contender, plain, filled) for contender in contenders],
    }


def _row(contender: Contender, plain: Contender, filled: float) -> dict:
    median = statistics.median(contender.seconds)
    size = step_bytes(contender.model, contender.mode, filled)
    return {
        "name": contender.name,
        "head_rows": contender.head_rows,
        "step_seconds": median,
        "steps_per_second": 1 / median,
        "ratio_to_plain": statistics.median(plain.seconds) / median,
        "bytes_per_step": size,
        "bytes_per_second": size / median,
    }


def equal_steps(first: Loop, second: Loop, delay: int) -> int:
    """Leading steps in which both chose the same tokens."""
    text = _common(first.text_ids, second.text_ids)
    audio = delay + _common(first.audio_ids, second.audio_ids)
    return min(text, audio)


def _common(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def long_run(model: LanguageModel) -> dict:
    """Time per step and memory near both ends of a long generation with both tracks."""
    decoder = library_decoder(library_models(model)["track"], LONG_RUN_STEPS)
    loop = library_loop(decoder, BOTH, LONG_RUN_STEPS)
    skip = first_timed_step(model.device)
    early, late, at_first = [], [], {}
    before, start = 0, time.perf_counter()
    for _ in tqdm(loop.run(), desc="Long run", disable=None):
        now, after = time.perf_counter(), loop.launched
        seconds = (now - start) / (after - before)
        if skip <= before < skip + WINDOW:
            early.append(seconds)
            at_first = memory(model.device)
        elif before >= LONG_RUN_STEPS - WINDOW:
            late.append(seconds)
        before, start = after, time.perf_counter()
    return {
        "steps": loop.launched,
        "window": WINDOW,
        "first_step_seconds": statistics.median(early),
        "last_step_seconds": statistics.median(late),
        "first_memory": at_first,
        "last_memory": memory(model.device),
    }
