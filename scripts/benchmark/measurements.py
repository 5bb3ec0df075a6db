"""What can be measured: functions from a :class:`Bench` to tables, by name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.memory import (
    LONGEST,
    Capacity,
    MemoryPlan,
    SpeechSizes,
    least_positions,
)
from kimia_infer.api.parameters import BUDGETS, MAX_SLOTS
from kimia_infer.audio.files import load_audio
from kimia_infer.layers.quantization import SCHEMES
from scripts.benchmark import (
    concurrency,
    decoding,
    editx,
    fast_paths,
    laptop,
    references,
    requests,
    server,
    speech,
    variants,
)
from scripts.benchmark.bench import Bench
from scripts.benchmark.checks import Place, check_all
from scripts.benchmark.cold_start import cold_start
from scripts.benchmark.measuring import memory as used_memory
from scripts.benchmark.measuring import parameter_bytes
from scripts.benchmark.profiling import profile_decoding
from scripts.benchmark.report import Table


def kernels(bench: Bench) -> list[Table]:
    checks = fast_paths.checks(Place(bench.device), bench.sizes)
    return [check_all("Kernels and recorded graphs", checks)]


def speech_synthesis(bench: Bench) -> list[Table]:
    detokenizer = bench.components.detokenizer
    assert detokenizer is not None
    detokenizer.warm_up()
    return [
        speech.compare_speech(detokenizer, bench.runs),
        speech.chunk_times(detokenizer, bench.runs),
        speech.chunks_together(detokenizer, bench.runs),
    ]


def speaking(bench: Bench) -> list[Table]:
    model, detokenizer = bench.language_model, bench.components.detokenizer
    assert detokenizer is not None
    detokenizer.warm_up()
    return [speech.decode_while_speaking(model, detokenizer, bench.steps, bench.runs)]


def encoders(bench: Bench) -> list[Table]:
    return [speech.measure_encoders(bench.model, load_audio(bench.question), bench.runs)]


def batches(bench: Bench) -> list[Table]:
    counts = [count for count in bench.clients if count <= MAX_SLOTS]
    return [decoding.compare_batches(bench.language_model, counts, bench.steps, bench.runs)]


def many_clients(bench: Bench) -> list[Table]:
    """Through the server of a checkpoint, then through the library, whose memory it may need."""
    clients, rounds, setup = bench.clients, bench.runs, bench.setup
    ways = 1 + (setup.weights is not None)
    count = concurrency.counter(bench.advance, ways * concurrency.answers_of(clients, rounds))
    table = concurrency.empty_table(rounds)
    if setup.server is not None:
        way = server.server(setup.server, bench.question)
        concurrency.measure(way, clients, rounds, table, count)
        return [table]
    if setup.weights is not None:
        variables = {
            "KIMI_AUDIO_DEVICE": str(bench.device),
            "KIMI_AUDIO_DTYPE": str(bench.dtype).removeprefix("torch."),
            "KIMI_AUDIO_HEAD_ROWS": "track",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        with server.serving(bench.directory, variables) as (url, process):
            way = server.server(url, bench.question, process)
            concurrency.measure(way, clients, rounds, table, count)
    elif bench.device.type != "cpu":
        bench.components.capacity = Capacity(MAX_SLOTS, least_positions(MAX_SLOTS))
    way = concurrency.library(bench.model, bench.question)
    concurrency.measure(way, clients, rounds, table, count)
    table.notes.append(f"Slots of the library: {bench.model.scheduler.slots}.")
    return [table]


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
    """What the loader asks for, and what the longest prompts then take."""
    return [Table(
        "Memory: what the loader asks for, and the most that was used",
        [_memory_of(bench, scheme) for scheme in SCHEMES],
        ["Promised includes what PyTorch does not count: the context and recorded graphs."],
    )]  # fmt: skip


def _memory_of(bench: Bench, scheme: str) -> dict[str, float | str]:
    device, accelerator = bench.device, bench.device.type != "cpu"
    free = 0
    if accelerator:
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
        free = torch.accelerator.get_memory_info(device)[0]
    components = bench.load_components(scheme)
    assert components.detokenizer is not None
    sizes = SpeechSizes.of(
        components.speech_tokenizer.module,
        components.whisper.module,
        components.detokenizer.dit,
        components.detokenizer.vocoder,
    )
    weights = parameter_bytes(components.language_model) + sum(sizes.encoders) + sizes.detokenizer
    config = components.language_model.config
    plan = MemoryPlan(config, bench.dtype, "none", sizes, device, device)
    components.capacity = Capacity(slots=1, positions=LONGEST)
    model = KimiAudio.from_components(components, head_rows="track")
    del components
    words = " ".join("abcdefghijklmnopqrstuvwxyz") + " "
    for output, budget in BUDGETS.items():
        tokens = (budget if accelerator else budget // 8) - 50
        text = words * (tokens // (len(model.text_tokenizer.encode(words)) + 1))
        chat = [{"role": "user", "message_type": "text", "content": text}]
        model.generate(chat, output_type=output, max_new_tokens=20)
    row: dict[str, float | str] = {"weights": scheme, "weights, GB": weights / 1e9}
    row["promised, GB"] = plan.needed(scheme, True)[device] / 1e9
    if accelerator:
        row["taken of the card, GB"] = (free - torch.accelerator.get_memory_info(device)[0]) / 1e9
        row |= used_memory(device)
    return row


def profile(bench: Bench) -> list[Table]:
    if bench.setup.folder is None:
        raise ValueError("a profile needs a folder for its trace; use --everything DIR")
    return [profile_decoding(bench.language_model, Path(bench.setup.folder, "trace.json.gz"))]


MEASURE: dict[str, Callable[[Bench], list[Table]]] = {
    "references": lambda bench: [
        check_all("Recorded references", references.checks(Place(bench.device)))
    ],
    "kernels": kernels,
    "decode": lambda bench: [
        decoding.compare_decoding(bench.language_model, bench.steps, bench.runs)
    ],
    "first": lambda bench: [requests.measure_first(bench.model, bench.question, bench.runs)],
    "requests": lambda bench: [requests.measure_requests(bench.model, bench.question, bench.runs)],
    "speech": speech_synthesis,
    "encoders": encoders,
    "speaking": speaking,
    "batches": batches,
    "long_run": lambda bench: [decoding.long_run(bench.language_model)],
    "int8": lambda bench: variant(bench, "int8", "none"),
    "fp8": lambda bench: variant(bench, "fp8", "none"),
    "int4": lambda bench: variant(bench, "int4", "none"),
    "fp8-cache": lambda bench: variant(bench, "none", "fp8"),
    "concurrency": many_clients,
    "memory": memory,
    "cold_start": lambda bench: [cold_start(bench.setup)],
    "laptop": laptop.laptop,
    "laptop-speech": laptop.laptop_speech,
    "profile": profile,
    "editx-stages": editx.stages,
    "editx-vq02": editx.vq02_loop,
    "editx-decode": editx.decode_bias,
    "editx-stream": editx.streaming,
    "editx-variants": editx.compare_variants,
}
