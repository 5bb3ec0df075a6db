"""How fast Kokoro speaks beside the stock package and onnxruntime, interleaved in one run.

    python -m scripts.benchmark.kokoro --weights DIR                       float32 and bfloat16
    python -m scripts.benchmark.kokoro --weights DIR --onnx FILE.onnx      and the int8 export

The stock package, which is in none of the requirements, takes part where it is installed;
onnxruntime is in the extra ``editx``. Each way has a process of its own, which works while the
others wait. Prints seconds for a second of audio, of processor time and of the clock, and the share
of the first chunk's own length after which it is there, for texts of about 1, 5 and 30 seconds, the
median of several rounds; then for each way the seconds until it is loaded and the most memory it
took.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process imports what its way needs, as that counts in its memory
    from numpy import ndarray
    from torch import Tensor

SAMPLE_RATE = 24_000
VOICE = "af_heart"
SENTENCE = "ðə kwˈɪk bɹˈWn fˈɑks ʤˈʌmps ˈOvəɹ ðə lˈAzi dˈɔɡ, ænd ðˈɛn ɪt ɹˈʌnz bˈæk tə ðə hˈWs."
TEXTS = {"1 s": "həlˈO, wˌʌt ɪz ðˈæt?", "5 s": SENTENCE, "30 s": " ".join([SENTENCE] * 6)[:500]}

Speak = Callable[[str, str], Iterator["Tensor | ndarray"]]
"""Speaks phonemes in a voice; the waves float32 [samples] of the chunks, as they are made."""


def float32(arguments: argparse.Namespace) -> Speak:
    return ours(arguments, "float32")


def bfloat16(arguments: argparse.Namespace) -> Speak:
    return ours(arguments, "bfloat16")


def ours(arguments: argparse.Namespace, dtype: str | None) -> Speak:
    """Kokoro of this package; ``dtype`` None is the default of this machine."""
    import torch

    from kimia_infer.api.events import AudioChunk
    from kimia_infer.api.kokoro import Kokoro

    torch.set_num_threads(arguments.threads)
    kokoro = Kokoro(arguments.weights, "cpu", dtype and getattr(torch, dtype))

    def speak(phonemes: str, voice: str) -> Iterator[Tensor]:
        for event in kokoro.stream(phonemes=phonemes, voice=voice, seed=0):
            if isinstance(event, AudioChunk):
                yield event.wav

    return speak


def stock(arguments: argparse.Namespace) -> Speak:
    """The package ``kokoro`` with the same weights, in its own form of weight norm."""
    import torch

    from kimia_infer.models.kokoro.voices import Voices

    torch.set_num_threads(arguments.threads)
    package = importlib.import_module("kokoro.model")
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(published_form(arguments.weights), file.name)
        config = str(arguments.weights / "config.json")
        model = package.KModel(config=config, model=file.name).eval()
    voices = Voices(arguments.weights, 256)

    @torch.inference_mode()
    def speak(phonemes: str, voice: str) -> Iterator[Tensor]:
        torch.manual_seed(0)  # of the noise in the voice
        style = voices.style(voice, len(phonemes))[None]
        yield model(phonemes, style, 1.0).squeeze()

    return speak


def published_form(weights: Path) -> dict[str, dict[str, Tensor]]:
    import torch

    from kimia_infer.models.kokoro.checkpoint import open_network
    from kimia_infer.weights.tensors import Reader

    store, reader = open_network(weights), Reader()
    sections: dict[str, dict[str, Tensor]] = {}
    for name in store.tensors:
        section, _, rest = name.partition(".")
        value = reader.tensor(store, name)
        into = sections.setdefault(section, {})
        plain = "noise_convs" in rest or "_proj" in rest or value.dim() != 3
        if plain or not rest.endswith(".weight"):
            into[rest] = value
            continue
        norm = value.flatten(1).norm(dim=1).view(-1, 1, 1)
        into[f"{rest}_g"], into[f"{rest}_v"] = norm, torch.where(norm == 0, 1.0, value)
    return sections


def onnx_int8(arguments: argparse.Namespace) -> Speak:
    import json

    import numpy as np
    from safetensors.numpy import load_file

    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = onnxruntime.InferenceSession(
        str(arguments.onnx), options, providers=["CPUExecutionProvider"]
    )
    vocab = json.loads((arguments.weights / "config.json").read_text())["vocab"]
    packs = load_file(arguments.weights / "voices.safetensors")
    speed = np.ones(1, dtype=np.float32)

    def speak(phonemes: str, voice: str) -> Iterator[ndarray]:
        ids = np.array([[0, *(vocab[s] for s in phonemes), 0]], dtype=np.int64)
        style = packs[voice].reshape(-1, 256)[len(phonemes) - 1][None]
        yield session.run(None, {"tokens": ids, "style": style, "speed": speed})[0].ravel()

    return speak


def work(
    pipe: Connection, load: Callable[[argparse.Namespace], Speak], arguments: argparse.Namespace
) -> None:
    """Load a way, send the seconds that took, then (audio, processor, clock, first) per text."""
    start = time.perf_counter()
    speak = load(arguments)
    pipe.send(time.perf_counter() - start)
    while (phonemes := pipe.recv()) is not None:
        processor, clock, samples, first = time.process_time(), time.perf_counter(), 0, 0.0
        for wave in speak(phonemes, VOICE):
            first = first or (time.perf_counter() - clock) / (len(wave) / SAMPLE_RATE)
            samples += len(wave)
        seconds = samples / SAMPLE_RATE
        took = time.process_time() - processor, time.perf_counter() - clock
        pipe.send((seconds, took[0] / seconds, took[1] / seconds, first))


def measure(
    ways: dict[str, Callable[[argparse.Namespace], Speak]], asked: argparse.Namespace
) -> None:
    from scripts.benchmark.measuring import MOST_RAM, process_memory

    context = multiprocessing.get_context("spawn")
    pipes, loaded, pids = {}, {}, {}
    for way, load in ways.items():
        pipes[way], other = context.Pipe()
        process = context.Process(target=work, args=(other, load, asked), daemon=True)
        process.start()
        other.close()  # so that the end of the process ends recv
        pids[way], loaded[way] = process.pid, pipes[way].recv()
    print(f"{'text':6}{'way':12}{'audio':>8}{'processor':>11}{'clock':>8}{'first':>8}")
    for name, phonemes in TEXTS.items():
        found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
        for turn in range(asked.rounds + 1):
            for way, pipe in pipes.items():
                pipe.send(phonemes)
                row = pipe.recv()
                if turn:  # the first one warms up
                    found[way].append(row)
        for way, rows in found.items():
            audio, processor, clock, first = map(statistics.median, zip(*rows, strict=True))
            print(
                f"{name:6}{way:12}{audio:7.2f}s{processor:11.3f}{clock:8.3f}{first:8.2f}",
                flush=True,
            )
    for way in ways:
        most = process_memory(pids[way])[MOST_RAM]
        print(f"{way:12} loaded in {loaded[way]:.1f} s, at most {most:.2f} GB of RAM")
        pipes[way].send(None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--onnx", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ways = {"float32": float32, "bfloat16": bfloat16}
    if importlib.util.find_spec("kokoro") is not None:
        ways["stock"] = stock
    if arguments.onnx:
        ways["onnx int8"] = onnx_int8
    measure(ways, arguments)


if __name__ == "__main__":
    main()
