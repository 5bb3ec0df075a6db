"""What can be measured: functions of a :class:`Bench` that give tables, named in the runner."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.memory import MemoryPlan
from kimia_infer.api.parameters import BUDGETS
from kimia_infer.audio.files import load_audio
from kimia_infer.layers.quantization import SCHEMES
from scripts.benchmark import cold_start as cold
from scripts.benchmark import decoding, fast_paths, profiling, requests, variants
from scripts.benchmark import references as recorded
from scripts.benchmark import speech as synthesis
from scripts.benchmark.checks import Place, check_all
from scripts.benchmark.measuring import memory as used_memory
from scripts.benchmark.report import Table
from scripts.benchmark.sizes import SIZES
from scripts.benchmark.worker import Bench


def references(bench: Bench) -> list[Table]:
    return [check_all("Recorded references", recorded.checks(Place(bench.device)))]


def kernels(bench: Bench) -> list[Table]:
    place, sizes = Place(bench.device), SIZES[bench.setup.size or "mid"]
    return [check_all("Kernels and recorded graphs", fast_paths.checks(place, sizes))]


def decode(bench: Bench) -> list[Table]:
    return [decoding.compare_decoding(bench.language_model, bench.steps, bench.runs)]


def long_run(bench: Bench) -> list[Table]:
    return [decoding.long_run(bench.language_model)]


def first(bench: Bench) -> list[Table]:
    return [requests.measure_first(bench.model, bench.question, bench.runs)]


def whole_requests(bench: Bench) -> list[Table]:
    return [requests.measure_requests(bench.model, bench.question, bench.runs)]


def speech(bench: Bench) -> list[Table]:
    detokenizer = bench.components.detokenizer
    return [
        synthesis.compare_speech(detokenizer, bench.runs),
        synthesis.chunk_times(detokenizer, bench.runs),
    ]


def encoders(bench: Bench) -> list[Table]:
    wave = load_audio(bench.question)
    return [synthesis.measure_encoders(bench.model, wave, bench.runs)]


def speaking(bench: Bench) -> list[Table]:
    model, detokenizer = bench.language_model, bench.components.detokenizer
    return [synthesis.decode_while_speaking(model, detokenizer, bench.steps, bench.runs)]


def variant(bench: Bench, scheme: str, kv_cache: str) -> list[Table]:
    tables = variants.compare_steps(
        bench.language_model, bench.load_language_model, scheme, kv_cache, bench.steps, bench.runs
    )
    if bench.setup.weights is not None:
        components = bench.load_components(scheme)
        other = KimiAudio.from_components(components, head_rows="track", kv_cache=kv_cache)
        name = scheme if kv_cache == "none" else f"{kv_cache} cache"
        tables += variants.compare_requests(bench.model, other, name, bench.question, bench.runs)
    return tables


def memory(bench: Bench) -> list[Table]:
    """What loading promises to need, and what the longest prompts then take."""
    rows = [_memory_of(bench, scheme) for scheme in SCHEMES]
    return [Table(
        "Memory: what the loader asks for before it loads, and the most that was taken", rows,
        ["Promised includes what PyTorch does not count: the context and recorded graphs."],
    )]  # fmt: skip


def _memory_of(bench: Bench, scheme: str) -> dict[str, float | str | None]:
    accelerator = bench.device.type != "cpu"
    gc.collect()
    free = 0
    if accelerator:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(bench.device)
        free = _free(bench.device)
    components = bench.load_components(scheme)
    modules = components.speech_tokenizer.module, components.whisper.encoder
    encoders = tuple(sum(p.nbytes for p in module.parameters()) for module in modules)
    assert components.detokenizer is not None
    speaking = [components.detokenizer.dit, components.detokenizer.vocoder]
    spoken = sum(p.nbytes for module in speaking for p in module.parameters())
    plan = MemoryPlan(components.language_model.config, bench.dtype, "none", encoders, spoken)
    weights = sum(p.nbytes for p in components.language_model.parameters()) + sum(encoders) + spoken
    model = KimiAudio.from_components(components, head_rows="track")
    del components, modules, speaking
    for output, budget in BUDGETS.items():
        text = _text_of(model, (budget if accelerator else budget // 8) - 50)
        chat = [{"role": "user", "message_type": "text", "content": text}]
        model.generate(chat, output_type=output, max_new_tokens=20)
    row: dict[str, float | str | None] = {"weights": scheme, "weights, GB": weights / 1e9}
    row["promised, GB"] = plan.needed(scheme, True) / 1e9
    if accelerator:
        row["taken of the card, GB"] = (free - _free(bench.device)) / 1e9
        row |= used_memory(bench.device)
    return row


def _free(device: torch.device) -> int:
    return torch.get_device_module(device).mem_get_info(device)[0]


def _text_of(model: KimiAudio, tokens: int) -> str:
    """A text of about so many tokens."""
    words = " ".join("abcdefghijklmnopqrstuvwxyz")
    return f"{words} " * (tokens // (len(model.text_tokenizer.encode(words)) + 1))


def cold_start(bench: Bench) -> list[Table]:
    return [cold.cold_start(bench.setup)]


def profile(bench: Bench) -> list[Table]:
    if bench.setup.folder is None:
        raise ValueError("a profile needs a folder for its trace; use --everything DIR")
    path = Path(bench.setup.folder) / "trace.json.gz"
    return [profiling.profile_decoding(bench.language_model, path)]
